// What sparse_linear and sparse_conv2d share: the packed weight, the rules, and how the work is given to the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "core/sparse_tiles.h"
#include "torch/dtype.h"

namespace pykd::glue {

// A weight as pack_sparse lays it out, and its head once more as numbers: shapes are needed where no data is at hand.
#define PYKD_SPARSE_TENSORS \
  const at::Tensor &input, const at::Tensor &packed, at::IntArrayRef head, const std::optional<at::Tensor>&bias

constexpr size_t kHeadNumbers = sizeof(PackedSparse) / sizeof(int64_t);
constexpr int64_t kMostEntries = INT32_MAX;  // the kernels count rows, columns and values in int32

// The head of a packed weight that lies on the CPU.
inline at::IntArrayRef head_of(const at::Tensor& packed) {
  PYKD_CHECK_TYPE(packed.is_cpu() && packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(sizeof(PackedSparse)),
                  "a packed weight must be what _C.sparse_pack returns");
  return {static_cast<const int64_t*>(packed.const_data_ptr()), kHeadNumbers};
}

// The blocks of a weight for the kernels: on the device, on the CPU, and the head. Torch's tracers see nothing of it:
// to them it is a constant.
inline std::tuple<at::Tensor, at::Tensor, std::vector<int64_t>> sparse_pack(const SparseBlocks& b, at::Device device) {
  constexpr const char* kName = "sparse_pack";
  const c10::impl::ExcludeDispatchKeyGuard untraced(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Tracer}));
  PYKD_CHECK(b.groups >= 1 && b.rows >= 1 && b.rows % b.groups == 0, kName, ": groups must divide the ", b.rows,
             " outputs, got ", b.groups);
  PYKD_CHECK(b.columns >= 1 && b.rows <= kMostEntries && b.columns <= kMostEntries / b.groups && b.block_rows >= 1 &&
                 b.block_columns >= 1 && b.block_rows <= b.rows && b.block_columns <= b.columns &&
                 b.stored <= kMostEntries / (b.block_rows * b.block_columns),
             kName, ": a weight must have less than 2^31 rows, columns and stored values, got [", b.rows, ", ",
             b.columns, "] with ", b.stored, " blocks [", b.block_rows, ", ", b.block_columns, "]");
  const int64_t grid = (1 + (b.rows - 1) / b.block_rows) * (1 + (b.columns - 1) / b.block_columns);
  for (int64_t i = 0; i < b.stored; ++i)
    PYKD_CHECK(b.positions[i] > (i ? b.positions[i - 1] : -1) && b.positions[i] < grid, kName,
               ": positions must ascend from 0 on, below ", grid, ", got ", b.positions[i], " at ", i);
  const std::vector<char> bytes = pack_sparse(b);
  at::Tensor packed = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
  std::memcpy(packed.mutable_data_ptr(), bytes.data(), bytes.size());
  return {packed.to(device), packed, head_of(packed).vec()};
}

// All rules but those on the input's shape. Indices are trusted: only pack_sparse writes them.
inline PackedSparse check_sparse(const char* op, PYKD_SPARSE_TENSORS) {
  const at::ScalarType dtype = input.scalar_type();
  PYKD_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                  ": input must be float32, float16 or bfloat16, got ", dtype);
  PackedSparse weight{};
  PYKD_CHECK(head.size() == kHeadNumbers, op, ": head must have ", kHeadNumbers, " numbers, got ", head.size());
  std::memcpy(&weight, head.data(), sizeof weight);
  PYKD_CHECK(weight.magic == kPackedSparse && packed.dim() == 1 && packed.sym_size(0) == weight.bytes &&
                 packed.scalar_type() == at::kByte && packed.is_contiguous(),
             op, ": packed must be the buffer that its head describes, of another build or weight, got ",
             packed.scalar_type(), " ", packed.sym_sizes());
  PYKD_CHECK_TYPE(packed.device() == input.device(), op, ": the weight must be on the input's device ", input.device(),
                  ", got ", packed.device());
  if (!bias) return weight;
  PYKD_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.rows, op, ": bias must be [", weight.rows, "], got ",
             bias->sym_sizes());
  PYKD_CHECK_TYPE(bias->is_floating_point() && bias->device() == input.device(), op,
                  ": bias must be floating-point on the input's device ", input.device(), ", got ", bias->scalar_type(),
                  " on ", bias->device());
  return weight;
}

// Where the buffer can be read.
inline void check_buffer_is_of(const char* op, const at::Tensor& packed, const PackedSparse& weight) {
  PYKD_CHECK(std::memcmp(packed.const_data_ptr(), &weight, sizeof weight) == 0, op,
             ": packed must be the buffer that its head describes, got another weight's");
}

// Whether the weight was packed as halves of this type, too.
inline bool has_halves(const PackedSparse& weight, DType dtype) {
  return weight.halves.tiles > 0 && weight.halves.dtype == static_cast<int64_t>(dtype);
}

// As the kernels read it.
inline std::optional<at::Tensor> dense_bias(const std::optional<at::Tensor>& bias) {
  return bias ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
}
inline const float* pointer_of(const std::optional<at::Tensor>& bias) {
  return bias ? bias->const_data_ptr<float>() : nullptr;
}

inline void check_no_gradient(const char* op, const at::Tensor& input, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(input.requires_grad() || (bias && bias->requires_grad())), op,
              " has no gradient: call it under torch.no_grad() or torch.inference_mode()");
}

// Threads for a number of multiplications: each is worth its start from about 10 us of work on.
inline int64_t tasks_of(const SparseTiles& weight, int64_t places) {
  constexpr int64_t kPerTask = 1 << 18;
  const int64_t work = weight.runs * weight.width * weight.height * places;
  return at::in_parallel_region() ? 1 : std::clamp<int64_t>(work / kPerTask, 1, at::get_num_threads());
}

// Whether whole units keep all the threads busy; if not, the weight's tiles are shared out.
inline bool by_units(int64_t units, int64_t tasks) { return units >= 4 * tasks || units % tasks == 0; }

// run(begin, end): tiles of the weight.
template <typename Run>
void share_tiles(const SparseTiles& weight, int64_t tasks, const Run& run) {
  if (tasks == 1) return run(0, weight.tiles);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    run(tile_of_part(weight, begin, tasks), tile_of_part(weight, end, tasks));
  });
}

}  // namespace pykd::glue
