// One weight's term, for vectors, scalars and CUDA: in three steps, so that loops can keep them apart.
#pragma once

#include "core/exponential.h"
#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

template <typename Float>
struct ScalarOf {
  using Type = float;
};
template <>
struct ScalarOf<double> {
  using Type = double;
};

// log(1 + e) / 2 for e in [0, 1], within 3e-7 of its size.
template <typename Float>
PYKD_HD Float half_logarithm_of_one_plus(Float e) {
  Float p = 0.022044817f - 0.00426960504f * e;
  p = p * e - 0.053840857f;
  p = p * e + 0.0887262075f;
  p = p * e - 0.122477316f;
  p = p * e + 0.166377396f;
  p = p * e - 0.249987021f;
  p = p * e + 0.499999911f;
  return p * e;
}
PYKD_HD double half_logarithm_of_one_plus(double e) { return 0.5 * log1p(e); }

// h = -log_alpha / 2, of any value for theta = 0. A subnormal theta counts as one just below the normal ones.
template <typename Float>
PYKD_HD Float kl_half_ratio(Float theta, Float log_sigma2) {
  return logarithm_of_positive(magnitude(theta)) - log_sigma2 * 0.5f;
}

// e = exp(-|log_alpha|), f = exp(k2 + k3 log_alpha), infinite where it is beyond the range.
template <typename Float>
struct KlExponentials {
  Float e, f;
};

template <typename Float>
PYKD_HD KlExponentials<Float> kl_exponentials(Float h) {
  using Scalar = typename ScalarOf<Float>::Type;
  constexpr double log2_e = 1.44269504088896340736;
  constexpr Scalar two = static_cast<Scalar>(2 * log2_e), k2 = static_cast<Scalar>(1.87320 * log2_e);
  constexpr Scalar two_k3 = static_cast<Scalar>(2 * 1.48695 * log2_e);
  constexpr Scalar beyond = sizeof(Scalar) == sizeof(float) ? 128 : 1024;
  const Float u = k2 - h * two_k3, most = Float{} + beyond;
  return {exponential2(magnitude(h) * -two), exponential2(u < beyond ? u : most)};
}

// The value, and its two derivatives times a factor.
template <typename Float>
struct KlTerm {
  Float kl, theta, log_sigma2;
};

template <typename Float>
PYKD_HD KlTerm<Float> kl_term(Float theta, Float h, const KlExponentials<Float>& of,
                              typename ScalarOf<Float>::Type factor) {
  using Scalar = typename ScalarOf<Float>::Type;
  constexpr Scalar k1 = static_cast<Scalar>(0.63576), k1_k3 = static_cast<Scalar>(0.63576 * 1.48695);
  const auto positive = h > 0.0f;
  const Float one = Float{} + 1.0f;
  const Float s = quotient(one, of.f + 1.0f);                          // s(-k2 - k3 log_alpha)
  const Float s_alpha = quotient(positive ? one : of.e, of.e + 1.0f);  // s(-log_alpha)
  const Float kl = s * k1 + (half_logarithm_of_one_plus(of.e) + (positive ? h : Float{}));
  const Float log_sigma2 = (s - s * s) * (-k1_k3 * factor) - s_alpha * (0.5f * factor);
  const auto none = theta == 0.0f;
  return {none ? Float{} : kl, none ? Float{} : quotient(log_sigma2 * -2.0f, theta), none ? Float{} : log_sigma2};
}

template <typename Float>
PYKD_HD KlTerm<Float> kl_term(Float theta, Float log_sigma2, typename ScalarOf<Float>::Type factor = 1) {
  const Float h = kl_half_ratio(theta, log_sigma2);
  return kl_term(theta, h, kl_exponentials(h), factor);
}

}  // namespace pykd::PYKD_ISA
