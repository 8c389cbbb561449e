// The CUDA forms of sparse_conv2d that sparse_conv2d_test.cpp is too small for, under emulation: many places and rows a
// thread, blocks that take more than one tile, strides of every kind; against the sum over a column's offset into the
// planes, in double. Nothing is written but places, and nothing is read beyond the planes.
#include "core/sparse_test.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace {

using namespace pykd::testing;
using pykd::DType;

struct Case {
  int64_t out, columns, block_rows, block_columns;
  double density;
  int64_t groups, height, width, lanes;  // of the output
  int64_t slack = 0;                     // floats between rows of the output, and between its channels
  DType halves = DType::kFloat32;
};

void test(const Case& c, std::mt19937& random) {
  const SparseMatrix w(c.out, c.columns, c.block_rows, c.block_columns, c.density, random, 1, c.halves);
  const bool halves = c.halves != DType::kFloat32;
  constexpr int64_t kTaps = 3;  // a column is one of three neighbours in the rows of a channel
  const int64_t row_stride = (c.width + 2) * c.lanes, channel = c.height * row_stride;
  const int64_t group_stride = (c.columns + kTaps - 1) / kTaps * channel;
  Vector<int32_t> offsets;
  for (int64_t i = 0; i < c.columns; ++i)
    offsets.push_back(static_cast<int32_t>(i / kTaps * channel + i % kTaps * c.lanes));
  const Vector<float> planes = filled(c.groups * group_stride, random), bias = filled(c.out, random);
  const int64_t out_row = c.width * c.lanes + c.slack, out_channel = c.height * out_row + c.slack;
  const bool relu = random() % 2, has_bias = random() % 2;
  Buffer output(DType::kFloat32, c.groups * c.out * out_channel);
  const int status = pykd::sparse_conv2d_cuda(
      {halves ? w.halves() : w.panels(), planes.data(), offsets.data(), group_stride, row_stride, c.lanes, c.height,
       c.width, reinterpret_cast<float*>(output.data()), c.out * out_channel, out_channel, out_row,
       has_bias ? bias.data() : nullptr, relu ? pykd::Activation::kRelu : pykd::Activation::kNone},
      c.groups, nullptr);
  bool right = status == 0;
  int64_t written = 0;
  for (int64_t i = 0; i < c.groups * c.out * out_channel; ++i) written += !std::isnan(output.get(i));
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t g = 0; g < c.groups; ++g)
      for (int64_t y = 0; y < c.height; ++y)
        for (int64_t x = 0; x < c.width * c.lanes; ++x) {
          double sum = has_bias ? bias[static_cast<size_t>(o)] : 0, size = std::abs(sum);
          for (int64_t i = 0; i < c.columns; ++i) {
            const float read =
                planes[static_cast<size_t>(g * group_stride + offsets[static_cast<size_t>(i)] + y * row_stride + x)];
            const double term = static_cast<double>(w.dense[static_cast<size_t>(o * c.columns + i)]) *
                                (halves ? pykd::rounded(read, c.halves) : read);
            sum += term;
            size += std::abs(term);
          }
          // A rounding for each of the terms, the sums of up to 8 parts and the bias; tensor cores may cut off instead.
          const double wanted = relu && sum < 0 ? 0 : sum;
          const double bound =
              (halves ? static_cast<double>(c.columns + 8) * 0x1p-23 : static_cast<double>(c.columns + 4) * 0x1p-24) *
              size;
          const double got = output.get((g * c.out + o) * out_channel + y * out_row + x);
          right = right && std::abs(got - wanted) <= bound;
        }
  const std::string name = w.name() + described({{"images", c.groups},
                                                 {"height", c.height},
                                                 {"width", c.width},
                                                 {"lanes", c.lanes},
                                                 {"slack", c.slack},
                                                 {"density", c.density},
                                                 {"relu", relu},
                                                 {"halves", static_cast<int>(c.halves)}});
  check(!halves || w.halves().tiles > 0, name + ": halves");
  check(right, name);
  check(written == c.groups * c.out * c.height * c.width * c.lanes, name + ": places alone");
  check(output.intact(), name + ": beyond the output");
}

}  // namespace

int main() {
  std::mt19937 random(20264);
  // Work enough for 2 and for 4 places and as many more rows a thread: apart, and in one access.
  for (const int64_t height : {1, 2, 4, 8, 16}) {
    const int64_t out = height == 16 ? 4224 : height == 1 ? 1060 : 530 * height;
    test({out, 7, height, 2, 0.4, 4, 5, 5, 1}, random);
    test({out, 7, height, 2, 0.4, height == 16 ? 8 : 4, 5, 10, 1, 3}, random);
  }
  for (const int64_t height : {1, 8}) {
    test({530 * height * (height == 1 ? 2 : 1), 7, height, 2, 0.4, 2, 3, 3, 16, 16}, random);
    test({530 * height * (height == 1 ? 2 : 1), 7, height, 2, 0.4, 2, 3, 3, 16, 3}, random);
  }
  for (const int64_t lanes : {1, 16, 48})
    for (const int64_t block : {1, 2, 3, 4, 8, 16, 20})
      for (const double density : {0.0, 0.3, 1.0}) {
        test({37, 45, block, 3, density, 3, 4, 7, lanes}, random);
        test({5, 45, block, 1, density, 2, 1, 1, lanes, 1}, random);
        test({5, 45, block, 1, density, 2, 3, 1, lanes, 2}, random);
      }
  test({37, 45, 4, 4, 0.5, 0, 4, 7, 1}, random);   // no images
  test({8480, 5, 1, 1, 0.5, 2, 3, 3, 1}, random);  // blocks that take a second round of tiles
  for (const DType halves : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t lanes : {1, 16, 48})
      for (const int64_t block : {9, 16, 20})
        for (const auto& [width, density] : {std::pair{2, 0.0}, {2, 0.3}, {6, 1.0}, {16, 0.5}, {34, 0.7}, {46, 1.0}})
          test({37, 46, block, width, density, lanes == 1 ? 3 : 1, 2, 5, lanes,
                width % 4    ? 0
                : lanes == 1 ? 3
                             : 4,
                halves},
               random);
    test({37, 46, 16, 16, 0.5, 0, 4, 7, 1, 0, halves}, random);
    if (kSlow) continue;
    // Work enough for 2 and for 4 places a lane: apart, and in one access.
    test({1060, 18, 16, 6, 0.3, 3, 9, 11, 1, 3, halves}, random);
    test({1060, 18, 16, 6, 0.3, 6, 9, 11, 1, 3, halves}, random);
    test({1060, 18, 16, 6, 0.3, 2, 3, 6, 16, 16, halves}, random);
    test({1060, 18, 16, 6, 0.3, 2, 3, 6, 16, 3, halves}, random);
  }
  return report();
}
