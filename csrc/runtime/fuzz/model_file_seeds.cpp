// Writes the fuzz target's first inputs into a folder: model_file_seeds FOLDER
#include <cstdio>
#include <fstream>
#include <string>

#include "runtime/fuzz/model_file_samples.h"

int main(int count, char** arguments) {
  if (count != 2) return std::fputs("usage: model_file_seeds FOLDER\n", stderr), 1;
  int number = 0;
  for (const auto& parts : pykd::testing::samples()) {
    for (const std::string& input : {pykd::testing::fuzz_input(parts), '\0' + pykd::testing::sealed(parts)}) {
      std::ofstream file(std::string(arguments[1]) + "/seed" + std::to_string(number++), std::ios::binary);
      if (!(file << input)) return std::fprintf(stderr, "cannot write into %s\n", arguments[1]), 1;
    }
  }
}
