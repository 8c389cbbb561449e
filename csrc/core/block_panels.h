// Panels of groups, which stay in the caches between two sweeps: what is summed is summed down the columns, in vectors,
// and once a group across them.
#pragma once

#include "core/blocks.h"
#include "core/magnitude.h"
#include "core/row_noise.h"

namespace pykd::PYKD_ISA {

constexpr int64_t kPanel = 16384;  // entries of a panel: 64 KB
constexpr int64_t kNarrow = 64;    // columns of a panel of tall groups at the least: whole lines

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How the grid of a weight, or of two together, is cut into units: some groups side by side in one of its rows.
struct Plan {
  explicit Plan(const Blocks& blocks, const Blocks& others = {}) {
    grid_rows = larger(blocks.grid_rows(), others.grid_rows());
    grid_columns = larger(blocks.grid_columns(), others.grid_columns());
    const Blocks& b = blocks.grid_rows() ? blocks : others;
    const int64_t columns = smaller(kTile, larger(kNarrow, kPanel / larger(1, b.block_rows)));
    groups = larger(1, columns / larger(larger(1, b.block_columns), others.block_columns));
    units_of_row = (grid_columns + groups - 1) / groups;
  }
  int64_t units() const { return grid_rows * units_of_row; }

  int64_t grid_rows, grid_columns, groups, units_of_row;
};

// Some groups side by side of one matrix: its rows and columns; none where the matrix lacks them.
struct Panel {
  Panel(const Blocks& b, int64_t grid_row, int64_t group_begin, int64_t group_end)
      : row(grid_row * b.block_rows),
        rows(larger(0, smaller(b.block_rows, b.rows - row))),
        column(smaller(group_begin * b.block_columns, b.columns)),
        columns(rows ? larger(0, smaller(group_end * b.block_columns, b.columns) - column) : 0),
        stride(b.columns),
        group_columns(larger(1, b.block_columns)),
        groups(columns == 0 ? 0 : larger(1, smaller(group_end, b.grid_columns()) - group_begin)) {}

  int64_t row, rows, column, columns, stride, group_columns, groups;
};

// An array a value a column, or a group, is written in whole vectors, and groups are spread in whole vectors of them.
constexpr int64_t kRoom = kTile + 16 * kLanes;

// ---- down the columns ----

template <bool kLinf, typename Float>
inline Float joined(Float total, Float w) {
  if constexpr (kLinf) return larger_magnitude(total, w);
  return total + w * w;
}

template <bool kLinf, bool kFirst, int kRowsTogether, typename T>
void join(T* total, const T* w, int64_t stride, int64_t n) {
  using Float = decltype(load_lanes(w));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Float sum = kFirst ? Float{} : load_lanes(total + i);
    for (int r = 0; r < kRowsTogether; ++r) sum = joined<kLinf>(sum, load_lanes(w + r * stride + i));
    store_lanes(total + i, sum);
  }
  if (i == n) return;
  Float sum = kFirst ? Float{} : load_lanes(total + i);
  for (int r = 0; r < kRowsTogether; ++r) sum = joined<kLinf>(sum, load_lanes(w + r * stride + i, n - i));
  store_lanes(total + i, sum);
}

template <bool kLinf, typename T>
void join_rows(const void* weight, DType dtype, const Panel& p, int64_t at, int64_t n, T* total) {
  alignas(64) T wide[kTile];
  int64_t r = 0;
  if (!is_half(dtype)) {
    const T* const w = static_cast<const T*>(weight) + p.row * p.stride + at;
    for (; r + 4 <= p.rows; r += 4)
      (r ? join<kLinf, false, 4, T> : join<kLinf, true, 4, T>)(total, w + r * p.stride, p.stride, n);
  }
  for (; r < p.rows; ++r)
    (r ? join<kLinf, false, 1, T>
       : join<kLinf, true, 1, T>)(total, as_wide(weight, dtype, (p.row + r) * p.stride + at, n, wide), 0, n);
}

// ---- columns to groups, and back ----

