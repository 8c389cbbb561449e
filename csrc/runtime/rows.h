// Rows that go into a network, its answers to all of them, and their comparison with recorded ones.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/engine.h"

namespace pykd::runtime {

// Floats, or pixels.
struct Rows {
  int64_t count = 0;
  std::vector<float> floats;
  std::vector<uint8_t> pixels;
};

// Of a PPM or PGM image, or an .npy file of one row or a batch. Throws FormatError with the path in it.
Rows read_rows(const std::string& path, const Model& model);

// Every row through the network, options.batch of them at a time, the last ones beside zeros. Throws as Plan does.
std::vector<float> answers(const std::shared_ptr<const Network>& network, const Rows& rows, const PlanOptions& options);

// An .npy file of float32 [rows, *output shape]. Throws FormatError with the path in it.
std::vector<float> read_answers(const std::string& path, const Network& network, int64_t rows);

// Both figures are shares of the largest recorded answer.
struct Check {
  int64_t rows;
  double largest_difference;  // NaN where one is finite and the other is not
  double tolerance;
  bool equal() const { return largest_difference <= tolerance; }
};
std::string line(const Check& check);  // "64 rows: largest difference ...: equal"
Check compare(const std::vector<float>& answers, const std::vector<float>& recorded, int64_t rows, Precision precision);

}  // namespace pykd::runtime
