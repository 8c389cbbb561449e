// Tiles of a sparse matrix times panels: every input is a row of vectors, whose lanes are batch or image.
//
// For a tile and up to kPairVectors or kSharedVectors vectors the results stay in registers, and each value is
// broadcast once for all of them. A shared tile takes an input's vector for kRows rows at a time: on AVX2 2 + 4 loads
// for 8 multiplications, two of each a cycle. A pair takes one for each multiplication and is bound by the loads.
#pragma once

#include "core/simd.h"
#include "core/sparse_tiles.h"

namespace pykd::PYKD_ISA {

#if defined(PYKD_ISA_AVX512) || defined(__aarch64__)
constexpr int kRows = 8, kSharedVectors = 3;  // of 32 registers 24 are results
#else
constexpr int kRows = 4, kSharedVectors = 2;  // of 16 registers 8: with 12 the compiler runs out of them
#endif
constexpr int kPairVectors = 6;

// The results of N vectors from `at` on, for the tiles [begin, end): store(row, results) is called for each output row
// with those N vectors. column(c) is where input c begins, counted from `at` in floats.
template <int N, class Column, class Store>
void pair_tiles(const SparseTiles& w, int64_t begin, int64_t end, const float* at, const Column& column,
                const Store& store) {
  for (int64_t t = begin; t < end; ++t) {
    Floats first[N] = {}, second[N] = {};
    const int64_t last = w.starts[t + 1];
    for (int64_t run = w.starts[t]; run < last; ++run) {
      const int64_t both = load<int64_t>(w.columns + 2 * run);
      const float* const a = at + column(static_cast<int32_t>(both));
      const float* const b = at + column(both >> 32);
      const Floats value = broadcast(w.values + 2 * run), other = broadcast(w.values + 2 * run + 1);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) first[n] += value * load<Floats>(a + n * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) second[n] += other * load<Floats>(b + n * kLanes);
    }
    store(w.outputs[2 * t], first);
    if (w.outputs[2 * t + 1] >= 0) store(w.outputs[2 * t + 1], second);
  }
}

// R rows of a shared tile from row `top` on.
template <int R, int N, class Column, class Store>
inline void shared_rows(const SparseTiles& w, int64_t t, int top, const float* at, const Column& column,
                        const Store& store) {
  Floats results[R][N] = {};
  const int height = w.height, width = w.width;
  for (int64_t run = w.starts[t]; run < w.starts[t + 1]; ++run) {
    const float* values = w.values + run * width * height + top;
    const int32_t c = w.columns[run];
    for (int i = 0; i < width; ++i, values += height) {
      const float* const from = at + column(c + i);
      Floats inputs[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) inputs[n] = load<Floats>(from + n * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats value = broadcast(values + r);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) results[r][n] += value * inputs[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int32_t row = w.outputs[t * height + top + r];
    if (row >= 0) store(row, results[r]);
  }
}

template <int N, class Column, class Store>
void shared_tiles(const SparseTiles& w, int64_t begin, int64_t end, const float* at, const Column& column,
                  const Store& store) {
  for (int64_t t = begin; t < end; ++t) {
    int top = 0;
    for (; top + kRows <= w.height; top += kRows) shared_rows<kRows, N>(w, t, top, at, column, store);
    if constexpr (kRows > 4)
      for (; top + 4 <= w.height; top += 4) shared_rows<4, N>(w, t, top, at, column, store);
    if (w.height == 2) shared_rows<2, N>(w, t, 0, at, column, store);
    if (w.height == 1) shared_rows<1, N>(w, t, 0, at, column, store);
  }
}

// How many vectors of `vectors` are taken at a time, so that each time it is about as many.
inline int64_t vectors_at_once(const SparseTiles& w, int64_t vectors) {
  const int64_t most = w.pairs ? kPairVectors : kSharedVectors, times = (vectors + most - 1) / most;
  return (vectors + times - 1) / times;
}

// `vectors` vectors from `at` on, at most vectors_at_once(w, ...).
template <class Column, class Store>
void run_tiles(const SparseTiles& w, int64_t begin, int64_t end, int64_t vectors, const float* at, const Column& column,
               const Store& store) {
  if (w.pairs) switch (vectors) {
      case 1: return pair_tiles<1>(w, begin, end, at, column, store);
      case 2: return pair_tiles<2>(w, begin, end, at, column, store);
      case 3: return pair_tiles<3>(w, begin, end, at, column, store);
      case 4: return pair_tiles<4>(w, begin, end, at, column, store);
      case 5: return pair_tiles<5>(w, begin, end, at, column, store);
      default: return pair_tiles<6>(w, begin, end, at, column, store);
    }
  if (vectors == 1) return shared_tiles<1>(w, begin, end, at, column, store);
  if (vectors == 2) return shared_tiles<2>(w, begin, end, at, column, store);
  if constexpr (kSharedVectors > 2) shared_tiles<3>(w, begin, end, at, column, store);
}

template <int N>
inline void finish(Floats (&results)[N], float bias, Activation activation) {
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    Floats result = results[n] + bias;
    // NaN stays NaN, as in torch.
    if (activation == Activation::kRelu) result = result < 0 ? Floats{} : result;
    results[n] = result;
  }
}

}  // namespace pykd::PYKD_ISA
