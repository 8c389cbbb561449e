#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/distillation_loss/distillation_loss.h"
#include "kernels/distillation_loss/distillation_loss_math.h"

// The floor of a logit, in AVX2 instructions for eight of them: two exponentials of 12 (a third where hard targets meet
// a temperature), 11 for the sums and 7 for the gradient, beside the loads and stores of three short passes over L1 and
// the noise of core/row_noise.h. Rows go through each pass together, as many as fill a tile, so that one row's chain of
// maximum, exponentials, sums and logarithm does not hold up the next. Rows of few classes are turned: a lane is a row,
// and nothing is added up across lanes.

namespace pykd::PYKD_ISA {
namespace {

constexpr double kLog2 = 0.69314718055994530942;
constexpr int64_t kFew = 32;  // classes of rows that are turned

template <typename T>
using Vector = decltype(load_lanes(static_cast<const T*>(nullptr)));
template <typename T>
constexpr int64_t kStep = sizeof(Vector<T>) / sizeof(T);

inline Floats load_lanes_or(const float* from, int64_t n, float others) { return load_first(from, n, others); }
inline double load_lanes_or(const double*, int64_t, double others) { return others; }

// `rows` rows of n <= kTile logits in `stride` places each, whole vectors; stride is n rounded up to them.
struct Shape {
  int64_t rows, n, stride;
};

// A tile of each row's logits, then of their exponentials (reverse: b - a in place of the teacher's), and of the
// exponentials at temperature 1.
template <typename T>
struct Scratch {
  T *student, *teacher, *hard;
};

// Copies logits, with targets made of the teacher's, fills their last vector with -inf, and finds the maxima, where
// sums are given.
template <Target kTarget, typename T>
void load_rows(const Shape& shape, const T* const* student, const T* const* teacher, const T* noise,
               int64_t noise_stride, const Scratch<T>& to, RowSums<T>* sums) {
  using V = Vector<T>;
  constexpr T kMasked = -__builtin_inff();
  for (int64_t i = 0; i < shape.rows; ++i) {
    const T *const s = student[i], *const t = teacher[i], *const eps = noise + i * noise_stride;
    T *const s_to = to.student + i * shape.stride, *const t_to = to.teacher + i * shape.stride;
    V student_max = V{} + kMasked, teacher_max = V{} + kMasked;
    const auto part = [&](int64_t c, V logits, V targets) __attribute__((always_inline)) {
      if constexpr (kTarget != Target::kClean) targets = perturb<kTarget>(targets, load_lanes(eps + c));
      store_lanes(s_to + c, logits);
      store_lanes(t_to + c, targets);
      student_max = logits > student_max ? logits : student_max;
      teacher_max = targets > teacher_max ? targets : teacher_max;
    };
    int64_t c = 0;
    for (; c + kStep<T> <= shape.n; c += kStep<T>) part(c, load_lanes(s + c), load_lanes(t + c));
    if (const int64_t rest = shape.n - c)
      part(c, load_lanes_or(s + c, rest, kMasked), load_lanes_or(t + c, rest, kMasked));
    if (!sums) continue;
    sums[i].student_max = reduce_max(student_max);
    sums[i].teacher_max = reduce_max(teacher_max);
  }
}

// Logits to exponentials, and their sums; a and b in powers of two. What the lanes hold is added up afterwards, for all
// rows together. What comes next is fetched meanwhile.
template <bool kReverse, typename T>
void exp_rows(const Shape& shape, const Scratch<T>& scratch, T inverse_temperature, const Near& next,
              RowSums<T>* sums) {
  using V = Vector<T>;
  const V slope = V{} + inverse_temperature * static_cast<T>(1 / kLog2);
  V lanes[kRows][3];
  for (int64_t i = 0; i < shape.rows; ++i) {
    const V student_max = V{} + sums->base(sums[i].student_max), teacher_max = V{} + sums->base(sums[i].teacher_max);
    T *const s = scratch.student + i * shape.stride, *const t = scratch.teacher + i * shape.stride;
    V sum_b{}, sum_a{}, divergence{};
    for (int64_t c = 0; c < shape.stride; c += kStep<T>) {
      if (c % 16 == 0)
        for (int array = 0; array < 3; ++array) next(array, c);
      const V b = (load_lanes(s + c) - student_max) * slope, a = (load_lanes(t + c) - teacher_max) * slope;
      const V exp_b = exponential2(b), exp_a = exponential2(a);
      sum_b += exp_b;
      sum_a += exp_a;
      divergence += divergence_term<kReverse>(exp_a, exp_b, a, b);
      store_lanes(s + c, exp_b);
      store_lanes(t + c, kReverse ? b - a : exp_a);
    }
    lanes[i][0] = sum_b;
    lanes[i][1] = sum_a;
    lanes[i][2] = divergence;
  }
  for (int64_t i = 0; i < shape.rows; ++i) {
    sums[i].exp_b = reduce_sum(lanes[i][0]);
    sums[i].exp_a = reduce_sum(lanes[i][1]);
    sums[i].divergence = reduce_sum(lanes[i][2]) * static_cast<T>(kLog2);
  }
}

// The student's exponentials at temperature 1; scratch.hard may be its logits.
template <typename T>
void hard_rows(const Shape& shape, const Scratch<T>& scratch, RowSums<T>* sums) {
  using V = Vector<T>;
  for (int64_t i = 0; i < shape.rows; ++i) {
    const V max = V{} + sums->base(sums[i].student_max);
    V sum{};
    for (int64_t c = i * shape.stride; c < (i + 1) * shape.stride; c += kStep<T>) {
      const V e = exponential2((load_lanes(scratch.student + c) - max) * static_cast<T>(1 / kLog2));
      sum += e;
      store_lanes(scratch.hard + c, e);
    }
    sums[i].hard = reduce_sum(sum);
  }
}

// Sum of n logits' differences to their maximum.
template <typename T>
T sum_row(const T* student, int64_t n, T max) {
  using V = Vector<T>;
  V sum{};
  T rest = 0;
  int64_t c = 0;
  for (; c + kStep<T> <= n; c += kStep<T>) sum += load_lanes(student + c) - max;
  for (; c < n; ++c) rest += student[c] - max;
  return reduce_sum(sum) + rest;
}

template <bool kReverse, bool kHard, typename T>
void grad_row(const Scratch<T>& s, int64_t n, const Slopes<T>& slopes, bool accumulate, T* grad) {
  const auto at = [&](int64_t c) __attribute__((always_inline)) {
    return gradient<kReverse, kHard>(slopes, load_lanes(s.student + c), load_lanes(s.teacher + c),
                                     load_lanes(s.hard + c));
  };
  int64_t c = 0;
  if (accumulate)
    for (; c + kStep<T> <= n; c += kStep<T>) store_lanes(grad + c, load_lanes(grad + c) + at(c));
  else
    for (; c + kStep<T> <= n; c += kStep<T>) store_lanes(grad + c, at(c));
  if (c == n) return;
  store_lanes(grad + c, accumulate ? load_lanes(grad + c, n - c) + at(c) : at(c), n - c);
}

// kLanes rows of `stride` to columns of kLanes, or back; a row is whole vectors.
inline void turn(const float* from, int64_t stride, float* columns) {
  for (int64_t c = 0; c < stride; c += kLanes) {
    Floats v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = load_lanes(from + i * stride + c);
    transpose(v);
    for (int i = 0; i < kLanes; ++i) store_lanes(columns + (c + i) * kLanes, v[i]);
  }
}
inline void turn_back(const float* columns, int64_t stride, float* to) {
  for (int64_t c = 0; c < stride; c += kLanes) {
    Floats v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = load_lanes(columns + (c + i) * kLanes);
    transpose(v);
    for (int i = 0; i < kLanes; ++i) store_lanes(to + i * stride + c, v[i]);
  }
}

// The scratch of a row of several tiles: three arrays of them, and each tile's maxima.
constexpr int64_t kArrays = 3, kMaxima = 2;

// One call's rows: the scratch, and what is the same for all of them.
template <typename T>
class Rows {
 public:
  Rows(const DistillationLoss& args, int64_t targets, void* workspace)
      : a(args),
        noise(a.noise, a.classes),
        tiles((a.classes + kTile - 1) / kTile),
        stride((smaller(kTile, a.classes) + kStep<T> - 1) / kStep<T> * kStep<T>),
        soft(a.hard_weight < 1),
        few(sizeof(T) == sizeof(float) && soft && a.classes <= kFew),
        inverse_temperature(static_cast<T>(1 / a.temperature)),
        weights(a),
        hard_scale(!a.batchmean  ? a.hard_weight
                   : targets > 0 ? a.hard_weight / static_cast<double>(targets)
                                 : 0),
        scratch{student, teacher, hard},
        load_noisy(a.noise.additive ? load_rows<Target::kAdditive, T> : load_rows<Target::kMultiplicative, T>) {
    if (tiles > 1) {
      T* const w = static_cast<T*>(workspace);
      scratch = {w, w + tiles * kTile, w + 2 * tiles * kTile};
      student_max = w + kArrays * tiles * kTile;
      teacher_max = student_max + tiles;
    }
    if (a.temperature == 1 || !soft) scratch.hard = scratch.student;
    if (!soft) scratch.teacher = scratch.student;
    for (int i = 0; i < kRows; ++i) {
      target[i] = -1;
      upstream[i] = 1;
    }
  }

