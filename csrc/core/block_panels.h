// Panels of groups, which stay in the caches between two sweeps: what is summed is summed down the columns, in vectors,
// and once a group across them.
#pragma once

#include "core/blocks.h"
#include "core/magnitude.h"
#include "core/row_noise.h"

namespace pykd::PYKD_ISA {

constexpr int64_t kPanel = 16384;  // entries of a panel: 64 KB
constexpr int64_t kNarrow = 256;   // columns of a panel of tall groups at the least: whole lines

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Groups that lie one after the other, each in a row of the matrix: as one row of groups.
inline bool lie_in_one_row(const Blocks& b) {
  return b.rows == 0 || (b.block_rows == 1 && b.columns % b.block_columns == 0);
}
inline Blocks in_one_row(const Blocks& b) {
  return b.rows == 0 ? b : Blocks{1, b.rows * b.columns, 1, b.block_columns};
}

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

// ---- strips ----
// Some vectors side by side hold whole groups, or pass over one wide group, whose values stay in registers.

constexpr int64_t kStrip = 64;  // columns at the most; a wide group has as many at the least

// The sum, or the larger, of two values that are not negative.
template <bool kLinf>
inline Floats both(Floats a, Floats b) {
  if constexpr (!kLinf) return a + b;
  return from_bits((Ints)a > (Ints)b ? (Ints)a : (Ints)b);
}

// Whether strips are for groups of this size: the rows of a strip must stay in L1, 64 sets of 8 lines, between sweeps.
inline bool fits_strips(const Blocks& b) {
  if (b.rows == 0) return false;
  if (b.block_columns >= kStrip) return b.block_rows * b.block_columns <= 4 * kPanel;
  int64_t sets = 64;
  for (int64_t lines = b.columns / 16; b.columns % 16 == 0 && sets > 1 && lines % 2 == 0; lines /= 2) sets /= 2;
  return (b.block_columns & (b.block_columns - 1)) == 0 && b.block_rows <= 4 * smaller(sets, 16);
}

// Vectors of the next strip over narrow groups, `left` columns before an end; 0 if none.
inline int strip_vectors(int64_t left, int64_t width) {
  int count = kStrip / kLanes < 8 ? kStrip / kLanes : 8;
  while (count && count * kLanes > left) count /= 2;
  return count * kLanes >= width ? count : 0;
}

// use(i) for i in [0, kCount), constants to the compiler, which keeps arrays of vectors in registers only then.
template <int kCount, typename Use>
[[gnu::always_inline]] inline void each_of(const Use& use) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) use(i);
}

// use(which of kCount, offset, lanes) for the vectors of a strip; of a wide group any number of columns, with a rest.
template <int kCount, bool kWide, typename Use>
[[gnu::always_inline]] inline void each_vector(int64_t rows, int64_t columns, int64_t stride, const Use& use) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = r * stride;
    if constexpr (kWide) {
      const int64_t end = at + columns;
      for (; at + kCount * kLanes <= end; at += kCount * kLanes)
        each_of<kCount>([&](int i) { use(i, at + i * kLanes, kLanes); });
      for (; at + kLanes <= end; at += kLanes) use(0, at, kLanes);
      if (at < end) use(1, at, end - at);
    } else {
      each_of<kCount>([&](int i) { use(i, at + i * kLanes, kLanes); });
    }
  }
}

template <bool kLinf, bool kWide, int kCount>
[[gnu::always_inline]] inline void join_down(const float* w, int64_t rows, int64_t columns, int64_t stride,
                                             Floats (&total)[kCount]) {
  each_vector<kCount, kWide>(rows, columns, stride, [&](int i, int64_t at, int64_t n) {
    const Floats x = load_some(w + at, n);
    total[i] = both<kLinf>(total[i], kLinf ? magnitude(x) : x * x);
  });
}

// Each column gets what its group of `width` columns, a power of two, joins to; where it is wide, what all join to.
template <bool kLinf, int kBy, int kCount>
[[gnu::always_inline]] inline void fold_groups(Floats (&v)[kCount], int64_t width) {
  if (width <= kBy) return;
  if constexpr (kBy < kLanes)
    each_of<kCount>([&](int i) { v[i] = both<kLinf>(v[i], folded<kBy>(v[i])); });
  else
    each_of<kCount>([&](int i) {
      constexpr int kOther = kBy / kLanes;
      if (!(i & kOther)) v[i] = v[i | kOther] = both<kLinf>(v[i], v[i | kOther]);
    });
  if constexpr (2 * kBy < kCount * kLanes) fold_groups<kLinf, 2 * kBy>(v, width);
}
template <bool kLinf, bool kWide, int kCount>
[[gnu::always_inline]] inline void join_groups(Floats (&v)[kCount], int64_t width) {
  fold_groups<kLinf, 1>(v, kWide ? kCount * kLanes : width);
}

// The vectors of a strip have each value `width` times: use(v) once for `together` of them, on one that has a lane of
// each. What it returns goes back into all.
template <int kWidth, int kCount, typename Use>
[[gnu::always_inline]] inline void compressed(Floats (&v)[kCount], const Use& use) {
  constexpr int kTogether = kWidth < kCount ? kWidth : kCount;
  each_of<kCount / kTogether>([&](int group) {
    Floats all = v[group * kTogether];
    each_of<kTogether>([&](int j) {
      Ints mine{};
      for (int lane = 0; lane < kLanes; ++lane) mine[lane] = lane % kTogether == j ? -1 : 0;
      all = mine ? v[group * kTogether + j] : all;
    });
    all = use(all, static_cast<float>(kTogether));
    each_of<kTogether>([&](int j) {
      Ints from;
      for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane / kWidth * kWidth + j;
      v[group * kTogether + j] = __builtin_shuffle(all, from);
    });
  });
}
template <int kCount, typename Use>
[[gnu::always_inline]] inline void compressed(Floats (&v)[kCount], int64_t width, const Use& use) {
  if (width == 1) return compressed<1>(v, use);
  if (width == 2) return compressed<2>(v, use);
  if constexpr (kLanes > 4)
    if (width == 4) return compressed<4>(v, use);
  if constexpr (kLanes > 8)
    if (width == 8) return compressed<8>(v, use);
  compressed<kLanes>(v, use);
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
