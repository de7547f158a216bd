// The two functions of the LZ4 library that Verilator's FST writer calls, so that waves need no further package.
// Block format: github.com/lz4/lz4, doc/lz4_Block_format.md. Greedy matching over a hash of four bytes.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

inline int LZ4_compressBound(int size) { return size + size / 255 + 16; }

// Returns the compressed size, or 0 if `capacity` is too small.
inline int LZ4_compress_default(const char* source, char* target, int size, int capacity) {
  constexpr int kMinMatch = 4, kLastLiterals = 5, kMatchLimit = 12, kMaxOffset = 65535, kHashBits = 14;
  const auto* in = reinterpret_cast<const uint8_t*>(source);
  auto* out = reinterpret_cast<uint8_t*>(target);
  const uint8_t* const end = out + capacity;
  std::vector<int> seen(1 << kHashBits, -1);
  const auto word = [&](int at) { uint32_t v; std::memcpy(&v, in + at, 4); return v; };
  const auto length = [&](int rest) {  // the part of a length that does not fit the token's 15
    for (; rest >= 255; rest -= 255) *out++ = 255;
    *out++ = static_cast<uint8_t>(rest);
  };
  const auto sequence = [&](int from, int literals, int offset, int match) {
    if (end - out < literals + literals / 255 + match / 255 + 8) return false;
    uint8_t* token = out++;
    const int extra = match - kMinMatch;
    *token = static_cast<uint8_t>((literals < 15 ? literals : 15) << 4 | (offset ? (extra < 15 ? extra : 15) : 0));
    if (literals >= 15) length(literals - 15);
    if (literals) std::memcpy(out, in + from, static_cast<size_t>(literals));
    out += literals;
    if (!offset) return true;
    *out++ = static_cast<uint8_t>(offset), *out++ = static_cast<uint8_t>(offset >> 8);
    if (extra >= 15) length(extra - 15);
    return true;
  };
  int anchor = 0;
  for (int at = 0; at + kMatchLimit <= size;) {
    int& slot = seen[word(at) * 2654435761u >> (32 - kHashBits)];
    const int candidate = slot;
    slot = at;
    if (candidate < 0 || at - candidate > kMaxOffset || word(candidate) != word(at)) {
      at++;
      continue;
    }
    int match = kMinMatch;
    while (at + match < size - kLastLiterals && in[candidate + match] == in[at + match]) match++;
    if (!sequence(anchor, at - anchor, at - candidate, match)) return 0;
    at += match;
    anchor = at;
  }
  if (!sequence(anchor, size - anchor, 0, 0)) return 0;
  return static_cast<int>(out - reinterpret_cast<uint8_t*>(target));
}