  void run(int64_t row_begin, int64_t row_end) {
    int64_t most = smaller(noise.most_rows(), kTile / stride);
    if (few) most = most / kLanes * kLanes;  // whole turns
    for (first = row_begin; first < row_end; first += kRows) {
      const int64_t rows = smaller(kRows, row_end - first);
      uint64_t selected = soft ? noise.select(first, rows) : 0;
      uint64_t others = ~selected & (~uint64_t{0} >> (kRows - rows));
      while (others) {
        others = take(others, most, places, count);
        run_rows(false);
      }
      while (selected) {
        selected = take(selected, most, places, count);
        run_rows(true);
      }
    }
  }

 private:
  // The rows at `places`, each of one tile; or a single row of several.
  void run_rows(bool noisy) {
    for (int i = 0; a.hard_weight > 0 && i < count; ++i) {
      const int64_t row = first + places[i];
      target[i] = a.target[row] == a.ignore_index ? -1 : a.target[row];
      hard_weight[i] = target[i] < 0 ? 0 : static_cast<T>(hard_scale);
      logit_sum[i] = at_target[i] = 0;
      T wide;
      if (target[i] >= 0) at_target[i] = *as_wide(a.student, a.student_dtype, row * a.classes + target[i], 1, &wide);
    }
    for (int i = 0; a.grad_loss && i < count; ++i)
      upstream[i] = static_cast<const T*>(a.grad_loss)[(first + places[i]) * a.grad_loss_stride];
    if constexpr (sizeof(T) == sizeof(float))
      if (few) return a.reverse ? run_few<true>(noisy) : run_few<false>(noisy);
    if (a.reverse && soft) return run_many<true>(noisy);
    run_many<false>(noisy);
  }

