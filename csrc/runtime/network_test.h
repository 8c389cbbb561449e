// What tests of the engine share: an interpreter of the graph in float64 that carries a bound of float32's rounding
// with each value, random networks of all operators, and the comparison of a plan's answers with it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/kernel_test.h"
#include "runtime/engine.h"
#include "runtime/model_file.h"

namespace pykd::runtime::testing {

using namespace pykd::testing;

using Shape = std::vector<int64_t>;
using Random = std::mt19937_64;

inline size_t at(int64_t i) { return static_cast<size_t>(i); }

inline int64_t whole(Random& random, int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(random);
}

inline bool coin(Random& random, double chance = 0.5) { return std::bernoulli_distribution(chance)(random); }

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[whole(random, 0, static_cast<int64_t>(choices.size()) - 1)];
}

inline std::vector<float> normals(Random& random, int64_t count, double scale = 1) {
  std::normal_distribution<double> normal;
  std::vector<float> values(at(count));
  for (float& value : values) value = static_cast<float>(scale * normal(random));
  return values;
}

// ---- the definition ------------------------------------------------------------------------------------------------

// The matrix of a weight.
inline std::vector<float> dense(const Weight& w) {
  if (w.dense) return w.values;
  const int64_t rows = w.shape[0], columns = product(w.shape) / rows;
  const int64_t across = (columns + w.block_columns - 1) / w.block_columns;
  std::vector<float> matrix(at(rows * columns));
  for (size_t block = 0; block < w.positions.size(); ++block)
    for (int64_t r = 0; r < w.block_rows; ++r)
      for (int64_t c = 0; c < w.block_columns; ++c) {
        const int64_t row = w.positions[block] / across * w.block_rows + r;
        const int64_t column = w.positions[block] % across * w.block_columns + c;
        if (row < rows && column < columns)
          matrix[at(row * columns + column)] =
              w.values[at((static_cast<int64_t>(block) * w.block_rows + r) * w.block_columns + c)];
      }
  return matrix;
}

// A number, and how far from it float32 may come.
struct Bounded {
  double value = 0, error = 0;
};
using Values = std::vector<Bounded>;

constexpr double kUnit = 0x1p-24;

// The sum of `terms` products, whose sizes sum up to `size`, in any order.
inline Bounded rounded(double value, double error, double size, int64_t terms) {
  return {value, error + static_cast<double>(terms + 2) * kUnit * (size + error) + 1e-37};
}

// `unit`: the rounding of the products' factors, relative to their size; below 2^-14 float16 rounds to 2^-25.
inline Values layer(const Op& op, const Shape& in, const Values& x, double unit) {
  const bool image = op.kind == Kind::kConv2d;
  const std::vector<float> matrix = dense(op.weight);
  const int64_t outputs = op.weight.shape[0], columns = product(op.weight.shape) / outputs;
  const int64_t height = image ? in[1] : 1, width = image ? in[2] : 1, kernel_h = image ? op.weight.shape[2] : 1,
                kernel_w = image ? op.weight.shape[3] : 1, inputs = op.weight.shape[1];
  const int64_t out_height = image ? op.shape[1] : 1, out_width = image ? op.shape[2] : 1;
  Values y(at(product(op.shape)));
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t v = 0; v < out_height; ++v)
      for (int64_t u = 0; u < out_width; ++u) {
        double sum = 0, error = 0, size = 0;
        for (int64_t c = 0; c < inputs; ++c)
          for (int64_t i = 0; i < kernel_h; ++i)
            for (int64_t j = 0; j < kernel_w; ++j) {
              const int64_t row = v * op.stride[0] + i * op.dilation[0] - op.padding[0];
              const int64_t column = u * op.stride[1] + j * op.dilation[1] - op.padding[1];
              if (row < 0 || row >= height || column < 0 || column >= width) continue;
              const int64_t channel = o / (outputs / op.groups) * inputs + c;
              const double w = static_cast<double>(matrix[at(o * columns + (c * kernel_h + i) * kernel_w + j)]);
              const Bounded& from = x[at((channel * height + row) * width + column)];
              sum += w * from.value;
              size += std::abs(w * from.value);
              error += std::abs(w) * from.error * (1 + unit) + std::abs(w * from.value) * (2 + unit) * unit;
              if (unit > 0) error += 0x1p-24 * (std::abs(w) + std::abs(from.value) + from.error);
            }
        if (!op.bias.empty()) {
          sum += static_cast<double>(op.bias[at(o)]);
          size += std::abs(static_cast<double>(op.bias[at(o)]));
        }
        y[at((o * out_height + v) * out_width + u)] = rounded(sum, error, size, columns + 1);
      }
  return y;
}

