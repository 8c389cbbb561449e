// torch's dtypes as the kernels name them.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/dtype.h"
#include "torch/check.h"

namespace pykd::glue {

inline DType dtype_of(const char* op, const char* argument, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: break;
  }
  PYKD_CHECK_TYPE(false, op, ": ", argument, " must be float32, float64, float16 or bfloat16, got ", t.scalar_type());
}

}  // namespace pykd::glue
