// The arithmetic of one entry, for vectors, scalars and CUDA, and what the sums over a row come to, for all of them.
//
// The unit vectors' difference is d = length * e with e = x - ratio * y, of the scaled factors x and y: of equal
// factors the ratio is 1 and e is exactly 0, whether or not the compiler fuses the product. The loss's derivative by d
// is a weight times direction(e).
#pragma once

#include <cmath>

#include "core/magnitude.h"
#include "kernels/factor_loss/factor_loss.h"

namespace pykd::PYKD_ISA {

// ---- an entry ------------------------------------------------------------------------------------------------------

// -1, 0 or 1.
template <typename T>
PYKD_HD T sign(T x) {
  return static_cast<T>((x > 0) - (x < 0));
}
#if !defined(PYKD_ISA_CUDA)
inline Floats sign(Floats x) { return (Floats)((((Ints)x & ~0x7FFFFFFF) | 0x3F800000) & (x != 0)); }
#endif

template <typename V>
PYKD_HD V direction(int p, V e) {
  return p == 1 ? sign(e) : e;
}

// ---- a row ---------------------------------------------------------------------------------------------------------

// Whether a sum of squares is to be trusted, and that of differences of a rounding's size, too; no for 0 and NaN.
PYKD_HD bool is_in_range(float squares) { return squares > 1e-12f && squares < 1e20f; }
PYKD_HD bool is_in_range(double squares) { return squares > 1e-200 && squares < 1e200; }

// The power of two that brings a magnitude near 1.
PYKD_HD float power_against(float magnitude) {
  const int32_t exponent = 254 - (magnitude_bits(magnitude) >> 23);
  return from_bits((exponent > 1 ? exponent : 1) << 23);
}
PYKD_HD double power_against(double magnitude) {
  const int64_t exponent = 2046 - (magnitude_bits(magnitude) >> 52);
  return from_bits((exponent > 1 ? exponent : 1) << 52);
}

// The factor f as the unit vector inverse * x, x = scale * f.
struct Unit {
  double scale;
  double inverse;  // 0: a vector of zeros; NaN: one with NaN or infinity

  PYKD_HD Unit(double scale_, double squares)
      : scale(scale_), inverse(squares == 0 ? 0 : 1 / sqrt(squares) + (squares - squares)) {}
};

// grad = along * direction(e) - inward * x
struct Slope {
  double along, inward;
};

struct Units {
  Unit student, teacher;

  PYKD_HD bool both() const { return student.inverse != 0 && teacher.inverse != 0; }
  PYKD_HD double ratio() const { return both() ? teacher.inverse / student.inverse : 1; }
  PYKD_HD double length() const { return student.inverse != 0 ? student.inverse : teacher.inverse; }

  // cost: the sum of |e|, or of e^2.
  PYKD_HD double loss(const FactorLoss& a, double cost) const {
    if (a.p == 1) return length() * cost;
    return a.by_row ? length() * sqrt(cost) : length() * length() * cost;
  }

  // inner: the sum of direction(e) x. A gradient has no part along its own factor. What the ratio's rounding adds to e
  // lies along the factors, so the part that goes is that of the direction as it was computed.
  PYKD_HD void slopes(const FactorLoss& a, double grad_loss, double cost, double inner, Slope& of_student,
                      Slope& of_teacher) const {
    if (cost == 0) {  // scales may overflow
      of_student = of_teacher = {0, 0};
      return;
    }
    double factor = a.scale * grad_loss;
    if (a.p == 2) factor *= a.by_row ? 1 / sqrt(cost) : 2 * length();
    const double with_d = length() * cost, with_student = student.inverse * inner + 0 * with_d;  // NaN is one in both
    of_student = slope(student, factor, with_student);
    of_teacher = slope(teacher, -factor, with_student - with_d);
  }

 private:
  PYKD_HD static Slope slope(const Unit& own, double factor, double with_own) {
    const double outer = factor * (own.scale * own.inverse);  // 0 for zeros, whose scale is the largest
    return {outer, outer * (own.inverse * with_own)};
  }
};

}  // namespace pykd::PYKD_ISA
