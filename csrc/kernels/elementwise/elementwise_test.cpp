// elementwise and softmax without torch: the CPU kernels of every level this processor runs and the CUDA kernels, under
// emulation, against the definition in double; strided planes, in place and not, extremes, outputs between sentinels.
#include "kernels/elementwise/elementwise.h"

#include <cmath>
#include <limits>
#include <random>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(elementwise_cpu, (const Elementwise& args, int64_t begin, int64_t end))
PYKD_DECLARE_LEVELS(softmax_cpu, (const Softmax& args, int64_t begin, int64_t end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::Elementwise;
using pykd::Function;
using pykd::Plane;
using pykd::Softmax;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGroups = 3;

template <typename Args>
struct Kernel {
  const char* name;
  void (*run)(const Args& args);
};

int64_t parts(const Elementwise& a) { return kGroups * a.channels; }
int64_t parts(const Softmax& a) { return kGroups * a.height; }

template <auto kCpu, typename Args>
void whole(const Args& args) {
  kCpu(args, 0, parts(args));
}
template <auto kCpu, typename Args>
void apart(const Args& args) {
  for (int64_t at = 0; at < parts(args); ++at) kCpu(args, at, at + 1);
}
template <auto kCuda, typename Args>
void launched(const Args& args) {
  check(kCuda(args, kGroups, nullptr) == 0, "the launch");
}

template <void (*kCpu)(const Elementwise&, int64_t, int64_t)>
void run_elementwise(const Elementwise& args) {
  whole<kCpu>(args);
}
template <void (*kCpu)(const Softmax&, int64_t, int64_t)>
void run_softmax(const Softmax& args) {
  whole<kCpu>(args);
}

std::vector<Kernel<Elementwise>> kernels(const Elementwise&) {
  std::vector<Kernel<Elementwise>> all = {{"cpu", whole<pykd::elementwise_cpu>},
                                          {"cpu, parts apart", apart<pykd::elementwise_cpu>}};
  PYKD_ADD_LEVELS(all, run_elementwise, elementwise_cpu);
  all.push_back({"cuda", launched<pykd::elementwise_cuda>});
  return all;
}
std::vector<Kernel<Softmax>> kernels(const Softmax&) {
  std::vector<Kernel<Softmax>> all = {{"cpu", whole<pykd::softmax_cpu>},
                                      {"cpu, parts apart", apart<pykd::softmax_cpu>}};
  PYKD_ADD_LEVELS(all, run_softmax, softmax_cpu);
  all.push_back({"cuda", launched<pykd::softmax_cuda>});
  return all;
}

struct Sizes {
  int64_t channels, lanes, height, width;
};

// A value in memory, with gaps behind rows, channels and groups, or without any.
struct Value {
  Value(const Sizes& s, bool gaps, double scale, std::mt19937& random)
      : plane(strides(s, gaps, random)), buffer(all()) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < kGroups * plane.group_stride; ++i) buffer.set(i, normal(random));
  }
  explicit Value(const Plane& strides) : plane(strides), buffer(all()) {}

  static Plane strides(const Sizes& s, bool gaps, std::mt19937& random) {
    const auto gap = [&](int64_t most) { return gaps ? static_cast<int64_t>(random() % (most + 1u)) : 0; };
    const int64_t row = (s.width + gap(2)) * s.lanes, channel = (s.height + gap(1)) * row;
    return {nullptr, s.channels * channel + gap(1) * s.lanes, channel, row};
  }
  Buffer all() const { return Buffer(DType::kFloat32, kGroups * plane.group_stride); }

  Plane at() {
    return {reinterpret_cast<float*>(buffer.data()), plane.group_stride, plane.channel_stride, plane.row_stride};
  }
  int64_t place(int64_t group, int64_t channel, int64_t y, int64_t i) const {
    return group * plane.group_stride + channel * plane.channel_stride + y * plane.row_stride + i;
  }
  double get(int64_t group, int64_t channel, int64_t y, int64_t i) const {
    return buffer.get(place(group, channel, y, i));
  }

  Plane plane;
  Buffer buffer;
};

