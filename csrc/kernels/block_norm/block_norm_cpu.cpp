// Memory is the floor: 4 bytes read and 4 written a float32 weight. What is computed must hide behind them: two sweeps
// over a panel of whole groups, which stays in the caches between them. The first sums squares (or takes maxima) down
// the columns, so that nothing is added across a vector but once a group; the second scales, a factor a column.
#include "core/block_panels.h"
#include "core/cpu_isa.h"
#include "kernels/block_norm/block_norm.h"
#include "kernels/block_norm/block_norm_math.h"

namespace pykd::PYKD_ISA {
namespace {

template <typename T>
struct Unit {
  using Float = decltype(load_lanes(static_cast<const T*>(nullptr)));
  static constexpr int64_t kStep = sizeof(Float) / sizeof(T);

  const BlockNorm& a;
  const BlockNormWeight& w;
  const Panel student, teacher;
  const int64_t grid_row, group_begin, count;  // of groups: the student's and the teacher's
  alignas(64) T norm[kRoom];                   // of a group
  alignas(64) T factor[kRoom];

  Unit(const BlockNorm& args, const BlockNormWeight& weight, int64_t grid_row_, int64_t begin, int64_t end)
      : a(args),
        w(weight),
        student(w.blocks, grid_row_, begin, end),
        teacher(w.teacher_blocks, grid_row_, begin, end),
        grid_row(grid_row_),
        group_begin(begin),
        count(end - begin) {}

  void run(T scale, double* value) {
    a.linf ? measure_linf() : measure_l2();
    if (a.by_size) {
      double sum = 0;
      for (int64_t g = 0; g < count; ++g) {
        const double size = __builtin_sqrt(static_cast<double>(entries(student, g) + entries(teacher, g)));
        sum += size * static_cast<double>(norm[g]);
        factor[g] *= static_cast<T>(size);
      }
      if (value) *value = sum;
    } else if (value) {
      *value = static_cast<double>(total_of<false>(norm, count));
    }
    if (w.norms)
      for (int64_t g = 0; g < student.groups; ++g)
        static_cast<T*>(w.norms)[grid_row * w.blocks.grid_columns() + group_begin + g] = norm[g];
    if (!w.grad || !student.columns) return;
    for (int64_t g = 0; g < student.groups; g += kStep) store_lanes(factor + g, load_lanes(factor + g) * scale);
    write();
  }

 private:
  static int64_t entries(const Panel& p, int64_t g) {
    return g < p.groups ? p.rows * smaller(p.group_columns, p.columns - g * p.group_columns) : 0;
  }

  void measure_l2() {
    constexpr T kLargest = sizeof(T) == sizeof(float) ? T(1e18) : T(1e150), kSmallest = 1 / kLargest;
    group_norms(w.student, a.dtype, student, norm);
    for (int64_t g = student.groups; g < count; ++g) norm[g] = 0;
    if (teacher.columns) {
      alignas(64) T others[kRoom];
      group_norms(w.teacher, a.teacher_dtype, teacher, others);
      for (int64_t g = 0; g < teacher.groups; ++g) {
        const T own = norm[g], its = others[g];
        const T most = own > its ? own : its;
        norm[g] = most > kSmallest && most < kLargest
                      ? static_cast<T>(root_of(own * own + its * its))
                      : static_cast<T>(__builtin_hypot(static_cast<double>(own), static_cast<double>(its)));
      }
    }
    for (int64_t g = count; g % kStep; ++g) norm[g] = 1;
    Float irregular{};
    for (int64_t g = 0; g < count; g += kStep) irregular += is_regular(load_lanes(norm + g)) ? Float{} : Float{} + 1;
    if (across<false>(irregular) > 0)
      for (int64_t g = 0; g < count; ++g) factor[g] = inverse_norm(norm[g]);
    else
      for (int64_t g = 0; g < count; g += kStep) store_lanes(factor + g, 1 / load_lanes(norm + g));
  }

