#include "runtime/program.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace pykd::runtime {
namespace {

constexpr double kMostFloats = 0x1p38;     // 2^40 bytes
constexpr double kMostGroup = 0x1p31 - 1;  // floats of a group, which int32 offsets reach
constexpr int64_t kCached = 64 * 1024;     // floats of a part of the batch, which stay in a core's second cache
constexpr int64_t kShort = 256;            // floats of a channel that is not worth a call of its own

// What stands for the caller's memory while a program is built.
float caller_input, caller_output;

// A value's row as channels of an image.
struct Sides {
  int64_t channels, height, width;
  bool operator==(const Sides&) const = default;
  int64_t features() const { return channels * height * width; }
};

Sides sides_of(const std::vector<int64_t>& shape) {
  Sides sides{shape[0], 1, 1};
  for (size_t i = 1; i + 1 < shape.size(); ++i) sides.height *= shape[i];
  if (shape.size() > 1) sides.width = shape.back();
  return sides;
}

Conv2dGeometry geometry_of(const Op& op, const Sides& image) {
  return {image.channels, image.height,  image.width,   op.weight.shape[2], op.weight.shape[3], op.stride[0],
          op.stride[1],   op.padding[0], op.padding[1], op.dilation[0],     op.dilation[1]};
}

bool has_stride(const Op& op) { return op.stride[0] > 1 || op.stride[1] > 1; }

double floats_of(const PlaneLayout& l) {
  const auto side = [](const PlaneSide& s) { return static_cast<double>(s.phases) * static_cast<double>(s.places); };
  return static_cast<double>(l.channels) * side(l.vertical) * side(l.horizontal) * static_cast<double>(l.lanes);
}

// Where a value lies in memory.
struct Storage {
  PlaneLayout layout;
  float* caller = nullptr;    // the caller's
  int first = -1, last = -1;  // steps that use it
  int64_t offset = 0;         // floats from the memory's begin

  bool has_borders() const { return !layout.vertical.filled() || !layout.horizontal.filled(); }
};

// A value as its readers see it.
struct View {
  Sides sides;
  Plane plane;
};

std::shared_ptr<char> host_memory(size_t bytes) {
  std::shared_ptr<char> memory(aligned_bytes(bytes).release(), AlignedDelete());
  std::memset(memory.get(), 0, bytes);
  return memory;
}

}  // namespace

// Which steps a program has, and where their values lie.
class Program::Builder {
 public:
  Builder(Program& program, const Network& network) : p_(program), network_(network), model_(network.model()) {
    find_readers();
    find_storages();
    emit();  // who uses what when
  }

  // Floats of one group that are needed at the same time.
  int64_t group() const {
    std::vector<double> change(static_cast<size_t>(step_) + 2);
    for (const Storage& s : storages_) {
      if (s.caller || s.first < 0) continue;
      change[static_cast<size_t>(s.first)] += floats_of(s.layout);
      change[static_cast<size_t>(s.last) + 1] -= floats_of(s.layout);
    }
    double most = 1, floats = 0;
    for (const double each : change) most = std::max(most, floats += each);
    return static_cast<int64_t>(std::min(most, kMostFloats));
  }

  void build(int64_t rows) {
    groups_ = ceil_div(rows, p_.lanes_);
    rows_ = rows;
    place();
    const size_t bytes = std::max<size_t>(p_.floats_, 1) * sizeof(float);
    p_.memory_ = p_.cuda_ ? p_.cuda_->memory(bytes) : host_memory(bytes);  // zeros: the borders stay so
    memory_ = reinterpret_cast<float*>(p_.memory_.get());
    p_.steps_.clear();
    p_.offsets_.clear();
    emit();
    bind();
  }

 private:
  const Op& op(int k) const { return model_.ops[static_cast<size_t>(k)]; }
  int last() const { return static_cast<int>(model_.ops.size()); }
  static bool is_layer(const Op& op) { return op.kind == Kind::kLinear || op.kind == Kind::kConv2d; }
  Sides sides(int value) const { return sides_of(network_.shape(value)); }
  static auto& of(auto& all, int i) { return all[static_cast<size_t>(i)]; }

