#include "core/cuda.h"
#include "core/cuda_list.h"
#include "core/cuda_rows.h"
#include "kernels/variational_kl/variational_kl.h"
#include "kernels/variational_kl/variational_kl_math.h"

// The floor is memory: 16 bytes a float32 weight with its gradients, 24 where they accumulate, 8 for the value alone.
// While an H200 (4.8 TB/s; 132 SMs of 128 lanes at 1.75 GHz) moves them it has 99, 148 or 49 instruction slots, of
// which a weight takes some 70, or 45 for the value alone (sm_90: 17 for the logarithm). Weights of two bytes have half
// the slots: arithmetic is their limit. The card's own 2^x and quotients are within 2^-22, so a term and its
// derivatives are within 2^-20.
namespace pykd::cuda {
namespace {

constexpr int kChunk = 4096;  // weights a block takes: enough blocks for 132 SMs in a network of 1e6

struct Layer {
  VariationalWeights weights;
  bool vectors;  // packs are whole and aligned
};

struct Call {
  const void* grad_kl;
  double* partials;  // out, one a block; or null
  void* kl;          // out, by the only block; or null
  double scale;
  bool accumulate;
};

template <typename T>
__device__ void write_kl(void* kl, double sum, double scale) {
  *static_cast<T*>(kl) = static_cast<T>(scale * sum);
}

template <typename T, typename E, bool kGrad>
__global__ void __launch_bounds__(kThreads) chunks(Call a, List<Layer> layers) {
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(E));
  constexpr int kTogether = kPack == 4 ? 2 : 1;  // packs in flight
  using ThisPack = Pack<E, kPack>;
  struct Packs {
    ThisPack theta, log_sigma2;
  };
  __shared__ double shared[1][kMostWarps];
  const int i = layers.of_block(blockIdx.x);
  const VariationalWeights& layer = layers.item[i].weights;
  const bool vectors = layers.item[i].vectors;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - layers.first[i]) * kChunk;
  const int size = static_cast<int>(layer.size - begin < kChunk ? layer.size - begin : kChunk);
  const auto from_here = [begin](const void* of_layer) { return static_cast<const E*>(of_layer) + begin; };
  const E *const theta = from_here(layer.theta), *const log_sigma2 = from_here(layer.log_sigma2);
  E* const grad_theta = kGrad ? const_cast<E*>(from_here(layer.grad_theta)) : nullptr;
  E* const grad_log_sigma2 = kGrad ? const_cast<E*>(from_here(layer.grad_log_sigma2)) : nullptr;
  const RowPacks<kPack, true> whole{0, size};
  const RowPacks<kPack, false> ragged{0, size};
  const auto read = [&](const E* from, int pack, ThisPack& to) {
    vectors ? whole.read(from, pack, to) : ragged.read(from, pack, to);
  };
  const auto write = [&](const ThisPack& from, E* to, int pack) {
    vectors ? whole.write(from, to, pack) : ragged.write(from, to, pack);
  };

  T factor, sum = 0;
  stream<kTogether, Packs>(
      static_cast<int>(threadIdx.x), (size + kPack - 1) / kPack, kThreads,
      [&](int pack, Packs& to) {
        to = {};  // what lies beyond the end is 0, whose term is 0
        read(theta, pack, to.theta);
        read(log_sigma2, pack, to.log_sigma2);
      },
      [&] {
        factor = static_cast<T>(a.scale);
        if (a.grad_kl) factor *= *static_cast<const T*>(a.grad_kl);
      },
      [&](int pack, const Packs& packs) {
        Packs grads = {};
        if (kGrad && a.accumulate) {
          read(grad_theta, pack, grads.theta);
          read(grad_log_sigma2, pack, grads.log_sigma2);
        }
        for (int j = 0; j < kPack; ++j) {
          const KlTerm<T> term = kl_term(widen(packs.theta.logit[j]), widen(packs.log_sigma2.logit[j]), factor);
          sum += term.kl;
          narrow(term.theta + widen(grads.theta.logit[j]), grads.theta.logit[j]);
          narrow(term.log_sigma2 + widen(grads.log_sigma2.logit[j]), grads.log_sigma2.logit[j]);
        }
        if (!kGrad) return;
        write(grads.theta, grad_theta, pack);
        write(grads.log_sigma2, grad_log_sigma2, pack);
      });
  if (!a.partials && !a.kl) return;
  const double total = sum_over(kThreads, sum, shared);
  if (threadIdx.x > 0) return;
  if (a.partials)
    a.partials[blockIdx.x] = total;
  else
    write_kl<T>(a.kl, total, a.scale);
}

// One block: the sum over all others.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone)
    finish(const double* partials, unsigned count, double scale, void* kl) {
  __shared__ double shared[1][kMostWarps];
  const double total = sum_partials(partials, count, shared);
  if (threadIdx.x == 0) write_kl<T>(kl, total, scale);
}

unsigned blocks_of(int64_t size) { return static_cast<unsigned>((size + kChunk - 1) / kChunk); }

unsigned blocks_of(const VariationalKl& a) {
  unsigned blocks = 0;
  for (int64_t i = 0; i < a.count; ++i) blocks += blocks_of(a.layers[i].size);
  return blocks;
}

template <typename T, typename E>
CudaStatus launch(const VariationalKl& a, void* workspace, CUstream_st* stream) {
  constexpr int kPack = logits_of_pack(sizeof(E), sizeof(E));
  const unsigned blocks = blocks_of(a);
  const bool alone = blocks == 1;
  Call call{a.grad_kl, a.kl && !alone ? static_cast<double*>(workspace) : nullptr, alone ? a.kl : nullptr, a.scale,
            a.accumulate};
  List<Layer> layers;
  const auto flush = [&] {
    if (layers.count == 0) return;
    if (layers.item[0].weights.grad_theta)
      PYKD_LAUNCH(layers.blocks(), kThreads, 0, stream, chunks<T, E, true>)(call, layers);
    else
      PYKD_LAUNCH(layers.blocks(), kThreads, 0, stream, chunks<T, E, false>)(call, layers);
    if (call.partials) call.partials += layers.blocks();
    layers = {};
  };
  for (int64_t i = 0; i < a.count; ++i) {
    const VariationalWeights& layer = a.layers[i];
    if (layer.size == 0) continue;
    bool vectors = layer.size % kPack == 0;
    for (const void* each : {layer.theta, layer.log_sigma2, static_cast<const void*>(layer.grad_theta),
                             static_cast<const void*>(layer.grad_log_sigma2)})
      vectors = vectors && is_aligned<E, kPack>(each);
    layers.add({layer, vectors}, blocks_of(layer.size));
    if (layers.is_full()) flush();
  }
  flush();
  if (a.kl && !alone)
    PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish<T>)(static_cast<const double*>(workspace), blocks, a.scale, a.kl);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t variational_kl_workspace_bytes(const VariationalKl& args) {
  const unsigned blocks = cuda::blocks_of(args);
  return args.kl && blocks > 1 ? int64_t{blocks} * static_cast<int64_t>(sizeof(double)) : 0;
}

CudaStatus variational_kl_cuda(const VariationalKl& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case DType::kFloat64: return cuda::launch<double, double>(args, workspace, stream);
    case DType::kFloat16: return cuda::launch<float, __half>(args, workspace, stream);
    case DType::kBFloat16: return cuda::launch<float, __nv_bfloat16>(args, workspace, stream);
    default: return cuda::launch<float, float>(args, workspace, stream);
  }
}

}  // namespace pykd
