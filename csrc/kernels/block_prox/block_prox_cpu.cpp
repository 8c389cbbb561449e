// Memory is the floor: 4 bytes read and written in place a float32 weight. l1_l2 stays near it, as block_norm does. For
// l1_linf some six sweeps over a group that stays in L1 find its level: narrow groups are turned, so that a lane is a
// group, and wide ones are swept in vectors.
#include "core/block_panels.h"
#include "core/cpu_isa.h"
#include "kernels/block_prox/block_prox.h"
#include "kernels/block_prox/block_prox_math.h"

namespace pykd::PYKD_ISA {
namespace {

constexpr int64_t kTurned = 4096;  // entries of a group of one column that is turned, at the most
constexpr int64_t kSmall = 64;     // and of another
constexpr int64_t kHeld = 32768;   // entries of a group that are held side by side

inline bool any_above(Floats a, Floats b) { return any(a > b); }
inline bool any_above(double a, double b) { return a > b; }

// kLanes groups of kWidth columns, one after the other, to kWidth vectors of a lane a group: neighbours are parted
// until none of a group are left.
template <int kWidth>
inline void turn(Floats (&v)[kWidth]) {
  if constexpr (kWidth > 1) {
    Ints even;
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
    Floats first[kWidth / 2], second[kWidth / 2];
    for (int i = 0; i < kWidth / 2; ++i) {
      first[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even);
      second[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even + 1);
    }
    turn<kWidth / 2>(first);
    turn<kWidth / 2>(second);
    for (int i = 0; i < kWidth / 2; ++i) {
      v[i] = first[i];
      v[kWidth / 2 + i] = second[i];
    }
  }
}
template <int kWidth>
inline void turn(float* values) {
  Floats v[kWidth];
  for (int i = 0; i < kWidth; ++i) v[i] = load<Floats>(values + i * kLanes);
  turn<kWidth>(v);
  for (int i = 0; i < kWidth; ++i) store(values + i * kLanes, v[i]);
}
inline void turn(float* values, int64_t width) {
  if (width == 2) turn<2>(values);
  if (width == 4) turn<4>(values);
  if (width == 8) turn<8>(values);
}
inline void turn(double*, int64_t) {}

inline void set(Floats& v, int64_t lane, float value) { v[lane] = value; }
inline void set(double& v, int64_t, double value) { v = value; }

inline Floats to_number(Ints n) { return __builtin_convertvector(n, Floats); }
inline double to_number(int64_t n) { return static_cast<double>(n); }
inline void add_above(Floats entry, Floats level, Floats& sum, Ints& count) {
  const Ints above = entry > level;
  sum += (Floats)((Ints)entry & above);
  count -= above;
}
inline void add_above(double entry, double level, double& sum, int64_t& count) {
  sum += entry > level ? entry : 0;
  count += entry > level;
}

// The sum and the number of the entries above a level, n of them in whole vectors. NaN is above none.
template <typename T>
struct Above {
  using Float = decltype(load_lanes(static_cast<const T*>(nullptr)));
  static constexpr int64_t kStep = sizeof(Float) / sizeof(T);

  Above(const T* entries, int64_t n, Float level) {
    Float sums[4] = {};
    decltype(magnitude_bits(Float{})) counts[4] = {};
    int64_t i = 0;
    for (; i + 4 * kStep <= n; i += 4 * kStep)
      each_of<4>([&](int j) { add_above(load_lanes(entries + i + j * kStep), level, sums[j], counts[j]); });
    for (; i < n; i += kStep) add_above(load_lanes(entries + i), level, sums[0], counts[0]);
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    number = to_number((counts[0] + counts[1]) + (counts[2] + counts[3]));
  }

  Float sum, number;
};

template <typename T>
struct Unit {
  using Float = decltype(load_lanes(static_cast<const T*>(nullptr)));
  static constexpr int64_t kStep = sizeof(Float) / sizeof(T);

