// Per value some 5.5 AVX2 instructions for the noise, a square root or a quotient, and 16 bytes of memory in float32:
// the generator is the larger part.
#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/variational_layer/variational_layer.h"
#include "kernels/variational_layer/variational_layer_math.h"

namespace pykd::PYKD_ISA {
namespace {

// n values of a row, n values of noise.
template <typename T>
void run_forward(const T* eps, T* sample, T* deviation, int64_t n) {
  constexpr int64_t kStep = sizeof(load_lanes(eps)) / sizeof(T);
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep) {
    const auto root = deviation_of(load_lanes(deviation + c));
    store_lanes(deviation + c, root);
    store_lanes(sample + c, load_lanes(sample + c) + root * load_lanes(eps + c));
  }
  if (c < n) {
    const auto root = deviation_of(load_lanes(deviation + c, n - c));
    store_lanes(deviation + c, root, n - c);
    store_lanes(sample + c, load_lanes(sample + c, n - c) + root * load_lanes(eps + c, n - c), n - c);
  }
}

template <typename T>
void run_backward(const T* eps, const T* grad_sample, const T* deviation, T* grad_variance, int64_t n) {
  constexpr int64_t kStep = sizeof(load_lanes(eps)) / sizeof(T);
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    store_lanes(grad_variance + c,
                grad_variance_of(load_lanes(grad_sample + c), load_lanes(eps + c), load_lanes(deviation + c)));
  if (c < n)
    store_lanes(grad_variance + c,
                grad_variance_of(load_lanes(grad_sample + c, n - c), load_lanes(eps + c, n - c),
                                 load_lanes(deviation + c, n - c)),
                n - c);
}

template <typename T>
void run(const VariationalLayer& a, int64_t row_begin, int64_t row_end) {
  const int64_t tile = smaller(kTile, a.classes);
  RowNoise<T> noise(a.noise, a.classes);
  alignas(64) T wide[kTile];
  T* const deviations = static_cast<T*>(a.deviation);

  for (int64_t row = row_begin; row < row_end; row += kRows) {
    uint64_t selected = noise.select(row, smaller(kRows, row_end - row));
    while (selected) {
      int places[kRows], taken;
      selected = take(selected, noise.most_rows(), places, taken);
      for (int64_t c = 0; c < a.classes; c += tile) {
        const int64_t n = smaller(tile, a.classes - c);
        const T* const values = noise.draw(places, taken, c, Near());
        for (int i = 0; i < taken; ++i) {
          const int64_t at = (row + places[i]) * a.classes + c;
          const T* const eps = values + i * noise.stride();
          if (a.grad_sample) {
            run_backward(eps, as_wide(a.grad_sample, a.dtype, at, n, wide), deviations + at,
                         static_cast<T*>(a.grad_variance) + at, n);
            continue;
          }
          T* const sample = const_cast<T*>(as_wide(a.sample, a.dtype, at, n, wide));
          run_forward(eps, sample, deviations + at, n);
          if constexpr (sizeof(T) == sizeof(float))
            if (is_half(a.dtype)) narrow(sample, a.dtype, static_cast<uint16_t*>(a.sample) + at, n);
        }
      }
    }
  }
}

template <typename T>
void exponentials(const VarianceWeights& a, int64_t begin, int64_t end) {
  alignas(64) T wide[kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = smaller(kTile, end - at);
    const T* const from = as_wide(a.log_sigma2, a.dtype, at, n, wide);
    T* const to = static_cast<T*>(a.sigma2) + at;
    constexpr int64_t kStep = sizeof(load_lanes(from)) / sizeof(T);
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep) store_lanes(to + c, sigma2_of(load_lanes(from + c)));
    if (c < n) store_lanes(to + c, sigma2_of(load_lanes(from + c, n - c)), n - c);
  }
}

}  // namespace

void variance_weights_cpu(const VarianceWeights& args, int64_t begin, int64_t end) {
  args.dtype == DType::kFloat64 ? exponentials<double>(args, begin, end) : exponentials<float>(args, begin, end);
}

void variational_layer_cpu(const VariationalLayer& args, int64_t row_begin, int64_t row_end) {
  args.dtype == DType::kFloat64 ? run<double>(args, row_begin, row_end) : run<float>(args, row_begin, row_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(variance_weights_cpu, (const VarianceWeights& args, int64_t begin, int64_t end), (args, begin, end))
PYKD_CPU_DOOR(variational_layer_cpu, (const VariationalLayer& args, int64_t row_begin, int64_t row_end),
              (args, row_begin, row_end))
