// block_prox_, the torch layer: rules and packing shared by the CPU, CUDA and Meta glue.
#pragma once

#include <torch/library.h>

#include <cmath>
#include <vector>

#include "kernels/block_prox/block_prox.h"
#include "torch/blocks.h"

namespace pykd::glue {

// As module.cpp offers it to Python.
void block_prox_(const Tensors& weights, PYKD_GROUPS, double threshold);

// A device's implementation; without `run` it only checks: Meta.
template <void (*run)(const at::Tensor& first, const BlockProx& args)>
struct BlockProxOp {
  static void apply(at::TensorList weights, PYKD_GROUPS, double threshold) {
    const char* op = "block_prox_";
    const Grouping grouping{groups, rows, columns, linf};
    check_weights(op, weights, grouping);
    PYKD_CHECK(threshold >= 0 && std::isfinite(threshold), op, ": threshold must be finite and >= 0, got ", threshold);
    if constexpr (run != nullptr) {
      Tensors dense;
      std::vector<BlockProxWeight> packed;
      for (const at::Tensor& weight : weights) {
        PYKD_CHECK(at::has_internal_overlap(weight) != at::MemOverlap::Yes, op,
                   ": a weight must have memory of its own for each value, got an expanded one");
        dense.push_back(weight.contiguous());
        packed.push_back({dense.back().mutable_data_ptr(), blocks_of(weight, grouping)});
      }
      Written(op, "weights", weights);
      run(weights[0],
          {packed.data(), static_cast<int64_t>(packed.size()), threshold, dtype_of(op, "weights", weights[0]), linf});
      for (size_t i = 0; i < dense.size(); ++i)
        if (!dense[i].is_same(weights[i])) weights[i].copy_(dense[i]);
    }
  }

  static void implement(torch::Library& m) { m.impl("block_prox_", &apply); }
};

}  // namespace pykd::glue
