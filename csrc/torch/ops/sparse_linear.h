// sparse_linear, the torch layer: rules and shapes shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "kernels/sparse_linear/sparse_linear.h"
#include "torch/sparse.h"

namespace pykd::glue {

// As module.cpp offers it to Python: `host` is the packed weight on the CPU, whose head is read.
at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& host,
                         const std::optional<at::Tensor>& bias, bool relu);

// A device's implementation; without `run` it only allocates: Meta. `input` comes to run as [rows, in], contiguous.
template <void (*run)(const at::Tensor& input, const at::Tensor& packed, const PackedSparse& weight, const float* bias,
                      bool relu, at::Tensor& output)>
struct SparseLinearOp {
  static constexpr const char* kName = "sparse_linear";

  static at::Tensor forward(PYKD_SPARSE_TENSORS, bool relu) {
    const PackedSparse weight = check_sparse(kName, input, packed, head, bias);
    PYKD_CHECK(weight.groups == 1, kName, ": the weight must be packed in one group, got ", weight.groups);
    PYKD_CHECK(input.dim() >= 1 && input.sym_size(-1) == weight.columns, kName, ": input must be [..., ",
               weight.columns, "], got ", input.sym_sizes());
    auto sizes = input.sym_sizes().vec();
    sizes.back() = weight.rows;
    at::Tensor output = at::empty_symint(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
    if constexpr (run != nullptr) {
      const auto wide = dense_bias(bias);
      if (output.numel()) run(input.contiguous(), packed, weight, pointer_of(wide), relu, output);
    }
    return output;
  }
};

}  // namespace pykd::glue