template <typename Use>
void each(const Sizes& s, const Use& use) {
  for (int64_t group = 0; group < kGroups; ++group)
    for (int64_t channel = 0; channel < s.channels; ++channel)
      for (int64_t y = 0; y < s.height; ++y)
        for (int64_t i = 0; i < s.width * s.lanes; ++i) use(group, channel, y, i);
}

bool near(double found, double wanted, double bound) {
  if (std::isnan(wanted)) return std::isnan(found);
  return std::isinf(wanted) ? found == wanted : std::fabs(found - wanted) <= bound;
}

// Each kernel, into another value and in place: where(group, channel, y, i) is what a place should hold, and how
// exactly.
template <typename Args, typename Where>
void check_all(Args args, const Sizes& s, const Value& input, const Plane& output, const std::string& name,
               const Where& where) {
  for (const auto& kernel : kernels(args))
    for (const bool in_place : {false, true}) {
      Value read = input, written = in_place ? input : Value(output);
      Value& result = in_place ? read : written;
      Value expected = result;
      args.input = read.at();
      args.output = result.at();
      kernel.run(args);
      bool right = true;
      each(s, [&](int64_t group, int64_t channel, int64_t y, int64_t i) {
        const auto [value, bound] = where(group, channel, y, i);
        const double found = result.get(group, channel, y, i);
        right &= near(found, value, bound);
        std::memcpy(expected.buffer.data() + 4 * expected.place(group, channel, y, i),
                    result.buffer.data() + 4 * result.place(group, channel, y, i), 4);
      });
      const std::string what = kernel.name + (in_place ? ", in place:" + name : ":" + name);
      check(right, what);
      check(result.buffer.intact() && result.buffer == expected.buffer, what + ": beyond the output");
    }
}

std::string described(const Sizes& s) {
  return pykd::testing::described(
      {{"channels", s.channels}, {"lanes", s.lanes}, {"height", s.height}, {"width", s.width}});
}

void set_extremes(Value& value, const Sizes& s) {
  const std::array<double, 8> extremes = {kNan, kInfinity, -kInfinity, -0.0, 1e-40, -3e38, 40, -12};
  size_t next = 0;
  each(s, [&](int64_t group, int64_t channel, int64_t y, int64_t i) {
    if (i % 5 == 0) value.buffer.set(value.place(group, channel, y, i), extremes[next++ % extremes.size()]);
  });
}

void test_elementwise(const Sizes& s, bool gaps, bool extreme, std::mt19937& random) {
  Value input(s, gaps, 2, random), other(s, gaps, 1, random);
  if (extreme) set_extremes(input, s);
  const Plane output = Value::strides(s, gaps, random);
  Buffer scale(DType::kFloat32, s.channels), shift(DType::kFloat32, s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    scale.set(c, 0.5 + static_cast<double>(c));
    shift.set(c, 1 - 0.25 * static_cast<double>(c));
  }
  Elementwise a{};
  a.other = other.at();
  a.channels = s.channels, a.lanes = s.lanes, a.height = s.height, a.width = s.width;
  a.slope = 0.125;
  a.scale = reinterpret_cast<const float*>(scale.data());
  a.shift = reinterpret_cast<const float*>(shift.data());
  for (const Function function :
       {Function::kRelu, Function::kLeakyRelu, Function::kTanh, Function::kAdd, Function::kAffine, Function::kCopy}) {
    a.function = function;
    const std::string name =
        described(s) +
        pykd::testing::described({{"function", static_cast<int>(function)}, {"gaps", gaps}, {"extreme", extreme}});
    check_all(a, s, input, output, name, [&](int64_t group, int64_t channel, int64_t y, int64_t i) {
      const double x = input.get(group, channel, y, i), its = other.get(group, channel, y, i);
      const double product = x * scale.get(channel);
      switch (function) {
        case Function::kRelu: return std::pair(std::isnan(x) ? x : std::max(0.0, x), 0.0);
        case Function::kLeakyRelu: return std::pair(x > 0 ? x : 0.125 * x, 0x1p-149);
        case Function::kTanh: return std::pair(std::tanh(x), 2e-7 * std::fabs(std::tanh(x)));
        case Function::kAdd: return std::pair(x + its, 0x1p-24 * std::fabs(x + its));
        case Function::kAffine: {
          const double sum = product + shift.get(channel);
          const bool over = std::fabs(sum) > 0x1.fffffep127;
          return std::pair(over ? std::copysign(kInfinity, sum) : sum, 0x1p-23 * (std::fabs(product) + std::fabs(sum)));
        }
        case Function::kCopy: break;
      }
      return std::pair(x, 0.0);
    });
  }
}