  // Steps whose results nobody reads are left out.
  void find_readers() {
    const auto values = model_.ops.size() + 1;
    live_.assign(values, 0);
    readers_.assign(values, 0);
    read_by_relu_.assign(values, false);
    padding_.assign(values, {0, 0});
    convolved_.assign(values, false);
    of(live_, last()) = true;
    of(readers_, last()) = 1;  // the caller
    for (int k = last() - 1; k >= 0; --k) {
      if (!of(live_, k + 1)) continue;
      std::vector<int> inputs = op(k).inputs;
      std::ranges::sort(inputs);
      inputs.erase(std::unique(inputs.begin(), inputs.end()), inputs.end());
      for (const int value : inputs) {
        of(live_, value) = true;
        ++of(readers_, value);
        of(read_by_relu_, value) = op(k).kind == Kind::kRelu;
        if (op(k).kind != Kind::kConv2d || has_stride(op(k))) continue;
        of(convolved_, value) = true;
        for (size_t side = 0; side < 2; ++side)
          of(padding_, value)[side] = std::max(of(padding_, value)[side], op(k).padding[side]);
      }
    }
  }

  // A layer's only reader is a ReLU, which it does itself.
  bool fuses(int k) const { return is_layer(op(k)) && of(readers_, k + 1) == 1 && of(read_by_relu_, k + 1); }
  bool is_fused(int k) const {
    const int from = op(k).inputs[0];
    return op(k).kind == Kind::kRelu && from > 0 && fuses(from - 1);
  }
  // A flatten that is none: the value lies without borders.
  bool is_view(int k) const {
    return op(k).kind == Kind::kFlatten && of(padding_, op(k).inputs[0]) == std::array<int64_t, 2>{0, 0};
  }

  int new_storage(const PlaneLayout& layout) {
    if (floats_of(layout) > kMostGroup)
      throw std::invalid_argument(
          "the network is too large for the engine: a value with its padding has more than 2^31 numbers; use smaller "
          "images, fewer channels or less padding");
    storages_.push_back({.layout = layout});
    return static_cast<int>(storages_.size()) - 1;
  }

  PlaneLayout home(int value) const {
    const Sides s = sides(value);
    const auto [high, wide] = of(padding_, value);
    // One more row closes the last row's shared border, as in conv2d_planes.
    return {s.channels,
            p_.lanes_,
            {s.height, high, 1, 1, s.height + 2 * high + (wide ? 1 : 0)},
            {s.width, wide, 1, 1, s.width + wide}};
  }

  // Values that follow upon one another in one place have one storage.
  void find_storages() {
    storage_.assign(model_.ops.size() + 1, -1);
    storage_[0] = new_storage(home(0));
    std::vector<char> may_write(model_.ops.size() + 1, false);  // whoever alone reads it, in its place
    for (int k = 0; k < last(); ++k) {
      if (!of(live_, k + 1)) continue;
      int storage = -1;
      const int from = op(k).inputs[0];
      if (is_fused(k) || is_view(k)) {
        storage = of(storage_, from);
        of(may_write, k + 1) = of(may_write, from) && of(readers_, k + 1) == 1;
      } else {
        of(may_write, k + 1) = of(readers_, k + 1) == 1;
        switch (op(k).kind) {
          case Kind::kRelu:
          case Kind::kTanh:
          case Kind::kLeakyRelu:
          case Kind::kAdd:
          case Kind::kAffine:
          case Kind::kSoftmax:
            for (const int value : op(k).inputs)
              if (of(may_write, value)) storage = of(storage_, value);
            break;
          default: break;
        }
      }
      if (storage < 0)
        storage = new_storage(home(k + 1));
      else if (of(padding_, k + 1) != std::array<int64_t, 2>{0, 0})  // of the last of them alone
        of(storages_, storage).layout = home(k + 1);
      of(storage_, k + 1) = storage;
    }
    // Of one lane a row lies as the caller's does. But convolutions read beyond what they are given, and parts of a
    // concatenation begin anywhere; of CUDA the caller's memory is the processor's, too, which is read but once.
    if (p_.lanes_ > 1) return;
    std::vector<char> own(storages_.size(), false);
    for (int value = 0; value <= last(); ++value)
      if (of(live_, value) && (of(convolved_, value) || (value && op(value - 1).kind == Kind::kConcat)))
        of(own, of(storage_, value)) = true;
    if (p_.cuda_) own[0] = true;
    if (!own[0]) storages_[0].caller = &caller_input;
    if (const int answer = of(storage_, last()); answer != 0 && !of(own, answer))
      of(storages_, answer).caller = &caller_output;
  }

  // ---- memory ------------------------------------------------------------------------------------------------------