inline Values pool(const Op& op, const Shape& in, const Values& x) {
  const bool global = op.kind == Kind::kGlobalAvgPool, mean = op.kind != Kind::kMaxPool2d;
  const std::array<int64_t, 2> kernel = global ? std::array{in[1], in[2]} : op.kernel;
  Values y;
  for (int64_t c = 0; c < in[0]; ++c)
    for (int64_t v = 0; v < op.shape[1]; ++v)
      for (int64_t u = 0; u < op.shape[2]; ++u) {
        double sum = 0, error = 0, size = 0, most = -std::numeric_limits<double>::infinity(), most_error = 0;
        int64_t within = 0, counted = 0;
        for (int64_t i = 0; i < kernel[0]; ++i)
          for (int64_t j = 0; j < kernel[1]; ++j) {
            const int64_t row = v * op.stride[0] + i * op.dilation[0] - op.padding[0];
            const int64_t column = u * op.stride[1] + j * op.dilation[1] - op.padding[1];
            counted += row < in[1] + op.padding[0] && column < in[2] + op.padding[1];
            if (row < 0 || row >= in[1] || column < 0 || column >= in[2]) continue;
            const Bounded& from = x[at((c * in[1] + row) * in[2] + column)];
            ++within;
            sum += from.value;
            size += std::abs(from.value);
            error += from.error;
            most = std::max(most, from.value);
            most_error = std::max(most_error, from.error);
          }
        const auto count = static_cast<double>(op.count_padding ? counted : within);
        y.push_back(mean ? rounded(sum / count, error / count, size / count, within + 2) : Bounded{most, most_error});
      }
  return y;
}

inline Values softmax(const Shape& in, const Values& x) {
  const int64_t channels = in[0], places = product(in) / channels;
  Values y(x.size());
  for (int64_t p = 0; p < places; ++p) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0, error = 0, span = 0;
    for (int64_t c = 0; c < channels; ++c) top = std::max(top, x[at(c * places + p)].value);
    for (int64_t c = 0; c < channels; ++c) {
      const Bounded& from = x[at(c * places + p)];
      sum += std::exp(from.value - top);
      error = std::max(error, from.error);
      span = std::max(span, top - from.value);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double share = std::exp(x[at(c * places + p)].value - top) / sum;
      const double relative = std::expm1(std::min(50.0, 2 * error)) + static_cast<double>(channels + 16) * kUnit +
                              2 * kUnit * std::min(span, 100.0);
      y[at(c * places + p)] = {share, share * relative + 1e-37};
    }
  }
  return y;
}

inline Values interpret(const Op& op, const std::vector<const Shape*>& shapes, const std::vector<const Values*>& inputs,
                        double unit) {
  const Values& x = *inputs[0];
  Values y = x;
  switch (op.kind) {
    case Kind::kLinear:
    case Kind::kConv2d: return layer(op, *shapes[0], x, unit);
    case Kind::kMaxPool2d:
    case Kind::kAvgPool2d:
    case Kind::kGlobalAvgPool: return pool(op, *shapes[0], x);
    case Kind::kSoftmax: return softmax(*shapes[0], x);
    case Kind::kFlatten: return y;
    case Kind::kRelu:
      for (Bounded& v : y) v.value = std::max(v.value, 0.0);
      return y;
    case Kind::kLeakyRelu:
      for (Bounded& v : y) {
        v.error *= std::max(1.0, std::abs(op.slope));
        v = rounded(v.value > 0 ? v.value : op.slope * v.value, v.error, std::abs(v.value), 1);
      }
      return y;
    case Kind::kTanh:
      for (Bounded& v : y) v = {std::tanh(v.value), v.error + 4e-7};
      return y;
    case Kind::kAdd:
      for (size_t i = 0; i < y.size(); ++i) {
        const Bounded& other = (*inputs[1])[i];
        y[i] = rounded(y[i].value + other.value, y[i].error + other.error, std::abs(y[i].value) + std::abs(other.value),
                       1);
      }
      return y;
    case Kind::kConcat:
      for (size_t i = 1; i < inputs.size(); ++i) y.insert(y.end(), inputs[i]->begin(), inputs[i]->end());
      return y;
    case Kind::kAffine: {
      const size_t places = y.size() / op.scale.size();
      for (size_t i = 0; i < y.size(); ++i) {
        const double scale = static_cast<double>(op.scale[i / places]),
                     shift = static_cast<double>(op.bias[i / places]);
        const double scaled = scale * y[i].value;
        y[i] = rounded(scaled + shift, std::abs(scale) * y[i].error, std::abs(scaled) + std::abs(shift), 2);
      }
      return y;
    }
  }
  return y;
}

