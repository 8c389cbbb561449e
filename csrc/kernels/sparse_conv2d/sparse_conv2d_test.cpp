// sparse_conv2d and the planes it reads, without torch: the CPU kernels of every level this processor runs and the CUDA
// kernels, under emulation, against the definition in double; strides, borders, dilation, groups, one image a group and
// many, outputs in planes of their own and in rows, every output between sentinels.
#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include "core/sparse_test.h"
#include "kernels/planes/planes.h"

PYKD_DECLARE_LEVELS(sparse_conv2d_cpu,
                    (const SparseConv2d& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end))
PYKD_DECLARE_LEVELS(pack_planes_cpu, (const PackPlanes& args, int64_t begin, int64_t end))
PYKD_DECLARE_LEVELS(unpack_planes_cpu, (const UnpackPlanes& args, int64_t begin, int64_t end))

namespace {

using namespace pykd::testing;
using pykd::Conv2dGeometry;
using pykd::DType;
using pykd::PackPlanes;
using pykd::PlaneLayout;
using pykd::SparseConv2d;
using pykd::UnpackPlanes;

struct Kernels {
  const char* name;
  void (*conv)(const SparseConv2d&, int64_t groups);
  void (*pack)(const PackPlanes&, int64_t channels);
  void (*unpack)(const UnpackPlanes&, int64_t channels);
};

template <void (*kCpu)(const SparseConv2d&, int64_t, int64_t, int64_t, int64_t)>
void conv_cpu(const SparseConv2d& args, int64_t groups) {
  kCpu(args, 0, groups, 0, args.weight.tiles);
}
template <auto kCpu, class Args>
void all_channels(const Args& args, int64_t channels) {
  kCpu(args, 0, channels);
}
void conv_apart(const SparseConv2d& args, int64_t groups) {
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t part = 0; part < 3; ++part)
      pykd::sparse_conv2d_cpu(args, group, group + 1, pykd::tile_of_part(args.weight, part, 3),
                              pykd::tile_of_part(args.weight, part + 1, 3));
}
// With the places of the columns looked up beforehand.
void conv_places(const SparseConv2d& args, int64_t groups) {
  SparseConv2d resolved = args;
  Vector<int32_t> places;
  if (args.weight.pairs) {
    for (int64_t i = 0; i < 2 * args.weight.runs; ++i) places.push_back(args.offsets[args.weight.columns[i]]);
    resolved.weight.columns = places.data();
    resolved.offsets = nullptr;
  }
  pykd::sparse_conv2d_cpu(resolved, 0, groups, 0, args.weight.tiles);
}
void conv_cuda(const SparseConv2d& args, int64_t groups) {
  check(pykd::sparse_conv2d_cuda(args, groups, nullptr) == 0, "the launch");
}
void pack_cuda(const PackPlanes& args, int64_t) { check(pykd::pack_planes_cuda(args, nullptr) == 0, "the launch"); }
void unpack_cuda(const UnpackPlanes& args, int64_t) {
  check(pykd::unpack_planes_cuda(args, nullptr) == 0, "the launch");
}

#define PYKD_KERNELS(level)                                                             \
  conv_cpu<level::sparse_conv2d_cpu>, all_channels<level::pack_planes_cpu, PackPlanes>, \
      all_channels<level::unpack_planes_cpu, UnpackPlanes>

std::vector<Kernels> kernels() {
  std::vector<Kernels> all = {{"cpu", PYKD_KERNELS(pykd)},
                              {"cpu, parts apart", conv_apart, all_channels<pykd::pack_planes_cpu, PackPlanes>,
                               all_channels<pykd::unpack_planes_cpu, UnpackPlanes>},
                              {"cpu, places", conv_places, all_channels<pykd::pack_planes_cpu, PackPlanes>,
                               all_channels<pykd::unpack_planes_cpu, UnpackPlanes>}};
#if defined(__x86_64__)
  all.push_back({"baseline", PYKD_KERNELS(pykd::baseline)});
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx2) all.push_back({"avx2", PYKD_KERNELS(pykd::avx2)});
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx512) all.push_back({"avx512", PYKD_KERNELS(pykd::avx512)});
#endif
  all.push_back({"cuda", conv_cuda, pack_cuda, unpack_cuda});
  return all;
}