  int64_t size_of(const Storage& s) const { return ceil_div(groups_ * s.layout.group_stride() + kPlaneSlack, 16) * 16; }

  // The largest first, each at the lowest place where none lies that is needed at the same time. Those with borders,
  // which are written once, share a place with those alone whose borders are the same.
  void place() {
    struct Slot {
      int64_t size;
      int first, last;
      std::vector<Storage*> storages;
      int64_t offset = 0;
    };
    std::vector<Slot> slots;
    double floats = 0;
    for (Storage& s : storages_) {
      if (s.caller || s.first < 0) continue;
      floats += static_cast<double>(groups_) * floats_of(s.layout) + kPlaneSlack;
      if (floats > kMostFloats)
        throw std::invalid_argument("the network needs more than 2^40 bytes for its values: use a smaller batch");
      const bool borders = s.has_borders();
      const auto same = [&](const Slot& slot) {
        const Storage& other = *slot.storages.back();
        return borders && other.has_borders() && other.last < s.first && other.layout == s.layout;
      };
      const auto slot = std::ranges::find_if(slots, same);
      if (slot != slots.end())
        slot->storages.push_back(&s);
      else
        slots.push_back({size_of(s), borders ? 0 : s.first, borders ? step_ : s.last, {&s}});
    }
    std::ranges::stable_sort(slots, std::greater(), &Slot::size);
    std::vector<const Slot*> placed;  // by offset
    int64_t end = 0;
    for (Slot& slot : slots) {
      for (const Slot* other : placed) {
        if (other->last < slot.first || slot.last < other->first) continue;
        if (slot.offset + slot.size <= other->offset) break;
        slot.offset = std::max(slot.offset, other->offset + other->size);
      }
      placed.insert(std::ranges::upper_bound(placed, slot.offset, {}, &Slot::offset), &slot);
      for (Storage* s : slot.storages) s->offset = slot.offset;
      end = std::max(end, slot.offset + slot.size);
    }
    p_.floats_ = static_cast<size_t>(end);
  }

  float* memory_of(int storage) {
    Storage& s = of(storages_, storage);
    if (s.first < 0) s.first = step_;
    s.last = std::max(s.last, step_);
    if (s.caller) return s.caller;
    return memory_ ? memory_ + s.offset : nullptr;
  }

  // Of a value. Nothing is added to a pointer that is none yet.
  View view(int value) {
    const Storage& s = of(storages_, of(storage_, value));
    float* const data = memory_of(of(storage_, value));
    const Sides mine = sides(value);
    const PlaneLayout& l = s.layout;
    const bool as_stored = mine == Sides{l.channels, l.vertical.length, l.horizontal.length};
    const int64_t row = as_stored ? l.row_stride() : mine.width * p_.lanes_;
    const int64_t channel = as_stored ? l.channel_stride() : mine.height * row;
    const int64_t origin = as_stored ? l.vertical.padding * row + l.horizontal.padding * p_.lanes_ : 0;
    return {mine, {data && origin ? data + origin : data, l.group_stride(), channel, row}};
  }

  // What steps read beside their values, where they run.
  template <typename T>
  const T* constants(const std::vector<T>& values) {
    if (!p_.cuda_ || !memory_) return values.data();
    return static_cast<const T*>(p_.cuda_->copied(values.data(), values.size() * sizeof(T)));
  }

  // ---- steps -------------------------------------------------------------------------------------------------------

  template <typename Work>
  Step& add(int k, const Work& work, int64_t units) {
    ++step_;
    p_.steps_.push_back({.op = k, .work = work, .units = units});
    return p_.steps_.back();
  }

  // Twice: to see what is used when, and then with the memory.
  void emit() {
    step_ = 0;
    repacked_.clear();
    if (!storages_[0].caller && of(readers_, 0) > 0 && is_input_packed()) pack_input(of(storage_, 0));
    for (int k = 0; k < last(); ++k)
      if (of(live_, k + 1) && !is_fused(k) && !is_view(k)) emit(k);
    if (of(storages_, of(storage_, last())).caller == &caller_output) return;
    const View answer = view(last());
    const int64_t features = answer.sides.features();
    if (answer.plane.data == &caller_input) {
      Elementwise copy = elementwise(Function::kCopy, answer, answer);
      copy.output.data = &caller_output;
      add(-1, copy, copy.channels);
      return;
    }
    add(-1,
        UnpackPlanes{answer.plane.data, &caller_output, rows_, feature_planes(features, p_.lanes_), DType::kFloat32},
        1);
  }