  // factor: 1 where the student's largest entry is the group's.
  void measure_linf() {
    alignas(64) T others[kRoom];
    measure<true>(w.student, a.dtype, student, norm);
    measure<true>(w.teacher, a.teacher_dtype, teacher, others);
    for (int64_t g = student.groups; g < count; ++g) norm[g] = 0;
    for (int64_t g = teacher.groups; g < count; ++g) others[g] = 0;
    for (int64_t g = 0; g < count; ++g) {
      const T own = norm[g], its = others[g];
      factor[g] = own > its ? T{1} : own == own ? T{} : own;
      norm[g] = larger_magnitude(own, its);
    }
  }

  void write() {
    if (!a.linf) {
      write_rows<false>(a.accumulate);
      return;
    }
    double active = 0;
    bool finite = true;
    for (int64_t g = 0; g < student.groups; ++g) {
      active += factor[g] != 0;
      finite &= factor[g] == factor[g];
    }
    const bool in_place = w.grad == w.student;
    if (in_place || !finite || is_half(a.dtype)) {  // counted before what is counted changes, or is rounded
      divide_by_ties();
      write_rows<true>(a.accumulate);
    } else if (write_rows<true>(a.accumulate) != active) {  // some share their maximum, which is rare
      alignas(64) T whole[kRoom];
      __builtin_memcpy(whole, factor, sizeof whole);
      divide_by_ties();
      for (int64_t g = 0; g < student.groups && a.accumulate; ++g) factor[g] -= whole[g];
      write_rows<true>(a.accumulate);
    }
  }

  void divide_by_ties() {
    alignas(64) T most[kRoom], ties[kRoom], wide[kRoom];
    T tied{};  // of a group wider than a tile
    for (int64_t begin = 0; begin < student.columns; begin += kTile) {
      const int64_t n = smaller(kTile, student.columns - begin);
      spread_from(norm, begin, n, most);
      for (int64_t i = 0; i < n; ++i) ties[i] = 0;
      for (int64_t r = 0; r < student.rows; ++r) {
        const T* const row = as_wide(w.student, a.dtype, place(r, begin), n, wide);
        for (int64_t i = 0; i < n; ++i) ties[i] += magnitude_bits(row[i]) == magnitude_bits(most[i]) ? T{1} : T{};
      }
      if (student.columns <= kTile) {
        T in_groups[kRoom];
        sum_groups<false>(ties, n, student.group_columns, in_groups);
        for (int64_t g = 0; g < student.groups; ++g)
          if (factor[g] != 0) factor[g] /= in_groups[g];
        return;
      }
      tied += total_of<false>(ties, n);
    }
    if (factor[0] != 0) factor[0] /= tied;
  }

  int64_t place(int64_t row, int64_t begin) const {
    return (student.row + row) * student.stride + student.column + begin;
  }

  // A group's value, a column each; where begin is not 0, there is one group alone.
  void spread_from(const T* groups, int64_t begin, int64_t n, T* columns) const {
    spread(groups, n, begin ? n : student.group_columns, columns);
  }

  // Returns how many entries were taken for the largest of their group.
  template <bool kLinf>
  double write_rows(bool accumulate) {
    const bool half = is_half(a.dtype);
    double taken = 0;
    for (int64_t begin = 0; begin < student.columns; begin += kTile) {
      const int64_t n = smaller(kTile, student.columns - begin);
      alignas(64) T factors[kRoom], most[kRoom], wide[kRoom], sums[kRoom];
      spread_from(factor, begin, n, factors);
      if (kLinf) {
        T targets[kRoom];  // none where the gradient is 0
        for (int64_t g = 0; g < student.groups; ++g) targets[g] = factor[g] == 0 ? -T{1} : norm[g];
        spread_from(targets, begin, n, most);
      }
      for (int64_t r = 0; r < student.rows; ++r) {
        const int64_t at = place(r, begin);
        const T* const from = as_wide(w.student, a.dtype, at, n, wide);
        T* const to = half ? sums : static_cast<T*>(w.grad) + at;
        if constexpr (sizeof(T) == sizeof(float))
          if (half && accumulate) widen(static_cast<const uint16_t*>(w.grad) + at, a.dtype, sums, n);
        taken += (accumulate ? write_row<kLinf, true> : write_row<kLinf, false>)(from, most, factors, n, to);
        if constexpr (sizeof(T) == sizeof(float))
          if (half) narrow(sums, a.dtype, static_cast<uint16_t*>(w.grad) + at, n);
      }
    }
    return taken;
  }

