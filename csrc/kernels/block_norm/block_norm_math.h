// One group's factor, for scalars and CUDA.
#pragma once

#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

// What a group's entries are multiplied with for their gradient: finite for norms whose inverse is not.
PYKD_HD float inverse_norm(float norm) { return norm == 0 ? 0.0f : norm < 2.94e-39f ? 3.4e38f : 1.0f / norm; }
PYKD_HD double inverse_norm(double norm) { return norm == 0 ? 0.0 : norm < 5.6e-309 ? 1.7e308 : 1.0 / norm; }

// The same, once it has been multiplied.
PYKD_HD float limited(float factor) { return factor > 3.4e38f ? 3.4e38f : factor < -3.4e38f ? -3.4e38f : factor; }
PYKD_HD double limited(double factor) { return factor > 1.7e308 ? 1.7e308 : factor < -1.7e308 ? -1.7e308 : factor; }
#if !defined(PYKD_ISA_CUDA)
inline Floats limited(Floats factor) {
  const Floats most = Floats{} + 3.4e38f;
  return factor > most ? most : factor < -most ? -most : factor;
}
#endif

}  // namespace pykd::PYKD_ISA
