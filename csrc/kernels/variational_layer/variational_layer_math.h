// One value, for vectors, scalars and CUDA.
#pragma once

#include "core/exponential.h"

namespace pykd::PYKD_ISA {

PYKD_HD double square_root(double x) { return sqrt(x); }

template <typename Float>
PYKD_HD Float deviation_of(Float variance) {
  return square_root(variance + 1e-8f);
}
PYKD_HD double deviation_of(double variance) { return square_root(variance + 1e-8); }

template <typename Float>
PYKD_HD Float grad_variance_of(Float grad_sample, Float eps, Float deviation) {
  return quotient(grad_sample * eps * 0.5f, deviation);
}

template <typename Float>
PYKD_HD Float sigma2_of(Float log_sigma2) {
  return exponential(log_sigma2 > 89.0f ? Float{} + 89.0f : log_sigma2);
}
PYKD_HD double sigma2_of(double log_sigma2) { return exp(log_sigma2); }

}  // namespace pykd::PYKD_ISA