  // The factor with the entry's sign where the entry is its group's largest, else 0; and counts the former.
  static Floats pick(Floats x, Floats most, Floats f, Ints& count) {
    const Ints hit = magnitude_bits(x) == (Ints)most;
    count -= hit;
    return (Floats)(hit & ((Ints)f ^ ((Ints)x & ~0x7FFFFFFF)));
  }
  static double pick(double x, double most, double f, int64_t& count) {
    const bool hit = magnitude_bits(x) == __builtin_bit_cast(int64_t, most);
    count += hit;
    return hit ? x < 0 ? -f : f : 0;
  }
  static double number(Ints count) { return static_cast<double>(reduce_sum(__builtin_convertvector(count, Floats))); }
  static double number(int64_t count) { return static_cast<double>(count); }

  template <bool kLinf, bool kAccumulate>
  static double write_row(const T* from, const T* most, const T* factors, int64_t n, T* to) {
    decltype(magnitude_bits(Float{})) count{};
    const auto gradient = [&](Float x, int64_t i) {
      const Float f = load_lanes(factors + i);
      if constexpr (!kLinf) return x * f;
      const Float picked = pick(x, load_lanes(most + i), f, count);
      return f == f ? picked : f;
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      const Float grad = gradient(load_lanes(from + i), i);
      store_lanes(to + i, kAccumulate ? load_lanes(to + i) + grad : grad);
    }
    if (i < n) {  // a target beyond the end is none that 0 could hit
      if constexpr (kLinf) {
        alignas(64) T last[kStep];
        for (int64_t lane = 0; lane < kStep; ++lane) last[lane] = i + lane < n ? most[i + lane] : -T{1};
        Float x = load_lanes(from + i, n - i);
        const Float f = load_lanes(factors + i), picked = pick(x, load_lanes(last), f, count);
        x = f == f ? picked : f;
        store_lanes(to + i, kAccumulate ? load_lanes(to + i, n - i) + x : x, n - i);
      } else {
        const Float grad = gradient(load_lanes(from + i, n - i), i);
        store_lanes(to + i, kAccumulate ? load_lanes(to + i, n - i) + grad : grad, n - i);
      }
    }
    return kLinf ? number(count) : 0;
  }
};

template <typename T>
void run(const BlockNorm& a, int64_t unit_begin, int64_t unit_end) {
  const T scale =
      static_cast<T>(a.grad_value ? static_cast<double>(*static_cast<const T*>(a.grad_value)) * a.scale : a.scale);
  int64_t first = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const Plan plan(a.weights[i].blocks, a.weights[i].teacher_blocks);
    const int64_t begin = larger(unit_begin, first), end = smaller(unit_end, first + plan.units());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t grid_row = (unit - first) / plan.units_of_row;
      const int64_t group_begin = (unit - first) % plan.units_of_row * plan.groups;
      const int64_t group_end = smaller(group_begin + plan.groups, plan.grid_columns);
      Unit<T>(a, a.weights[i], grid_row, group_begin, group_end)
          .run(scale, a.unit_value ? a.unit_value + unit : nullptr);
    }
    first += plan.units();
  }
}

}  // namespace

void block_norm_cpu(const BlockNorm& args, int64_t unit_begin, int64_t unit_end) {
  args.dtype == DType::kFloat64 ? run<double>(args, unit_begin, unit_end) : run<float>(args, unit_begin, unit_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(block_norm_cpu, (const BlockNorm& args, int64_t unit_begin, int64_t unit_end),
              (args, unit_begin, unit_end))

#if defined(PYKD_ISA_BASELINE)
int64_t pykd::block_norm_units(const BlockNorm& args) {
  int64_t units = 0;
  for (int64_t i = 0; i < args.count; ++i)
    units += baseline::Plan(args.weights[i].blocks, args.weights[i].teacher_blocks).units();
  return units;
}
#endif