inline Values interpret(const Model& model, const float* input, double unit = 0) {
  std::vector<Values> values(1);
  std::vector<const Shape*> shapes{&model.input_shape};
  for (int64_t i = 0; i < product(model.input_shape); ++i) values[0].push_back({static_cast<double>(input[i]), 0});
  for (const Op& op : model.ops) {
    std::vector<const Shape*> its_shapes;
    std::vector<const Values*> its_values;
    for (const int value : op.inputs) {
      its_shapes.push_back(shapes[at(value)]);
      its_values.push_back(&values[at(value)]);
    }
    Values result = interpret(op, its_shapes, its_values, unit);
    values.push_back(std::move(result));
    shapes.push_back(&op.shape);
  }
  return values.back();
}

// ---- networks ------------------------------------------------------------------------------------------------------

inline Weight weight(Random& random, const Shape& shape, double zeros) {
  Weight w;
  w.shape = shape;
  const int64_t rows = shape[0], columns = product(shape) / rows;
  w.dense = coin(random, 0.2);
  const auto [high, wide] =
      one_of<std::pair<int64_t, int64_t>>(random, {{1, 1}, {1, 1}, {1, 16}, {4, 4}, {8, 8}, {16, 16}, {3, 5}, {32, 2}});
  w.block_rows = w.dense ? 1 : std::min(rows, high);
  w.block_columns = w.dense ? 1 : std::min(columns, wide);
  const double scale = 1 / std::sqrt(std::max(1.0, (1 - zeros) * static_cast<double>(columns)));
  if (w.dense) {
    w.values = normals(random, rows * columns, scale);
    for (float& value : w.values)
      if (coin(random, zeros)) value = 0;
    return w;
  }
  const int64_t across = (columns + w.block_columns - 1) / w.block_columns;
  const int64_t down = (rows + w.block_rows - 1) / w.block_rows;
  for (int64_t place = 0; place < across * down; ++place) {
    if (coin(random, zeros)) continue;
    w.positions.push_back(place);
    for (int64_t r = 0; r < w.block_rows; ++r)
      for (int64_t c = 0; c < w.block_columns; ++c)
        w.values.push_back(place / across * w.block_rows + r < rows && place % across * w.block_columns + c < columns
                               ? normals(random, 1, scale)[0]
                               : 0);
  }
  return w;
}

inline int64_t windows(int64_t side, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t room = side + 2 * padding - dilation * (kernel - 1) - 1;
  if (room < 0) return 0;
  int64_t count = room / stride + 1;
  if (ceil) {
    count = (room + stride - 1) / stride + 1;
    if ((count - 1) * stride >= side + padding) --count;
  }
  return count;
}

class Builder {
 public:
  Builder(Random& random, const Shape& input) : random_(random) { model.input_shape = input; }

  Model model{};

  const Shape& shape(int value) const { return value ? model.ops[at(value - 1)].shape : model.input_shape; }
  int last() const { return static_cast<int>(model.ops.size()); }

