// Per weight 8 bytes read and 8 written in float32, and four transcendental functions and three divisions, some 90
// instructions a vector: twice the memory's time with AVX2. So nothing is fetched ahead.
#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/variational_kl/variational_kl.h"
#include "kernels/variational_kl/variational_kl_math.h"

namespace pykd::PYKD_ISA {
namespace {

// n weights of a tile; returns the sum of their terms. A term is a long chain of dependent instructions: step by step
// over the tile, many vectors are under way at once.
template <typename T>
T run_tile(const T* theta, const T* log_sigma2, T* grad_theta, T* grad_log_sigma2, T factor, bool accumulate,
           int64_t n) {
  using Float = decltype(load_lanes(theta));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  alignas(64) T ratio[kTile + kStep], e[kTile + kStep], f[kTile + kStep];
  const auto read = [&](const T* from, int64_t c) {  // what lies beyond the end is 0, whose term is 0
    return c + kStep <= n ? load_lanes(from + c) : load_lanes(from + c, n - c);
  };
  for (int64_t c = 0; c < n; c += kStep) store_lanes(ratio + c, kl_half_ratio(read(theta, c), read(log_sigma2, c)));
  for (int64_t c = 0; c < n; c += kStep) {
    const KlExponentials<Float> of = kl_exponentials(load_lanes(ratio + c));
    store_lanes(e + c, of.e);
    store_lanes(f + c, of.f);
  }
  Float sum{};
  const auto write = [&](T* to, Float gradient, int64_t c) {
    if (accumulate) gradient += read(to, c);
    c + kStep <= n ? store_lanes(to + c, gradient) : store_lanes(to + c, gradient, n - c);
  };
  for (int64_t c = 0; c < n; c += kStep) {
    const KlTerm<Float> term =
        kl_term(read(theta, c), load_lanes(ratio + c), {load_lanes(e + c), load_lanes(f + c)}, factor);
    sum += term.kl;
    if (!grad_theta) continue;
    write(grad_theta, term.theta, c);
    write(grad_log_sigma2, term.log_sigma2, c);
  }
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