template <bool kLinf, int kWidth = kLanes / 2>
inline float across(Floats v) {
  const Floats other = folded<kWidth>(v), both = kLinf ? larger_magnitude(v, other) : v + other;
  if constexpr (kWidth > 1) return across<kLinf, kWidth / 2>(both);
  return both[0];
}
template <bool kLinf>
inline double across(double v) {
  return v;
}

// The sum, or the largest, of n values.
template <bool kLinf, typename T>
T total_of(const T* values, int64_t n) {
  using Float = decltype(load_lanes(values));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  const auto add = [](Float a, Float b) { return kLinf ? larger_magnitude(a, b) : a + b; };
  Float sum{};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) sum = add(sum, load_lanes(values + i));
  if (i < n) sum = add(sum, load_lanes(values + i, n - i));
  return across<kLinf>(sum);
}

// Neighbours joined: the first half from a, the second from b.
template <bool kLinf>
inline Floats pairs(Floats a, Floats b) {
  Ints even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  const Floats first = __builtin_shuffle(a, b, even), second = __builtin_shuffle(a, b, even + 1);
  return kLinf ? larger_magnitude(first, second) : first + second;
}

// kVectors vectors, a power of two of at most kLanes, to one: a lane is a group of kVectors lanes.
template <bool kLinf, int kVectors, typename Get>
inline Floats gathered(int first, const Get& get) {
  if constexpr (kVectors == 1)
    return get(first);
  else
    return pairs<kLinf>(gathered<kLinf, kVectors / 2>(first, get),
                        gathered<kLinf, kVectors / 2>(first + kVectors / 2, get));
}

template <bool kLinf, int kColumns>
void narrow_groups(float* columns, int64_t n, float* groups) {
  for (int64_t i = n; i < n + kLanes * kColumns; i += kLanes) store(columns + i, Floats{});
  for (int64_t i = 0; i < n; i += kLanes * kColumns, groups += kLanes)
    store(groups, gathered<kLinf, kColumns>(0, [&](int v) { return load<Floats>(columns + i + v * kLanes); }));
}

// Groups of whole vectors.
template <bool kLinf>
void wide_groups(const float* columns, int64_t n, int64_t width, float* groups) {
  const int64_t count = (n + width - 1) / width;
  for (int64_t g = 0; g < count; g += kLanes)
    store(groups + g, gathered<kLinf, kLanes>(0, [&](int lane) {
            const int64_t begin = (g + lane) * width, end = smaller(begin + width, n);
            Floats sum{};
            int64_t i = begin;
            for (; i + kLanes <= end; i += kLanes) {
              const Floats v = load<Floats>(columns + i);
              sum = kLinf ? larger_magnitude(sum, v) : sum + v;
            }
            if (i < end) {
              const Floats v = load_first(columns + i, end - i);
              sum = kLinf ? larger_magnitude(sum, v) : sum + v;
            }
            return sum;
          }));
}

