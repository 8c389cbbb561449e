#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/noisy_logits/noisy_logits.h"
#include "kernels/noisy_logits/noisy_logits_math.h"

namespace pykd::PYKD_ISA {
namespace {

// n logits, and as many values of noise.
template <Target kTarget, typename T>
void run_tile(const T* logits, const T* noise, T* noisy, int64_t n) {
  constexpr int64_t kStep = sizeof(load_lanes(logits)) / sizeof(T);
  int64_t c = 0;
  for (; c + kStep <= n; c += kStep)
    store_lanes(noisy + c, perturb<kTarget>(load_lanes(logits + c), load_lanes(noise + c)));
  if (c < n)
    store_lanes(noisy + c, perturb<kTarget>(load_lanes(logits + c, n - c), load_lanes(noise + c, n - c)), n - c);
}

template <typename T>
void run(const NoisyLogits& a, int64_t row_begin, int64_t row_end) {
  const int64_t bytes = is_half(a.dtype) ? 2 : sizeof(T), tile = smaller(kTile, a.classes);
  const auto* const from = static_cast<const char*>(a.logits);
  auto* const to = static_cast<char*>(a.noisy);
  const auto run_noisy = a.noise.additive ? run_tile<Target::kAdditive, T> : run_tile<Target::kMultiplicative, T>;
  RowNoise<T> noise(a.noise, a.classes);
  alignas(64) T wide[kTile];

  for (int64_t row = row_begin; row < row_end; row += kRows) {
    const int64_t count = smaller(kRows, row_end - row);
    uint64_t selected = noise.select(row, count);
    if (to != from)
      for (int64_t i = 0; i < count; ++i)
        if (~selected >> i & 1)
          __builtin_memcpy(to + (row + i) * a.classes * bytes, from + (row + i) * a.classes * bytes,
                           static_cast<size_t>(a.classes * bytes));
    while (selected) {
      int places[kRows], taken;
      selected = take(selected, noise.most_rows(), places, taken);
      for (int64_t c = 0; c < a.classes; c += tile) {
        const int64_t n = smaller(tile, a.classes - c), first = (row + places[0]) * a.classes + c;
        const T* const values =
            noise.draw(places, taken, c, Near(first, n, {{from, a.dtype}, {to, a.dtype}, {to, a.dtype}}));
        for (int i = 0; i < taken; ++i) {
          const int64_t at = (row + places[i]) * a.classes + c;
          const T* const logits = as_wide(from, a.dtype, at, n, wide);
          T* const noisy = is_half(a.dtype) ? wide : static_cast<T*>(a.noisy) + at;
          run_noisy(logits, values + i * noise.stride(), noisy, n);
          if constexpr (sizeof(T) == sizeof(float))
            if (is_half(a.dtype)) narrow(wide, a.dtype, to + at * bytes, n);
        }
      }
    }
  }
}

}  // namespace

void noisy_logits_cpu(const NoisyLogits& args, int64_t row_begin, int64_t row_end) {
  args.dtype == DType::kFloat64 ? run<double>(args, row_begin, row_end) : run<float>(args, row_begin, row_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(noisy_logits_cpu, (const NoisyLogits& args, int64_t row_begin, int64_t row_end),
              (args, row_begin, row_end))