void test_softmax(const Sizes& s, bool gaps, double scale, bool extreme, std::mt19937& random) {
  Value input(s, gaps, scale, random);
  if (extreme) set_extremes(input, s);
  Softmax a{};
  a.channels = s.channels, a.lanes = s.lanes, a.height = s.height, a.width = s.width;
  const std::string name =
      " softmax" + described(s) + pykd::testing::described({{"gaps", gaps}, {"scale", scale}, {"extreme", extreme}});
  check_all(a, s, input, Value::strides(s, gaps, random), name,
            [&](int64_t group, int64_t channel, int64_t y, int64_t i) {
              double most = -kInfinity, sum = 0;
              for (int64_t c = 0; c < s.channels; ++c) most = std::max(most, input.get(group, c, y, i));
              for (int64_t c = 0; c < s.channels; ++c) sum += std::exp(input.get(group, c, y, i) - most);
              const double value = std::exp(input.get(group, channel, y, i) - most) / sum;
              // The difference is rounded before exp multiplies its error; exp's own; the sum's; below -87 it is 0.
              const double lost = std::fmin(std::fabs(input.get(group, channel, y, i) - most), 200) * 0x1p-24;
              const double steps = 8 + static_cast<double>(s.channels);
              return std::pair(value, value * (lost + steps * 0x1p-24) + 2e-38);
            });
}

// tanh keeps its accuracy over all of its range.
void test_tangent() {
  const Sizes s{1, 1, 1, 4096};
  std::mt19937 random(3);
  Value input(s, false, 1, random);
  for (int64_t group = 0; group < kGroups; ++group)
    for (int64_t i = 0; i < s.width; ++i)
      input.buffer.set(input.place(group, 0, 0, i), std::ldexp((i % 2 ? 1.0 : -1.0) * static_cast<double>(1 + i) / 4096,
                                                               static_cast<int>(5 * group - 6)));
  Elementwise a{};
  a.channels = s.channels, a.lanes = s.lanes, a.height = s.height, a.width = s.width;
  a.function = Function::kTanh;
  check_all(a, s, input, input.plane, " tanh", [&](int64_t group, int64_t channel, int64_t y, int64_t i) {
    const double value = std::tanh(input.get(group, channel, y, i));
    return std::pair(value, 2e-7 * std::fabs(value));
  });
}

}  // namespace

int main() {
  std::mt19937 random(20263);
  for (const Sizes& s : {Sizes{1, 1, 1, 1},
                         {3, 1, 1, 1},
                         {10, 1, 1, 1},
                         {37, 1, 1, 1},
                         {2, 1, 5, 7},
                         {3, 1, 4, 33},
                         {1, 16, 1, 1},
                         {10, 16, 1, 1},
                         {3, 48, 2, 3},
                         {17, 32, 1, 2}})
    for (const bool gaps : {false, true}) {
      for (const bool extreme : {false, true}) test_elementwise(s, gaps, extreme, random);
      for (const double scale : {0.0, 1.0, 30.0}) test_softmax(s, gaps, scale, false, random);
      test_softmax(s, gaps, 1, true, random);
    }
  test_tangent();
  return report();
}