struct Case {
  int64_t batch, channels, height, width, out, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
      dilation_w, groups, block_rows, block_columns, lanes;
  double density;
};

void test(const Case& c, std::mt19937& random) {
  const Conv2dGeometry g{c.channels, c.height,    c.width,     c.kernel_h,   c.kernel_w,  c.stride_h,
                         c.stride_w, c.padding_h, c.padding_w, c.dilation_h, c.dilation_w};
  if (g.height + 2 * g.padding_h < g.dilation_h * (g.kernel_h - 1) + 1 ||
      g.width + 2 * g.padding_w < g.dilation_w * (g.kernel_w - 1) + 1)
    return;
  const int64_t out_h = g.out_height(), out_w = g.out_width(), taps = c.kernel_h * c.kernel_w;
  const SparseMatrix w(c.out, c.channels / c.groups * taps, c.block_rows, c.block_columns, c.density, random, c.groups);
  const int64_t pixels = c.height * c.width;
  const Vector<float> images = filled(c.batch * c.channels * pixels, random), bias = filled(c.out, random);
  const bool each_tap = random() % 3 == 0;
  const PlaneLayout layout = pykd::conv2d_planes(g, c.lanes, each_tap);
  const int64_t groups = layout.groups(c.batch);
  const bool relu = random() % 2, has_bias = random() % 2;
  // The output in planes of its own: rows with a border on both sides that nobody may touch.
  const int64_t border = static_cast<int64_t>(random() % 3);
  const PlaneLayout to{
      c.out, c.lanes, {out_h, border, 1, 1, out_h + 2 * border}, {out_w, border, 1, 1, out_w + 2 * border}};
  Vector<int32_t> offsets(static_cast<size_t>(c.channels * taps));
  pykd::conv2d_offsets(g, layout, offsets.data());
  std::vector<double> wanted, bounds;
  const int64_t in_group = c.channels / c.groups;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t o = 0; o < c.out; ++o)
      for (int64_t y = 0; y < out_h; ++y)
        for (int64_t x = 0; x < out_w; ++x) {
          double sum = has_bias ? bias[static_cast<size_t>(o)] : 0, size = std::abs(sum);
          for (int64_t i = 0; i < in_group; ++i)
            for (int64_t kh = 0; kh < c.kernel_h; ++kh)
              for (int64_t kw = 0; kw < c.kernel_w; ++kw) {
                const int64_t in_y = y * c.stride_h + kh * c.dilation_h - c.padding_h;
                const int64_t in_x = x * c.stride_w + kw * c.dilation_w - c.padding_w;
                if (in_y < 0 || in_y >= c.height || in_x < 0 || in_x >= c.width) continue;
                const int64_t channel = o / (c.out / c.groups) * in_group + i;
                const int64_t column = (o * in_group + i) * taps + kh * c.kernel_w + kw;
                const int64_t pixel = ((b * c.channels + channel) * c.height + in_y) * c.width + in_x;
                const double term =
                    static_cast<double>(w.dense[static_cast<size_t>(column)]) * images[static_cast<size_t>(pixel)];
                sum += term;
                size += std::abs(term);
              }
          wanted.push_back(relu && sum < 0 ? 0 : sum);
          bounds.push_back(static_cast<double>(w.columns + 4) * 0x1p-24 * size);
        }
  for (const Kernels& kernel : kernels()) {
    Buffer planes(DType::kFloat32, groups * layout.group_stride() + pykd::kPlaneSlack);
    std::memset(planes.data(), 0, static_cast<size_t>(groups * layout.group_stride() + pykd::kPlaneSlack) * 4);
    Buffer output(DType::kFloat32, groups * to.group_stride());
    Buffer answer(DType::kFloat32, c.batch * c.out * out_h * out_w);
    float* const planes_data = reinterpret_cast<float*>(planes.data());
    float* const output_data = reinterpret_cast<float*>(output.data());
    kernel.pack({images.data(), planes_data, c.batch, layout, DType::kFloat32}, groups * c.channels);
    kernel.conv(
        {w.panels(), planes_data, offsets.data(), layout.group_stride(), layout.row_stride(), c.lanes, out_h, out_w,
         output_data + border * (to.row_stride() + c.lanes), to.group_stride(), to.channel_stride(), to.row_stride(),
         has_bias ? bias.data() : nullptr, relu ? pykd::Activation::kRelu : pykd::Activation::kNone},
        groups);
    kernel.unpack({output_data, answer.data(), c.batch, to, DType::kFloat32}, groups * c.out);
    const std::string name = kernel.name + described({{"batch", c.batch},
                                                      {"channels", c.channels},
                                                      {"height", c.height},
                                                      {"width", c.width},
                                                      {"out", c.out},
                                                      {"kernel", c.kernel_h},
                                                      {"by", c.kernel_w},
                                                      {"stride", c.stride_h},
                                                      {"by", c.stride_w},
                                                      {"padding", c.padding_h},
                                                      {"by", c.padding_w},
                                                      {"dilation", c.dilation_h},
                                                      {"by", c.dilation_w},
                                                      {"groups", c.groups},
                                                      {"block", c.block_rows},
                                                      {"by", c.block_columns},
                                                      {"lanes", c.lanes},
                                                      {"taps", each_tap},
                                                      {"density", c.density}});
    bool right = true;
    for (size_t i = 0; i < wanted.size(); ++i)
      right = right && std::abs(answer.get(static_cast<int64_t>(i)) - wanted[i]) <= bounds[i];
    check(right, name);
    // NaN is what the buffer was filled with.
    int64_t written = 0;
    for (int64_t i = 0; i < groups * to.group_stride(); ++i) written += !std::isnan(output.get(i));
    check(written == groups * c.out * out_h * out_w * c.lanes, name + ": the border of the output");
    check(planes.intact() && output.intact() && answer.intact(), name + ": beyond a buffer");
  }
}

