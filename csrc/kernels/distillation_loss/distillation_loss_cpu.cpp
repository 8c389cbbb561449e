#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/distillation_loss/distillation_loss.h"
#include "kernels/distillation_loss/distillation_loss_math.h"

// The floor of a logit, in AVX2 instructions for eight of them: two exponentials of 12 (a third where hard targets meet
// a temperature), 11 for the sums and 7 for the gradient, beside the loads and stores of three short passes over L1 and
// the noise of core/row_noise.h. Rows go through each pass together, as many as fill a tile, so that one row's chain of
// maximum, exponentials, sums and logarithm does not hold up the next.

namespace pykd::PYKD_ISA {
namespace {

constexpr double kLog2 = 0.69314718055994530942;

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

// Copies logits, with targets made of the teacher's, fills their last vector with -inf, and finds the maxima.
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
    sums[i].student_max = reduce_max(student_max);
    sums[i].teacher_max = reduce_max(teacher_max);
  }
}

// Logits to exponentials, and their sums; a and b in powers of two. What the lanes hold is added up afterwards, for all
// rows together.
template <bool kReverse, typename T>
void exp_rows(const Shape& shape, const Scratch<T>& scratch, T inverse_temperature, RowSums<T>* sums) {
  using V = Vector<T>;
  const V slope = V{} + inverse_temperature * static_cast<T>(1 / kLog2);
  V lanes[kRows][3];
  for (int64_t i = 0; i < shape.rows; ++i) {
    const V student_max = V{} + sums->base(sums[i].student_max), teacher_max = V{} + sums->base(sums[i].teacher_max);
    T *const s = scratch.student + i * shape.stride, *const t = scratch.teacher + i * shape.stride;
    V sum_b{}, sum_a{}, divergence{};
    for (int64_t c = 0; c < shape.stride; c += kStep<T>) {
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
double sum_row(const T* student, int64_t n, T max) {
  using V = Vector<T>;
  V sum{};
  T rest = 0;
  int64_t c = 0;
  for (; c + kStep<T> <= n; c += kStep<T>) sum += load_lanes(student + c) - max;
  for (; c < n; ++c) rest += student[c] - max;
  return static_cast<double>(reduce_sum(sum) + rest);
}

// A row's gradient: student * exp_b - teacher * exp_a             (reverse: student * exp_b * ((b - a) + offset))
//                   + hard * exp(logit) - smoothing,  and - at_target at the target
template <typename T>
struct Slopes {
  T student = 0, teacher = 0, offset = 0, hard = 0, smoothing = 0, at_target = 0;
};

template <bool kReverse, bool kHard, bool kAccumulate, typename T>
void grad_row(const Scratch<T>& s, int64_t n, const Slopes<T>& slopes, T* grad) {
  using V = Vector<T>;
  const auto gradient = [&](int64_t c) __attribute__((always_inline)) {
    const V exp_b = load_lanes(s.student + c), other = load_lanes(s.teacher + c);
    V g;
    if constexpr (kReverse)
      g = reverse_gradient(exp_b, slopes.student, other + slopes.offset);
    else
      g = exp_b * slopes.student - other * slopes.teacher;
    if constexpr (kHard) g += load_lanes(s.hard + c) * slopes.hard - slopes.smoothing;
    return g;
  };
  int64_t c = 0;
  for (; c + kStep<T> <= n; c += kStep<T>) {
    V g = gradient(c);
    if constexpr (kAccumulate) g += load_lanes(grad + c);
    store_lanes(grad + c, g);
  }
  if (c < n) {
    V g = gradient(c);
    if constexpr (kAccumulate) g += load_lanes(grad + c, n - c);
    store_lanes(grad + c, g, n - c);
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
        inverse_temperature(static_cast<T>(1 / a.temperature)),
        soft_scale((1 - a.hard_weight) * a.temperature * a.temperature /
                   (a.batchmean ? static_cast<double>(a.rows) : 1)),
        hard_scale(!a.batchmean  ? a.hard_weight
                   : targets > 0 ? a.hard_weight / static_cast<double>(targets)
                                 : 0),
        soft_slope(soft_scale / a.temperature * (a.reverse ? kLog2 : 1)),
        scratch{student, teacher, hard},
        load_noisy(a.noise.additive ? load_rows<Target::kAdditive, T> : load_rows<Target::kMultiplicative, T>),
        exp(a.reverse ? exp_rows<true, T> : exp_rows<false, T>),
        grad{choose_grad(false), choose_grad(true)} {
    if (tiles > 1) {
      T* const w = static_cast<T*>(workspace);
      scratch = {w, w + tiles * kTile, w + 2 * tiles * kTile};
      student_max = w + kArrays * tiles * kTile;
      teacher_max = student_max + tiles;
    }
    if (a.temperature == 1 || !soft) scratch.hard = scratch.student;
    if (!soft) scratch.teacher = scratch.student;
  }

  void run(int64_t row_begin, int64_t row_end) {
    const int64_t most = smaller(noise.most_rows(), kTile / stride);
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
    for (int i = 0; i < count; ++i) {
      const int64_t row = first + places[i];
      target[i] = a.hard_weight > 0 && a.target[row] != a.ignore_index ? a.target[row] : -1;
      logit_sum[i] = 0;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) sum_tile(tile, noisy);
    for (int i = 0; i < count; ++i) finish(i);
    if (!a.grad_student) return;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int i = 0; i < count; ++i) write_grad(tile, i);
  }

  int64_t size_of_tile(int64_t tile) const { return smaller(kTile, a.classes - tile * kTile); }
  int64_t place(int64_t tile, int i) const { return (first + places[i]) * a.classes + tile * kTile; }
  Scratch<T> scratch_of(int64_t tile, int i) const {
    const int64_t at = tile * kTile + i * stride;
    return {scratch.student + at, scratch.teacher + at, scratch.hard + at};
  }

  void sum_tile(int64_t tile, bool noisy) {
    const int64_t n = size_of_tile(tile);
    const Shape shape{count, n, (n + kStep<T> - 1) / kStep<T> * kStep<T>};
    const Scratch<T> to = scratch_of(tile, 0);
    const T *students[kRows], *teachers[kRows];
    for (int i = 0; i < count; ++i) {
      students[i] = as_wide(a.student, a.student_dtype, place(tile, i), n, to.student + i * stride);
      teachers[i] = students[i];
      if (soft) teachers[i] = as_wide(a.teacher, a.teacher_dtype, place(tile, i), n, to.teacher + i * stride);
    }
    RowSums<T>* const part = tile == 0 ? sums : &more;
    if (noisy) {
      const void* const out = a.grad_student ? a.grad_student : a.student;
      const Near near(place(tile, 0), n,
                      {{a.student, a.student_dtype}, {a.teacher, a.teacher_dtype}, {out, a.student_dtype}});
      const T* const values = noise.draw(places, count, tile * kTile, near);
      load_noisy(shape, students, teachers, values, noise.stride(), to, part);
    } else {
      load_rows<Target::kClean>(shape, students, teachers, students[0], 0, to, part);
    }
    if (a.label_smoothing > 0 && a.hard_weight > 0)
      for (int i = 0; i < count; ++i) {
        const T max = part->base(part[i].student_max);
        logit_sum[i] += sum_row(to.student + i * stride, n, max) + static_cast<double>(max) * static_cast<double>(n);
      }
    if (!soft || (a.hard_weight > 0 && scratch.hard != scratch.student)) hard_rows(shape, to, part);
    if (soft) exp(shape, to, inverse_temperature, part);
    if (soft && scratch.hard == scratch.student)
      for (int i = 0; i < count; ++i) part[i].hard = part[i].exp_b;
    if (tiles == 1) return;
    student_max[tile] = part->student_max;
    teacher_max[tile] = part->teacher_max;
    if (tile > 0)
      a.reverse ? sums->template add<true>(more, inverse_temperature)
                : sums->template add<false>(more, inverse_temperature);
  }

  // The row's loss, and the slopes of its gradient.
  void finish(int i) {
    const int64_t row = first + places[i];
    const RowSums<T>& sum = sums[i];
    const double log_ratio = !soft ? 0 : a.reverse ? sum.template log_ratio<true>() : sum.template log_ratio<false>();
    const double kl = !soft ? 0 : a.reverse ? sum.template kl<true>(log_ratio) : sum.template kl<false>(log_ratio);
    if (a.row_loss) {
      double loss = soft_scale * kl;
      if (target[i] >= 0) {
        T wide;
        const T at_target = *as_wide(a.student, a.student_dtype, row * a.classes + target[i], 1, &wide);
        loss += hard_scale * (1 - a.label_smoothing) * sum.nll(static_cast<double>(at_target));
        if (a.label_smoothing > 0)
          loss += hard_scale * a.label_smoothing * sum.nll(logit_sum[i] / static_cast<double>(a.classes));
      }
      static_cast<T*>(a.row_loss)[row] = static_cast<T>(loss);
    }
    double scale = 1;
    if (a.grad_loss) scale = static_cast<double>(static_cast<const T*>(a.grad_loss)[row * a.grad_loss_stride]);
    slopes[i] = {};
    if (soft) {
      const T slope = static_cast<T>(scale * soft_slope);
      slopes[i].student = slope / sum.exp_b;
      slopes[i].teacher = slope / sum.exp_a;
      slopes[i].offset = static_cast<T>((log_ratio - kl) * (1 / kLog2));
    }
    if (target[i] >= 0) {
      const double slope = scale * hard_scale;
      slopes[i].hard = static_cast<T>(slope) / sum.hard;
      slopes[i].smoothing = static_cast<T>(slope * a.label_smoothing / static_cast<double>(a.classes));
      slopes[i].at_target = static_cast<T>(slope * (1 - a.label_smoothing));
    }
  }

  void write_grad(int64_t tile, int i) {
    const int64_t n = size_of_tile(tile), at = place(tile, i);
    Slopes<T> here = slopes[i];
    if (tiles > 1) {
      const T of_b = sums->base(student_max[tile]) - sums->base(sums->student_max);
      const T of_a = sums->base(teacher_max[tile]) - sums->base(sums->teacher_max);
      here.student *= exponential(of_b * inverse_temperature);
      here.teacher *= exponential(of_a * inverse_temperature);
      here.offset += (of_b - of_a) * inverse_temperature * static_cast<T>(1 / kLog2);
      here.hard *= exponential(of_b);
    }
    const bool narrowed = is_half(a.student_dtype);
    T* const to = narrowed ? widened : static_cast<T*>(a.grad_student) + at;
    if (narrowed && a.accumulate) as_wide(a.grad_student, a.student_dtype, at, n, widened);
    grad[target[i] >= 0](scratch_of(tile, i), n, here, to);
    const int64_t hit = target[i] - tile * kTile;
    if (target[i] >= 0 && hit >= 0 && hit < n) to[hit] -= here.at_target;
    if constexpr (sizeof(T) == sizeof(float))
      if (narrowed) narrow(widened, a.student_dtype, static_cast<uint16_t*>(a.grad_student) + at, n);
  }

  using GradRow = void (*)(const Scratch<T>&, int64_t, const Slopes<T>&, T*);
  GradRow choose_grad(bool is_hard) const {
    static constexpr GradRow kChoices[2][2][2] = {{{grad_row<false, false, false, T>, grad_row<false, false, true, T>},
                                                   {grad_row<false, true, false, T>, grad_row<false, true, true, T>}},
                                                  {{grad_row<true, false, false, T>, grad_row<true, false, true, T>},
                                                   {grad_row<true, true, false, T>, grad_row<true, true, true, T>}}};
    return kChoices[a.reverse && soft][is_hard][a.accumulate];
  }

  const DistillationLoss& a;
  RowNoise<T> noise;
  const int64_t tiles;   // of a row
  const int64_t stride;  // of rows in one tile
  const bool soft;       // whether the teacher counts
  const T inverse_temperature;
  const double soft_scale, hard_scale;  // of a row's KL and cross-entropy
  const double soft_slope;              // of the KL's gradient
  Scratch<T> scratch;
  T *student_max = nullptr, *teacher_max = nullptr;  // of each tile, where there are several
  decltype(&load_rows<Target::kAdditive, T>) const load_noisy;
  decltype(&exp_rows<false, T>) const exp;
  const GradRow grad[2];

  // The rows at hand: `places` in the group from `first` on, their targets (-1: none), sums and slopes.
  int64_t first = 0;
  int places[kRows], count = 0;
  int64_t target[kRows];
  double logit_sum[kRows];
  RowSums<T> sums[kRows], more;
  Slopes<T> slopes[kRows];
  alignas(64) T student[kTile], teacher[kTile], hard[kTile], widened[kTile];
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
