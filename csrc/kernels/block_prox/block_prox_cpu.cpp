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
constexpr int64_t kHeld = 8192;    // entries of a group that are held side by side

inline Floats magnitude(Floats x) { return bits_float(float_bits(x) & 0x7FFFFFFF); }
inline double magnitude(double x) { return __builtin_fabs(x); }
inline bool any_above(Floats a, Floats b) { return reduce_max(a > b ? Floats{} + 1.0f : Floats{}) > 0; }
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
      Float above{}, of_them{};
      for (int64_t i = 0; i < count; ++i) {
        const Float entry = load_lanes(entries + i * kStep);
        above += entry > level ? entry : Float{};
        of_them += entry > level ? Float{} + 1 : Float{};
      }
      level = next_level(level, above, of_them, threshold);
      rising = any_above(level, last);
    }
    store_lanes(values + first, level);
  }

  // Of one group, swept in vectors: side by side in a buffer, or where it is. Sums of pieces are added in double.
  T level_of(int64_t group) const {
    const int64_t begin = group * p.group_columns, end = smaller(begin + p.group_columns, p.columns);
    const bool held = (end - begin + kStep) * p.rows <= kHeld;
    alignas(64) T values_held[kHeld], wide[kRoom];
    const int64_t padded = (end - begin + kStep - 1) / kStep * kStep;
    if (held)
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t at = begin; at < end; at += kTile) {
          const int64_t n = smaller(kTile, end - at);
          const T* const from = row(r, at, n, wide);
          T* const to = values_held + r * padded + at - begin;
          int64_t i = 0;
          for (; i + kStep <= n; i += kStep) store_lanes(to + i, magnitude(load_lanes(from + i)));
          if (i < n) store_lanes(to + i, magnitude(load_lanes(from + i, n - i)));
        }
    const auto sums = [&](T level, double& above, double& of_them) {
      above = of_them = 0;
      const auto piece = [&](const T* from, int64_t n) {
        Float sum[2] = {}, number[2] = {};
        const auto add = [&](Float entry, int which) {
          sum[which] += entry > level ? entry : entry == entry ? Float{} : entry;
          number[which] += entry > level ? Float{} + 1 : Float{};
        };
        int64_t i = 0;
        for (; i + 2 * kStep <= n; i += 2 * kStep) {
          add(magnitude(load_lanes(from + i)), 0);
          add(magnitude(load_lanes(from + i + kStep)), 1);
        }
        for (; i + kStep <= n; i += kStep) add(magnitude(load_lanes(from + i)), 0);
        if (i < n) add(magnitude(load_lanes(from + i, n - i)), 0);
        above += static_cast<double>(reduce_sum(sum[0] + sum[1]));
        of_them += static_cast<double>(reduce_sum(number[0] + number[1]));
      };
      if (held)
        for (int64_t at = 0; at < p.rows * padded; at += kTile)
          piece(values_held + at, smaller(kTile, p.rows * padded - at));
      else
        for (int64_t r = 0; r < p.rows; ++r)
          for (int64_t at = begin; at < end; at += kTile) {
            const int64_t n = smaller(kTile, end - at);
            piece(row(r, at, n, wide), n);
          }
    };
    double above, of_them;
    sums(T{}, above, of_them);
    if (above <= a.threshold) return 0;
    T level = first_level(static_cast<T>(above), static_cast<T>(entries_of(group)));
    for (T last = level;; last = level) {
      sums(level, above, of_them);
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

template <typename T>
void run(const BlockProx& a, int64_t unit_begin, int64_t unit_end) {
  int64_t first = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const BlockProxWeight& w = a.weights[i];
    const Plan plan(w.blocks);
    for (int64_t unit = larger(unit_begin, first); unit < smaller(unit_end, first + plan.units()); ++unit) {
      const int64_t grid_row = (unit - first) / plan.units_of_row;
      const int64_t begin = (unit - first) % plan.units_of_row * plan.groups;
      const Panel panel(w.blocks, grid_row, begin, smaller(begin + plan.groups, plan.grid_columns));
      Unit<T>(a, w.weight, panel, static_cast<T>(a.threshold)).run();
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
