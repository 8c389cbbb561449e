// What noise does to a logit, written once for vectors, scalars and CUDA.
#pragma once

#include "core/dtype.h"

namespace pykd::PYKD_ISA {

enum class Target { kClean, kMultiplicative, kAdditive };

// A logit of -inf is a masked class, which noise leaves where it is.
template <Target kTarget, typename V>
PYKD_HD V perturb(V logit, V noise) {
  if constexpr (kTarget == Target::kMultiplicative) return logit > -__builtin_inff() ? logit + logit * noise : logit;
  if constexpr (kTarget == Target::kAdditive) return logit + noise;
  return logit;
}

}  // namespace pykd::PYKD_ISA
