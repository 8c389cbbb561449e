// The reader under libFuzzer; model_file_samples.h has the layout of an input, model_file_seeds.cpp makes the first
// ones:
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc -isystem JSON
//     csrc/runtime/fuzz/model_file_fuzz.cpp csrc/runtime/{model_file,json,sha256,file}.cpp -o model_file_fuzz
//   ./model_file_fuzz -dict=csrc/runtime/fuzz/model_file.dict -max_len=8192 CORPUS
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "runtime/fuzz/model_file_samples.h"
#include "runtime/model_file.h"

namespace {

using namespace pykd;

// What a file says, or the sentence against it.
std::string answer(const std::string& file, runtime::Model& model) {
  const auto bytes = std::make_unique<unsigned char[]>(file.size());  // exactly as long, so that an over-read is seen
  std::memcpy(bytes.get(), file.data(), file.size());
  try {
    model = runtime::parse_model(bytes.get(), file.size());
  } catch (const runtime::FormatError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input(reinterpret_cast<const char*>(data), size);
  std::string file;
  if (size && (data[0] & 1) == 0) {
    file = input.substr(1);
  } else if (size >= 7) {
    testing::Parts parts;
    parts.stored = static_cast<runtime::Stored>(data[0] >> 1 & 3);
    size_t at = 7;
    const std::array<std::string*, 3> tensors = {&parts.vectors, &parts.values, &parts.indices};
    for (size_t i = 0; i < 3; ++i) {
      *tensors[i] = input.substr(at, data[1 + 2 * i] + 256u * data[2 + 2 * i]);
      at += tensors[i]->size();
    }
    parts.description = input.substr(at);
    file = testing::sealed(parts);
  }
  runtime::Model first{}, second{};
  if (answer(file, first) != answer(file, second) || first != second) std::abort();
  return 0;
}
