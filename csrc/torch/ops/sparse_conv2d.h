// sparse_conv2d, the torch layer: rules and shapes shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "torch/sparse.h"

namespace pykd::glue {

#define PYKD_SPARSE_CONV \
  at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu

// As module.cpp offers it to Python: `host` is the packed weight on the CPU, whose head is read.
at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& host,
                         const std::optional<at::Tensor>& bias, std::array<int64_t, 2> kernel,
                         std::array<int64_t, 2> stride, std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                         bool relu);

// A device's implementation; without `run` it only allocates: Meta. `input` comes to run contiguous.
template <void (*run)(const at::Tensor& input, const at::Tensor& packed, const PackedSparse& weight,
                      const Conv2dGeometry& geometry, const float* bias, bool relu, at::Tensor& output)>
struct SparseConv2dOp {
  static constexpr const char* kName = "sparse_conv2d";

  static at::Tensor forward(PYKD_SPARSE_TENSORS, PYKD_SPARSE_CONV) {
    const PackedSparse weight = check_sparse(kName, input, packed, head, bias);
    check_pair("kernel", kernel, 1);
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("dilation", dilation, 1);
    const int64_t taps = kernel[0] * kernel[1], channels = weight.columns / taps * weight.groups;
    PYKD_CHECK(weight.columns % taps == 0, kName, ": kernel must be the weight's, got ", kernel, " for ",
               weight.columns, " columns");
    PYKD_CHECK(input.dim() == 4 && input.sym_size(1) == channels, kName, ": input must be [rows, ", channels,
               ", height, width], got ", input.sym_sizes());
    std::vector<c10::SymInt> sizes = {input.sym_size(0), weight.rows};
    for (size_t i = 0; i < 2; ++i) {
      const c10::SymInt side = input.sym_size(static_cast<int64_t>(i) + 2);
      const c10::SymInt room = side + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
      PYKD_CHECK(side >= 1 && room >= 0, kName, ": input must be as large as the kernel, got ", input.sym_sizes(),
                 " for ", kernel, " with padding ", padding, " and dilation ", dilation);
      sizes.push_back(room / stride[i] + 1);
    }
    if constexpr (run != nullptr) {
      int64_t pixels = channels;
      for (size_t i = 0; i < 2; ++i)
        PYKD_CHECK(!c10::mul_overflows(pixels, input.size(static_cast<int64_t>(i) + 2) + 2 * padding[i], &pixels) &&
                       pixels <= kMostEntries,
                   kName, ": an image must have less than 2^31 pixels in all channels, with padding ", padding,
                   ", got ", input.sizes());
    }
    at::Tensor output = at::empty_symint(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
    if constexpr (run != nullptr) {
      const auto wide = dense_bias(bias);
      const Conv2dGeometry geometry{channels,  input.size(2), input.size(3), kernel[0],   kernel[1],  stride[0],
                                    stride[1], padding[0],    padding[1],    dilation[0], dilation[1]};
      if (output.numel()) run(input.contiguous(), packed, weight, geometry, pointer_of(wide), relu, output);
    }
    return output;
  }

 private:
  static void check_pair(const char* name, at::IntArrayRef values, int64_t least) {
    PYKD_CHECK(
        values.size() == 2 && std::min(values[0], values[1]) >= least && std::max(values[0], values[1]) < kMostEntries,
        kName, ": ", name, " must be one or two integers >= ", least, " and < 2^31, got ", values);
  }
};

}  // namespace pykd::glue
