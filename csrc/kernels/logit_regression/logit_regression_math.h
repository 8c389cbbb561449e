// The arithmetic of one logit, written once for vectors, scalars and CUDA.
#pragma once

#include "core/perturb.h"

namespace pykd::PYKD_ISA {

// student - target
template <Target kTarget, typename V>
PYKD_HD V logit_difference(V student, V teacher, V noise) {
  return student - perturb<kTarget>(teacher, noise);
}

}  // namespace pykd::PYKD_ISA
