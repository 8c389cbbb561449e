// Planes on CUDA without torch, under emulation, against their definition: strides, borders, dilation, one image a
// group and many, groups that are not full, every dtype, more groups than blocks; every buffer between sentinels.
#include <random>

#include "core/kernel_test.h"
#include "kernels/planes/planes.h"

namespace {

using namespace pykd::testing;
using pykd::Conv2dGeometry;
using pykd::DType;
using pykd::PlaneLayout;

std::mt19937 random_bits(20265);

Buffer random_values(DType dtype, int64_t count) {
  std::normal_distribution<double> normal;
  Buffer values(dtype, count);
  for (int64_t i = 0; i < count; ++i) values.set(i, normal(random_bits));
  return values;
}

std::string described_layout(const PlaneLayout& l, int64_t batch, DType dtype) {
  return described({{"batch", batch},
                    {"channels", l.channels},
                    {"height", l.vertical.length},
                    {"width", l.horizontal.length},
                    {"padding", l.vertical.padding},
                    {"by", l.horizontal.padding},
                    {"step", l.vertical.step},
                    {"by", l.horizontal.step},
                    {"lanes", l.lanes},
                    {"dtype", static_cast<int>(dtype)}});
}

// Every float of the planes, in their order: the pixel that stands there, or a zero.
void test_pack(const PlaneLayout& l, int64_t batch, DType dtype) {
  const int64_t height = l.vertical.length, width = l.horizontal.length;
  Buffer images = random_values(dtype, batch * l.channels * height * width), before = images;
  Buffer planes(DType::kFloat32, l.groups(batch) * l.group_stride());
  bool right =
      pykd::pack_planes_cuda({images.data(), reinterpret_cast<float*>(planes.data()), batch, l, dtype}, nullptr) == 0;
  int64_t at = 0;
  for (int64_t group = 0; group < l.groups(batch); ++group)
    for (int64_t channel = 0; channel < l.channels; ++channel)
      for (int64_t down = 0; down < l.vertical.phases; ++down)
        for (int64_t across = 0; across < l.horizontal.phases; ++across)
          for (int64_t row = 0; row < l.vertical.places; ++row)
            for (int64_t place = 0; place < l.horizontal.places; ++place)
              for (int64_t lane = 0; lane < l.lanes; ++lane, ++at) {
                const int64_t image = group * l.lanes + lane;
                const int64_t y = row * l.vertical.step + down - l.vertical.padding;
                const int64_t x = place * l.horizontal.step + across - l.horizontal.padding;
                const bool inside = image < batch && y >= 0 && y < height && x >= 0 && x < width;
                const double wanted =
                    inside ? images.get(((image * l.channels + channel) * height + y) * width + x) : 0;
                right = right && planes.get(at) == wanted;
              }
  check(right, "pack:" + described_layout(l, batch, dtype));
  check(planes.intact() && images == before, "pack, beyond the buffers:" + described_layout(l, batch, dtype));
}

void test_unpack(const PlaneLayout& l, int64_t batch, DType dtype) {
  const int64_t height = l.vertical.length, width = l.horizontal.length;
  Buffer planes = random_values(DType::kFloat32, l.groups(batch) * l.group_stride()), before = planes;
  Buffer images(dtype, batch * l.channels * height * width);
  bool right = pykd::unpack_planes_cuda({reinterpret_cast<const float*>(planes.data()), images.data(), batch, l, dtype},
                                        nullptr) == 0;
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t channel = 0; channel < l.channels; ++channel)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x) {
          const double value = planes.get(image / l.lanes * l.group_stride() + channel * l.channel_stride() +
                                          (y + l.vertical.padding) * l.row_stride() +
                                          (x + l.horizontal.padding) * l.lanes + image % l.lanes);
          const double got = images.get(((image * l.channels + channel) * height + y) * width + x);
          const double bound = dtype == DType::kFloat32 ? 0 : roundoff(dtype) * std::abs(value) + 0x1p-24;
          right = right && std::abs(got - value) <= bound;
        }
  check(right, "unpack:" + described_layout(l, batch, dtype));
  check(images.intact() && planes == before, "unpack, beyond the buffers:" + described_layout(l, batch, dtype));
}

