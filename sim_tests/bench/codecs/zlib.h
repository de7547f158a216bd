// The two functions of zlib that Verilator's FST writer calls, so that waves need no further package. The data are
// stored, not compressed (the writer then keeps the plain form, which FST allows). Formats: RFC 1950 and RFC 1951.
#pragma once
#include <cstdint>
#include <cstring>

using Bytef = unsigned char;
using uLong = unsigned long;
using uLongf = unsigned long;
constexpr int Z_OK = 0, Z_BUF_ERROR = -5;

inline uLong compressBound(uLong size) { return size + 5 * (size / 65535 + 1) + 6; }

inline int compress2(Bytef* target, uLongf* target_size, const Bytef* source, uLong size, int /*level*/) {
  if (*target_size < compressBound(size)) return Z_BUF_ERROR;
  Bytef* out = target;
  *out++ = 0x78, *out++ = 0x01;
  uLong at = 0;
  do {
    const uLong chunk = size - at < 65535 ? size - at : 65535;
    *out++ = at + chunk == size;
    *out++ = chunk & 255, *out++ = chunk >> 8, *out++ = ~chunk & 255, *out++ = ~chunk >> 8 & 255;
    if (chunk) std::memcpy(out, source + at, chunk);
    out += chunk, at += chunk;
  } while (at < size);
  uint32_t a = 1, b = 0;
  for (uLong n = 0; n < size; n++) a = (a + source[n]) % 65521, b = (b + a) % 65521;
  *out++ = b >> 8, *out++ = b & 255, *out++ = a >> 8, *out++ = a & 255;
  *target_size = static_cast<uLong>(out - target);
  return Z_OK;
}