  int64_t size_of_tile(int64_t tile) const { return smaller(kTile, a.classes - tile * kTile); }
  int64_t place(int64_t tile, int i) const { return (first + places[i]) * a.classes + tile * kTile; }
  Scratch<T> scratch_of(int64_t tile, int i) const {
    const int64_t at = tile * kTile + i * stride;
    return {scratch.student + at, scratch.teacher + at, scratch.hard + at};
  }
  bool is_smooth() const { return a.hard_weight > 0 && a.label_smoothing > 0; }

  Near near(int64_t at, int64_t n) const {
    const void* const out = a.grad_student ? a.grad_student : a.student;
    return Near(at, n, {{a.student, a.student_dtype}, {a.teacher, a.teacher_dtype}, {out, a.student_dtype}});
  }
  // The memory after a large row's tile.
  Near next(int64_t tile) const {
    const int64_t at = place(tile, 0) + size_of_tile(tile);
    return count > 1 ? Near() : near(at, smaller(kTile, a.rows * a.classes - at));
  }

  void read(const Shape& shape, int64_t tile, bool noisy, RowSums<T>* part) {
    const Scratch<T> to = scratch_of(tile, 0);
    const T *students[kRows], *teachers[kRows];
    for (int i = 0; i < count; ++i) {
      students[i] = as_wide(a.student, a.student_dtype, place(tile, i), shape.n, to.student + i * stride);
      teachers[i] = students[i];
      if (soft) teachers[i] = as_wide(a.teacher, a.teacher_dtype, place(tile, i), shape.n, to.teacher + i * stride);
    }
    if (!noisy) return load_rows<Target::kClean>(shape, students, teachers, students[0], 0, to, part);
    const T* const values = noise.draw(places, count, tile * kTile, near(place(tile, 0), shape.n));
    load_noisy(shape, students, teachers, values, noise.stride(), to, part);
  }

