// SHA-256 (FIPS 180-4) in plain C++.
#pragma once

#include <cstddef>
#include <string>

namespace pykd::runtime {

std::string sha256(const void* bytes, size_t size);  // 64 hexadecimal digits

}  // namespace pykd::runtime
