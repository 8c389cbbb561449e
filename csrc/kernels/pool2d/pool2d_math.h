// Where windows meet the image, for the CPU and CUDA.
#pragma once

#include "kernels/pool2d/pool2d.h"

namespace pykd::PYKD_ISA {

// The places of one window along one side that lie within the image; the others are its padding.
struct PoolWindow {
  int64_t first, places;
  int64_t counted;  // by a mean

  PYKD_HD PoolWindow(int64_t out, int64_t length, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                     bool count_padding) {
    const int64_t begin = out * stride - padding, skipped = begin < 0 ? (dilation - 1 - begin) / dilation : 0;
    first = begin + skipped * dilation;
    const int64_t room = length - first;
    const int64_t within = room <= 0 ? 0 : dilation == 1 ? room : (room - 1) / dilation + 1;
    places = within < kernel - skipped ? within : kernel - skipped;
    counted = !count_padding ? places : begin + kernel < length + padding ? kernel : length + padding - begin;
  }
};

// NaN stays.
template <typename Float>
PYKD_HD Float larger(Float a, Float b) {
  const Float most = b > a ? b : a;  // a where either is NaN
  return b == b ? most : b;
}

}  // namespace pykd::PYKD_ISA
