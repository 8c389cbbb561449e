#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/noisy_logits/noisy_logits.h"

// The floor is memory: 8 bytes a float32 logit, 4 one of two bytes, and none for a row without noise that lies in
// place. While an H200 moves them it has 49 or 25 instruction slots a logit, of which one of a noisy row takes some 60
// or 40: with alpha = 0.5 both ends meet.
namespace pykd::cuda {
namespace {

constexpr int64_t kChunk = 8192;  // logits of a row a block takes

template <typename T, typename E, bool kVectors>
__global__ void __launch_bounds__(kThreads) rows(NoisyLogits a, RowPlan plan) {
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(E));
  constexpr int kTogether = 2;  // packs in flight
  using ThisPack = Pack<E, kPack>;
  const int lanes = plan.lanes(), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t row = blockIdx.x / plan.chunks * plan.rows_of_block() + (threadIdx.x >> plan.log2_lanes);
  if (row >= a.rows) return;
  ThreadNoise<T, kPack> noise(a.noise, plan, row);
  noise.draw();
  if (!noise.any() && a.noisy == a.logits) return;
  constexpr int64_t kChunkPacks = kChunk / kPack;
  const int64_t begin = blockIdx.x % plan.chunks * kChunkPacks;
  const int64_t end = begin + kChunkPacks < plan.packs ? begin + kChunkPacks : plan.packs;
  const RowPacks<kPack, kVectors> at{row, a.classes};
  stream<kTogether, ThisPack>(
      begin + lane, end, lanes, [&](int64_t pack, ThisPack& to) { at.read(a.logits, pack, to); }, [] {},
      [&](int64_t pack, ThisPack logits) {
        T noisy[kPack];
        noise.perturb(pack, logits, noisy);
        for (int j = 0; j < kPack; ++j) narrow(noisy[j], logits.logit[j]);
        at.write(logits, a.noisy, pack);
      });
}

template <typename T, typename E>
CudaStatus launch(const NoisyLogits& a, CUstream_st* stream) {
  if (a.rows == 0) return cudaSuccess;
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(E));
  const RowPlan plan(a.rows, a.classes, kPack, a.noise, kThreads, kChunk, 0);
  if (a.classes % kPack == 0 && is_aligned<E, kPack>(a.logits) && is_aligned<E, kPack>(a.noisy))
    PYKD_LAUNCH(plan.blocks, kThreads, 0, stream, rows<T, E, true>)(a, plan);
  else
    PYKD_LAUNCH(plan.blocks, kThreads, 0, stream, rows<T, E, false>)(a, plan);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::noisy_logits_cuda(const NoisyLogits& args, CUstream_st* stream) {
  switch (args.dtype) {
    case DType::kFloat64: return cuda::launch<double, double>(args, stream);
    case DType::kFloat16: return cuda::launch<float, __half>(args, stream);
    case DType::kBFloat16: return cuda::launch<float, __nv_bfloat16>(args, stream);
    default: return cuda::launch<float, float>(args, stream);
  }
}
