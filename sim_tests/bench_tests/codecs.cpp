// Reads standard input, writes it compressed by the codec that argv[1] names.
#include <cstdio>
#include <string>
#include <vector>

#include "lz4.h"
#include "zlib.h"

int main(int, char** argv) {
  std::vector<char> in, out;
  for (int c; (c = std::getchar()) != EOF;) in.push_back(static_cast<char>(c));
  const int size = static_cast<int>(in.size());
  size_t made;
  if (std::string(argv[1]) == "lz4") {
    out.resize(static_cast<size_t>(LZ4_compressBound(size)));
    made = static_cast<size_t>(LZ4_compress_default(in.data(), out.data(), size, static_cast<int>(out.size())));
  } else {
    uLongf bound = compressBound(in.size());
    out.resize(bound);
    if (compress2(reinterpret_cast<Bytef*>(out.data()), &bound, reinterpret_cast<Bytef*>(in.data()), in.size(), 4) != Z_OK) return 1;
    made = bound;
  }
  return std::fwrite(out.data(), 1, made, stdout) != made;
}