  // Strides want planes of their own, which are packed from the caller's rows.
  bool is_input_packed() const {
    if (last() == 0) return true;
    for (int k = 0; k < last(); ++k) {
      const auto reads = std::ranges::count(op(k).inputs, 0) > 0;
      if (of(live_, k + 1) && reads && !(op(k).kind == Kind::kConv2d && has_stride(op(k)))) return true;
    }
    return false;
  }

  void pack_input(int storage) {
    PlaneLayout layout = of(storages_, storage).layout;
    if (!of(storages_, storage).has_borders()) {  // the transposed squares are filled
      const int64_t pixels = layout.vertical.length * layout.horizontal.length;
      layout = layout.channels > 1 && pixels < 16
                   ? feature_planes(layout.channels * pixels, p_.lanes_)
                   : PlaneLayout{layout.channels, p_.lanes_, {1, 0, 1, 1, 1}, {pixels, 0, 1, 1, pixels}};
    }
    float* const to = memory_of(storage);
    add(-1, PackPlanes{&caller_input, to, rows_, layout, DType::kFloat32}, layout.channels);
  }

  static bool is_dense(const View& v, int64_t lanes) {
    return v.plane.row_stride == v.sides.width * lanes && v.plane.channel_stride == v.sides.height * v.plane.row_stride;
  }

  // Channels that are short and lie side by side are one.
  Elementwise elementwise(Function function, const View& input, const View& output, const View* other = nullptr) const {
    Sides s = output.sides;
    Elementwise work{};
    work.input = input.plane;
    work.other = other ? other->plane : input.plane;
    work.output = output.plane;
    const bool dense =
        is_dense(input, p_.lanes_) && is_dense(output, p_.lanes_) && (!other || is_dense(*other, p_.lanes_));
    if (function != Function::kAffine && dense && s.height * s.width * p_.lanes_ < kShort) {
      s = {1, 1, s.features()};
      for (Plane* plane : {&work.input, &work.other, &work.output})
        plane->row_stride = plane->channel_stride = s.width * p_.lanes_;
    }
    work.channels = s.channels;
    work.lanes = p_.lanes_;
    work.height = s.height;
    work.width = s.width;
    work.function = function;
    return work;
  }

  void emit(int k) {
    const Op& it = op(k);
    if (it.kind == Kind::kConv2d) return emit_conv2d(k);
    const View input = view(it.inputs[0]), output = view(k + 1);
    switch (it.kind) {
      case Kind::kLinear: return emit_linear(k, input, output);
      case Kind::kRelu: return add_elementwise(k, elementwise(Function::kRelu, input, output));
      case Kind::kTanh: return add_elementwise(k, elementwise(Function::kTanh, input, output));
      case Kind::kLeakyRelu: {
        Elementwise work = elementwise(Function::kLeakyRelu, input, output);
        work.slope = static_cast<float>(it.slope);
        return add_elementwise(k, work);
      }
      case Kind::kAffine: {
        Elementwise work = elementwise(Function::kAffine, input, output);
        work.scale = constants(it.scale);
        work.shift = constants(it.bias);
        return add_elementwise(k, work);
      }
      case Kind::kAdd: {
        const View other = view(it.inputs[1]);
        return add_elementwise(k, elementwise(Function::kAdd, input, output, &other));
      }
      case Kind::kFlatten: {  // of a value that lies with borders
        View flat = output;
        flat.sides = input.sides;
        flat.plane.row_stride = input.sides.width * p_.lanes_;
        flat.plane.channel_stride = input.sides.height * flat.plane.row_stride;
        return add_elementwise(k, elementwise(Function::kCopy, input, flat));
      }
      case Kind::kConcat: {
        View part = output;
        for (const int value : it.inputs) {
          const View from = view(value);
          part.sides.channels = from.sides.channels;
          view(k + 1);
          add_elementwise(k, elementwise(Function::kCopy, from, part));
          if (part.plane.data) part.plane.data += part.sides.channels * part.plane.channel_stride;
        }
        return;
      }
      case Kind::kSoftmax: {
        const Sides s = input.sides;
        add(k, Softmax{input.plane, output.plane, s.channels, p_.lanes_, s.height, s.width}, s.height);
        return;
      }
      case Kind::kMaxPool2d:
      case Kind::kAvgPool2d:
      case Kind::kGlobalAvgPool: return emit_pool2d(k, input, output);
      case Kind::kConv2d: return;
    }
  }

