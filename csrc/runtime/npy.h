// numpy's .npy files of float32 and uint8: read trusting nothing, and written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pykd::runtime {

// An array row by row (C order). Its elements lie in the bytes it was parsed from, wherever they begin.
struct Array {
  std::vector<int64_t> shape;
  bool pixels;  // uint8, otherwise float32
  const unsigned char* elements;
  int64_t count;  // the product of the shape
};

// Format 1.0 or 2.0, little-endian, and nothing behind the last element. Throws FormatError.
Array parse_npy(const unsigned char* bytes, size_t size);

// The head of a float32 file, behind which the elements follow.
std::string npy_head(const std::vector<int64_t>& shape);

}  // namespace pykd::runtime