// From rows and channels and groups with `slack` floats between them; with an offset nothing is aligned.
void test_repack(const PlaneLayout& l, int64_t groups, int64_t slack, int64_t offset) {
  const int64_t height = l.vertical.length, width = l.horizontal.length, row_stride = width * l.lanes + slack;
  const int64_t channel_stride = height * row_stride + slack, group_stride = l.channels * channel_stride + slack;
  std::normal_distribution<float> normal;
  Buffer input(DType::kFloat32, groups * group_stride, offset), planes(DType::kFloat32, groups * l.group_stride());
  for (int64_t i = 0; i < groups * group_stride; ++i) input.set(i, static_cast<double>(normal(random_bits)));
  const Buffer before = input, unwritten = planes;
  bool right =
      pykd::repack_planes_cuda({{reinterpret_cast<float*>(input.data()), group_stride, channel_stride, row_stride},
                                reinterpret_cast<float*>(planes.data()),
                                l},
                               groups, nullptr) == 0;
  int64_t at = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t channel = 0; channel < l.channels; ++channel)
      for (int64_t down = 0; down < l.vertical.phases; ++down)
        for (int64_t across = 0; across < l.horizontal.phases; ++across)
          for (int64_t row = 0; row < l.vertical.places; ++row)
            for (int64_t place = 0; place < l.horizontal.places; ++place)
              for (int64_t lane = 0; lane < l.lanes; ++lane, ++at) {
                const int64_t y = row * l.vertical.step + down - l.vertical.padding;
                const int64_t x = place * l.horizontal.step + across - l.horizontal.padding;
                const double got = planes.get(at);
                right = right && (y >= 0 && y < height && x >= 0 && x < width
                                      ? got == input.get(group * group_stride + channel * channel_stride +
                                                         y * row_stride + x * l.lanes + lane)
                                      : std::isnan(got));  // as it was
              }
  const std::string name = described_layout(l, groups, DType::kFloat32) + described({{"slack", slack}});
  check(right, "repack:" + name);
  check(planes.intact() && input == before && (groups || planes == unwritten), "repack, beyond the buffers:" + name);
}

int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[random_bits() % values.size()]; }

}  // namespace

int main() {
  constexpr std::array kDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const int64_t lanes : {1, 16, 32, 48})
    for (const DType dtype : kDTypes)
      for (const int64_t batch : {0, 1, 15, 17, 50})
        for (const int64_t features : {1, 3, 64, 65, 150, 1100}) {
          if (features == 1100 && batch > 1) continue;
          test_pack(pykd::feature_planes(features, lanes), batch, dtype);
          test_unpack(pykd::feature_planes(features, lanes), batch, dtype);
        }
  for (int i = 0; i < 300; ++i) {
    const Conv2dGeometry g{one_of({1, 2, 5}),    one_of({1, 4, 7, 12}), one_of({1, 3, 8, 9, 33}), one_of({1, 2, 3}),
                           one_of({1, 2, 3}),    one_of({1, 2, 3}),     one_of({1, 2, 3}),        one_of({0, 1, 2, 4}),
                           one_of({0, 1, 2, 4}), one_of({1, 2, 3}),     one_of({1, 2, 3})};
    if (g.out_height() < 1 || g.out_width() < 1) continue;
    const int64_t lanes = one_of({1, 1, 16, 32, 48}), batch = one_of({1, 3, 17, 50});
    const DType dtype = kDTypes[random_bits() % 3];
    test_pack(pykd::conv2d_planes(g, lanes), batch, dtype);
    const int64_t border = one_of({0, 1, 2});
    const PlaneLayout out{g.channels,
                          lanes,
                          {g.height, border, 1, 1, g.height + 2 * border},
                          {g.width, border, 1, 1, g.width + 2 * border}};
    test_unpack(out, batch, dtype);
    const int64_t slack = one_of({0, 3, 4}), offset = lanes == 1 ? 0 : one_of({0, 1});
    test_repack(pykd::conv2d_planes(g, lanes), one_of({0, 1, 3}), slack, offset);
  }
  // More groups than blocks, so that some take several.
  for (const int64_t lanes : {1, 16}) {
    test_pack(pykd::feature_planes(3, lanes), 1100 * lanes, DType::kFloat32);
    test_unpack(pykd::feature_planes(3, lanes), 1100 * lanes, DType::kFloat32);
    test_repack(pykd::conv2d_planes({2, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1}, lanes), 2200, 0, 0);
  }
  return report();
}