  void add_elementwise(int k, const Elementwise& work) { add(k, work, work.channels); }

  // What a layer does besides: its bias, and the ReLU after it.
  const float* bias(int k) { return op(k).bias.empty() ? nullptr : constants(op(k).bias); }
  Activation activation(int k) const { return fuses(k) ? Activation::kRelu : Activation::kNone; }

  void emit_linear(int k, const View& input, const View& output) {
    const int64_t in = input.sides.features(), out = output.sides.features();
    add(k, SparseLinear{{}, input.plane.data, output.plane.data, bias(k), rows_, in, out, p_.lanes_, activation(k)}, 1)
        .cost = {out, in, p_.lanes_, rows_, 0, 0, 0};
  }

  void emit_conv2d(int k) {
    const Op& it = op(k);
    const int from = it.inputs[0];
    const Conv2dGeometry geometry = geometry_of(it, sides(from));
    SparseConv2d work{};
    PlaneLayout layout = conv2d_planes(geometry, p_.lanes_);
    if (has_stride(it)) {
      const int storage = repacked(from, layout);
      work.planes = memory_of(storage);
    } else {
      const View input = view(from);
      layout = of(storages_, of(storage_, from)).layout;
      if (input.plane.data)
        work.planes = input.plane.data - it.padding[0] * layout.row_stride() - it.padding[1] * p_.lanes_;
    }
    if (memory_) {
      p_.offsets_.emplace_back(static_cast<size_t>(geometry.channels * geometry.kernel_h * geometry.kernel_w));
      conv2d_offsets(geometry, layout, p_.offsets_.back().data());
      work.offsets = constants(p_.offsets_.back());
    }
    const View output = view(k + 1);
    work.group_stride = layout.group_stride();
    work.row_stride = layout.row_stride();
    work.lanes = p_.lanes_;
    work.out_height = output.sides.height;
    work.out_width = output.sides.width;
    work.output = output.plane.data;
    work.out_group_stride = output.plane.group_stride;
    work.out_channel_stride = output.plane.channel_stride;
    work.out_row_stride = output.plane.row_stride;
    work.bias = bias(k);
    work.activation = activation(k);
    const int64_t columns = it.weight.shape[1] * it.weight.shape[2] * it.weight.shape[3];
    add(k, work, 1).cost = {output.sides.channels,   columns, p_.lanes_, rows_, work.out_height, work.out_width,
                            layout.horizontal.places};
  }

  // A value in planes with phases, which is made where it is first needed.
  int repacked(int value, const PlaneLayout& layout) {
    const std::pair wanted{value, layout};
    auto at = planes_.find(wanted);
    if (at == planes_.end()) at = planes_.emplace(wanted, new_storage(layout)).first;
    const int storage = at->second;
    if (!repacked_.insert(storage).second) return storage;
    if (value == 0) {
      float* const to = memory_of(storage);
      add(-1, PackPlanes{&caller_input, to, rows_, layout, DType::kFloat32}, layout.channels);
    } else {
      const View input = view(value);
      float* const to = memory_of(storage);
      add(-1, RepackPlanes{input.plane, to, layout}, layout.channels);
    }
    return storage;
  }

  void emit_pool2d(int k, const View& input, const View& output) {
    const Op& it = op(k);
    const bool global = it.kind == Kind::kGlobalAvgPool;
    const Sides &from = input.sides, &to = output.sides;
    const std::array<int64_t, 2> kernel = global ? std::array{from.height, from.width} : it.kernel;
    add(k,
        Pool2d{input.plane, output.plane, from.channels, p_.lanes_, from.height, from.width, to.height, to.width,
               kernel[0], kernel[1], it.stride[0], it.stride[1], it.padding[0], it.padding[1], it.dilation[0],
               it.dilation[1], it.kind != Kind::kMaxPool2d, it.count_padding},
        from.channels);
  }

  // ---- what changes with a call ------------------------------------------------------------------------------------

