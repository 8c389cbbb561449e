// Memory is the floor: 4 bytes read and 4 written a float32 weight. What is computed must hide behind them: two sweeps
// over a panel of whole groups, which stays in the caches between them. The first sums squares (or takes maxima) down
// the columns, so that nothing is added across a vector but once a group; the second scales, a factor a column. Most
// groups of float32 go through strips, whose sums and factors stay in registers; others through arrays of them.
#include "core/block_panels.h"
#include "core/cpu_isa.h"
#include "kernels/block_norm/block_norm.h"
#include "kernels/block_norm/block_norm_math.h"

namespace pykd::PYKD_ISA {
namespace {

// The factor with the entry's sign where the entry is its group's largest, else 0; and counts the former.
inline Floats pick(Floats x, Floats most, Floats f, Ints& count) {
  const Ints hit = magnitude_bits(x) == (Ints)most;
  count -= hit;
  return (Floats)(hit & ((Ints)f ^ ((Ints)x & ~0x7FFFFFFF)));
}
inline double pick(double x, double most, double f, int64_t& count) {
  const bool hit = magnitude_bits(x) == __builtin_bit_cast(int64_t, most);
  count += hit;
  return hit ? x < 0 ? -f : f : 0;
}

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

  void run(T scale, double& value) {
    a.linf ? measure_linf() : measure_l2();
    if (a.by_size) {
      double sum = 0;
      for (int64_t g = 0; g < count; ++g) {
        const double size = __builtin_sqrt(static_cast<double>(entries(student, g) + entries(teacher, g)));
        sum += size * static_cast<double>(norm[g]);
        factor[g] = limited(factor[g] * static_cast<T>(size));
      }
      value += sum;
    } else {
      value += static_cast<double>(total_of<false>(norm, count));
    }
    if (w.norms)
      for (int64_t g = 0; g < student.groups; ++g)
        static_cast<T*>(w.norms)[grid_row * w.blocks.grid_columns() + group_begin + g] = norm[g];
    if (!w.grad || !student.columns) return;
    for (int64_t g = 0; g < student.groups; g += kStep)
      store_lanes(factor + g, limited(load_lanes(factor + g) * scale));
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
    // Counted before it is changed, added to or rounded; else while it is written, once more where some share a
    // maximum.
    const bool first_counted = a.accumulate || w.grad == w.student || !finite || is_half(a.dtype);
    if (first_counted) divide_by_ties();
    if (write_rows<true>(a.accumulate) == active || first_counted) return;
    divide_by_ties();
    write_rows<true>(false);
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

constexpr int64_t kBeyondCaches = int64_t{1} << 23;  // entries of a weight that no cache holds

// What strips of one unit add up to: the norms, and by how much the entries taken for the largest of their group are
// more than such groups.
struct Sums {
  Floats norms{};
  Ints surplus{};

  bool tied() const { return reduce_sum(__builtin_convertvector(surplus, Floats)) > 0; }
};

// Groups whose sums and factors stay in registers.
class Strips {
 public:
  Strips(const BlockNorm& args, const BlockNormWeight& weight, float scale_)
      : a(args), w(weight), b(weight.blocks), its(weight.teacher_blocks), scale(scale_) {
    wide = b.block_columns >= kStrip;
    fit = a.dtype == DType::kFloat32 && !w.norms && fits_strips(b) &&
          (its.rows == 0 || (a.teacher_dtype == a.dtype && fits_strips(its) &&
                             (wide ? its.block_columns >= kStrip : its.block_columns == b.block_columns)));
    counted_first = a.linf && (a.accumulate || w.grad == w.student);
    past = !a.accumulate && w.grad != w.student && b.rows * b.columns >= kBeyondCaches && b.columns % kLanes == 0;
  }

  // Whether entries are counted that share their group's largest magnitude before anything is written: what is written
  // over or added to cannot be written again.
  bool counts_first() const { return counted_first; }

  // Does groups from `group` on and returns the first that is left, `end` or one that strips are not for: they are for
  // whole groups of these sizes, whose squares are in range. What entries share is told by the sums if not counted.
  int64_t run(int64_t grid_row, int64_t group, int64_t end, bool counted, Sums& sums) const {
    while (const int64_t done = fit ? some(grid_row, group, end, counted, sums) : 0) group += done;
    return group;
  }

 private:
  struct Place {
    int64_t student, rows, columns;
    int64_t teacher, its_rows, its_columns;
    bool counted;
  };

  const BlockNorm& a;
  const BlockNormWeight& w;
  const Blocks &b, &its;
  const float scale;
  bool wide, fit, counted_first, past;

  int64_t some(int64_t grid_row, int64_t group, int64_t end, bool counted, Sums& sums) const {
    const int64_t row = grid_row * b.block_rows, column = group * b.block_columns;
    int64_t left = smaller(b.columns, end * b.block_columns) - column;
    if (row >= b.rows || left <= 0) return 0;
    const int64_t its_row = grid_row * its.block_rows, its_column = group * its.block_columns;
    const bool taught = its_row < its.rows && its_column < its.columns;
    Place at{row * b.columns + column,
             smaller(b.block_rows, b.rows - row),
             0,
             its_row * its.columns + its_column,
             taught ? smaller(its.block_rows, its.rows - its_row) : 0,
             0,
             counted};
    if (wide) {
      at.columns = smaller(b.block_columns, left);
      at.its_columns = smaller(its.block_columns, its.columns - its_column);
      return a.linf ? run<true, 4, true>(at, sums) : run<false, 4, true>(at, sums);
    }
    if (taught) left = smaller(left, its.columns - column);
    switch (strip_vectors(left, b.block_columns)) {
      case 8: return a.linf ? side_by_side<true, 8>(at, left, sums) : side_by_side<false, 8>(at, left, sums);
      case 4: return a.linf ? side_by_side<true, 4>(at, left, sums) : side_by_side<false, 4>(at, left, sums);
      case 2: return a.linf ? side_by_side<true, 2>(at, left, sums) : side_by_side<false, 2>(at, left, sums);
      case 1: return a.linf ? side_by_side<true, 1>(at, left, sums) : side_by_side<false, 1>(at, left, sums);
    }
    return 0;
  }

  template <bool kLinf, bool kWide, int kCount>
  [[gnu::always_inline]] void join_student(const Place& p, Floats (&total)[kCount]) const {
    join_down<kLinf, kWide>(static_cast<const float*>(w.student) + p.student, p.rows, p.columns, b.columns, total);
  }
  template <bool kLinf, bool kWide, int kCount>
  [[gnu::always_inline]] void join_teacher(const Place& p, Floats (&total)[kCount]) const {
    join_down<kLinf, kWide>(static_cast<const float*>(w.teacher) + p.teacher, p.its_rows, p.its_columns, its.columns,
                            total);
  }

  template <bool kLinf, int kCount>
  int64_t side_by_side(Place p, int64_t left, Sums& sums) const {
    int64_t done = 0;
    for (; left >= kCount * kLanes && run<kLinf, kCount, false>(p, sums); left -= kCount * kLanes) {
      p.student += kCount * kLanes;
      p.teacher += kCount * kLanes;
      done += kCount * kLanes;
    }
    return done / b.block_columns;
  }

  template <bool kLinf, int kCount, bool kWide>
  [[gnu::always_inline]] bool run(const Place& p, Sums& sums) const {
    const int64_t width = kWide ? kCount * kLanes : b.block_columns;
    const int64_t entries = kWide ? p.rows * p.columns + p.its_rows * p.its_columns : (p.rows + p.its_rows) * width;
    const float size = a.by_size ? square_root(static_cast<float>(entries)) : 1.0f;
    Floats group[kCount] = {}, norms{};
    join_student<kLinf, kWide>(p, group);
    if constexpr (kLinf) {
      join_groups<true, kWide>(group, width);
      Floats others[kCount] = {};
      join_teacher<true, kWide>(p, others);
      join_groups<true, kWide>(others, width);
      const float part = size / static_cast<float>(width);  // of a column, so that sums stay in range
      Ints odd{}, active{};
      each_of<kCount>([&](int i) {
        const Floats norm = both<true>(group[i], others[i]);
        odd |= norm - norm != 0;
        norms += norm * part;
        group[i] = group[i] > others[i] ? group[i] : Floats{} - 1;  // the magnitude of an entry that has a gradient
        active -= group[i] > 0;
      });
      if (any(odd)) return false;
      const Floats gradient = Floats{} + size * scale;
      if (w.grad && p.counted) {
        Floats share[kCount] = {};
        each_entry<kCount, kWide>(
            p, [&](int i, Floats x) { share[i] += magnitude_bits(x) == (Ints)group[i] ? Floats{} + 1.0f : Floats{}; });
        join_groups<false, kWide>(share, width);
        each_of<kCount>([&](int i) { share[i] = gradient / share[i]; });  // infinite where none is picked
        Ints hits{};
        write<kCount, kWide>(p, [&](int i, Floats x) { return pick(x, group[i], share[i], hits); });
      } else if (w.grad) {
        Ints hits{};
        write<kCount, kWide>(p, [&](int i, Floats x) { return pick(x, group[i], gradient, hits); });
        sums.surplus += hits * static_cast<int32_t>(width) - active;
      }
    } else {
      join_teacher<false, kWide>(p, group);
      join_groups<false, kWide>(group, width);
      Ints irregular{};
      compressed(group, width, [&](Floats squares, float times) {
        irregular |= ~is_regular(squares);
        const Floats norm = square_root(squares);
        norms += norm * times;
        return norm > 0 ? size * scale / norm : Floats{};
      });
      if (any(irregular) && !only_zeros<kWide, kCount>(p, width)) return false;
      norms *= size / static_cast<float>(width);
      if (w.grad) write<kCount, kWide>(p, [&](int i, Floats x) { return x * group[i]; });
    }
    sums.norms += norms;
    return true;
  }

  // Whether groups out of the range of squares are groups of zeros, which pruning makes.
  template <bool kWide, int kCount>
  [[gnu::noinline]] bool only_zeros(const Place& p, int64_t width) const {
    Floats squares[kCount] = {}, most[kCount] = {};
    join_student<false, kWide>(p, squares);
    join_teacher<false, kWide>(p, squares);
    join_groups<false, kWide>(squares, width);
    join_student<true, kWide>(p, most);
    join_teacher<true, kWide>(p, most);
    join_groups<true, kWide>(most, width);
    Ints odd{};
    each_of<kCount>([&](int i) { odd |= (most[i] != 0) & ~is_regular(squares[i]); });
    return !any(odd);
  }

  template <int kCount, bool kWide, typename Use>
  [[gnu::always_inline]] void each_entry(const Place& p, const Use& use) const {
    const float* const from = static_cast<const float*>(w.student) + p.student;
    each_vector<kCount, kWide>(p.rows, p.columns, b.columns,
                               [&](int i, int64_t at, int64_t n) { use(i, load_some(from + at, n)); });
  }
  template <int kCount, bool kWide, typename Gradient>
  [[gnu::always_inline]] void write(const Place& p, const Gradient& gradient) const {
    const float* const from = static_cast<const float*>(w.student) + p.student;
    float* const to = static_cast<float*>(w.grad) + p.student;
    if (a.accumulate)
      each_vector<kCount, kWide>(p.rows, p.columns, b.columns, [&](int i, int64_t at, int64_t n) {
        store_some(to + at, load_some(to + at, n) + gradient(i, load_some(from + at, n)), n);
      });
    else if (past && reinterpret_cast<uintptr_t>(to) % sizeof(Floats) == 0)
      each_vector<kCount, kWide>(p.rows, p.columns, b.columns, [&](int i, int64_t at, int64_t n) {
        const Floats grad = gradient(i, load_some(from + at, n));
        n == kLanes ? store_past(to + at, grad) : store_some(to + at, grad, n);
      });
    else
      each_vector<kCount, kWide>(p.rows, p.columns, b.columns, [&](int i, int64_t at, int64_t n) {
        store_some(to + at, gradient(i, load_some(from + at, n)), n);
      });
  }
};

template <typename T>
void run(const BlockNorm& a, int64_t unit_begin, int64_t unit_end) {
  const T scale =
      static_cast<T>(a.grad_value ? static_cast<double>(*static_cast<const T*>(a.grad_value)) * a.scale : a.scale);
  int64_t first = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const BlockNormWeight& w = a.weights[i];
    const Plan plan(w.blocks, w.teacher_blocks);
    const Strips strips(a, w, static_cast<float>(scale));
    const int64_t begin = larger(unit_begin, first), end = smaller(unit_end, first + plan.units());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t grid_row = (unit - first) / plan.units_of_row;
      const int64_t group_begin = (unit - first) % plan.units_of_row * plan.groups;
      const int64_t group_end = smaller(group_begin + plan.groups, plan.grid_columns);
      Sums sums, again;
      const int64_t group = strips.run(grid_row, group_begin, group_end, strips.counts_first(), sums);
      if (sums.tied()) strips.run(grid_row, group_begin, group, true, again);  // which is rare
      double value = static_cast<double>(reduce_sum(sums.norms));
      if (group < group_end) Unit<T>(a, w, grid_row, group, group_end).run(scale, value);
      if (a.unit_value) a.unit_value[unit] = value;
    }
    first += plan.units();
  }
  fence_past();
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
