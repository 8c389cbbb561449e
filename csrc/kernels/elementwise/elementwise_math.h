// The functions, for vectors, scalars and CUDA.
#pragma once

#include "core/exponential.h"
#include "kernels/elementwise/elementwise.h"

namespace pykd::PYKD_ISA {

// Within 2e-7 of it: a polynomial in x^2 near 0, where 1 - 2 / (exp(2 x) + 1) cancels.
template <typename Float>
PYKD_HD Float tangent(Float x) {
  const Float size = x < 0.0f ? -x : x, z = x * x;
  const Float e = exponential(2.0f * (size > 10.0f ? Float{} + 10.0f : size));
  const Float far = 1.0f - 2.0f / (e + 1.0f);
  Float p = 1.68036916e-3f * z - 7.50901304e-3f;
  p = p * z + 2.131894e-2f;
  p = p * z - 5.38388858e-2f;
  p = p * z + 0.133316948f;
  p = p * z - 0.333332466f;
  const Float near = p * z * x + x;
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// `other` is read of kAdd, `first` and `second` are kLeakyRelu's slope or kAffine's scale and shift.
template <Function kFunction, typename Float>
PYKD_HD Float applied(Float x, Float other, float first, float second) {
  switch (kFunction) {
    case Function::kRelu: return x <= 0.0f ? Float{} : x;
    case Function::kLeakyRelu: return x > 0.0f ? x : x * first;
    case Function::kTanh: return tangent(x);
    case Function::kAdd: return x + other;
    case Function::kAffine: return x * first + second;
    case Function::kCopy: break;
  }
  return x;
}

}  // namespace pykd::PYKD_ISA
