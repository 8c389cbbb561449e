// The arithmetic of a logit and of a row, written once for vectors, scalars and CUDA.
//
// With a = (z - teacher_max) / T and b = (student - student_max) / T, a row is known by its two maxima and the sums of
// exp(b), exp(a), and of the divergence's terms; sums of parts of a row are brought to common maxima and added.
#pragma once

#include "core/exponential.h"
#include "core/perturb.h"
#include "kernels/distillation_loss/distillation_loss.h"

namespace pykd::PYKD_ISA {

template <typename V>
PYKD_HD V zero_where_zero(V weight, V value) {
  return weight == 0.0f ? V{} : value;
}

// The term of one class: exp(a) (a - b), or exp(b) (b - a), which is 0 where its exponential is, whatever a and b are.
template <bool kReverse, typename V>
PYKD_HD V divergence_term(V exp_a, V exp_b, V a, V b) {
  return kReverse ? exp_b * zero_where_zero(exp_b, b - a) : exp_a * zero_where_zero(exp_a, a - b);
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
    const V moved = divergence + (kReverse ? exp_b * (of_b - of_a) : exp_a * (of_a - of_b));
    const V factor_b = exponential(of_b), factor_a = exponential(of_a);
    exp_b = zero_where_zero(exp_b, exp_b * factor_b);
    exp_a = zero_where_zero(exp_a, exp_a * factor_a);
    divergence = zero_where_zero(kReverse ? exp_b : exp_a, moved * (kReverse ? factor_b : factor_a));
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

// The gradient of a class: student * exp_b - teacher * exp_a         (reverse: student * exp_b * ((b - a) + offset))
//                          + hard * exp(logit) - smoothing,  and - at_target at the target
// a and b are in powers of two. The fourth argument is exp_a, or b - a.
template <typename V>
struct Slopes {
  V student = {}, teacher = {}, offset = {}, hard = {}, smoothing = {}, at_target = {};
};

template <bool kReverse, bool kHard, typename V, typename S>
PYKD_HD V gradient(const Slopes<S>& slopes, V exp_b, V other, V hard) {
  V g;
  if constexpr (kReverse)
    g = reverse_gradient(exp_b, slopes.student, other + slopes.offset);
  else
    g = exp_b * slopes.student - other * slopes.teacher;
  if constexpr (kHard) g += hard * slopes.hard - slopes.smoothing;
  return g;
}

PYKD_HD int64_t batch_rows(const DistillationLoss& a) { return a.rows_before + a.rows + a.rows_after; }

// What all rows share.
template <typename T>
struct Weights {
  explicit Weights(const DistillationLoss& a)
      : Weights(a, (1 - a.hard_weight) * a.temperature / (a.batchmean ? static_cast<double>(batch_rows(a)) : 1)) {}

  bool soft, hard;  // whether the teacher, whether the target counts
  T soft_scale;     // of a row's KL
  T soft_slope;     // of its gradient, which divides by the temperature
  T smoothing;      // label_smoothing
  T each;           // 1 / classes

 private:
  Weights(const DistillationLoss& a, double slope)
      : soft(a.hard_weight < 1),
        hard(a.hard_weight > 0),
        soft_scale(static_cast<T>(slope * a.temperature)),
        soft_slope(static_cast<T>(slope)),
        smoothing(static_cast<T>(a.label_smoothing)),
        each(static_cast<T>(1 / static_cast<double>(a.classes))) {}
};

// The loss of one row, or of as many as V has lanes, and the slopes of the gradient. hard_weight, the weight of the
// cross-entropy, is 0 where the row is ignored; upstream is the loss's own gradient.
template <bool kReverse, typename V, typename T>
PYKD_HD V finish(const RowSums<V>& sums, const Weights<T>& weights, V hard_weight, V upstream, V at_target,
                 V logit_mean, Slopes<V>& slopes) {
  constexpr T kLog2 = T(0.69314718055994530942);
  V loss{};
  if (weights.soft) {
    const V log_ratio = sums.template log_ratio<kReverse>(), kl = sums.template kl<kReverse>(log_ratio);
    const V slope = upstream * (weights.soft_slope * (kReverse ? kLog2 : T(1)));
    loss = kl * weights.soft_scale;
    slopes.student = kl == kl ? slope / sums.exp_b : kl;
    slopes.teacher = slope / sums.exp_a;
    slopes.offset = (log_ratio - kl) * (1 / kLog2);
  }
  if (weights.hard) {
    V ce{};
    if (weights.smoothing < 1) ce = sums.nll(at_target) * (1 - weights.smoothing);
    if (weights.smoothing > 0) ce += sums.nll(logit_mean) * weights.smoothing;
    const V slope = hard_weight * upstream;
    loss += zero_where_zero(hard_weight, hard_weight * ce);
    slopes.hard = zero_where_zero(hard_weight, slope / sums.hard);
    slopes.smoothing = slope * (weights.smoothing * weights.each);
    slopes.at_target = slope * (1 - weights.smoothing);
  }
  return loss;
}

}  // namespace pykd::PYKD_ISA
