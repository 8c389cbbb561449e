#include "runtime/model_file.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string_view>

#include "core/sparse_tiles.h"
#include "runtime/file.h"
#include "runtime/json.h"
#include "runtime/sha256.h"

namespace pykd::runtime {
namespace {

static_assert(std::endian::native == std::endian::little, "the file's numbers are little-endian");

constexpr uint64_t kLargestHeader = 16 << 20;
constexpr size_t kMostTensors = 65'536, kMostSteps = 65'536;
constexpr size_t kHighestRank = 8;
constexpr int64_t kLargestSide = 1 << 24;
constexpr int64_t kMostEntries = 1 << 28;  // of all dense weights together, and of all values of one row together
constexpr int64_t kMostBits = 16;
constexpr int64_t kLargestFile = int64_t{4} << 30;

using Shape = std::vector<int64_t>;

using runtime::text;
std::string text(int64_t number) { return std::to_string(number); }

// ---- the container -------------------------------------------------------------------------------------------------

struct Item {
  std::string_view dtype;
  int64_t bytes;
};
constexpr Item kItems[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I8", 1}, {"U8", 1}};

struct Tensor {
  std::string_view name;
  Item item;
  size_t rank;
  int64_t begin, end;  // bytes of the data
};

bool are_naturals(Json list) {
  return list.is(JsonType::kList) && list.all([](Json each) { return each.is_whole(0, INT64_MAX); });
}

Tensor read_place(std::string_view name, Json entry) {
  const std::string tensor = "tensor " + brief(name);
  Json dtype = entry, shape = entry, offsets = entry;
  if (!entry.is(JsonType::kObject) || entry.size() != 3 || !entry.find("dtype", dtype) || !entry.find("shape", shape) ||
      !entry.find("data_offsets", offsets)) {
    throw FormatError(tensor + " should have dtype, shape and data_offsets and nothing else");
  }
  const auto item = std::find_if(std::begin(kItems), std::end(kItems), [&](const Item& each) {
    return dtype.is(JsonType::kText) && each.dtype == dtype.text();
  });
  if (item == std::end(kItems)) throw FormatError(tensor + " should be of F32, F16, BF16, I8, U8, got " + brief(dtype));
  if (!are_naturals(shape) || shape.size() > kHighestRank) {
    throw FormatError(tensor + " should have at most " + text(kHighestRank) + " sides, got " + brief(shape));
  }
  if (!are_naturals(offsets) || offsets.size() != 2) {
    throw FormatError(tensor + " should have two offsets, got " + brief(offsets));
  }
  const int64_t begin = (*offsets.begin()).whole(), end = (*++offsets.begin()).whole();
  Shape sides{item->bytes};
  for (const Json side : shape) sides.push_back(side.whole());
  if (end - begin != product(sides) || end - begin == INT64_MAX) {
    throw FormatError(tensor + " of shape " + brief(shape) + " does not fill the bytes " + brief(offsets));
  }
  return {name, *item, shape.size(), begin, end};
}

// The tensors of a header in the order in which they lie; together they are the `size` bytes of data.
std::vector<Tensor> read_tensors(Json header, int64_t size) {
  std::vector<Tensor> tensors;
  for (auto each = header.begin(); each != header.end(); ++each) {
    const std::string_view name = (*each).text();
    ++each;
    if (name != "__metadata__") tensors.push_back(read_place(name, *each));
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const Tensor& a, const Tensor& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  int64_t end = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor.begin != end) {
      throw FormatError("tensor " + brief(tensor.name) + " should begin where the one before ends, " + text(end) +
                        ", got " + text(tensor.begin));
    }
    if (tensor.end > size) {
      throw FormatError("tensor " + brief(tensor.name) + " ends at byte " + text(tensor.end) + ", and the data after " +
                        text(size));
    }
    end = tensor.end;
  }
  if (end != size) {
    throw FormatError("its tensors end at byte " + text(end) + ", and the data after " + text(size));
  }
  return tensors;
}

// ---- the three tensors, of which every step takes its part from where the step before ended ------------------------

struct ValueType {
  std::string_view name, dtype;
};
constexpr ValueType kValues[] = {{"float32", "F32"}, {"float16", "F16"}, {"bfloat16", "BF16"}, {"int8", "I8"}};

float half(uint16_t bits) {
  const uint32_t size = bits & 0x7FFF;
  const float value =
      size < 0x400 ? static_cast<float>(size) * 0x1p-24f : std::bit_cast<float>((size << 13) + (uint32_t{112} << 23));
  return bits & 0x8000 ? -value : value;
}

template <typename T>
T load(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

class Stream {
 public:
  explicit Stream(const char* name) : name_(name) {}

  void fill(const unsigned char* bytes, int64_t size, int64_t item) {
    at_ = bytes;
    item_ = item;
    left_ = size / item;
  }

  const unsigned char* take(int64_t count) {
    if (count > left_) {
      throw FormatError(std::string("tensor '") + name_ + "' ends too early: a step needs " + text(count) +
                        " entries, " + text(left_) + " are left");
    }
    const unsigned char* taken = at_;
    at_ += count * item_;
    left_ -= count;
    return taken;
  }

  void check_end() const {
    if (left_)
      throw FormatError(std::string("tensor '") + name_ + "' has " + text(left_) + " entries that no step takes");
  }

  // Throws where one of what is left is NaN or infinite, given the bits of the exponent.
  template <typename T>
  void check_finite(T exponent) const {
    for (int64_t i = 0; i < left_; ++i) {
      if ((load<T>(at_ + i * item_) & exponent) == exponent) {
        throw FormatError(std::string("tensor '") + name_ + "' holds NaN or infinity");
      }
    }
  }

 private:
  const char* name_;
  const unsigned char* at_ = nullptr;
  int64_t item_ = 1, left_ = 0;
};

struct Streams {
  Stored stored;
  Stream vectors{"vectors"}, values{"values"}, indices{"indices"};

  std::vector<float> take_vector(int64_t count) {
    const unsigned char* from = vectors.take(count);
    std::vector<float> taken(static_cast<size_t>(count));
    if (count) std::memcpy(taken.data(), from, taken.size() * sizeof(float));
    return taken;
  }

  std::vector<float> take_values(int64_t count) {
    const unsigned char* from = values.take(count);
    std::vector<float> taken(static_cast<size_t>(count));
    for (float& value : taken) {
      switch (stored) {
        case Stored::kFloat32: value = load<float>(from), from += 4; break;
        case Stored::kFloat16: value = half(load<uint16_t>(from)), from += 2; break;
        case Stored::kBFloat16: value = std::bit_cast<float>(uint32_t{load<uint16_t>(from)} << 16), from += 2; break;
        case Stored::kInt8: value = static_cast<float>(load<int8_t>(from)), from += 1; break;
      }
    }
    return taken;
  }
};

Streams open_streams(const std::vector<Tensor>& tensors, Json values, const unsigned char* data) {
  Streams streams{};
  const auto type = std::find_if(std::begin(kValues), std::end(kValues), [&](const ValueType& each) {
    return values.is(JsonType::kText) && each.name == values.text();
  });
  if (type == std::end(kValues)) {
    throw FormatError("values should be one of float32, float16, bfloat16, int8, got " + brief(values));
  }
  streams.stored = static_cast<Stored>(type - std::begin(kValues));
  for (const Tensor& tensor : tensors) {
    const bool vectors = tensor.name == "vectors", indices = tensor.name == "indices";
    const std::string_view dtype = vectors ? "F32" : indices ? "U8" : type->dtype;
    if (tensor.item.dtype != dtype || tensor.rank != 1) {
      throw FormatError("tensor '" + std::string(tensor.name) + "' should be one row of " + std::string(dtype));
    }
    (vectors   ? streams.vectors
     : indices ? streams.indices
               : streams.values)
        .fill(data + tensor.begin, tensor.end - tensor.begin, tensor.item.bytes);
  }
  streams.vectors.check_finite(uint32_t{0x7F800000});
  switch (streams.stored) {
    case Stored::kFloat32: streams.values.check_finite(uint32_t{0x7F800000}); break;
    case Stored::kFloat16: streams.values.check_finite(uint16_t{0x7C00}); break;
    case Stored::kBFloat16: streams.values.check_finite(uint16_t{0x7F80}); break;
    case Stored::kInt8: break;
  }
  return streams;
}

// ---- the description's values --------------------------------------------------------------------------------------

using Names = std::initializer_list<std::string_view>;

bool contains(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

void check_keys(Json given, const Names& needed, const Names& optional, const std::string& what) {
  if (!given.is(JsonType::kObject)) throw FormatError(what + " should be a JSON object, got " + brief(given));
  for (const std::string_view name : needed) {
    if (Json found = given; !given.find(name, found)) {
      throw FormatError(what + " lacks the key '" + std::string(name) + "'");
    }
  }
  for (auto each = given.begin(); each != given.end(); ++ ++each) {
    const std::string_view name = (*each).text();
    if (!contains(needed, name) && !contains(optional, name)) {
      throw FormatError(what + " has the unknown key " + brief(name));
    }
  }
}

// The value of a key that is there.
Json entry(Json object, std::string_view key) {
  object.find(key, object);
  return object;
}

// The value of a key for a sentence.
std::string brief_entry(Json object, std::string_view key) { return object.find(key, object) ? brief(object) : "None"; }

bool are_sides(Json list, size_t least, size_t most, int64_t lowest) {
  return list.is(JsonType::kList) && list.size() >= least && list.size() <= most &&
         list.all([lowest](Json each) { return each.is_whole(lowest, kLargestSide); });
}

Shape read_shape(Json object, const std::string& what) {
  Json found = object;
  if (!object.find("shape", found) || !are_sides(found, 1, 4, 1)) {
    throw FormatError(what + " should have as shape 1 to 4 sides from 1 to " + text(kLargestSide) + ", got " +
                      brief_entry(object, "shape"));
  }
  Shape shape;
  for (const Json side : found) shape.push_back(side.whole());
  return shape;
}

bool is_text(Json value) { return value.is(JsonType::kText) && is_printable(value.text()); }

// Numbers below 1e30, one for each of `count` channels; false where they are none.
bool read_numbers(Json object, std::string_view key, int64_t count, std::vector<float>& numbers) {
  Json list = object;
  if (!object.find(key, list) || !list.is(JsonType::kList) || static_cast<int64_t>(list.size()) != count) return false;
  for (const Json each : list) {
    if (!each.is_number() || !(std::abs(each.number()) < 1e30)) return false;
    numbers.push_back(static_cast<float>(each.number()));
  }
  return true;
}

void read_input(Json input, Model& model) {
  check_keys(input, {"shape", "dtype"}, {"mean", "std"}, "input");
  model.input_shape = read_shape(input, "input");
  const Json dtype = entry(input, "dtype");
  if (!dtype.is(JsonType::kText) || dtype.text() != "float32") {
    throw FormatError("input should be of dtype float32, got " + brief(dtype));
  }
  if (input.size() == 2) return;
  const int64_t channels = model.input_shape[0];
  if (!read_numbers(input, "mean", channels, model.mean) || !read_numbers(input, "std", channels, model.std) ||
      !entry(input, "std").all([](Json each) { return each.number() > 0; })) {
    throw FormatError("input should have a mean and a positive std for each of " + text(channels) + " channels");
  }
}

// ---- the steps -----------------------------------------------------------------------------------------------------

struct Rules {
  Kind kind;
  const char* name;
  size_t inputs;  // 0: one or more
  Names options;
};

const Rules kRules[] = {
    {Kind::kLinear, "linear", 1, {}},
    {Kind::kConv2d, "conv2d", 1, {"stride", "padding", "dilation", "groups"}},
    {Kind::kRelu, "relu", 1, {}},
    {Kind::kTanh, "tanh", 1, {}},
    {Kind::kLeakyRelu, "leaky_relu", 1, {"slope"}},
    {Kind::kMaxPool2d, "max_pool2d", 1, {"kernel", "stride", "padding", "dilation", "ceil"}},
    {Kind::kAvgPool2d, "avg_pool2d", 1, {"kernel", "stride", "padding", "ceil", "count_padding"}},
    {Kind::kGlobalAvgPool, "global_avg_pool", 1, {}},
    {Kind::kAdd, "add", 2, {}},
    {Kind::kConcat, "concat", 0, {}},
    {Kind::kFlatten, "flatten", 1, {}},
    {Kind::kSoftmax, "softmax", 1, {}},
    {Kind::kAffine, "affine", 1, {}},
};

void read_option(Json step, std::string_view name, Op& op) {
  Json value = step;
  const bool given = step.find(name, value);
  const auto refuse = [&](const std::string& should) {
    throw FormatError(std::string(runtime::name(op.kind)) + " should have as " + std::string(name) + " " + should +
                      ", got " + brief_entry(step, name));
  };
  if (name == "ceil" || name == "count_padding") {
    if (!given) return;
    if (!value.is(JsonType::kBool)) refuse("true or false");
    (name == "ceil" ? op.ceil : op.count_padding) = value.boolean();
  } else if (name == "groups") {
    if (!given) return;
    if (!value.is_whole(1, kLargestSide)) refuse("a positive whole number");
    op.groups = value.whole();
  } else if (name == "slope") {
    if (!given) return;
    if (!value.is_number() || !std::isfinite(value.number())) refuse("a number");
    op.slope = value.number();
  } else {
    auto& pair = name == "kernel"    ? op.kernel
                 : name == "stride"  ? op.stride
                 : name == "padding" ? op.padding
                                     : op.dilation;
    if (!given && name != "kernel") {
      if (name == "stride") pair = op.kernel;  // a pool's; a convolution has left its kernel at ones
      return;
    }
    const int64_t lowest = name == "padding" ? 0 : 1;
    if (!given || !are_sides(value, 2, 2, lowest)) {
      refuse("two whole numbers from " + text(lowest) + " to " + text(kLargestSide));
    }
    pair = {(*value.begin()).whole(), (*++value.begin()).whole()};
  }
}

// Which places of a grid have a block: docs/model_file.md, the codes.
class Codes {
 public:
  Codes(int64_t bits, int64_t codes, const unsigned char* bytes) : bits_(bits), codes_(codes), bytes_(bytes) {}

  // Calls found(place) in ascending order; returns the place after the last code's.
  template <typename Found>
  int64_t walk(Found found) const {
    const uint64_t escape = (uint64_t{1} << bits_) - 1;
    int64_t place = 0, at = 0, held = 0;
    uint64_t pool = 0;  // the next `held` bits
    for (int64_t i = 0; i < codes_; ++i) {
      for (; held < bits_; held += 8) pool |= uint64_t{bytes_[at++]} << held;
      const uint64_t code = pool & escape;
      pool >>= bits_;
      held -= bits_;
      place += static_cast<int64_t>(code);
      if (code < escape) {
        found(place++);
      } else if (i == codes_ - 1) {
        throw FormatError("the last code leads to no position");
      }
    }
    if (pool) throw FormatError("the last byte is not filled up with zeros");
    return place;
  }

 private:
  int64_t bits_, codes_;
  const unsigned char* bytes_;
};

// Applies int8's scales, and checks what reaches over the edge. Zeros lose their sign but in float blocks.
void finish_values(Weight& weight, const std::vector<float>& scales, int64_t rows, int64_t columns) {
  const int64_t high = weight.dense ? 1 : weight.block_rows, wide = weight.dense ? columns : weight.block_columns;
  const int64_t across = ceil_div(columns, wide);
  float* value = weight.values.data();
  const int64_t blocks = weight.dense ? rows : static_cast<int64_t>(weight.positions.size());
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t place = weight.dense ? block : weight.positions[static_cast<size_t>(block)];
    const int64_t top = place / across * high, left = place % across * wide;
    for (int64_t row = top; row < top + high; ++row) {
      for (int64_t column = left; column < left + wide; ++column, ++value) {
        if (row >= rows || column >= columns) {
          if (*value != 0) throw FormatError("blocks should be zero where they reach over the weight's edge");
          continue;
        }
        if (!scales.empty()) *value *= scales[static_cast<size_t>(row)];
        if (!std::isfinite(*value)) throw FormatError("a sparse weight should be finite: it holds NaN or infinity");
        if (*value == 0 && (weight.dense || !scales.empty())) *value = 0;
      }
    }
  }
}

Weight read_weight(Json step, const char* kind, size_t sides, Streams& streams, int64_t most) {
  Weight weight;
  weight.shape = read_shape(step, kind);
  if (weight.shape.size() != sides) {
    throw FormatError(std::string(kind) + " has a weight of " + std::to_string(weight.shape.size()) + " sides");
  }
  const int64_t entries = product(weight.shape);
  if (entries > most) throw FormatError("all weights together should have at most " + text(kMostEntries) + " entries");
  const int64_t rows = weight.shape[0], columns = entries / rows;
  if (Json block = step; step.find("block", block)) {
    if (!are_sides(block, 2, 2, 1)) {
      throw FormatError("block should be two whole numbers from 1 to " + text(kLargestSide) + ", got " + brief(block));
    }
    weight.block_rows = std::min(rows, (*block.begin()).whole());
    weight.block_columns = std::min(columns, (*++block.begin()).whole());
  }
  const int64_t high = weight.block_rows, wide = weight.block_columns;
  const int64_t down = ceil_div(rows, high), across = ceil_div(columns, wide), places = down * across;
  const auto scales = streams.stored == Stored::kInt8 ? streams.take_vector(rows) : std::vector<float>();
  Json bits = step, codes = step;
  const bool has_bits = step.find("bits", bits), has_codes = step.find("codes", codes);
  weight.dense = !has_bits && !has_codes;
  if (weight.dense) {
    weight.values = streams.take_values(entries);
  } else {
    if (!has_bits || !has_codes || !bits.is_whole(1, kMostBits) || !codes.is_whole(0, places)) {
      throw FormatError("bits and codes should be those of " + text(places) + " places, got [" +
                        brief_entry(step, "bits") + ", " + brief_entry(step, "codes") + "]");
    }
    const int64_t bytes = ceil_div(bits.whole() * codes.whole(), 8);
    const Codes stream(bits.whole(), codes.whole(), streams.indices.take(bytes));
    int64_t stored = 0;
    const int64_t end = stream.walk([&stored](int64_t) { ++stored; });
    if (end > places) throw FormatError("a position should be below " + text(places) + ", got " + text(end - 1));
    weight.values = streams.take_values(stored * high * wide);
    weight.positions.reserve(static_cast<size_t>(stored));
    stream.walk([&weight](int64_t place) { weight.positions.push_back(place); });
  }
  finish_values(weight, scales, rows, columns);
  return weight;
}

// How often a kernel fits each side; with ceil, a last window that begins within the image or its padding counts.
Shape windows(const Op& op, const Shape& image, int64_t channels, const std::array<int64_t, 2>& kernel) {
  Shape shape{channels};
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t side = image[axis + 1], stride = op.stride[axis], padding = op.padding[axis];
    const int64_t room = side + 2 * padding - op.dilation[axis] * (kernel[axis] - 1) - 1;
    if (room < 0) {
      throw FormatError(std::string(name(op.kind)) + "'s kernel is larger than its image " +
                        text(Shape{image[1], image[2]}));
    }
    int64_t count = room / stride + 1;
    if (op.ceil && room % stride && count * stride < side + padding) ++count;
    shape.push_back(count);
  }
  return shape;
}

// The shape of a result; `shapes` are those of all earlier values.
Shape result_shape(const Op& op, const std::vector<Shape>& shapes) {
  const std::string kind = name(op.kind);
  const auto input = [&](size_t i) -> const Shape& { return shapes[static_cast<size_t>(op.inputs[i])]; };
  const Shape& first = input(0);
  const auto does_not_take = [&](const std::string& what) {
    throw FormatError(kind + " of " + what + " does not take " + text(first));
  };
  const bool needs_image = op.kind == Kind::kConv2d || op.kind == Kind::kMaxPool2d || op.kind == Kind::kAvgPool2d ||
                           op.kind == Kind::kGlobalAvgPool;
  if (needs_image && first.size() != 3) {
    throw FormatError(kind + " needs an image [channels, height, width], got " + text(first));
  }
  const Shape& weight = op.weight.shape;
  switch (op.kind) {
    case Kind::kLinear:
      if (first != Shape{weight[1]}) does_not_take("a weight " + text(weight));
      return {weight[0]};
    case Kind::kConv2d:
      if (first[0] != weight[1] * op.groups || weight[0] % op.groups) {
        does_not_take("a weight " + text(weight) + " in " + text(op.groups) + " groups");
      }
      return windows(op, first, weight[0], {weight[2], weight[3]});
    case Kind::kMaxPool2d:
    case Kind::kAvgPool2d:
      if (2 * op.padding[0] > op.kernel[0] || 2 * op.padding[1] > op.kernel[1]) {
        throw FormatError(kind + " should be padded by half its kernel at most");
      }
      return windows(op, first, first[0], op.kernel);
    case Kind::kGlobalAvgPool: return {first[0], 1, 1};
    case Kind::kConcat: {
      Shape shape = first;
      for (size_t i = 1; i < op.inputs.size(); ++i) {
        const Shape& other = input(i);
        if (!std::equal(first.begin() + 1, first.end(), other.begin() + 1, other.end())) {
          throw FormatError("concat needs inputs that differ in their first side alone, got " + text(first) + " and " +
                            text(other));
        }
        shape[0] += other[0];
      }
      return shape;
    }
    case Kind::kFlatten: return {product(first)};
    case Kind::kAffine:
      if (static_cast<int64_t>(op.scale.size()) != first[0])
        does_not_take(std::to_string(op.scale.size()) + " channels");
      return first;
    case Kind::kAdd:
      if (input(1) != first) {
        throw FormatError("add needs inputs of one shape, got " + text(first) + " and " + text(input(1)));
      }
      return first;
    case Kind::kRelu:
    case Kind::kTanh:
    case Kind::kLeakyRelu:
    case Kind::kSoftmax: break;
  }
  return first;
}

// The operator of a step, which takes its part of the streams; its weight has at most `most` entries.
Op read_step(Json step, const std::vector<Shape>& shapes, Streams& streams, int64_t most) {
  const std::string in_step = " in step " + std::to_string(shapes.size());
  Json kind = step;
  const bool has_kind = step.is(JsonType::kObject) && step.find("op", kind) && kind.is(JsonType::kText);
  const auto rules = std::find_if(std::begin(kRules), std::end(kRules),
                                  [&](const Rules& each) { return has_kind && kind.text() == each.name; });
  if (rules == std::end(kRules)) {
    std::string names;
    for (const Rules& each : kRules) names += std::string(names.empty() ? "" : ", ") + each.name;
    throw FormatError("step " + std::to_string(shapes.size()) + " should be one of " + names + ", got " +
                      (step.is(JsonType::kObject) ? brief_entry(step, "op") : brief(step)));
  }
  Op op{};
  op.kind = rules->kind;
  const int earlier = static_cast<int>(shapes.size()) - 1;
  if (Json inputs = step; step.find("in", inputs)) {
    const auto is_earlier = [earlier](Json each) { return each.is_whole(0, earlier); };
    if (!inputs.is(JsonType::kList) || !inputs.all(is_earlier)) {
      throw FormatError(rules->name + in_step + " should read earlier values, got " + brief(inputs));
    }
    if (rules->inputs ? inputs.size() != rules->inputs : inputs.size() == 0) {
      throw FormatError(rules->name + in_step + " has " + std::to_string(inputs.size()) + " inputs");
    }
    op.inputs.reserve(inputs.size());
    for (const Json each : inputs) op.inputs.push_back(static_cast<int>(each.whole()));
  } else if (rules->inputs > 1) {
    throw FormatError(rules->name + in_step + " has 1 inputs");
  } else {
    op.inputs = {earlier};
  }
  try {
    const bool weighted = op.kind == Kind::kLinear || op.kind == Kind::kConv2d;
    for (auto each = step.begin(); each != step.end(); ++ ++each) {
      const std::string_view key = (*each).text();
      if (key != "op" && key != "in" && !contains(rules->options, key) &&
          !(weighted && contains({"shape", "block", "bits", "codes", "bias"}, key))) {
        throw FormatError(std::string(rules->name) + " has no option " + brief(key));
      }
    }
    for (const std::string_view option : rules->options) read_option(step, option, op);
    if (weighted) {
      op.weight = read_weight(step, rules->name, op.kind == Kind::kLinear ? 2 : 4, streams, most);
      Json bias = step;
      const bool given = step.find("bias", bias);
      if (given && !bias.is(JsonType::kBool)) throw FormatError("bias should be true or false, got " + brief(bias));
      if (!given || bias.boolean()) op.bias = streams.take_vector(op.weight.shape[0]);
    } else if (op.kind == Kind::kAffine) {
      const int64_t channels = shapes[static_cast<size_t>(op.inputs[0])][0];
      op.scale = streams.take_vector(channels);
      op.bias = streams.take_vector(channels);
    }
    op.shape = result_shape(op, shapes);
  } catch (const FormatError& error) {
    throw FormatError(error.what() + in_step);
  }
  return op;
}

}  // namespace

std::string text(const Shape& shape) {
  std::string sides;
  for (const int64_t side : shape) sides += (sides.empty() ? "" : ", ") + std::to_string(side);
  return "[" + sides + "]";
}

int64_t product(const Shape& sides) {
  int64_t result = 1;
  bool over = false;
  for (const int64_t side : sides) {
    if (side == 0) return 0;
    over = over || __builtin_mul_overflow(result, side, &result);
  }
  return over ? INT64_MAX : result;
}

const char* name(Kind kind) {
  return std::find_if(std::begin(kRules), std::end(kRules), [kind](const Rules& each) { return each.kind == kind; })
      ->name;
}

Model parse_model(const unsigned char* bytes, size_t size) {
  if (size < sizeof(uint64_t)) {
    throw FormatError("it has " + std::to_string(size) + " bytes, too few for a safetensors file");
  }
  const auto length = load<uint64_t>(bytes);
  const size_t rest = size - sizeof length;
  if (length > kLargestHeader) {
    throw FormatError("its header should have at most " + std::to_string(kLargestHeader) + " bytes, got " +
                      std::to_string(length));
  }
  if (length > rest) {
    throw FormatError("its header should have " + std::to_string(length) + " bytes, and only " + std::to_string(rest) +
                      " follow");
  }
  const unsigned char* data = bytes + sizeof length + length;
  const Document header({reinterpret_cast<const char*>(bytes + sizeof length), length}, "the header");
  Json metadata = header.root();
  const bool has_metadata = header.root().find("__metadata__", metadata);
  if (has_metadata) {
    bool words = metadata.is(JsonType::kObject);
    if (words) words = metadata.all([](Json each) { return each.is(JsonType::kText); });
    if (!words) throw FormatError("__metadata__ should map words to words");
  }
  if (const size_t count = header.root().size() - has_metadata; count > kMostTensors) {
    throw FormatError("it should hold at most " + std::to_string(kMostTensors) + " tensors, got " +
                      std::to_string(count));
  }
  const std::vector<Tensor> tensors = read_tensors(header.root(), static_cast<int64_t>(rest - length));
  Json description = metadata, hash = metadata;
  if (!has_metadata || metadata.size() != 2 || !metadata.find("pykd", description) || !metadata.find("sha256", hash)) {
    throw FormatError("its metadata should have the keys 'pykd' and 'sha256' and no other");
  }
  if (hash.text() != sha256(description.text().data(), description.text().size())) {
    throw FormatError("its description was changed: its SHA-256 is another");
  }
  for (const Tensor& tensor : tensors) {
    if (!contains({"vectors", "values", "indices"}, tensor.name)) {
      throw FormatError("its tensors should be vectors, values, indices, got " + brief(tensor.name));
    }
  }

  const Document document(description.text(), "its description");
  const Json root = document.root();
  Json found = root;
  if (!root.find("version", found) || !found.is_whole(1, 1)) {
    throw FormatError("its format should have version 1, got " + brief_entry(root, "version") +
                      "; another pykd may read it");
  }
  check_keys(root, {"version", "input", "values", "ops", "classes", "sha256", "provenance", "licence"}, {},
             "its description");
  const Json hashes = entry(root, "sha256");
  if (!hashes.is(JsonType::kObject) || hashes.size() != tensors.size() ||
      !std::all_of(tensors.begin(), tensors.end(),
                   [&](const Tensor& tensor) { return hashes.find(tensor.name, found); })) {
    throw FormatError("sha256 should have an entry for each tensor and no other");
  }
  for (const Tensor& tensor : tensors) {
    found = entry(hashes, tensor.name);
    if (!found.is(JsonType::kText) ||
        found.text() != sha256(data + tensor.begin, static_cast<size_t>(tensor.end - tensor.begin))) {
      throw FormatError("tensor '" + std::string(tensor.name) + "' was changed: its SHA-256 is another");
    }
  }

  Model model{};
  model.file_bytes = static_cast<int64_t>(size);
  Streams streams = open_streams(tensors, entry(root, "values"), data);
  model.stored = streams.stored;
  read_input(entry(root, "input"), model);
  const Json steps = entry(root, "ops");
  if (!steps.is(JsonType::kList) || steps.size() > kMostSteps) {
    throw FormatError("ops should be a list of at most " + std::to_string(kMostSteps) + " steps");
  }
  int64_t entries = 0, weights = 0;
  std::vector<Shape> shapes;
  const auto add = [&](const Shape& shape) {
    const int64_t more = product(shape);
    if (more > kMostEntries - entries) {
      throw FormatError("the values of one row should have at most " + text(kMostEntries) + " entries in all");
    }
    entries += more;
    shapes.push_back(shape);
  };
  shapes.reserve(steps.size() + 1);
  model.ops.reserve(steps.size());
  add(model.input_shape);
  for (const Json step : steps) {
    model.ops.push_back(read_step(step, shapes, streams, kMostEntries - weights));
    const Op& op = model.ops.back();
    add(op.shape);
    if (!op.weight.shape.empty()) weights += product(op.weight.shape);
  }
  streams.vectors.check_end();
  streams.values.check_end();
  streams.indices.check_end();

  const Json classes = entry(root, "classes"), provenance = entry(root, "provenance"), licence = entry(root, "licence");
  const auto answers = static_cast<size_t>(shapes.back()[0]);
  if (!classes.is(JsonType::kList) || !classes.all(is_text) || (classes.size() != 0 && classes.size() != answers)) {
    throw FormatError("classes should be words, none or one for each of " + std::to_string(answers) + " answers");
  }
  for (const Json each : classes) model.classes.emplace_back(each.text());
  const auto refuse_provenance = [] { throw FormatError("provenance should map words to words and whole numbers"); };
  if (!provenance.is(JsonType::kObject)) refuse_provenance();
  for (auto each = provenance.begin(); each != provenance.end(); ++each) {
    const Json key = *each, value = *++each;
    const bool whole = value.is(JsonType::kWhole);
    if (!is_text(key) || !(whole || value.is(JsonType::kLargeWhole) || is_text(value))) refuse_provenance();
    model.provenance.emplace_back(key.text(), whole ? text(value.whole()) : std::string(value.text()));
  }
  if (!is_text(licence)) throw FormatError("licence should be a line of text");
  model.licence = licence.text();
  return model;
}

Model read_model(const char* path) {
  const Bytes bytes = read_file(path, kLargestFile, "model file");
  try {
    return parse_model(bytes.data.get(), bytes.size);
  } catch (const FormatError& error) {
    throw FormatError(std::string(path) + " is no model file of pykd, or was damaged: " + error.what() +
                      "; export it anew");
  }
}

}  // namespace pykd::runtime