  // Rows, side by side or of several tiles.
  template <bool kReverse>
  void run_many(bool noisy) {
    RowSums<T> sums[kRows], more;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      RowSums<T>* const part = tile == 0 ? sums : &more;
      const int64_t n = size_of_tile(tile);
      const Shape shape{count, n, (n + kStep<T> - 1) / kStep<T> * kStep<T>};
      const Scratch<T> to = scratch_of(tile, 0);
      read(shape, tile, noisy, part);
      for (int i = 0; is_smooth() && i < count; ++i) {
        const T max = part->base(part[i].student_max);
        logit_sum[i] += sum_row(to.student + i * stride, n, max) + max * static_cast<T>(n);
      }
      if (!soft || (a.hard_weight > 0 && scratch.hard != scratch.student)) hard_rows(shape, to, part);
      if (soft) exp_rows<kReverse>(shape, to, inverse_temperature, next(tile), part);
      if (soft && scratch.hard == scratch.student)
        for (int i = 0; i < count; ++i) part[i].hard = part[i].exp_b;
      if (tiles > 1) {
        student_max[tile] = part->student_max;
        teacher_max[tile] = part->teacher_max;
      }
      if (tile > 0) sums->template add<kReverse>(more, inverse_temperature);
    }
    Slopes<T> slopes[kRows];
    for (int i = 0; i < count; ++i) {
      slopes[i] = finish<kReverse, T>(sums[i], i);
      if (a.row_loss) static_cast<T*>(a.row_loss)[first + places[i]] = row_loss[i];
    }
    for (int64_t tile = 0; a.grad_student && tile < tiles; ++tile)
      for (int i = 0; i < count; ++i) {
        if (tiles > 1) slopes[0] = finish<kReverse, T>(sums[0], 0), move(slopes[0], sums[0], tile);
        const auto choice = target[i] < 0 ? grad_row<kReverse, false, T> : grad_row<kReverse, true, T>;
        write(tile, i, slopes[i].at_target,
              [&](T* to, bool add) { choice(scratch_of(tile, i), size_of_tile(tile), slopes[i], add, to); });
      }
  }

  // Slopes for the exponentials of a tile, which are taken from its own maxima.
  void move(Slopes<T>& slopes, const RowSums<T>& sums, int64_t tile) const {
    const T of_b = sums.base(student_max[tile]) - sums.base(sums.student_max);
    const T of_a = sums.base(teacher_max[tile]) - sums.base(sums.teacher_max);
    slopes.student *= exponential(of_b * inverse_temperature);
    slopes.teacher *= exponential(of_a * inverse_temperature);
    slopes.offset = zero_where_zero(slopes.student,
                                    slopes.offset + (of_b - of_a) * inverse_temperature * static_cast<T>(1 / kLog2));
    slopes.hard *= exponential(of_b);
  }

