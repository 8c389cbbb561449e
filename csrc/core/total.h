// The sum of the rows' losses on the CPU: in double and in their order, so that threads do not change it.
#pragma once

#include "core/dtype.h"

namespace pykd {

// *loss = scale * sum of row_loss[0..rows); both are float64 or float32.
void total_cpu(const void* row_loss, DType dtype, int64_t rows, double scale, void* loss);

}  // namespace pykd