  // Adds the step if its shapes fit.
  bool add(Op op) {
    if (op.inputs.empty()) op.inputs = {last()};
    const Shape in = shape(op.inputs[0]);
    const bool image = in.size() == 3;
    switch (op.kind) {
      case Kind::kLinear:
      case Kind::kConv2d: {
        op.shape = {op.weight.shape[0]};
        if (op.kind == Kind::kLinear) break;
        for (size_t side = 0; side < 2; ++side)
          op.shape.push_back(windows(in[side + 1], op.weight.shape[side + 2], op.stride[side], op.padding[side],
                                     op.dilation[side], false));
        break;
      }
      case Kind::kMaxPool2d:
      case Kind::kAvgPool2d:
        if (!image) return false;
        op.shape = {in[0]};
        for (size_t side = 0; side < 2; ++side)
          op.shape.push_back(
              windows(in[side + 1], op.kernel[side], op.stride[side], op.padding[side], op.dilation[side], op.ceil));
        break;
      case Kind::kGlobalAvgPool:
        if (!image) return false;
        op.shape = {in[0], 1, 1};
        break;
      case Kind::kFlatten: op.shape = {product(in)}; break;
      case Kind::kConcat:
        op.shape = in;
        for (size_t i = 1; i < op.inputs.size(); ++i) op.shape[0] += shape(op.inputs[i])[0];
        break;
      default: op.shape = in;
    }
    if (std::ranges::any_of(op.shape, [](int64_t side) { return side < 1; }) || product(op.shape) > 20'000)
      return false;
    model.ops.push_back(std::move(op));
    return true;
  }

  Op step(Kind kind, std::vector<int> inputs = {}) const {
    Op op{};
    op.kind = kind;
    op.inputs = std::move(inputs);
    return op;
  }

  bool linear(int64_t out, double zeros) {
    Op op = step(Kind::kLinear);
    op.weight = weight(random_, {out, product(shape(last()))}, zeros);
    if (coin(random_, 0.8)) op.bias = normals(random_, out);
    return add(op);
  }

  // Of value `from`.
  bool conv2d(int from, int64_t out, int64_t kernel_h, int64_t kernel_w, int64_t groups, double zeros,
              std::array<int64_t, 2> stride = {1, 1}, std::array<int64_t, 2> padding = {0, 0},
              std::array<int64_t, 2> dilation = {1, 1}) {
    Op op = step(Kind::kConv2d, {from});
    op.groups = groups;
    op.stride = stride;
    op.padding = padding;
    op.dilation = dilation;
    op.weight = weight(random_, {out, shape(from)[0] / groups, kernel_h, kernel_w}, zeros);
    if (coin(random_, 0.8)) op.bias = normals(random_, out);
    return add(op);
  }

  // Any step on any value, later ones rather.
  bool any() {
    const int from = static_cast<int>(std::max(whole(random_, 0, last()), whole(random_, 0, last())));
    const Shape in = shape(from);
    const double zeros = one_of(random_, {0.0, 0.5, 0.9, 0.97, 1.0});
    const auto kind = static_cast<Kind>(whole(random_, 0, static_cast<int64_t>(Kind::kAffine)));
    Op op = step(kind, {from});
    const auto pair = [&](int64_t least, int64_t most) {
      return std::array{whole(random_, least, most), whole(random_, least, most)};
    };
    switch (kind) {
      case Kind::kLinear:
        if (in.size() != 1) return false;
        op.weight = weight(random_, {whole(random_, 1, 70), in[0]}, zeros);
        if (coin(random_)) op.bias = normals(random_, op.weight.shape[0]);
        break;
      case Kind::kConv2d: {
        if (in.size() != 3) return false;
        const int64_t groups = coin(random_, 0.6) ? 1 : coin(random_) ? in[0] : in[0] % 2 ? 1 : 2;
        const bool strided = coin(random_, 0.3);
        return conv2d(from, groups * whole(random_, 1, 24), whole(random_, 1, 4), whole(random_, 1, 4), groups, zeros,
                      strided ? pair(1, 3) : std::array<int64_t, 2>{1, 1}, pair(0, 3),
                      coin(random_, 0.3) ? pair(1, 3) : std::array<int64_t, 2>{1, 1});
      }
      case Kind::kLeakyRelu: op.slope = one_of(random_, {0.01, 0.3}); break;
      case Kind::kMaxPool2d:
      case Kind::kAvgPool2d:
        op.kernel = pair(1, 4);
        op.stride = pair(1, 3);
        op.padding = {whole(random_, 0, op.kernel[0] / 2), whole(random_, 0, op.kernel[1] / 2)};
        if (kind == Kind::kMaxPool2d && coin(random_, 0.3)) op.dilation = pair(1, 2);
        op.ceil = coin(random_);
        op.count_padding = coin(random_);
        break;
      case Kind::kAdd:
      case Kind::kConcat:
        for (int other = last(); other >= 0; --other) {
          const Shape& its = shape(other);
          const bool fits = kind == Kind::kAdd
                                ? its == in
                                : its.size() == in.size() && std::equal(in.begin() + 1, in.end(), its.begin() + 1);
          if (fits && coin(random_, 0.6)) {
            op.inputs.push_back(other);
            if (kind == Kind::kAdd) break;
          }
        }
        if (kind == Kind::kAdd && op.inputs.size() != 2) return false;
        break;
      case Kind::kAffine:
        op.scale = normals(random_, in[0]);
        op.bias = normals(random_, in[0]);
        break;
      default: break;
    }
    return add(op);
  }

 private:
  Random& random_;
};

inline Model random_model(Random& random) {
  const Shape input = coin(random, 0.7)   ? Shape{whole(random, 1, 9), whole(random, 1, 13), whole(random, 1, 13)}
                      : coin(random, 0.6) ? Shape{whole(random, 1, 90)}
                      : coin(random)      ? Shape{3, 17}
                                          : Shape{2, 3, 4, 5};
  Builder builder(random, input);
  const int64_t steps = whole(random, 1, 12);
  for (int tries = 0; tries < 100 && builder.last() < steps; ++tries) builder.any();
  return std::move(builder.model);
}

inline Model lenet(Random& random, double zeros) {
  Builder builder(random, {784});
  builder.linear(300, zeros);
  builder.add(builder.step(Kind::kRelu));
  builder.linear(100, zeros);
  builder.add(builder.step(Kind::kRelu));
  builder.linear(10, 0);
  return std::move(builder.model);
}

// A residual network with strides, branches and images as input.
inline Model residual(Random& random) {
  Builder b(random, {3, 12, 12});
  b.conv2d(0, 16, 3, 3, 1, 0.8, {1, 1}, {1, 1});
  b.add(b.step(Kind::kRelu));
  b.conv2d(2, 32, 3, 3, 1, 0.9, {2, 2}, {1, 1});
  b.add(b.step(Kind::kRelu));
  b.conv2d(4, 32, 3, 3, 1, 0.9, {1, 1}, {1, 1});
  b.conv2d(2, 32, 1, 1, 1, 0.5, {2, 2});
  b.add(b.step(Kind::kAdd, {5, 6}));
  b.add(b.step(Kind::kRelu));
  b.conv2d(8, 32, 3, 3, 32, 0, {1, 1}, {1, 1});
  b.add(b.step(Kind::kConcat, {8, 9}));
  b.add(b.step(Kind::kGlobalAvgPool));
  b.add(b.step(Kind::kFlatten));
  b.linear(10, 0.5);
  b.add(b.step(Kind::kSoftmax));
  b.model.mean = {0.1f, 0.2f, 0.3f};
  b.model.std = {0.5f, 0.6f, 0.7f};
  return std::move(b.model);
}

// ---- comparisons ---------------------------------------------------------------------------------------------------

// Rows of a batch that are compared.
inline std::set<int64_t> looked_at(Random& random, int64_t batch) {
  std::set<int64_t> rows{0, batch - 1};
  for (int i = 0; i < 3; ++i) rows.insert(whole(random, 0, batch - 1));
  return rows;
}

struct Expected {
  std::vector<float> input;
  std::vector<std::pair<int64_t, Values>> rows;
};

inline Expected expect(Random& random, const Model& model, int64_t batch, double unit = 0) {
  Expected expected{normals(random, batch * product(model.input_shape)), {}};
  for (const int64_t row : looked_at(random, batch))
    expected.rows.push_back({row, interpret(model, expected.input.data() + row * product(model.input_shape), unit)});
  return expected;
}

inline void compare(const Expected& expected, const std::vector<float>& output, const std::string& name) {
  for (const auto& [row, values] : expected.rows)
    for (size_t i = 0; i < values.size(); ++i) {
      const double got = static_cast<double>(output[at(row) * values.size() + i]);
      if (std::abs(got - values[i].value) <= values[i].error) continue;
      char text[160];
      std::snprintf(text, sizeof text, ": row %lld, %zu of %zu is %.9g, not %.9g +- %.3g", static_cast<long long>(row),
                    i, values.size(), got, values[i].value, values[i].error);
      return check(false, name + text);
    }
  check(true, name);
}

inline std::string described(const Model& model) {
  std::string text;
  for (const Op& op : model.ops) {
    text += std::string(text.empty() ? "" : " ") + pykd::runtime::name(op.kind) + "(";
    for (const int value : op.inputs) text += std::to_string(value) + ",";
    text.back() = ')';
  }
  return text;
}

inline std::vector<float> answered(Plan& plan, const Network& network, const std::vector<float>& input, int64_t batch) {
  std::vector<float> output(at(batch * product(output_shape(network))), std::numeric_limits<float>::quiet_NaN());
  plan.run(input.data(), output.data());
  return output;
}

}  // namespace pykd::runtime::testing
