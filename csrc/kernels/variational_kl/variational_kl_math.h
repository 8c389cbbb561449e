// One weight's term, for vectors, scalars and CUDA.
#pragma once

#include "core/exponential.h"

namespace pykd::PYKD_ISA {

template <typename Float>
struct ScalarOf {
  using Type = float;
};
template <>
struct ScalarOf<double> {
  using Type = double;
};

template <typename Float>
struct KlTerm {
  Float kl, theta, log_sigma2;  // the value and its two derivatives
};

PYKD_HD double magnitude(double x) { return fabs(x); }
template <typename Float>
PYKD_HD Float magnitude(Float x) {
  return bits_float(float_bits(x) & 0x7FFFFFFF);
}

// log(1 + e) for e in [0, 1], relative to its size: what rounds off in 1 + e is added again.
template <typename Float>
PYKD_HD Float logarithm_of_one_plus(Float e) {
  const Float sum = e + 1.0f;
  return logarithm(sum) + (e - (sum - 1.0f));
}

// With L = -log_alpha and u = k2 - k3 L: two exponentials of what is not positive, so that nothing overflows, and the
// logistic functions of L and of -u as quotients of them, exact to rounding on both sides.
template <typename Float>
PYKD_HD KlTerm<Float> kl_term(Float theta, Float log_sigma2) {
  using Scalar = typename ScalarOf<Float>::Type;
  constexpr Scalar k1 = static_cast<Scalar>(0.63576), k2 = static_cast<Scalar>(1.87320);
  constexpr Scalar k3 = static_cast<Scalar>(1.48695);
  const Float l = logarithm(magnitude(theta)) * 2.0f - log_sigma2;
  const Float u = k2 - l * k3;
  const Float e = exponential(-magnitude(l)), f = exponential(-magnitude(u));
  const Float inverse = 1.0f / ((e + 1.0f) * (f + 1.0f));
  const Float of_e = inverse * (f + 1.0f), of_f = inverse * (e + 1.0f);  // 1 / (1 + e), 1 / (1 + f)
  const Float s_l = l > 0.0f ? of_e : e * of_e;                          // s(L)
  const Float s_u = u > 0.0f ? f * of_f : of_f;                          // s(-u)
  const Float positive = l > 0.0f ? l : Float{};
  KlTerm<Float> term;
  term.kl = s_u * k1 + (logarithm_of_one_plus(e) + positive) * 0.5f;
  term.log_sigma2 = f * of_f * of_f * (-k1 * k3) - s_l * 0.5f;
  term.theta = term.log_sigma2 * (-2.0f / theta);
  const auto none = theta == 0.0f;
  term.kl = none ? Float{} : term.kl;
  term.theta = none ? Float{} : term.theta;
  term.log_sigma2 = none ? Float{} : term.log_sigma2;
  return term;
}

}  // namespace pykd::PYKD_ISA
