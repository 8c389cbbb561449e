// The engine against an interpreter of the graph in float64 that carries a bound of float32's rounding with each value:
// random networks of all operators in every number of lanes, form of the weights and number of threads; no memory
// allocated by a run; plans that run at the same time; the cache; the C API's bad arguments.
#include "runtime/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>
#include <random>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/kernel_test.h"
#include "runtime/planner.h"
#include "runtime/pykd.h"
#include "runtime/sha256.h"

// ---- what is allocated ---------------------------------------------------------------------------------------------

static std::atomic<int64_t> allocations{0};

static void* allocated(std::size_t size, std::size_t alignment) {
  ++allocations;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = alignment > 16 ? std::aligned_alloc(alignment, rounded) : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* operator new(std::size_t size) { return allocated(size, 16); }
void* operator new[](std::size_t size) { return allocated(size, 16); }
void* operator new(std::size_t size, std::align_val_t to) { return allocated(size, static_cast<std::size_t>(to)); }
void* operator new[](std::size_t size, std::align_val_t to) { return allocated(size, static_cast<std::size_t>(to)); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
// Not inlined: the compiler would see that what `new` gave goes to `free`.
[[gnu::noinline]] static void freed(void* memory) { std::free(memory); }
void operator delete(void* memory) noexcept { freed(memory); }
void operator delete[](void* memory) noexcept { freed(memory); }
void operator delete(void* memory, std::size_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::size_t) noexcept { freed(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { freed(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { freed(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { freed(memory); }

namespace {

using namespace pykd::runtime;
using namespace pykd::testing;

using Shape = std::vector<int64_t>;
using Random = std::mt19937_64;

size_t at(int64_t i) { return static_cast<size_t>(i); }

int64_t whole(Random& random, int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(random);
}

bool coin(Random& random, double chance = 0.5) { return std::bernoulli_distribution(chance)(random); }

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[whole(random, 0, static_cast<int64_t>(choices.size()) - 1)];
}

std::vector<float> normals(Random& random, int64_t count, double scale = 1) {
  std::normal_distribution<double> normal;
  std::vector<float> values(at(count));
  for (float& value : values) value = static_cast<float>(scale * normal(random));
  return values;
}

// ---- the definition ------------------------------------------------------------------------------------------------

// The matrix of a weight.
std::vector<float> dense(const Weight& w) {
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
Bounded rounded(double value, double error, double size, int64_t terms) {
  return {value, error + static_cast<double>(terms + 2) * kUnit * (size + error) + 1e-37};
}

Values layer(const Op& op, const Shape& in, const Values& x) {
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
              error += std::abs(w) * from.error;
            }
        if (!op.bias.empty()) {
          sum += static_cast<double>(op.bias[at(o)]);
          size += std::abs(static_cast<double>(op.bias[at(o)]));
        }
        y[at((o * out_height + v) * out_width + u)] = rounded(sum, error, size, columns + 1);
      }
  return y;
}

Values pool(const Op& op, const Shape& in, const Values& x) {
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

Values softmax(const Shape& in, const Values& x) {
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

Values interpret(const Op& op, const std::vector<const Shape*>& shapes, const std::vector<const Values*>& inputs) {
  const Values& x = *inputs[0];
  Values y = x;
  switch (op.kind) {
    case Kind::kLinear:
    case Kind::kConv2d: return layer(op, *shapes[0], x);
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

Values interpret(const Model& model, const float* input) {
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
    Values result = interpret(op, its_shapes, its_values);
    values.push_back(std::move(result));
    shapes.push_back(&op.shape);
  }
  return values.back();
}

// ---- networks ------------------------------------------------------------------------------------------------------

Weight weight(Random& random, const Shape& shape, double zeros) {
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

int64_t windows(int64_t side, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
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

Model random_model(Random& random) {
  const Shape input = coin(random, 0.7)   ? Shape{whole(random, 1, 9), whole(random, 1, 13), whole(random, 1, 13)}
                      : coin(random, 0.6) ? Shape{whole(random, 1, 90)}
                      : coin(random)      ? Shape{3, 17}
                                          : Shape{2, 3, 4, 5};
  Builder builder(random, input);
  const int64_t steps = whole(random, 1, 12);
  for (int tries = 0; tries < 100 && builder.last() < steps; ++tries) builder.any();
  return std::move(builder.model);
}

Model lenet(Random& random, double zeros) {
  Builder builder(random, {784});
  builder.linear(300, zeros);
  builder.add(builder.step(Kind::kRelu));
  builder.linear(100, zeros);
  builder.add(builder.step(Kind::kRelu));
  builder.linear(10, 0);
  return std::move(builder.model);
}

// A residual network with strides, branches and images as input.
Model residual(Random& random) {
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
std::set<int64_t> looked_at(Random& random, int64_t batch) {
  std::set<int64_t> rows{0, batch - 1};
  for (int i = 0; i < 3; ++i) rows.insert(whole(random, 0, batch - 1));
  return rows;
}

struct Expected {
  std::vector<float> input;
  std::vector<std::pair<int64_t, Values>> rows;
};

Expected expect(Random& random, const Model& model, int64_t batch) {
  Expected expected{normals(random, batch * product(model.input_shape)), {}};
  for (const int64_t row : looked_at(random, batch))
    expected.rows.push_back({row, interpret(model, expected.input.data() + row * product(model.input_shape))});
  return expected;
}

void compare(const Expected& expected, const std::vector<float>& output, const std::string& name) {
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

std::string described(const Model& model) {
  std::string text;
  for (const Op& op : model.ops) {
    text += std::string(text.empty() ? "" : " ") + pykd::runtime::name(op.kind) + "(";
    for (const int value : op.inputs) text += std::to_string(value) + ",";
    text.back() = ')';
  }
  return text;
}

std::vector<float> answered(Plan& plan, const Network& network, const std::vector<float>& input, int64_t batch) {
  std::vector<float> output(at(batch * product(output_shape(network))), std::numeric_limits<float>::quiet_NaN());
  plan.run(input.data(), output.data());
  return output;
}

void test_random_networks() {
  for (uint64_t seed = 0; seed < 120; ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 1, 2, 3, 15, 16, 17, 33, 48, 64, 70});
    const Expected expected = expect(random, model(*network), batch);
    const std::string name =
        "seed " + std::to_string(seed) + " batch " + std::to_string(batch) + " " + described(model(*network));
    for (const int64_t lanes : {int64_t{0}, int64_t{1}, int64_t{std::max(8, pykd::vector_lanes())}, int64_t{16},
                                int64_t{32}, int64_t{48}, int64_t{64}})
      for (const int threads : {1, 2, 3}) {
        if (threads > 1 && (seed + static_cast<uint64_t>(lanes) / 16) % 3 != static_cast<uint64_t>(threads) % 3)
          continue;
        Plan plan(network, {.batch = batch, .threads = threads, .measure = false, .lanes = lanes});
        const std::string its = name + " lanes " + std::to_string(lanes) + " threads " + std::to_string(threads);
        const std::vector<float> first = answered(plan, *network, expected.input, batch);
        compare(expected, first, its);
        check(first == answered(plan, *network, expected.input, batch) ||
                  std::ranges::any_of(first, [](float v) { return std::isnan(v); }),
              its + ": the same bits again");
      }
    if (seed % 4 == 0) {
      Plan plan(network, {.batch = batch, .threads = static_cast<int>(seed / 4 % 3) + 1});
      compare(expected, answered(plan, *network, expected.input, batch), name + " measured");
    }
  }
}

// Every form of every layer, which a plan would take on some machine; threads share every step.
void test_forms() {
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    Random random(seed);
    const auto network = load(random_model(random));
    const int64_t batch = one_of<int64_t>(random, {1, 2, 5, 16, 33});
    const Expected expected = expect(random, model(*network), batch);
    for (const int64_t lanes : {int64_t{1}, int64_t{std::max(8, pykd::vector_lanes())}, int64_t{48}})
      for (size_t which = 0; which < 6; ++which) {
        const int threads = static_cast<int>(which % 3) + 1;
        Program program(network, lanes, batch, threads);
        for (size_t i = 0; i < program.steps().size(); ++i) {
          Step& step = program.steps()[i];
          step.shared = true;
          if (!step.is_layer()) continue;
          const auto& forms = network->forms(step.op);
          program.take(i, program.weight(i, forms[which % forms.size()].form));
        }
        ThreadPool pool(threads);
        const Shape& answer = output_shape(*network);
        std::vector<float> output(at(batch * product(answer)));
        for (int64_t row = 0; row < batch; row += program.rows())
          program.run(expected.input.data() + row * product(model(*network).input_shape),
                      output.data() + row * product(answer), std::min(program.rows(), batch - row), &pool);
        compare(expected, output,
                "forms seed " + std::to_string(seed) + " batch " + std::to_string(batch) + " lanes " +
                    std::to_string(lanes) + " form " + std::to_string(which) + " " + described(model(*network)));
      }
  }
}

void test_networks() {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Random random(seed);
    for (Model& made : std::array{lenet(random, 0.95), residual(random)}) {
      const auto network = load(std::move(made));
      for (const int64_t batch : {1, 7, 64, 300})
        for (const int threads : {1, 2})
          for (const bool measured : {false, true}) {
            if (measured && (batch == 300 || seed)) continue;
            const Expected expected = expect(random, model(*network), batch);
            Plan plan(network, {.batch = batch, .threads = threads, .measure = measured});
            compare(
                expected, answered(plan, *network, expected.input, batch),
                pykd::testing::described({{"network of batch", batch}, {"threads", threads}, {"measured", measured}}));
            check(plan.weight_bytes() > 0 && plan.workspace_bytes() > 0, "bytes are told");
            const auto layers =
                std::ranges::count_if(model(*network).ops, [](const Op& op) { return !op.weight.shape.empty(); });
            check(static_cast<std::ptrdiff_t>(plan.choices().size()) == layers, "a choice for each layer");
            check(std::ranges::all_of(plan.choices(), [](const Choice& c) { return c.us > 0 && !c.form.empty(); }),
                  "with its time");
          }
    }
  }
}

void test_pixels() {
  Random random(5);
  const auto network = load(residual(random));
  for (const int64_t batch : {1, 5, 40})
    for (const int threads : {1, 2}) {
      std::vector<uint8_t> pixels(at(batch * 3 * 144));
      std::vector<float> input;
      for (size_t i = 0; i < pixels.size(); ++i) {
        pixels[i] = static_cast<uint8_t>(whole(random, 0, 255));
        const size_t channel = i / 144 % 3;
        input.push_back(static_cast<float>((pixels[i] / 255.0 - static_cast<double>(model(*network).mean[channel])) /
                                           static_cast<double>(model(*network).std[channel])));
      }
      Plan plan(network, {.batch = batch, .threads = threads, .measure = false});
      std::vector<float> output(at(batch * 10));
      plan.run(pixels.data(), output.data());
      check(output == answered(plan, *network, input, batch), "pixels are read as mean and std say");
    }
}

void test_nothing_is_allocated() {
  Random random(6);
  for (Model& made : std::array{lenet(random, 0.9), residual(random)}) {
    const auto network = load(std::move(made));
    const bool pixels = !model(*network).mean.empty();
    for (const int64_t batch : {1, 3, 100})
      for (const int threads : {1, 2}) {
        Plan plan(network, {.batch = batch, .threads = threads, .measure = false});
        const std::vector<float> input = normals(random, batch * product(model(*network).input_shape));
        const std::vector<uint8_t> image(pixels ? input.size() : 0);
        std::vector<float> output(at(batch * product(output_shape(*network))));
        const int64_t before = allocations;
        plan.run(input.data(), output.data());
        if (pixels) plan.run(image.data(), output.data());
        const int64_t after = allocations;
        check(after == before, "a run allocates nothing");
      }
  }
}

void test_plans_at_the_same_time() {
  Random random(7);
  const auto network = load(residual(random));
  const int64_t batch = 5;
  const std::vector<float> input = normals(random, batch * 3 * 144);
  Plan alone(network, {.batch = batch, .measure = false});
  const std::vector<float> expected = answered(alone, *network, input, batch);
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      Plan plan(network, {.batch = batch, .measure = false});
      for (int run = 0; run < 10; ++run) same += answered(plan, *network, input, batch) == expected;
      if (i == 0) Plan measured(network, {.batch = batch, .threads = 2});
    });
  for (std::thread& thread : threads) thread.join();
  check(same == 40, "plans at the same time answer as one alone");
}

// Strides beyond the image, of two convolutions whose layouts differ in little else.
void test_large_strides() {
  Random random(12);
  const auto answers = [&](Builder& builder, int first, int second, const char* name) {
    builder.add(builder.step(Kind::kFlatten, {first}));
    builder.add(builder.step(Kind::kFlatten, {second}));
    builder.add(builder.step(Kind::kConcat, {builder.last() - 1, builder.last()}));
    const auto network = load(std::move(builder.model));
    const Expected expected = expect(random, model(*network), 2);
    Plan plan(network, {.batch = 2, .measure = false});
    compare(expected, answered(plan, *network, expected.input, 2), name);
  };
  for (const bool turned : {false, true}) {
    Builder layers(random, {16, 64, 2});
    const auto far = [&] { layers.conv2d(0, 3, 1, 1, 1, 0, {2, 65'538}); };
    if (!turned) far();
    layers.add(layers.step(Kind::kTanh, {0}));
    const int near_input = layers.last();
    layers.conv2d(near_input, 3, 2, 1, 1, 0, {2, 2});
    const int near = layers.last();
    if (turned) far();
    answers(layers, turned ? layers.last() : 1, near, "a large stride beside a small one");
    Builder image(random, {1, 2, 1});
    image.conv2d(0, 1, 1, 2, 1, 0, turned ? std::array<int64_t, 2>{1, 2} : std::array<int64_t, 2>{65'537, 1}, {0, 1});
    image.conv2d(0, 1, 1, 1, 1, 0, turned ? std::array<int64_t, 2>{65'537, 1} : std::array<int64_t, 2>{1, 2}, {0, 1});
    answers(image, 1, 2, "strides of one sum");
  }
}

void test_large_batches() {
  Random random(8);
  const auto network = load(lenet(random, 0.98));
  const int64_t batch = 5000;
  const Expected expected = expect(random, model(*network), batch);
  Plan plan(network, {.batch = batch, .threads = 2, .measure = false});
  compare(expected, answered(plan, *network, expected.input, batch), "a large batch");
  check(plan.workspace_bytes() < 4 << 20, "whose values do not lie in memory at once");
}

// ---- the cache -----------------------------------------------------------------------------------------------------

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void write(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

void test_cache() {
  Random random(9);
  const auto network = load(lenet(random, 0.9));
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() /
      ("pykd_engine_test." + std::to_string(random()) + "." + std::to_string(std::random_device()()));
  const std::string path = folder / "plans.json";
  const std::vector<float> input = normals(random, 20 * 784);
  const auto planned = [&](const std::string& cache) {
    Plan plan(network, {.batch = 20, .cache = cache});
    std::string forms = std::to_string(plan.lanes());
    for (const Choice& choice : plan.choices()) forms += " " + choice.form + " " + std::to_string(choice.us);
    return std::pair(forms, answered(plan, *network, input, 20));
  };
  const auto measured = planned(path);
  const std::string text = text_of(path);
  check(text.starts_with("{\"pykd plans\":1}\n{\"key\":\""), "measured plans are remembered");
  const auto recalled = planned(path);
  check(recalled.second == measured.second, "a remembered plan gives the same bits");
  check(text_of(path) == text, "and is not measured again");
  const size_t steps = text.find("\"steps\":[");
  write(path, std::regex_replace(text, std::regex(",[0-9.e-]+\\]"), ",123456]"));
  check(planned(path).first.find(" 123456") != std::string::npos, "what it says is taken");
  for (const std::string& broken :
       {std::string("{\"pykd plans\":1}\n{\"key\":\"") + std::string(64, '0') + "\"}\n",
        text.substr(0, text.size() / 2), text.substr(0, text.find("\"lanes\"")) + "\"lanes\":7,\"steps\":[]}\n",
        text.substr(0, steps) + "\"steps\":[[9,9,0,1],[9,9,0,1],[9,9,0,1],[0,0,0,1],[0,0,0,1]]}\n",
        text.substr(0, steps) + "\"steps\":[[1,1,0],3]}\n",
        text.substr(0, steps) + "\"steps\":[" + std::string(5000, '[')}) {
    write(path, broken);
    const auto again = planned(path);
    check(again.second.size() == 200 && text_of(path).size() > 40, "what is broken in a cache is measured again");
    check(planned(path).second == again.second, "and then remembered");
  }
  std::string full = text;
  for (int i = 0; i < 69; ++i) full += "{\"key\":\"" + std::to_string(i) + std::string(60'000, 'x') + "\"}\n";
  write(path, full);  // with the next plan it is larger than what is read
  std::filesystem::resize_file(path, (4 << 20) - 10);
  const auto forgotten = planned(path);
  check(text_of(path).size() < 4 << 20 && planned(path) == forgotten, "a full cache loses its oldest lines");
  for (const char* foreign : {"a letter\n", "{\"pykd plans\":2}\n", "{}"}) {
    write(path, foreign);
    planned(path);
    check(text_of(path) == foreign, "another's file is left alone");
  }
  check(planned(folder).second.size() == 200, "a folder is no cache");
  check(planned("/dev/null/x").second.size() == 200, "a cache that cannot be written is none");
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++files;
  check(files == 1, "no draft is left");
  std::filesystem::remove_all(folder);
}

// ---- misuse --------------------------------------------------------------------------------------------------------

void test_refused_options() {
  Random random(10);
  const auto network = load(lenet(random, 0.9));
  const auto refused = [&](const PlanOptions& options, const std::string& words) {
    try {
      Plan plan(network, options);
      check(false, "refused: " + words);
    } catch (const std::invalid_argument& error) {
      check(std::string(error.what()).find(words) != std::string::npos,
            std::string("says ") + words + ": " + error.what());
    }
  };
  refused({.batch = 0}, "batch should be 1 to 65536 rows, got 0");
  refused({.batch = 65'537}, "batch");
  refused({.batch = INT64_MAX}, "batch");
  refused({.threads = 0}, "threads should be 1 to 256, got 0");
  refused({.threads = 100'000}, "threads");
  refused({.lanes = 7}, "lanes should be");
  refused({.lanes = 80}, "lanes should be");
}

// Padding that no memory holds.
void test_too_large() {
  Random random(11);
  Builder builder(random, {1 << 20, 1, 1});
  Op op = builder.step(Kind::kConv2d, {0});
  op.weight.shape = {1, 1 << 20, 1, 1};
  op.weight.dense = false;
  op.padding = {1 << 20, 1 << 20};
  op.stride = {1, 1};  // as the reader would refuse it; the engine does not rely on that
  op.shape = {1, (1 << 21) + 1, (1 << 21) + 1};
  builder.model.ops.push_back(op);
  try {
    Plan plan(load(std::move(builder.model)), {.measure = false});
    check(false, "too large a network is refused");
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find("too large") != std::string::npos, error.what());
  }
}

// A file of one linear layer without zeros, and what reads it.
std::string small_file(bool pixels) {
  const std::string values(reinterpret_cast<const char*>(std::array<float, 6>{1, 2, 3, 4, 5, 6}.data()), 24);
  const std::string vectors(reinterpret_cast<const char*>(std::array<float, 2>{0.5f, -100}.data()), 8);
  const auto hash = [](const std::string& bytes) { return sha256(bytes.data(), bytes.size()); };
  const std::string description =
      std::string(R"({"version":1,"input":{"shape":[3],"dtype":"float32")") +
      (pixels ? R"(,"mean":[0,0,0],"std":[1,1,1])" : "") +
      R"(},"values":"float32","ops":[{"op":"linear","shape":[2,3]},{"op":"relu"}],"classes":["a","b"],"sha256":{"values":")" +
      hash(values) + R"(","vectors":")" + hash(vectors) + R"("},"provenance":{},"licence":"none"})";
  std::string quoted;
  for (const char c : description) quoted += c == '"' ? std::string("\\\"") : std::string(1, c);
  const std::string header =
      R"({"__metadata__":{"pykd":")" + quoted + R"(","sha256":")" + hash(description) +
      R"("},"vectors":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"values":{"dtype":"F32","shape":[6],"data_offsets":[8,32]}})";
  const uint64_t size = header.size();
  std::string file(reinterpret_cast<const char*>(&size), 8);
  return file + header + vectors + values;
}

void test_c_api() {
  const auto fails = [](pykd_status got, pykd_status expected, const std::string& words) {
    check(got == expected, "status of: " + words);
    check(std::string(pykd_last_error()).find(words) != std::string::npos, words + " in: " + pykd_last_error());
  };
  pykd_model* model = nullptr;
  pykd_plan* plan = nullptr;
  check(std::string(pykd_version()) == PYKD_VERSION, "version");
  fails(pykd_model_load(nullptr, &model), PYKD_ERROR_ARGUMENT, "pykd_model_load needs all its pointers");
  fails(pykd_model_load("there/is/none", nullptr), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_load("there/is/none", &model), PYKD_ERROR_FILE, "there/is/none");
  check(model == nullptr, "no model of a failure");
  pykd_model* const garbage = reinterpret_cast<pykd_model*>(&model);
  model = garbage;
  fails(pykd_model_load(nullptr, &model), PYKD_ERROR_ARGUMENT, "null");
  check(model == nullptr, "nothing that looks like a model either");
  fails(pykd_model_load_bytes("nothing", 7, &model), PYKD_ERROR_FILE, "the bytes are no model file");
  const std::string file = small_file(false);
  check(pykd_model_load_bytes(file.data(), file.size(), &model) == PYKD_OK, std::string("loads: ") + pykd_last_error());
  if (!model) return;
  const int64_t* sides = nullptr;
  size_t rank = 0, classes = 0;
  int takes = 7;
  check(pykd_model_input_shape(model, &sides, &rank) == PYKD_OK && rank == 1 && sides[0] == 3, "input shape");
  check(pykd_model_output_shape(model, &sides, &rank) == PYKD_OK && rank == 1 && sides[0] == 2, "output shape");
  check(pykd_model_classes(model, &classes) == PYKD_OK && classes == 2, "classes");
  const char* name = nullptr;
  check(pykd_model_class(model, 1, &name) == PYKD_OK && std::string(name) == "b", "a class");
  check(pykd_model_takes_pixels(model, &takes) == PYKD_OK && takes == 0, "takes no pixels");
  fails(pykd_model_class(model, 2, &name), PYKD_ERROR_ARGUMENT, "2 classes");
  fails(pykd_model_input_shape(nullptr, &sides, &rank), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_output_shape(model, nullptr, &rank), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_classes(model, nullptr), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_model_takes_pixels(nullptr, &takes), PYKD_ERROR_ARGUMENT, "null");

  pykd_plan_options options = PYKD_PLAN_OPTIONS;
  fails(pykd_plan_create(nullptr, &options, &plan), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_plan_create(model, &options, nullptr), PYKD_ERROR_ARGUMENT, "null");
  options.size = 3;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "PYKD_PLAN_OPTIONS");
  options = PYKD_PLAN_OPTIONS;
  options.batch = -1;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "batch");
  options = PYKD_PLAN_OPTIONS;
  options.threads = 1'000'000;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "threads");
  options = PYKD_PLAN_OPTIONS;
  options.measure = 5;
  fails(pykd_plan_create(model, &options, &plan), PYKD_ERROR_ARGUMENT, "measure");
  check(plan == nullptr, "no plan of a failure");
  check(pykd_plan_create(model, nullptr, &plan) == PYKD_OK && plan, "a plan without options");
  if (!plan) return;
  pykd_model_free(model);
  const float input[3] = {1, 1, 1};
  float output[2] = {};
  check(pykd_plan_run(plan, input, 3, output, 2) == PYKD_OK && output[0] == 6.5f && output[1] == 0, "answers");
  fails(pykd_plan_run(plan, input, 2, output, 2), PYKD_ERROR_ARGUMENT,
        "reads 3 numbers and writes 2, got places for 2 and 2");
  fails(pykd_plan_run(plan, input, 3, output, 20), PYKD_ERROR_ARGUMENT, "got places for 3 and 20");
  fails(pykd_plan_run(plan, nullptr, 3, output, 2), PYKD_ERROR_ARGUMENT, "null");
  fails(pykd_plan_run(nullptr, input, 3, output, 2), PYKD_ERROR_ARGUMENT, "null");
  const uint8_t pixels[3] = {255, 0, 51};
  fails(pykd_plan_run_pixels(plan, pixels, 3, output, 2), PYKD_ERROR_ARGUMENT, "pixels");
  pykd_plan_free(plan);
  pykd_plan_free(nullptr);
  pykd_model_free(nullptr);

  const std::string other = small_file(true);
  check(pykd_model_load_bytes(other.data(), other.size(), &model) == PYKD_OK,
        std::string("loads: ") + pykd_last_error());
  if (!model) return;
  check(pykd_plan_create(model, nullptr, &plan) == PYKD_OK, "a plan of pixels");
  check(pykd_plan_run_pixels(plan, pixels, 3, output, 2) == PYKD_OK && std::abs(output[0] - 2.1f) < 1e-6f,
        "answers pixels");
  pykd_plan_free(plan);
  pykd_model_free(model);
}

}  // namespace

int main() {
  test_random_networks();
  test_forms();
  test_networks();
  test_pixels();
  test_nothing_is_allocated();
  test_plans_at_the_same_time();
  test_large_strides();
  test_large_batches();
  test_cache();
  test_refused_options();
  test_too_large();
  test_c_api();
  return report();
}
