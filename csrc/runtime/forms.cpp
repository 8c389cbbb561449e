#include "runtime/forms.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "core/cpu_isa.h"

namespace pykd::runtime {
namespace {

constexpr int64_t kBand = 16;  // rows whose columns are counted together

int64_t rows_of(const Weight& w) { return w.shape[0]; }

int64_t columns_of(const Weight& w) {
  int64_t columns = 1;
  for (size_t i = 1; i < w.shape.size(); ++i) columns *= w.shape[i];
  return columns;
}

// entry(row, column, value) for each value other than 0.
template <typename Entry>
void each_entry(const Weight& w, const Entry& entry) {
  const int64_t columns = columns_of(w), high = w.dense ? 1 : w.block_rows, wide = w.dense ? columns : w.block_columns;
  const int64_t across = ceil_div(columns, wide);
  const size_t blocks = w.dense ? static_cast<size_t>(rows_of(w)) : w.positions.size();
  const float* value = w.values.data();
  for (size_t block = 0; block < blocks; ++block) {
    const int64_t place = w.dense ? static_cast<int64_t>(block) : w.positions[block];
    const int64_t top = place / across * high, left = place % across * wide;
    for (int64_t r = 0; r < high; ++r)
      for (int64_t c = 0; c < wide; ++c, ++value)
        if (*value != 0) entry(top + r, left + c, *value);
  }
}

// Rows of a band's blocks of `high` rows that are not all 0, over all columns.
int64_t tall_blocks(const std::vector<uint16_t>& masks, int64_t high) {
  const uint32_t whole = (1u << high) - 1;
  int64_t count = 0;
  for (const uint32_t mask : masks)
    for (int64_t top = 0; top < kBand; top += high) count += (mask >> top & whole) != 0;
  return count;
}

std::vector<FormCount> forms_of(const Op& op) {
  const Weight& w = op.weight;
  if (w.shape.empty()) return {};
  const int64_t rows = rows_of(w), columns = columns_of(w), group = rows / op.groups;
  std::vector<uint16_t> masks(static_cast<size_t>(ceil_div(rows, kBand) * columns));
  each_entry(w, [&](int64_t row, int64_t column, float) {
    masks[static_cast<size_t>(row / kBand * columns + column)] |= static_cast<uint16_t>(1 << row % kBand);
  });
  // Blocks may not straddle groups.
  const int64_t highest = op.groups == 1 ? kBand : std::min(kBand, group & -group);
  std::vector<FormCount> forms;
  const auto add = [&](const Form& form, int64_t blocks) {
    if (std::ranges::none_of(forms, [&](const FormCount& each) { return each.form == form; }))
      forms.push_back({form, blocks});
  };
  const Form dense{highest, 0};
  if (w.dense)
    add(dense, ceil_div(rows, highest));
  else if (op.groups == 1 || group % w.block_rows == 0)
    add({w.block_rows, w.block_columns}, static_cast<int64_t>(w.positions.size()));
  for (int64_t high = 1; high <= highest; high *= high == 1 ? 4 : 2) add({high, 1}, tall_blocks(masks, high));
  add(dense, ceil_div(rows, highest));
  return forms;
}

Packed pack(const Op& op, const Form& form) {
  const Weight& w = op.weight;
  const int64_t rows = rows_of(w), columns = columns_of(w);
  SparseBlocks blocks{w.positions.data(),
                      w.values.data(),
                      static_cast<int64_t>(w.positions.size()),
                      rows,
                      columns,
                      form.rows,
                      form.columns ? form.columns : columns,
                      op.groups};
  std::vector<int64_t> positions;
  std::vector<float> values;
  blocks.halves = form.values;
  if (w.dense || form.rows != w.block_rows || form.columns != w.block_columns) {
    const int64_t across = ceil_div(columns, blocks.block_columns), size = form.rows * blocks.block_columns;
    const auto place = [&](int64_t row, int64_t column) {
      return static_cast<size_t>(row / form.rows * across + column / blocks.block_columns);
    };
    std::vector<int32_t> number(static_cast<size_t>(ceil_div(rows, form.rows) * across), -1);
    each_entry(w, [&](int64_t row, int64_t column, float) { number[place(row, column)] = 0; });
    for (size_t i = 0; i < number.size(); ++i) {
      if (number[i] < 0) continue;
      number[i] = static_cast<int32_t>(positions.size());
      positions.push_back(static_cast<int64_t>(i));
    }
    values.resize(positions.size() * static_cast<size_t>(size));
    each_entry(w, [&](int64_t row, int64_t column, float value) {
      values[static_cast<size_t>(number[place(row, column)] * size + row % form.rows * blocks.block_columns +
                                 column % blocks.block_columns)] = value;
    });
    blocks.positions = positions.data();
    blocks.values = values.data();
    blocks.stored = static_cast<int64_t>(positions.size());
  }
  if (form.values != DType::kFloat32) {
    if (values.empty()) values = w.values;
    for (float& value : values) {
      value = rounded(value, form.values);
      if (!std::isfinite(value))
        throw std::invalid_argument("a weight is larger than float16's 65504: take bfloat16 or float32");
    }
    blocks.values = values.data();
  }
  const std::vector<char> made = pack_sparse(blocks);
  Packed packed{aligned_bytes(made.size())};
  std::memcpy(packed.bytes.get(), made.data(), made.size());
  return packed;
}

// No protection against forgery: it only names a line of the cache.
struct Fingerprint {
  uint64_t hash = 0x9E3779B97F4A7C15;

