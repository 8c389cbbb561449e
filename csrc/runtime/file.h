// Whole files in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace pykd::runtime {

struct Bytes {
  std::unique_ptr<unsigned char[]> data;
  size_t size;
};

// A regular file of at most `most` bytes; throws FormatError, which calls what is none `what` ("model file").
Bytes read_file(const std::string& path, int64_t most, const std::string& what);

}  // namespace pykd::runtime
