// pool2d without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation, against
// the definition in double; ragged sizes, strided planes, windows that hang over, NaN, every output between sentinels.
#include "kernels/pool2d/pool2d.h"

#include <cmath>
#include <limits>
#include <random>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(pool2d_cpu, (const Pool2d& args, int64_t begin, int64_t end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::Pool2d;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGroups = 2;

struct Kernel {
  const char* name;
  void (*run)(const Pool2d& args);
};

template <void (*kCpu)(const Pool2d&, int64_t, int64_t)>
void run_cpu(const Pool2d& args) {
  kCpu(args, 0, kGroups * args.channels);
}

void run_parts_apart(const Pool2d& args) {
  for (int64_t at = 0; at < kGroups * args.channels; at += 2)
    pykd::pool2d_cpu(args, at, std::min(at + 2, kGroups * args.channels));
}

void run_cuda(const Pool2d& args) { check(pykd::pool2d_cuda(args, kGroups, nullptr) == 0, "the launch"); }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::pool2d_cpu>}, {"cpu, parts apart", run_parts_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, pool2d_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

int64_t count(int64_t length, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t room = length + 2 * padding - dilation * (kernel - 1) - 1, floor = room / stride + 1;
  return floor + (ceil && room % stride && floor * stride < length + padding);
}

// The result at one place, and the sum of magnitudes behind it.
std::pair<double, double> wanted(const Pool2d& a, const Buffer& input, int64_t group, int64_t channel, int64_t y,
                                 int64_t x, int64_t lane) {
  double result = a.average ? 0 : -kInfinity, size = 0;
  int64_t inside = 0, padded = 0;
  for (int64_t i = 0; i < a.kernel_h; ++i)
    for (int64_t j = 0; j < a.kernel_w; ++j) {
      const int64_t row = y * a.stride_h - a.padding_h + i * a.dilation_h;
      const int64_t column = x * a.stride_w - a.padding_w + j * a.dilation_w;
      padded += row < a.height + a.padding_h && column < a.width + a.padding_w;
      if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
      ++inside;
      const double value = input.get(group * a.input.group_stride + channel * a.input.channel_stride +
                                     row * a.input.row_stride + column * a.lanes + lane);
      size += std::fabs(value);
      if (a.average)
        result += value;
      else if (std::isnan(value) || value > result)
        result = std::isnan(result) ? result : value;
    }
  const double divisor = a.average ? static_cast<double>(a.count_padding ? padded : inside) : 1;
  return {result / divisor, size / divisor};
}

void test(Pool2d a, bool ceil, bool extreme, std::mt19937& random) {
  a.out_height = count(a.height, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h, ceil);
  a.out_width = count(a.width, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w, ceil);
  const auto laid_out = [&](int64_t rows, int64_t columns) {  // with gaps behind rows, channels and groups
    const int64_t row = (columns + static_cast<int64_t>(random() % 3)) * a.lanes;
    const int64_t channel = (rows + static_cast<int64_t>(random() % 2)) * row;
    return pykd::Plane{nullptr, a.channels * channel + static_cast<int64_t>(random() % 2) * a.lanes, channel, row};
  };
  a.input = laid_out(a.height, a.width);
  a.output = laid_out(a.out_height, a.out_width);
  Buffer input(DType::kFloat32, kGroups * a.input.group_stride);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < kGroups * a.input.group_stride; ++i) {
    const double value = normal(random);
    const double special = random() % 2 ? kNan : random() % 2 ? kInfinity : -kInfinity;
    input.set(i, extreme && random() % 16 == 0 ? special : value);
  }
  a.input.data = reinterpret_cast<float*>(input.data());
  const std::string name = described({{"channels", a.channels},
                                      {"lanes", a.lanes},
                                      {"height", a.height},
                                      {"width", a.width},
                                      {"kernel", a.kernel_h},
                                      {"x", a.kernel_w},
                                      {"stride", a.stride_h},
                                      {"x", a.stride_w},
                                      {"padding", a.padding_h},
                                      {"x", a.padding_w},
                                      {"dilation", a.dilation_h},
                                      {"x", a.dilation_w},
                                      {"average", a.average},
                                      {"count padding", a.count_padding},
                                      {"ceil", ceil},
                                      {"extreme", extreme}});
  for (const Kernel& kernel : kernels()) {
    Buffer output(DType::kFloat32, kGroups * a.output.group_stride);
    a.output.data = reinterpret_cast<float*>(output.data());
    kernel.run(a);
    bool right = true;
    int64_t written = 0;
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t channel = 0; channel < a.channels; ++channel)
        for (int64_t y = 0; y < a.out_height; ++y)
          for (int64_t x = 0; x < a.out_width; ++x)
            for (int64_t lane = 0; lane < a.lanes; ++lane, ++written) {
              const double found = output.get(group * a.output.group_stride + channel * a.output.channel_stride +
                                              y * a.output.row_stride + x * a.lanes + lane);
              const auto [value, size] = wanted(a, input, group, channel, y, x, lane);
              const double bound = a.average ? static_cast<double>(a.kernel_h + a.kernel_w) * 0x1p-24 * size : 0;
              right &= std::isnan(value)   ? std::isnan(found)
                       : std::isinf(value) ? found == value
                                           : std::fabs(found - value) <= bound;
            }
    int64_t untouched = 0;  // the gaps, in which every byte is 0xFF
    for (int64_t i = 0; i < kGroups * a.output.group_stride; ++i) {
      uint32_t bits;
      std::memcpy(&bits, output.data() + 4 * i, 4);
      untouched += bits == ~0u;
    }
    check(right, std::string(kernel.name) + ":" + name);
    check(output.intact() && written + untouched == kGroups * a.output.group_stride,
          std::string(kernel.name) + ": beyond the output" + name);
  }
}

}  // namespace

