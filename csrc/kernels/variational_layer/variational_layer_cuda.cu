#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/variational_layer/variational_layer.h"
#include "kernels/variational_layer/variational_layer_math.h"

// The floor is memory: 16 bytes a float32 value forward and 12 backward, of two bytes 12 and 10. While an H200 moves
// them it has 99 and 74, or 74 and 62 instruction slots, of which a value takes some 55 (sm_90: 35 of them Philox and
// Box-Muller). The card's own root and quotient are within 2^-22.
namespace pykd::cuda {
namespace {

constexpr int64_t kChunk = 4096;  // values of a row a block takes

template <typename T, typename E, bool kVectors>
__global__ void __launch_bounds__(kThreads) rows(VariationalLayer a, RowPlan plan) {
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(T)), kTogether = 2;  // packs in flight
  constexpr int64_t kChunkPacks = kChunk / kPack;
  struct Packs {
    Pack<E, kPack> sample;  // or its gradient
    Pack<T, kPack> deviation;
  };
  const int lanes = plan.lanes(), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t row = blockIdx.x / plan.chunks * plan.rows_of_block() + (threadIdx.x >> plan.log2_lanes);
  if (row >= a.rows) return;
  const int64_t begin = blockIdx.x % plan.chunks * kChunkPacks;
  const int64_t end = begin + kChunkPacks < plan.packs ? begin + kChunkPacks : plan.packs;
  const RowPacks<kPack, kVectors> at{row, a.classes};
  uint64_t seed = 0;
  stream<kTogether, Packs>(
      begin + lane, end, lanes,
      [&](int64_t pack, Packs& to) {
        at.read(a.grad_sample ? a.grad_sample : a.sample, pack, to.sample);
        at.read(a.deviation, pack, to.deviation);
      },
      [&] { seed = static_cast<uint64_t>(*a.noise.seed); },
      [&](int64_t pack, Packs packs) {
        T eps[kPack] = {};
        add_normals(seed, static_cast<uint64_t>(a.noise.row_offset + row), 0, pack, T(1), eps);
        Pack<E, kPack>& sample = packs.sample;
        Pack<T, kPack>& deviation = packs.deviation;
        if (a.grad_sample) {
          for (int j = 0; j < kPack; ++j)
            deviation.logit[j] = grad_variance_of(static_cast<T>(widen(sample.logit[j])), eps[j], deviation.logit[j]);
          at.write(deviation, a.grad_variance, pack);
        } else {
          for (int j = 0; j < kPack; ++j) {
            deviation.logit[j] = deviation_of(deviation.logit[j]);
            narrow(widen(sample.logit[j]) + deviation.logit[j] * eps[j], sample.logit[j]);
          }
          at.write(sample, a.sample, pack);
          at.write(deviation, a.deviation, pack);
        }
      });
}

template <typename T, typename E>
CudaStatus launch(const VariationalLayer& a, CUstream_st* stream) {
  if (a.rows == 0) return cudaSuccess;
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(T));
  const RowPlan plan(a.rows, a.classes, kPack, a.noise, kThreads, kChunk, 0);
  if (a.classes % kPack == 0 && is_aligned<E, kPack>(a.grad_sample) && is_aligned<E, kPack>(a.sample) &&
      is_aligned<T, kPack>(a.deviation) && is_aligned<T, kPack>(a.grad_variance))
    PYKD_LAUNCH(plan.blocks, kThreads, 0, stream, rows<T, E, true>)(a, plan);
  else
    PYKD_LAUNCH(plan.blocks, kThreads, 0, stream, rows<T, E, false>)(a, plan);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::variational_layer_cuda(const VariationalLayer& args, CUstream_st* stream) {
  switch (args.dtype) {
    case DType::kFloat64: return cuda::launch<double, double>(args, stream);
    case DType::kFloat16: return cuda::launch<float, __half>(args, stream);
    case DType::kBFloat16: return cuda::launch<float, __nv_bfloat16>(args, stream);
    default: return cuda::launch<float, float>(args, stream);
  }
}
