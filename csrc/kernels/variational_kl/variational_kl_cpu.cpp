// Per weight 8 bytes read and 8 written in float32, and four transcendental functions and two divisions, some 70
// instructions a vector: three to four times the memory's time. So the pass is plain, and nothing is fetched ahead.
#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/variational_kl/variational_kl.h"
#include "kernels/variational_kl/variational_kl_math.h"

namespace pykd::PYKD_ISA {
namespace {

// n weights; returns the sum of their terms.
template <typename T>
T run_tile(const T* theta, const T* log_sigma2, T* grad_theta, T* grad_log_sigma2, T factor, bool accumulate,
           int64_t n) {
  using Float = decltype(load_lanes(theta));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  Float sum{};
  const auto write = [&](T* to, Float gradient, int64_t c, bool whole) {
    gradient = gradient * factor;
    if (accumulate) gradient += whole ? load_lanes(to + c) : load_lanes(to + c, n - c);
    whole ? store_lanes(to + c, gradient) : store_lanes(to + c, gradient, n - c);
  };
  const auto run = [&](int64_t c, bool whole) {
    const KlTerm<Float> term = whole ? kl_term(load_lanes(theta + c), load_lanes(log_sigma2 + c))
                                     : kl_term(load_lanes(theta + c, n - c), load_lanes(log_sigma2 + c, n - c));
    sum += term.kl;  // what lies beyond the end is theta = 0, whose term is 0
    if (!grad_theta) return;
    write(grad_theta, term.theta, c, whole);
    write(grad_log_sigma2, term.log_sigma2, c, whole);
  };
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) run(c, true);
  if (c < n) run(c, false);
  return reduce_sum(sum);
}

// The place of n gradients: where they are, or a buffer with what it shall be added to.
template <typename T>
T* as_wide_grad(void* grad, DType dtype, int64_t at, int64_t n, bool accumulate, T* buffer) {
  if (!grad) return nullptr;
  if (!is_half(dtype)) return static_cast<T*>(grad) + at;
  if constexpr (sizeof(T) == sizeof(float))
    if (accumulate) widen(static_cast<const uint16_t*>(grad) + at, dtype, buffer, n);
  return buffer;
}

template <typename T>
void run(const VariationalKl& a, int64_t chunk_begin, int64_t chunk_end) {
  alignas(64) T wide[4][kTile];
  const T factor =
      static_cast<T>(a.grad_kl ? static_cast<double>(*static_cast<const T*>(a.grad_kl)) * a.scale : a.scale);
  int64_t chunk = 0;
  for (int64_t i = 0; i < a.count && chunk < chunk_end; ++i) {
    const VariationalWeights& layer = a.layers[i];
    for (int64_t begin = 0; begin < layer.size; begin += kVariationalChunk, ++chunk) {
      if (chunk < chunk_begin || chunk >= chunk_end) continue;
      const int64_t end = smaller(begin + kVariationalChunk, layer.size);
      double sum = 0;
      for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = smaller(kTile, end - at);
        T* const grad_theta = as_wide_grad(layer.grad_theta, a.dtype, at, n, a.accumulate, wide[2]);
        T* const grad_log_sigma2 = as_wide_grad(layer.grad_log_sigma2, a.dtype, at, n, a.accumulate, wide[3]);
        sum += static_cast<double>(run_tile(as_wide(layer.theta, a.dtype, at, n, wide[0]),
                                            as_wide(layer.log_sigma2, a.dtype, at, n, wide[1]), grad_theta,
                                            grad_log_sigma2, factor, a.accumulate, n));
        if constexpr (sizeof(T) == sizeof(float))
          if (is_half(a.dtype) && grad_theta) {
            narrow(grad_theta, a.dtype, static_cast<uint16_t*>(layer.grad_theta) + at, n);
            narrow(grad_log_sigma2, a.dtype, static_cast<uint16_t*>(layer.grad_log_sigma2) + at, n);
          }
      }
      if (a.chunk_kl) static_cast<double*>(a.chunk_kl)[chunk] = sum;
    }
  }
}

}  // namespace

void variational_kl_cpu(const VariationalKl& args, int64_t chunk_begin, int64_t chunk_end) {
  args.dtype == DType::kFloat64 ? run<double>(args, chunk_begin, chunk_end) : run<float>(args, chunk_begin, chunk_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(variational_kl_cpu, (const VariationalKl& args, int64_t chunk_begin, int64_t chunk_end),
              (args, chunk_begin, chunk_end))