// `columns` is changed beyond n.
template <bool kLinf, typename T>
void sum_groups(T* columns, int64_t n, int64_t width, T* groups) {
  if (width == 1) {
    __builtin_memcpy(groups, columns, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (width == 2) return narrow_groups<kLinf, 2>(columns, n, groups);
    if (width == 4) return narrow_groups<kLinf, 4>(columns, n, groups);
    if (width % kLanes == 0) return wide_groups<kLinf>(columns, n, width, groups);
  }
  for (int64_t i = 0; i < n; i += width, ++groups) {
    const int64_t count = smaller(width, n - i);
    if (width >= kLanes) {
      *groups = total_of<kLinf>(columns + i, count);
      continue;
    }
    T sum = columns[i];
    for (int64_t j = 1; j < count; ++j) sum = kLinf ? larger_magnitude(sum, columns[i + j]) : sum + columns[i + j];
    *groups = sum;
  }
}

template <int kColumns>
void spread_narrow(const float* groups, int64_t n, float* columns) {
  for (int64_t i = 0; i < n; i += kLanes * kColumns, groups += kLanes) {
    const Floats all = load<Floats>(groups);
    for (int part = 0; part < kColumns; ++part) {
      Ints from;
      for (int lane = 0; lane < kLanes; ++lane) from[lane] = (part * kLanes + lane) / kColumns;
      store(columns + i + part * kLanes, __builtin_shuffle(all, from));
    }
  }
}

template <typename T>
void spread(const T* groups, int64_t n, int64_t width, T* columns) {
  if (width == 1) {
    __builtin_memcpy(columns, groups, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (width == 2) return spread_narrow<2>(groups, n, columns);
    if (width == 4) return spread_narrow<4>(groups, n, columns);
  }
  using Float = decltype(load_lanes(groups));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  for (int64_t i = 0; i < n; i += width, ++groups)  // each writes into the next, which then overwrites it
    for (int64_t j = 0; j < smaller(width, n - i); j += kStep) store_lanes(columns + i + j, Float{} + *groups);
}

// Sums of squares, or maxima, of a panel's groups; a group wider than a tile is alone in its panel.
template <bool kLinf, typename T>
void measure(const void* weight, DType dtype, const Panel& p, T* groups) {
  alignas(64) T columns[kRoom];
  T all{};
  for (int64_t begin = 0; begin < p.columns; begin += kTile) {
    const int64_t n = smaller(kTile, p.columns - begin);
    join_rows<kLinf>(weight, dtype, p, p.column + begin, n, columns);
    if (p.columns <= kTile) return sum_groups<kLinf>(columns, n, p.group_columns, groups);
    const T tile = total_of<kLinf>(columns, n);
    all = kLinf ? larger_magnitude(all, tile) : all + tile;
  }
  if (p.columns) groups[0] = all;
}

// The norm of one group, by its largest entry: for squares out of range.
template <typename T>
double scaled_norm(const void* weight, DType dtype, const Panel& p, int64_t group) {
  alignas(64) T wide[kTile];
  const int64_t begin = p.column + group * p.group_columns;
  const int64_t end = smaller(begin + p.group_columns, p.column + p.columns);
  const auto each = [&](const auto& use) {
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t at = begin; at < end; at += kTile) {
        const int64_t n = smaller(kTile, end - at);
        use(as_wide(weight, dtype, (p.row + r) * p.stride + at, n, wide), n);
      }
  };
  T most{};
  each([&](const T* w, int64_t n) {
    for (int64_t i = 0; i < n; ++i) most = larger_magnitude(most, w[i]);
  });
  if (!(most > 0) || most - most != 0) return static_cast<double>(most);  // 0, infinity, NaN
  double squares = 0;
  each([&](const T* w, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double scaled = static_cast<double>(w[i]) / static_cast<double>(most);
      squares += scaled * scaled;
    }
  });
  return static_cast<double>(most) * __builtin_sqrt(squares);
}

inline Floats root_of(Floats x) { return square_root(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }

// The norms of a panel's groups, with room for whole vectors. The squares of large and small entries are neither
// infinite nor lost.
template <typename T>
void group_norms(const void* weight, DType dtype, const Panel& p, T* norms) {
  using Float = decltype(load_lanes(norms));
  constexpr int64_t kStep = sizeof(Float) / sizeof(T);
  const int64_t count = p.groups;
  measure<false>(weight, dtype, p, norms);
  for (int64_t g = count; g % kStep; ++g) norms[g] = 1;
  Float irregular{};
  for (int64_t g = 0; g < count; g += kStep) irregular += is_regular(load_lanes(norms + g)) ? Float{} : Float{} + 1;
  if (across<false>(irregular) == 0) {
    for (int64_t g = 0; g < count; g += kStep) store_lanes(norms + g, root_of(load_lanes(norms + g)));
    return;
  }
  alignas(64) T most[kRoom];  // tells groups of zeros, which pruning makes, from those whose squares vanished
  measure<true>(weight, dtype, p, most);
  for (int64_t g = 0; g < count; ++g)
    norms[g] = static_cast<T>(most[g] == 0           ? 0
                              : is_regular(norms[g]) ? __builtin_sqrt(static_cast<double>(norms[g]))
                                                     : scaled_norm<T>(weight, dtype, p, g));
}

}  // namespace pykd::PYKD_ISA
