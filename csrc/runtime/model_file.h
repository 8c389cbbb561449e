// The reader of the model file, docs/model_file.md: it trusts nothing that the file says.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pykd::runtime {

// A file that is none, in one sentence.
struct FormatError : std::runtime_error {
  using runtime_error::runtime_error;
};

enum class Stored { kFloat32, kFloat16, kBFloat16, kInt8 };

// A weight as a matrix [out, in kh kw / groups] in blocks, which are filled up with zeros at its edges.
struct Weight {
  std::vector<int64_t> shape;  // [out, in] or [out, in / groups, kh, kw]; empty: none
  int64_t block_rows = 1, block_columns = 1;
  bool dense = true;               // values hold the matrix itself row by row, positions is empty
  std::vector<int64_t> positions;  // of the stored blocks in the grid, row by row, ascending
  std::vector<float> values;       // [stored, block rows, block columns], finite; int8's scales are applied

  bool operator==(const Weight&) const = default;
};

enum class Kind {
  kLinear,
  kConv2d,
  kRelu,
  kTanh,
  kLeakyRelu,
  kMaxPool2d,
  kAvgPool2d,
  kGlobalAvgPool,
  kAdd,
  kConcat,
  kFlatten,
  kSoftmax,
  kAffine
};

const char* name(Kind kind);  // as the file calls it

// A step of the graph. All its options are checked, and its inputs' shapes fit.
struct Op {
  Kind kind;
  std::vector<int> inputs;  // 0 is the network's input, k the result of step k; all earlier than this step
  Weight weight;
  std::vector<float> bias, scale;  // [out] of a layer, or none; [channels] shift and scale of kAffine
  std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
  bool ceil = false, count_padding = true;
  double slope = 0.01;
  std::vector<int64_t> shape;  // of one row's result: [features] or [channels, height, width]

  bool operator==(const Op&) const = default;
};

struct Model {
  std::vector<int64_t> input_shape;  // of one row, 1 to 4 sides
  std::vector<float> mean, std;      // a number for each channel: a pixel p is read as (p / 255 - mean) / std; or empty
  Stored stored;
  std::vector<Op> ops;  // the last one's result is the answer; without any the input is
  std::vector<std::string> classes;
  std::string licence;
  std::vector<std::pair<std::string, std::string>> provenance;  // whole numbers as their digits
  int64_t file_bytes;

  bool operator==(const Model&) const = default;
};

// Both throw FormatError, read_model with the path in it. Memory: that of the result, the file's bytes in read_model,
// and about 30 bytes for each of the header's, which has at most 16 MB.
Model parse_model(const unsigned char* bytes, size_t size);
Model read_model(const char* path);  // a regular file of at most 4 GiB

std::string text(const std::vector<int64_t>& shape);  // "[3, 32, 32]"
int64_t product(const std::vector<int64_t>& sides);   // INT64_MAX where it is larger

}  // namespace pykd::runtime