  // Rows of few classes, turned: a lane is a row.
  template <bool kReverse>
  void run_few(bool noisy) {
    read({count, a.classes, stride}, 0, noisy, nullptr);
    for (int i = 0; i < count; i += kLanes) {
      float* const s = columns[0];
      float* const t = columns[1];
      float* const h = scratch.hard == scratch.student ? s : columns[2];
      turn(scratch.student + i * stride, stride, s);
      turn(scratch.teacher + i * stride, stride, t);
      const int64_t end = a.classes * kLanes;
      RowSums<Floats> sums;
      for (int64_t c = 0; c < end; c += kLanes) {
        const Floats logits = load_lanes(s + c), targets = load_lanes(t + c);
        sums.student_max = logits > sums.student_max ? logits : sums.student_max;
        sums.teacher_max = targets > sums.teacher_max ? targets : sums.teacher_max;
      }
      const Floats student_base = sums.base(sums.student_max), teacher_base = sums.base(sums.teacher_max);
      if (is_smooth()) {
        Floats sum{};
        for (int64_t c = 0; c < end; c += kLanes) sum += load_lanes(s + c) - student_base;
        store_lanes(logit_sum + i, sum + student_base * static_cast<float>(a.classes));
      }
      if (a.hard_weight > 0 && h != s)
        for (int64_t c = 0; c < end; c += kLanes) {
          const Floats e = exponential2((load_lanes(s + c) - student_base) * static_cast<float>(1 / kLog2));
          sums.hard += e;
          store_lanes(h + c, e);
        }
      const Floats slope = Floats{} + inverse_temperature * static_cast<float>(1 / kLog2);
      for (int64_t c = 0; c < end; c += kLanes) {
        const Floats b = (load_lanes(s + c) - student_base) * slope, a2 = (load_lanes(t + c) - teacher_base) * slope;
        const Floats exp_b = exponential2(b), exp_a = exponential2(a2);
        sums.exp_b += exp_b;
        sums.exp_a += exp_a;
        sums.divergence += divergence_term<kReverse>(exp_a, exp_b, a2, b);
        store_lanes(s + c, exp_b);
        store_lanes(t + c, kReverse ? b - a2 : exp_a);
      }
      sums.divergence *= static_cast<float>(kLog2);
      if (h == s) sums.hard = sums.exp_b;
      const Slopes<Floats> slopes = finish<kReverse, Floats>(sums, i);
      const int64_t rows = smaller(kLanes, count - i);
      for (int j = 0; a.row_loss && j < rows; ++j)
        static_cast<float*>(a.row_loss)[first + places[i + j]] = row_loss[i + j];
      if (!a.grad_student) continue;
      if (a.hard_weight > 0)
        for (int64_t c = 0; c < end; c += kLanes)
          store_lanes(s + c, gradient<kReverse, true>(slopes, load_lanes(s + c), load_lanes(t + c), load_lanes(h + c)));
      else
        for (int64_t c = 0; c < end; c += kLanes)
          store_lanes(s + c, gradient<kReverse, false>(slopes, load_lanes(s + c), load_lanes(t + c), Floats{}));
      turn_back(s, stride, scratch.student + i * stride);
      for (int j = 0; j < rows; ++j)
        write(0, i + j, slopes.at_target[j], [&](float* to, bool add) {
          const float* const grad = scratch.student + (i + j) * stride;
          int64_t c = 0;
          for (; c + kLanes <= a.classes; c += kLanes)
            store_lanes(to + c, add ? load_lanes(to + c) + load_lanes(grad + c) : load_lanes(grad + c));
          if (const int64_t rest = a.classes - c)
            store_lanes(to + c, add ? load_lanes(to + c, rest) + load_lanes(grad + c) : load_lanes(grad + c), rest);
        });
    }
  }