  void bind() {
    p_.inputs_.clear();
    p_.outputs_.clear();
    p_.batches_.clear();
    p_.batch_ = rows_;
    const auto each = [&](auto&... pointers) {
      const auto look = [&](auto& pointer) {
        if (pointer == &caller_input) p_.inputs_.push_back(&pointer);
        if (pointer == &caller_output) p_.outputs_.push_back(&pointer);
      };
      (look(pointers), ...);
    };
    for (Step& step : p_.steps_) {
      std::visit(
          [&]<typename Work>(Work& work) {
            if constexpr (std::is_same_v<Work, SparseLinear>)
              each(work.input, work.output);
            else if constexpr (std::is_same_v<Work, SparseConv2d>)
              each(work.planes, work.output);
            else if constexpr (std::is_same_v<Work, Elementwise>)
              each(work.input.data, work.other.data, work.output.data);
            else if constexpr (std::is_same_v<Work, PackPlanes> || std::is_same_v<Work, UnpackPlanes>)
              each(work.images, work.planes);
            else if constexpr (std::is_same_v<Work, RepackPlanes>)
              each(work.input.data, work.planes);
            else
              each(work.input.data, work.output.data);
            if constexpr (requires { work.batch; }) p_.batches_.push_back(&work.batch);
          },
          step.work);
    }
  }

  Program& p_;
  const Network& network_;
  const Model& model_;
  int64_t groups_ = 1, rows_ = 1;
  float* memory_ = nullptr;
  int step_ = 0;
  // Of each value.
  std::vector<char> live_, read_by_relu_, convolved_;
  std::vector<int> readers_, storage_;
  std::vector<std::array<int64_t, 2>> padding_;  // the largest that a convolution without stride wants
  std::vector<Storage> storages_;
  std::map<std::pair<int, PlaneLayout>, int> planes_;  // the storages of values with phases
  std::set<int> repacked_;                             // of them those that are filled so far
};

Program::Program(std::shared_ptr<const Network> network, int64_t lanes, int64_t batch, int threads, Device device)
    : network_(std::move(network)), lanes_(lanes) {
  if (device == Device::kCuda) {
    const auto floats = [&](int value) { return batch * product(network_->shape(value)); };
    cuda_ = cuda_steps(floats(0), floats(static_cast<int>(network_->model().ops.size())));
  }
  Builder builder(*this, *network_);
  const int64_t groups = ceil_div(batch, lanes);
  const int64_t each = ceil_div(groups, threads);
  apart_ = threads > 1 && each * threads * 3 <= groups * 4;  // at most a quarter of the threads' time is idle
  const int64_t whole = apart_ ? each : groups, cached = kCached * (apart_ ? 1 : threads);
  const int64_t calls = ceil_div(whole, std::max<int64_t>(1, cached / builder.group()));
  rows_ = cuda_ ? batch : std::min(batch, ceil_div(whole, calls) * lanes);
  builder.build(rows_);
  if (cuda_) bind(cuda_->input(), cuda_->output());
  weights_.resize(steps_.size());
  for (const Step& step : steps_) {
    const auto* const conv = std::get_if<SparseConv2d>(&step.work);
    offsets_of_.push_back(conv ? conv->offsets : nullptr);
  }
}

LayerWeight Program::weight(size_t step, const Form& form) const {
  if (cuda_) {
    const bool rowwise = lanes_ == 1 && std::holds_alternative<SparseLinear>(steps_[step].work);
    return {form, nullptr, nullptr, cuda_->tiles(*network_, steps_[step].op, form, rowwise)};
  }
  LayerWeight weight{form, network_->packed(steps_[step].op, form)};
  const PackedSparse& head = weight.packed->head();
  const auto* const conv = std::get_if<SparseConv2d>(&steps_[step].work);
  if (conv && head.panels.pairs) {
    const SparseTiles tiles = tiles_of(&head, head.panels);
    std::vector<int32_t> places(static_cast<size_t>(2 * tiles.runs));
    for (size_t i = 0; i < places.size(); ++i) places[i] = offsets_of_[step][tiles.columns[i]];
    weight.places = std::make_shared<const std::vector<int32_t>>(std::move(places));
  }
  return weight;
}

void Program::take(size_t step, LayerWeight weight) {
  if (cuda_) cuda_->changed();
  const auto tiles = [&](auto set) {
    if (weight.on_device) return weight.on_device->tiles;
    const PackedSparse& head = weight.packed->head();
    return tiles_of(&head, head.*set);
  };
  if (auto* const linear = std::get_if<SparseLinear>(&steps_[step].work)) {
    linear->weight = tiles(lanes_ == 1 ? &PackedSparse::rowwise : &PackedSparse::panels);
  } else {
    auto& conv = std::get<SparseConv2d>(steps_[step].work);
    conv.weight = tiles(&PackedSparse::panels);
    conv.offsets = weight.places ? nullptr : offsets_of_[step];
    if (weight.places) conv.weight.columns = weight.places->data();
  }
  weights_[step] = std::move(weight);
}

