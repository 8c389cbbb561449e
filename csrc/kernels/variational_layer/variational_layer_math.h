// One value, for vectors, scalars and CUDA.
#pragma once

#include "core/simd.h"

namespace pykd::PYKD_ISA {

PYKD_HD double square_root(double x) { return sqrt(x); }

template <typename Float>
PYKD_HD Float deviation_of(Float variance) {
  return square_root(variance + 1e-8f);
}
PYKD_HD double deviation_of(double variance) { return square_root(variance + 1e-8); }

template <typename Float>
PYKD_HD Float grad_variance_of(Float grad_sample, Float eps, Float deviation) {
  return grad_sample * eps * 0.5f / deviation;
}

}  // namespace pykd::PYKD_ISA