  // Of one row, or of as many as V has lanes.
  template <bool kReverse, typename V>
  Slopes<V> finish(const RowSums<V>& sums, int i) {
    const auto of_rows = [i](const T* values) { return load<V>(values + i); };
    Slopes<V> slopes;
    store(row_loss + i, PYKD_ISA::finish<kReverse>(sums, weights, of_rows(hard_weight), of_rows(upstream),
                                                   of_rows(at_target), of_rows(logit_sum) * weights.each, slopes));
    return slopes;
  }

  // A row's gradient of a tile, by fill(to, whether to add to it).
  template <typename Fill>
  void write(int64_t tile, int i, T off_target, const Fill& fill) {
    const int64_t n = size_of_tile(tile), at = place(tile, i);
    const bool narrowed = is_half(a.student_dtype);
    T* const to = narrowed ? widened : static_cast<T*>(a.grad_student) + at;
    if (narrowed && a.accumulate) as_wide(a.grad_student, a.student_dtype, at, n, widened);
    fill(to, a.accumulate);
    const int64_t hit = target[i] - tile * kTile;
    if (target[i] >= 0 && hit >= 0 && hit < n) to[hit] -= off_target;
    if constexpr (sizeof(T) == sizeof(float))
      if (narrowed) narrow(widened, a.student_dtype, static_cast<uint16_t*>(a.grad_student) + at, n);
  }

  const DistillationLoss& a;
  RowNoise<T> noise;
  const int64_t tiles;   // of a row
  const int64_t stride;  // of rows in one tile
  const bool soft;       // whether the teacher counts
  const bool few;        // classes: rows are turned
  const T inverse_temperature;
  const Weights<T> weights;
  const double hard_scale;  // of a row's cross-entropy
  Scratch<T> scratch;
  T *student_max = nullptr, *teacher_max = nullptr;  // of each tile, where there are several
  decltype(&load_rows<Target::kAdditive, T>) const load_noisy;

  // The rows at hand: `places` in the group from `first` on, their targets (-1: none), and what finish() reads and
  // writes, in whole vectors.
  int64_t first = 0;
  int places[kRows], count = 0;
  int64_t target[kRows];
  alignas(64) T hard_weight[kRows] = {}, upstream[kRows], at_target[kRows] = {}, logit_sum[kRows] = {};
  alignas(64) T row_loss[kRows];
  alignas(64) T student[kTile] = {}, teacher[kTile] = {}, hard[kTile], widened[kTile];
  alignas(64) T columns[3][kFew * kLanes];
};

}  // namespace

void distillation_loss_cpu(const DistillationLoss& args, int64_t targets, void* workspace, int64_t row_begin,
                           int64_t row_end) {
  if (args.student_dtype == DType::kFloat64)
    Rows<double>(args, targets, workspace).run(row_begin, row_end);
  else
    Rows<float>(args, targets, workspace).run(row_begin, row_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(distillation_loss_cpu,
              (const DistillationLoss& args, int64_t targets, void* workspace, int64_t row_begin, int64_t row_end),
              (args, targets, workspace, row_begin, row_end))

#if defined(PYKD_ISA_BASELINE)
int64_t pykd::distillation_loss_targets_cpu(const DistillationLoss& args, int64_t& wrong) {
  int64_t count = 0;
  wrong = -1;
  for (int64_t row = 0; args.hard_weight > 0 && row < args.rows; ++row) {
    const int64_t target = args.target[row];
    if (target == args.ignore_index) continue;
    if ((target < 0 || target >= args.classes) && wrong < 0) wrong = row;
    ++count;
  }
  return count;
}

int64_t pykd::distillation_loss_workspace_bytes_cpu(const DistillationLoss& args) {
  const int64_t tiles = (args.classes + baseline::kTile - 1) / baseline::kTile;
  const int64_t bytes = args.student_dtype == DType::kFloat64 ? 8 : 4;
  return tiles > 1 ? tiles * (baseline::kArrays * baseline::kTile + baseline::kMaxima) * bytes : 0;
}
#endif
