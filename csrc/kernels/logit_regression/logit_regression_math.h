// The arithmetic of one logit, written once for vectors, scalars and CUDA.
#pragma once

#include "core/dtype.h"

namespace pykd::PYKD_ISA {

enum class Target { kClean, kMultiplicative, kAdditive };

// student - target
template <Target kTarget, typename V>
PYKD_HD V logit_difference(V student, V teacher, V noise) {
  if constexpr (kTarget == Target::kMultiplicative) return student - (teacher + teacher * noise);
  if constexpr (kTarget == Target::kAdditive) return student - (teacher + noise);
  return student - teacher;
}

}  // namespace pykd::PYKD_ISA
