// One entry and one step, for vectors, scalars and CUDA.
#pragma once

#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

// The factor of a group under l1_l2.
template <typename T>
PYKD_HD T shrink_factor(T norm, T threshold) {
  const T factor = 1 - threshold / norm;
  return norm > threshold ? factor : norm == norm ? T{} : norm;
}

// The next level, from the sum and the number of the entries above the last one: never lower, and the same once no
// entry is left between the two.
template <typename Float, typename Scalar>
PYKD_HD Float next_level(Float level, Float sum, Float count, Scalar threshold) {
  const Float next = (sum - threshold) / count;
  return next > level ? next : level;  // also where count is 0
}

}  // namespace pykd::PYKD_ISA
