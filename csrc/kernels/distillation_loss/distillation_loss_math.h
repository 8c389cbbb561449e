// The arithmetic of a logit and of a row, written once for vectors, scalars and CUDA.
//
// With a = (z - teacher_max) / T and b = (student - student_max) / T, a row is known by its two maxima and the sums of
// exp(b), exp(a), and of the divergence's terms; sums of parts of a row are brought to common maxima and added.
#pragma once

#include "core/exponential.h"
#include "core/perturb.h"

namespace pykd::PYKD_ISA {

template <typename V>
PYKD_HD V zero_where_zero(V weight, V value) {
  return weight == 0.0f ? V{} : value;
}

// The term of one class: exp(a) (a - b), or exp(b) (b - a), which is 0 where its exponential is, whatever a and b are.
template <bool kReverse, typename V>
PYKD_HD V divergence_term(V exp_a, V exp_b, V a, V b) {
  return kReverse ? zero_where_zero(exp_b, exp_b * (b - a)) : zero_where_zero(exp_a, exp_a * (a - b));
}

// The gradient of one class under the reverse divergence: where exp(b) is 0, 0 times the slope (which may be NaN),
// whatever the difference is.
template <typename V, typename S>
PYKD_HD V reverse_gradient(V exp_b, S slope, V difference) {
  return exp_b * slope * zero_where_zero(exp_b, difference);
}

// Of one row, or of as many as V has lanes.
template <typename V>
struct RowSums {
  V student_max = V{} - __builtin_inff(), teacher_max = V{} - __builtin_inff();
  V exp_b = {}, exp_a = {}, divergence = {};
  V hard = {};  // sum of exp(student - student_max)

  // A part without any finite logit has maximum -inf; its exponentials are taken from 0 instead.
  PYKD_HD static V base(V max) { return max == -__builtin_inff() ? V{} : max; }

  // Brings the sums to other maxima, not below their own.
  template <bool kReverse>
  PYKD_HD void rebase(V new_student_max, V new_teacher_max, V inverse_temperature) {
    const V of_b = (base(student_max) - base(new_student_max)) * inverse_temperature;
    const V of_a = (base(teacher_max) - base(new_teacher_max)) * inverse_temperature;
    const V weight = kReverse ? exp_b : exp_a;
    const V moved = divergence + weight * (kReverse ? of_b - of_a : of_a - of_b);
    divergence = zero_where_zero(weight, moved * exponential(kReverse ? of_b : of_a));
    exp_b = zero_where_zero(exp_b, exp_b * exponential(of_b));
    exp_a = zero_where_zero(exp_a, exp_a * exponential(of_a));
    hard = zero_where_zero(hard, hard * exponential(base(student_max) - base(new_student_max)));
    student_max = new_student_max;
    teacher_max = new_teacher_max;
  }

  // Adds another part of the row.
  template <bool kReverse>
  PYKD_HD void add(RowSums part, V inverse_temperature) {
    const V new_student_max = student_max > part.student_max ? student_max : part.student_max;
    const V new_teacher_max = teacher_max > part.teacher_max ? teacher_max : part.teacher_max;
    rebase<kReverse>(new_student_max, new_teacher_max, inverse_temperature);
    part.template rebase<kReverse>(new_student_max, new_teacher_max, inverse_temperature);
    exp_b += part.exp_b;
    exp_a += part.exp_a;
    divergence += part.divergence;
    hard += part.hard;
  }

  // log of the other's sum over the weights': what the terms' mean lacks to the divergence of the softmaxes.
  template <bool kReverse>
  PYKD_HD V log_ratio() const {
    return logarithm(kReverse ? exp_a / exp_b : exp_b / exp_a);
  }

  // KL, which rounding leaves no less than 0; NaN for a row without any finite logit.
  template <bool kReverse>
  PYKD_HD V kl(V log_ratio) const {
    const V value = divergence / (kReverse ? exp_b : exp_a) + log_ratio;
    return value < 0.0f ? V{} : value;
  }

  // -log softmax of a logit, at temperature 1.
  PYKD_HD V nll(V logit) const { return logarithm(hard) + (student_max - logit); }
};

}  // namespace pykd::PYKD_ISA