  void add(uint64_t word) { hash = std::rotl((hash ^ word) * 0xD6E8FEB86659FD93, 29); }
  template <typename T>
  void add(const std::vector<T>& values) {
    add(values.size());
    for (const T value : values) {
      if constexpr (sizeof(T) == 4)
        add(std::bit_cast<uint32_t>(value));
      else
        add(static_cast<uint64_t>(value));
    }
  }
};

uint64_t fingerprint_of(const Model& model) {
  Fingerprint print;
  print.add(model.input_shape);
  for (const Op& op : model.ops) {
    print.add(static_cast<uint64_t>(op.kind));
    print.add(op.inputs);
    print.add(op.shape);
    print.add(op.weight.shape);
    print.add(static_cast<uint64_t>(op.weight.block_rows) << 32 | static_cast<uint64_t>(op.weight.block_columns));
    print.add(op.weight.positions);
    print.add(op.weight.values);
    for (const auto& pair : {op.kernel, op.stride, op.padding, op.dilation})
      for (const int64_t side : pair) print.add(static_cast<uint64_t>(side));
    print.add(static_cast<uint64_t>(op.groups));
  }
  return print.hash;
}

// Nanoseconds, of one core of a Zen 4 at 3.7 GHz on AVX2, fitted to the measured times of LeNet-300-100 with 0 to 0.95
// zeros at batches of 1 to 256.
constexpr double kPairEntry = 0.40;     // an entry of a pair, one lane
constexpr double kTallVector = 0.18;    // a vector of a tile's column, one lane
constexpr double kLowVector = 0.9;      // a vector of a tile that is lower than a vector, one lane
constexpr double kPairVector = 0.26;    // an entry times a vector of lanes
constexpr double kSharedVector = 0.20;  // likewise, of rows that share their columns
constexpr double kResultVector = 0.6;   // to end and store a vector of results
constexpr double kRun = 0.4;            // to begin a run
constexpr double kByte = 0.009;         // of the weight, to fetch it for a call

}  // namespace

std::string name(const Form& form) {
  if (form == Form{1, 1}) return "pairs";
  const char* const values = form.values == DType::kFloat16    ? " float16"
                             : form.values == DType::kBFloat16 ? " bfloat16"
                                                               : "";
  return (form.columns ? "sparse " + std::to_string(form.rows) + "x" + std::to_string(form.columns) : "dense") + values;
}

Network::Network(Model model) : model_(std::move(model)), fingerprint_(fingerprint_of(model_)) {
  for (const Op& op : model_.ops) forms_.push_back(forms_of(op));
}

std::shared_ptr<const Packed> Network::packed(int op, const Form& form) const {
  const std::scoped_lock lock(mutex_);
  std::weak_ptr<const Packed>& kept = packed_[{op, form}];
  if (auto packed = kept.lock()) return packed;
  auto made = std::make_shared<const Packed>(pack(model_.ops[static_cast<size_t>(op)], form));
  kept = made;
  return made;
}

double seconds(const FormCount& count, const LayerCost& layer) {
  const int64_t wide = count.form.columns ? count.form.columns : layer.columns, lanes = vector_lanes();
  const auto high = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::min(count.form.rows, kBand))));
  const bool pairs = count.form.rows == 1;
  const auto runs = static_cast<double>(count.blocks * ceil_div(count.form.rows, high)),
             rows = static_cast<double>(layer.rows);
  const double entries = static_cast<double>(high * wide), fetch = runs * entries * sizeof(float) * kByte;
  if (layer.lanes == 1 && !layer.out_height) {
    double row = 0;
    if (pairs && wide == 1)
      row = runs * kPairEntry;
    else if (high < lanes)
      row = runs * static_cast<double>(ceil_div(high * wide, lanes)) * kLowVector;
    else
      row = runs * (kRun + entries / static_cast<double>(lanes) * kTallVector);
    return 1e-9 * (fetch + static_cast<double>(layer.batch) * (row + rows * kResultVector));
  }
  // The vectors of the whole batch, and how often the weight is read for them.
  const int64_t most = pairs ? 6 : 2;  // kPairVectors and, of AVX2, kSharedVectors in core/sparse_panels.h
  int64_t vectors = 0, passes = 0;
  const auto add = [&](int64_t count, int64_t stretch) {
    vectors += count * ceil_div(stretch, lanes);
    passes += count * ceil_div(ceil_div(stretch, lanes), most);
  };
  if (layer.out_height) {
    const int64_t across = layer.out_width * layer.lanes;
    const int64_t through = ((layer.out_height - 1) * layer.row + layer.out_width) * layer.lanes;
    const int64_t groups = ceil_div(layer.batch, layer.lanes);
    if (layer.out_height * ceil_div(across, lanes) <= ceil_div(through, lanes))
      add(groups * layer.out_height, across);
    else
      add(groups, through);
  } else {
    add(layer.batch / layer.lanes, layer.lanes);
    add(1, layer.batch % layer.lanes);
  }
  const double vector = runs * entries * (pairs ? kPairVector : kSharedVector) + rows * kResultVector;
  return 1e-9 * (fetch + static_cast<double>(vectors) * vector + static_cast<double>(passes) * runs * kRun);
}

}  // namespace pykd::runtime
