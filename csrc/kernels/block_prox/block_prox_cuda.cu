#include "core/cuda.h"
#include "core/cuda_blocks.h"
#include "kernels/block_prox/block_prox.h"
#include "kernels/block_prox/block_prox_math.h"

// The floor is memory: 8 bytes a float32 weight, read and written in place. While an H200 moves them it has 49
// instruction slots. l1_l2 takes some 25, as block_norm does. l1_linf takes some 6 an entry for each step of the level,
// with some six steps over what registers hold: instructions are its limit. Groups larger than the registers of a
// thread block are read again in each step.
namespace pykd::cuda {
namespace {

struct ProxWeight {
  Panels panels;
  void* weight;
};

// For l1_linf, the sum and the number of the entries above the level of their group. NaN is above all.
template <typename T>
struct Measure : Squares<T> {
  const bool linf;

  __device__ void add(Pair<T>& to, T w, T level) const {
    if (!linf) return Squares<T>::add(to, w, level);
    const T size = from_bits(magnitude_bits(w));
    const bool above = !(size <= level);
    to.first += above ? size : T(0);
    to.second += above ? T(1) : T(0);
  }
  __device__ Pair<T> join(Pair<T> a, Pair<T> b) const {
    return linf ? Pair<T>{a.first + b.first, a.second + b.second} : Squares<T>::join(a, b);
  }
};

template <typename T, typename E, bool kRegular>
__device__ void run(bool linf, T threshold, const ProxWeight& weight, unsigned block, Pair<T>* shared) {
  using ThisPanels = PanelsOfBlock<T, E, kRegular>;
  using ThisPack = typename ThisPanels::ThisPack;
  constexpr int kPack = ThisPanels::kPack, kSums = ThisPanels::kSums, kSummed = ThisPanels::kSummed;
  ThisPanels panels(weight.panels, weight.weight, block, shared);
  T* const level = panels.of_groups(0);  // or the scale of squares
  T* const factor = panels.of_groups(1);
  panels.each_group([&](int g, int64_t, int64_t) { level[g] = 0; });
  __syncthreads();
  const Measure<T> measure{{}, linf};
  for (bool again = false, more = true; more; again = true)
    more = panels.reduce(measure, linf || again ? level : nullptr, [&](int g, Pair<T> found) {
      if (!linf) return measure.finish(found, again, factor[g], level[g]);
      const T last = level[g], sum = found.first;
      const T next = sum == sum ? next_level(last, sum, found.second, threshold) : sum;
      level[g] = next;
      return next > last || (next != next && last == last);
    });
  if (!linf) {
    panels.each_group([&](int g, int64_t, int64_t) { factor[g] = shrink_factor(factor[g], threshold); });
    __syncthreads();
  }

  T values[kSums];
  panels.each([] {}, [&](int panel) { panels.values_of(linf ? level : factor, panel, values); },
              [&](int k, const ThisPack& entries) {
                ThisPack near;
                for (int j = 0; j < kPack; ++j) {
                  const T w = widen(entries.logit[j]), v = values[j / kSummed];
                  const T clipped = from_bits(magnitude_bits(w)) <= v ? w : w < 0 ? -v : v;
                  narrow(linf ? clipped : w * v, near.logit[j]);
                }
                panels.write(k, near, weight.weight);
              },
              [](int) {});
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads, 2) groups(bool linf, double threshold, Weights<ProxWeight> weights) {
  PYKD_DYNAMIC_SHARED(Pair<T>, shared);
  const int i = weights.of_block(blockIdx.x);
  const ProxWeight& weight = weights.item[i];
  const unsigned block = blockIdx.x - weights.first[i];
  const T t = static_cast<T>(threshold);
  weight.panels.regular ? run<T, E, true>(linf, t, weight, block, shared)
                        : run<T, E, false>(linf, t, weight, block, shared);
}

template <typename T, typename E>
void launch(const BlockProx& a, CUstream_st* stream) {
  Weights<ProxWeight> weights;
  const auto flush = [&] {
    if (weights.count == 0) return;
    PYKD_LAUNCH(weights.blocks(), kThreads, static_cast<size_t>(weights.shared_bytes), stream, groups<T, E>)
    (a.linf, a.threshold, weights);
    weights = {};
  };
  for (int64_t i = 0; i < a.count; ++i) {
    const BlockProxWeight& w = a.weights[i];
    if (w.blocks.rows > 0)
      weights.add({Panels(w.blocks, sizeof(E), reinterpret_cast<uintptr_t>(w.weight)), w.weight}, sizeof(E));
    if (weights.is_full()) flush();
  }
  flush();
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::block_prox_cuda(const BlockProx& args, CUstream_st* stream) {
  if (args.threshold == 0) return cudaSuccess;
  switch (args.dtype) {
    case DType::kFloat64: cuda::launch<double, double>(args, stream); break;
    case DType::kFloat32: cuda::launch<float, float>(args, stream); break;
    case DType::kFloat16: cuda::launch<float, __half>(args, stream); break;
    case DType::kBFloat16: cuda::launch<float, __nv_bfloat16>(args, stream); break;
  }
  return cudaGetLastError();
}
