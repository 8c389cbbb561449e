// noisy_logits, the torch layer: rules and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/noisy_logits/noisy_logits.h"
#include "torch/dtype.h"
#include "torch/noise.h"

namespace pykd::glue {

#define PYKD_NOISY_LOGITS_OPTIONS double sigma, double alpha, bool per_sample, bool additive, int64_t row_offset

// As module.cpp offers them to Python: a seed that noise needs and that is not given is drawn from the generator.
at::Tensor noisy_logits(const at::Tensor& logits, std::optional<at::Tensor> seed,
                        const std::optional<at::Generator>& generator, PYKD_NOISY_LOGITS_OPTIONS);
void noisy_logits_out(const at::Tensor& logits, std::optional<at::Tensor> seed,
                      const std::optional<at::Generator>& generator, PYKD_NOISY_LOGITS_OPTIONS, const at::Tensor& out);

// A device's implementations; without `run` they only allocate: Meta.
template <void (*run)(const at::Tensor& logits, const NoisyLogits& args)>
struct NoisyLogitsOp {
  static at::Tensor forward(const at::Tensor& logits, const std::optional<at::Tensor>& seed,
                            PYKD_NOISY_LOGITS_OPTIONS) {
    at::Tensor noisy = at::empty_symint(logits.sym_sizes(), logits.options());
    call(logits, seed, {sigma, alpha, per_sample, additive, 1, row_offset}, noisy);
    return noisy;
  }

  static void out(const at::Tensor& logits, const std::optional<at::Tensor>& seed, PYKD_NOISY_LOGITS_OPTIONS,
                  const at::Tensor& out) {
    check_buffer("noisy_logits", "", out, "logits", logits);
    call(logits, seed, {sigma, alpha, per_sample, additive, 1, row_offset}, out);
  }

  static void implement(torch::Library& m) {
    m.impl("noisy_logits", &forward);
    m.impl("noisy_logits.out", &out);
  }

 private:
  static void call(const at::Tensor& logits, const std::optional<at::Tensor>& seed, const NoiseOptions& options,
                   const at::Tensor& noisy) {
    const char* op = "noisy_logits";
    PYKD_CHECK(logits.dim() == 2, op, ": logits must be [rows, classes], got ", logits.sym_sizes());
    PYKD_CHECK(logits.sym_size(1) >= 1, op, ": logits must have at least one class, got ", logits.sym_sizes());
    const DType dtype = dtype_of(op, "logits", logits);
    check_noise(op, options, seed, logits);
    if constexpr (run != nullptr) {
      const at::Tensor dense = logits.contiguous();
      check_overlap(op, "", noisy, "logits", dense);
      run(dense, {dense.const_data_ptr(), noisy.mutable_data_ptr(), dense.size(0), dense.size(1), dtype,
                  pack_noise(options, seed)});
    }
  }
};

}  // namespace pykd::glue