int64_t one_of(std::mt19937& random, std::initializer_list<int64_t> values) {
  return values.begin()[random() % values.size()];
}

}  // namespace

int main() {
  std::mt19937 random(20262);
  test({2, 3, 6, 6, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5}, random);
  test({3, 16, 8, 8, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 16, 1, 0.3}, random);
  test({20, 16, 4, 4, 32, 3, 3, 1, 1, 1, 1, 1, 1, 1, 16, 16, 16, 0.3}, random);
  test({2, 4, 7, 7, 4, 3, 3, 2, 2, 1, 1, 1, 1, 4, 1, 1, 1, 1}, random);
  test({1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1}, random);
  test({1, 2, 1, 9, 3, 1, 3, 1, 2, 0, 4, 1, 2, 1, 1, 1, 1, 0.6}, random);
  for (int i = 0; i < (kSlow ? 40 : 250); ++i) {
    const int64_t groups = one_of(random, {1, 1, 1, 2, 3}), block = one_of(random, {1, 1, 2, 3, 4, 8, 16, 20});
    test({one_of(random, {1, 2, 5, 17}), groups * one_of(random, {1, 2, 5}), one_of(random, {1, 4, 7, 12}),
          one_of(random, {1, 3, 8, 9, 33}), groups * one_of(random, {1, 3, 8, 18}), one_of(random, {1, 2, 3, 5}),
          one_of(random, {1, 2, 3, 5}), one_of(random, {1, 1, 2, 3}), one_of(random, {1, 1, 2, 3}),
          one_of(random, {0, 1, 2, 4}), one_of(random, {0, 1, 2, 4}), one_of(random, {1, 1, 2, 3}),
          one_of(random, {1, 1, 2, 3}), groups, block, one_of(random, {1, 1, 3, 16}), one_of(random, {1, 1, 1, 16, 32}),
          0.01 * static_cast<double>(random() % 101)},
         random);
  }
  return report();
}