  void run() {
    if (!p.columns) return;
    if (!a.linf) {
      group_norms(weight, a.dtype, p, values);
      for (int64_t g = 0; g < p.groups; ++g) values[g] = shrink_factor(values[g], threshold);
    } else if (is_turned()) {
      for (int64_t g = 0; g < p.groups; g += kStep) turned_levels(g);
    } else {
      for (int64_t g = 0; g < p.groups; ++g) values[g] = level_of(g);
    }
    write();
  }

  Unit(const BlockProx& args, void* weight_, const Panel& panel, T threshold_)
      : a(args), weight(weight_), p(panel), threshold(threshold_) {}

  const BlockProx& a;
  void* const weight;
  const Panel p;
  const T threshold;
  alignas(64) T values[kRoom];  // of a group: its factor, or its level

 private:
  const T* row(int64_t r, int64_t begin, int64_t n, T* wide) const {
    return as_wide(weight, a.dtype, (p.row + r) * p.stride + p.column + begin, n, wide);
  }

  // Narrow groups, and those that are small.
  bool is_turned() const {
    const int64_t width = p.group_columns, count = p.rows * width;
    return count <= kTurned && (width == 1 || (sizeof(T) == sizeof(float) && width <= kStep && count <= kSmall &&
                                               (width == 2 || width == 4 || width == 8)));
  }

  // The levels of kStep groups from `first` on, whose entries are turned: entry after entry, a lane a group.
  void turned_levels(int64_t first) {
    alignas(64) T entries[kTurned * kStep];
    alignas(64) T wide[kRoom];
    const int64_t width = p.group_columns, begin = first * width;
    const int64_t n = smaller(kStep * width, p.columns - begin);
    T* to = entries;
    for (int64_t r = 0; r < p.rows; ++r, to += width * kStep) {
      const T* const from = row(r, begin, n, wide);
      if (n == kStep * width) {
        for (int64_t i = 0; i < n; i += kStep) store_lanes(to + i, load_lanes(from + i));
      } else {
        for (int64_t i = 0; i < kStep * width; ++i) to[i] = i < n ? from[i] : T{};
      }
      turn(to, width);
    }
    const int64_t count = p.rows * width;
    Float sum{}, number{};
    for (int64_t i = 0; i < count; ++i) {
      const Float entry = magnitude(load_lanes(entries + i * kStep));
      store_lanes(entries + i * kStep, entry);
      sum += entry;
    }
    for (int64_t lane = 0; lane < kStep; ++lane) set(number, lane, static_cast<T>(entries_of(first + lane)));
    Float level = first_level(sum, number);
    for (bool rising = true; rising;) {
      const Float last = level;
      const Above<T> above(entries, count * kStep, level);
      level = next_level(level, above.sum, above.number, threshold);
      rising = any_above(level, last);
    }
    store_lanes(values + first, level);
  }