int64_t Program::weight_bytes() const {
  int64_t bytes = 0;
  for (const LayerWeight& weight : weights_) {
    if (weight.packed) bytes += weight.packed->head().bytes;
    if (weight.places) bytes += static_cast<int64_t>(weight.places->size() * sizeof(int32_t));
    if (weight.on_device) bytes += weight.on_device->size;
  }
  return bytes;
}

namespace {

struct Part {
  int64_t groups, units;
  int i, of;

  int64_t begin(int64_t all) const { return all * i / of; }
  int64_t end(int64_t all) const { return all * (i + 1) / of; }
};

void run_part(const SparseLinear& work, const Part& part) {
  const SparseTiles& tiles = work.weight;
  if (part.groups >= part.of)
    return sparse_linear_cpu(work, part.begin(part.groups), part.end(part.groups), 0, tiles.tiles);
  sparse_linear_cpu(work, 0, part.groups, tile_of_part(tiles, part.i, part.of),
                    tile_of_part(tiles, part.i + 1, part.of));
}

void run_part(const SparseConv2d& work, const Part& part) {
  const SparseTiles& tiles = work.weight;
  if (part.groups >= part.of)
    return sparse_conv2d_cpu(work, part.begin(part.groups), part.end(part.groups), 0, tiles.tiles);
  if (tiles.tiles >= 4 * part.of || work.out_height < part.of)
    return sparse_conv2d_cpu(work, 0, part.groups, tile_of_part(tiles, part.i, part.of),
                             tile_of_part(tiles, part.i + 1, part.of));
  const int64_t top = part.begin(work.out_height);
  SparseConv2d rows = work;
  rows.out_height = part.end(work.out_height) - top;
  rows.planes += top * work.row_stride;
  rows.output += top * work.out_row_stride;
  sparse_conv2d_cpu(rows, 0, part.groups, 0, tiles.tiles);
}

#define PYKD_RUN_PART(Work, run)                                                         \
  void run_part(const Work& work, const Part& part) {                                    \
    run(work, part.begin(part.groups * part.units), part.end(part.groups * part.units)); \
  }
PYKD_RUN_PART(Pool2d, pool2d_cpu)
PYKD_RUN_PART(Elementwise, elementwise_cpu)
PYKD_RUN_PART(Softmax, softmax_cpu)
PYKD_RUN_PART(PackPlanes, pack_planes_cpu)
PYKD_RUN_PART(UnpackPlanes, unpack_planes_cpu)
PYKD_RUN_PART(RepackPlanes, repack_planes_cpu)
#undef PYKD_RUN_PART

}  // namespace

void Program::run(const Step& step, int64_t rows, ThreadPool* pool) const noexcept {
  const int64_t groups = ceil_div(rows, lanes_);
  std::visit(
      [&](const auto& work) {
        if (!pool || !step.shared) return run_part(work, {groups, step.units, 0, 1});
        const int threads = pool->threads();
        pool->each([&](int i) { run_part(work, {groups, step.units, i, threads}); });
      },
      step.work);
}

void Program::repeat(size_t step, int repeats, ThreadPool* pool) const {
  const LayerWeight& weight = weights_[step];
  if (cuda_) return cuda_->repeat(steps_[step], ceil_div(rows_, lanes_), repeats, weight.on_device);
  for (int i = 0; i < repeats; ++i) run(steps_[step], rows_, pool);
}

// Their types differ by const alone.
void Program::bind(const float* input, float* output) {
  for (void* const pointer : inputs_) std::memcpy(pointer, &input, sizeof input);
  for (void* const pointer : outputs_) std::memcpy(pointer, &output, sizeof output);
}

void Program::prepare() {
  if (cuda_) cuda_->prepare(steps_, ceil_div(rows_, lanes_));
}

void Program::run(const float* input, float* output, int64_t rows, ThreadPool* pool) {
  if (cuda_) return cuda_->run(steps_, ceil_div(rows, lanes_), input, output);
  bind(input, output);
  if (rows != batch_)
    for (int64_t* const batch : batches_) *batch = rows;
  batch_ = rows;
  for (const Step& step : steps_) run(step, rows, pool);
}

}  // namespace pykd::runtime
