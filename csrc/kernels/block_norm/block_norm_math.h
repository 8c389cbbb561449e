// One group's factor, for scalars and CUDA.
#pragma once

#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

// What a group's entries are multiplied with for their gradient: finite for norms whose inverse is not.
PYKD_HD float inverse_norm(float norm) { return norm == 0 ? 0.0f : norm < 2.94e-39f ? 3.4e38f : 1.0f / norm; }
PYKD_HD double inverse_norm(double norm) { return norm == 0 ? 0.0 : norm < 5.6e-309 ? 1.7e308 : 1.0 / norm; }

}  // namespace pykd::PYKD_ISA