  // Of one group: its magnitudes side by side in a buffer, or read anew for each sweep where it is large. Sums of
  // pieces are added in double.
  T level_of(int64_t group) const {
    const int64_t begin = group * p.group_columns, end = smaller(begin + p.group_columns, p.columns);
    const int64_t count = entries_of(group);
    const bool held = count <= kHeld;
    alignas(64) T entries[kHeld + kStep];
    double above = 0, of_them = 0;
    const auto piece = [&](const T* from, int64_t n, T level) {
      const Above<T> found(from, n, Float{} + level);
      above += static_cast<double>(reduce_sum(found.sum));
      of_them += static_cast<double>(reduce_sum(found.number));
    };
    // Rows in pieces: their magnitudes, to whole vectors from `to` on.
    const auto each_piece = [&](auto to, const auto& use) {
      alignas(64) T wide[kRoom];
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t at = begin; at < end; at += kTile) {
          const int64_t n = smaller(kTile, end - at);
          const T* const from = row(r, at, n, wide);
          T* const into = to(r, at);
          int64_t i = 0;
          for (; i + kStep <= n; i += kStep) store_lanes(into + i, magnitude(load_lanes(from + i)));
          if constexpr (kStep > 1)
            if (i < n) store_lanes(into + i, magnitude(load_lanes(from + i, n - i)));
          use(into, (n + kStep - 1) / kStep * kStep);
        }
    };
    const auto sweep = [&](T level) {
      above = of_them = 0;
      if (held)
        for (int64_t at = 0; at < count; at += kTile)
          piece(entries + at, (smaller(kTile, count - at) + kStep - 1) / kStep * kStep, level);
      else
        each_piece([&](int64_t, int64_t) { return entries; }, [&](const T* from, int64_t n) { piece(from, n, level); });
    };
    double sum = 0;
    const auto add = [&](const T* from, int64_t n) { sum += static_cast<double>(total_of<false>(from, n)); };
    if (held) {
      each_piece([&](int64_t r, int64_t at) { return entries + r * (end - begin) + at - begin; },
                 [](const T*, int64_t) {});
      store_lanes(entries + count, Float{});
      for (int64_t at = 0; at < count; at += kTile) add(entries + at, smaller(kTile, count - at));
    } else {
      each_piece([&](int64_t, int64_t) { return entries; }, add);
    }
    if (sum <= a.threshold) return 0;
    T level = first_level(static_cast<T>(sum), static_cast<T>(count));
    for (T last = level;; last = level) {
      sweep(level);
      level = next_level(level, static_cast<T>(above), static_cast<T>(of_them), threshold);
      if (!(level > last)) break;
    }
    return level;
  }

  // The level where no entry lies below it: a lower bound, and 0 where the threshold takes all.
  template <typename F>
  F first_level(F sum, F number) const {
    const F level = (sum - threshold) / number;
    return level > 0 ? level : level == level ? F{} : level;
  }

  int64_t entries_of(int64_t group) const {
    return p.rows * larger(1, smaller(p.group_columns, p.columns - group * p.group_columns));
  }

  void write() {
    alignas(64) T in_columns[kRoom], wide[kRoom];
    for (int64_t begin = 0; begin < p.columns; begin += kTile) {
      const int64_t n = smaller(kTile, p.columns - begin);
      begin ? spread(values, n, n, in_columns) : spread(values, n, p.group_columns, in_columns);
      for (int64_t r = 0; r < p.rows; ++r) {
        T* const w = const_cast<T*>(row(r, begin, n, wide));
        a.linf ? clip(w, in_columns, n) : multiply(w, in_columns, n);
        if constexpr (sizeof(T) == sizeof(float))
          if (is_half(a.dtype))
            narrow(w, a.dtype, static_cast<uint16_t*>(weight) + (p.row + r) * p.stride + p.column + begin, n);
      }
    }
  }

  template <typename Use>
  static void each(T* w, const T* values, int64_t n, const Use& use) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) store_lanes(w + i, use(load_lanes(w + i), load_lanes(values + i)));
    if (i < n) store_lanes(w + i, use(load_lanes(w + i, n - i), load_lanes(values + i)), n - i);
  }
  static void multiply(T* w, const T* factors, int64_t n) {
    each(w, factors, n, [](Float x, Float factor) { return factor == 0 ? Float{} : x * factor; });
  }
  static void clip(T* w, const T* levels, int64_t n) {
    each(w, levels, n, [](Float x, Float level) {
      const Float most = x < level ? x : level, least = most > -level ? most : -level;
      return level == level ? least : level;
    });
  }
};

// Groups whose factors of l1_l2 stay in registers.
class Strips {
 public:
  Strips(const BlockProx& a, const BlockProxWeight& weight)
      : b(weight.blocks),
        values(static_cast<float*>(weight.weight)),
        threshold(static_cast<float>(a.threshold)),
        fit(!a.linf && a.dtype == DType::kFloat32 && threshold > 1e-14f && fits_strips(b)) {}