int main() {
  std::mt19937 random(20262);
  const auto one_of = [&random](auto... choices) {
    const std::array<int64_t, sizeof...(choices)> all = {choices...};
    return all[random() % all.size()];
  };
  for (int i = 0; i < (kSlow ? 150 : 1500); ++i) {
    Pool2d a{};
    a.average = random() % 2;
    a.count_padding = random() % 2;
    a.channels = one_of(1, 3);
    a.lanes = one_of(1, 1, 16, 48);
    a.kernel_h = one_of(1, 2, 2, 3, 5);
    a.kernel_w = one_of(1, 2, 2, 3, 3, 4);
    a.stride_h = one_of(1, 2, 3);
    a.stride_w = one_of(1, 2, 2, 3, 4);
    a.padding_h = static_cast<int64_t>(random() % static_cast<uint64_t>(a.kernel_h / 2 + 1));
    a.padding_w = static_cast<int64_t>(random() % static_cast<uint64_t>(a.kernel_w / 2 + 1));
    a.dilation_h = a.average ? 1 : one_of(1, 1, 2, 4);
    a.dilation_w = a.average ? 1 : one_of(1, 1, 2, 3);
    a.height = std::max<int64_t>(1, a.dilation_h * (a.kernel_h - 1) + 1 - 2 * a.padding_h) + one_of(0, 1, 2, 5);
    a.width = std::max<int64_t>(1, a.dilation_w * (a.kernel_w - 1) + 1 - 2 * a.padding_w) + one_of(0, 1, 7, 16, 33);
    if (i % 10 == 0) {  // a global pool
      a.height = a.kernel_h, a.width = a.kernel_w;
      a.dilation_h = a.dilation_w = 1;
    }
    test(a, random() % 2, i % 5 == 0, random);
  }
  // Rows that are longer than what is pooled at a time, windows that are wider, strides that leave no vector of them.
  for (const auto& [width, kernel, stride, padding] : {std::array<int64_t, 4>{1100, 3, 2, 1},
                                                       {1100, 2, 2, 0},
                                                       {1100, 4, 1, 2},
                                                       {600, 600, 1, 0},
                                                       {600, 511, 1, 255},
                                                       {600, 5, 70, 2}})
    for (const bool average : {false, true}) {
      Pool2d a{};
      a.channels = a.lanes = 1;
      a.height = a.kernel_h = a.stride_h = 2;
      a.width = width, a.kernel_w = kernel, a.stride_w = stride, a.padding_w = padding;
      a.dilation_h = a.dilation_w = 1;
      a.average = average;
      a.count_padding = stride == 1;
      test(a, true, false, random);
    }
  return report();
}
