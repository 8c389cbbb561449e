#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/logit_regression/logit_regression.h"
#include "kernels/logit_regression/logit_regression_math.h"

namespace pykd::PYKD_ISA {
namespace {

// Sum of squared differences of n <= kTile logits; with a gradient, grad = or += scale * difference.
template <Target kTarget, bool kGrad, bool kAccumulate, typename T>
inline double run_row(const T* student, const T* teacher, const T* noise, T* grad, T scale, int64_t n) {
  using V = decltype(load_lanes(student));
  constexpr int64_t kStep = sizeof(V) / sizeof(T);
  V sum[2] = {};
  const auto part = [&](int64_t c, V& s, const auto& read, const auto& write) __attribute__((always_inline)) {
    // Doubles stay scalars: where there is no gradient the compiler would take vectors, and round the sum otherwise.
    if constexpr (kStep == 1) asm volatile("");
    V eps{};
    if constexpr (kTarget != Target::kClean) eps = read(noise + c);
    const V difference = logit_difference<kTarget>(read(student + c), read(teacher + c), eps);
    s += difference * difference;
    if constexpr (kGrad) {
      V g = difference * scale;
      if constexpr (kAccumulate) g += read(grad + c);
      write(grad + c, g);
    }
  };
  const auto read = [](const T* from) __attribute__((always_inline)) { return load_lanes(from); };
  const auto write = [](T* to, V v) __attribute__((always_inline)) { store_lanes(to, v); };
  int64_t c = 0;
  for (; c + 2 * kStep <= n; c += 2 * kStep) {
    part(c, sum[0], read, write);
    part(c + kStep, sum[1], read, write);
  }
  if (c + kStep <= n) {
    part(c, sum[0], read, write);
    c += kStep;
  }
  if (c < n)
    part(
        c, sum[1], [n, c](const T* from) __attribute__((always_inline)) { return load_lanes(from, n - c); },
        [n, c](T* to, V v) __attribute__((always_inline)) { store_lanes(to, v, n - c); });
  return static_cast<double>(reduce_sum(sum[0] + sum[1]));
}

// Some rows of a group of up to kRows, and a tile of their classes.
template <typename T>
struct Part {
  int rows[kRows];  // their place in the group
  int count = 0;
  int64_t first;        // the group's first row
  int64_t class_begin;  // of n <= kTile classes
  int64_t n;
  const T* noise;  // of the rows, noise_stride apart; not read for clean targets
  int64_t noise_stride;
  double* sum;  // of squared differences, by place in the group
};

// Half logits pass through these, one row at a time.
template <typename T>
struct Widened {
  alignas(64) T student[kTile], teacher[kTile], grad[kTile];
};

template <Target kTarget, bool kGrad, bool kAccumulate, typename T>
void run_part(const LogitRegression& a, const Part<T>& part, Widened<T>& widened) {
  const int64_t n = part.n;
  for (int i = 0; i < part.count; ++i) {
    const int64_t row = part.first + part.rows[i], at = row * a.classes + part.class_begin;
    T scale = static_cast<T>(a.grad_scale);
    if (kGrad && a.grad_loss) scale *= static_cast<const T*>(a.grad_loss)[row * a.grad_loss_stride];
    const T* student = as_wide(a.student, a.student_dtype, at, n, widened.student);
    const T* teacher = as_wide(a.teacher, a.teacher_dtype, at, n, widened.teacher);
    const bool narrowed = kGrad && is_half(a.student_dtype);
    T* grad = kGrad && !narrowed ? static_cast<T*>(a.grad_student) + at : widened.grad;
    if (narrowed && kAccumulate) as_wide(a.grad_student, a.student_dtype, at, n, widened.grad);
    part.sum[part.rows[i]] +=
        run_row<kTarget, kGrad, kAccumulate>(student, teacher, part.noise + i * part.noise_stride, grad, scale, n);
    if constexpr (sizeof(T) == sizeof(float))
      if (narrowed) narrow(grad, a.student_dtype, static_cast<uint16_t*>(a.grad_student) + at, n);
  }
}

template <typename T>
using RunPart = void (*)(const LogitRegression&, const Part<T>&, Widened<T>&);

template <Target kTarget, typename T>
RunPart<T> choose_outputs(const LogitRegression& a) {
  if (!a.grad_student) return run_part<kTarget, false, false, T>;
  return a.accumulate ? run_part<kTarget, true, true, T> : run_part<kTarget, true, false, T>;
}

// One call's rows: the scratch, and what is the same for all of them.
template <typename T>
class Rows {
 public:
  explicit Rows(const LogitRegression& args)
      : a(args),
        clean(choose_outputs<Target::kClean, T>(a)),
        noisy(a.noise.additive ? choose_outputs<Target::kAdditive, T>(a)
                               : choose_outputs<Target::kMultiplicative, T>(a)),
        noise(a.noise, a.classes),
        tile(smaller(kTile, a.classes)) {
    part.sum = sum;
  }

  void run(int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      part.first = row;
      const int64_t count = smaller(kRows, row_end - row);
      for (int64_t i = 0; i < count; ++i) sum[i] = 0;
      uint64_t selected = noise.select(row, count);
      uint64_t others = ~selected & (~uint64_t{0} >> (kRows - count));
      part.noise_stride = 0;
      part.noise = nullptr;
      while (others) {
        others = take(others, tile < a.classes ? 1 : kRows, part.rows, part.count);  // memory is read row after row
        for_tiles([&] { clean(a, part, widened); });
      }
      part.noise_stride = noise.stride();
      while (selected) {
        selected = take(selected, noise.most_rows(), part.rows, part.count);
        for_tiles([&] {
          const int64_t at = (row + part.rows[0]) * a.classes + part.class_begin;
          const Near near(at, part.n,
                          {{a.student, a.student_dtype},
                           {a.teacher, a.teacher_dtype},
                           {a.grad_student ? a.grad_student : a.student, a.student_dtype}});
          part.noise = noise.draw(part.rows, part.count, part.class_begin, near);
          noisy(a, part, widened);
        });
      }
      if (a.row_loss)
        for (int64_t i = 0; i < count; ++i) static_cast<T*>(a.row_loss)[row + i] = static_cast<T>(sum[i] / 2);
    }
  }

 private:
  template <typename Function>
  void for_tiles(const Function& function) {
    for (part.class_begin = 0; part.class_begin < a.classes; part.class_begin += tile) {
      part.n = smaller(tile, a.classes - part.class_begin);
      function();
    }
  }

  const LogitRegression& a;
  const RunPart<T> clean, noisy;
  RowNoise<T> noise;
  const int64_t tile;  // classes at a time
  Part<T> part;
  double sum[kRows];
  Widened<T> widened;
};

}  // namespace

void logit_regression_cpu(const LogitRegression& args, int64_t row_begin, int64_t row_end) {
  if (args.student_dtype == DType::kFloat64)
    Rows<double>(args).run(row_begin, row_end);
  else
    Rows<float>(args).run(row_begin, row_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(logit_regression_cpu, (const LogitRegression& args, int64_t row_begin, int64_t row_end),
              (args, row_begin, row_end))