  // Does some groups of [group, end) and tells how many: 0 where strips are not for these, at edges, and where there is
  // a number too large to square, or one that is not finite. Norms too small to square are below the threshold.
  int64_t run(int64_t grid_row, int64_t group, int64_t end) const {
    if (!fit) return 0;
    const int64_t row = grid_row * b.block_rows, column = group * b.block_columns;
    const int64_t rows = smaller(b.block_rows, b.rows - row), left = smaller(b.columns, end * b.block_columns) - column;
    float* const to = values + row * b.columns + column;
    if (b.block_columns >= kStrip) return left > 0 && shrink<4, true>(to, rows, smaller(b.block_columns, left));
    switch (strip_vectors(left, b.block_columns)) {
      case 8: return side_by_side<8>(to, rows, left);
      case 4: return side_by_side<4>(to, rows, left);
      case 2: return side_by_side<2>(to, rows, left);
      case 1: return side_by_side<1>(to, rows, left);
    }
    return 0;
  }

 private:
  const Blocks& b;
  float* const values;
  const float threshold;
  const bool fit;

  template <int kCount>
  int64_t side_by_side(float* to, int64_t rows, int64_t left) const {
    int64_t done = 0;
    while (left - done >= kCount * kLanes && shrink<kCount, false>(to + done, rows, 0)) done += kCount * kLanes;
    return done / b.block_columns;
  }

  template <int kCount, bool kWide>
  [[gnu::always_inline]] bool shrink(float* to, int64_t rows, int64_t columns) const {
    const int64_t width = kWide ? kCount * kLanes : b.block_columns;
    Floats group[kCount] = {};
    join_down<false, kWide>(to, rows, columns, b.columns, group);
    join_groups<false, kWide>(group, width);
    Ints regular = Ints{} - 1;
    compressed(group, width, [&](Floats squares, float) {
      regular &= squares < 1e37f;
      const Floats norm = square_root(squares);
      return norm > threshold ? 1 - threshold / norm : Floats{};
    });
    if (any(~regular)) return false;
    each_vector<kCount, kWide>(rows, columns, b.columns, [&](int i, int64_t at, int64_t n) {
      store_some(to + at, load_some(to + at, n) * group[i] + 0.0f, n);  // 0 without a sign
    });
    return true;
  }
};

template <typename T>
void run(const BlockProx& a, int64_t unit_begin, int64_t unit_end) {
  int64_t first = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const BlockProxWeight& w = a.weights[i];
    const Plan plan(w.blocks);
    const Strips strips(a, w);
    for (int64_t unit = larger(unit_begin, first); unit < smaller(unit_end, first + plan.units()); ++unit) {
      const int64_t grid_row = (unit - first) / plan.units_of_row;
      int64_t group = (unit - first) % plan.units_of_row * plan.groups;
      const int64_t end = smaller(group + plan.groups, plan.grid_columns);
      while (int64_t done = strips.run(grid_row, group, end)) group += done;
      if (group < end) Unit<T>(a, w.weight, {w.blocks, grid_row, group, end}, static_cast<T>(a.threshold)).run();
    }
    first += plan.units();
  }
}

}  // namespace

void block_prox_cpu(const BlockProx& args, int64_t unit_begin, int64_t unit_end) {
  if (args.threshold == 0) return;
  args.dtype == DType::kFloat64 ? run<double>(args, unit_begin, unit_end) : run<float>(args, unit_begin, unit_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(block_prox_cpu, (const BlockProx& args, int64_t unit_begin, int64_t unit_end),
              (args, unit_begin, unit_end))

#if defined(PYKD_ISA_BASELINE)
int64_t pykd::block_prox_units(const BlockProx& args) {
  int64_t units = 0;
  for (int64_t i = 0; i < args.count; ++i) units += baseline::Plan(args.weights[i].blocks).units();
  return units;
}
#endif
