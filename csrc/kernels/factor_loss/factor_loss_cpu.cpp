#include "core/cpu_isa.h"
#include "core/row_noise.h"
#include "kernels/factor_loss/factor_loss_math.h"

namespace pykd::PYKD_ISA {
namespace {

struct Whole {
  template <typename T>
  auto read(const T* from) const {
    return load_lanes(from);
  }
  template <typename T, typename V>
  void write(T* to, V v) const {
    store_lanes(to, v);
  }
};

struct First {  // what lies beyond reads as 0
  int64_t n;
  template <typename T>
  auto read(const T* from) const {
    return load_lanes(from, n);
  }
  template <typename T, typename V>
  void write(T* to, V v) const {
    store_lanes(to, v, n);
  }
};

constexpr int kSums = 4;  // side by side, so that no addition waits for the one before

// part(place, which of the sums, access) for the vectors of n values.
template <typename T, typename Part>
inline __attribute__((always_inline)) void for_vectors(int64_t n, const Part& part) {
  constexpr int64_t kStep = sizeof(decltype(load_lanes(static_cast<const T*>(nullptr)))) / sizeof(T);
  int64_t i = 0;
  for (; i + kSums * kStep <= n; i += kSums * kStep) {
    part(i, 0, Whole());
    part(i + kStep, 1, Whole());
    part(i + 2 * kStep, 2, Whole());
    part(i + 3 * kStep, 3, Whole());
  }
  for (; i + kStep <= n; i += kStep) part(i, 0, Whole());
  if (i < n) part(i, 1, First{n - i});
}

template <typename V>
inline double total(const V (&sums)[kSums]) {
  return static_cast<double>(reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

template <typename T>
double squares_of(const T* values, int64_t n) {
  using V = decltype(load_lanes(values));
  V sums[kSums] = {};
  for_vectors<T>(n, [&](int64_t i, int which, auto at) __attribute__((always_inline)) {
    const V v = at.read(values + i);
    sums[which] += v * v;
  });
  return total(sums);
}

struct Sums {
  double cost = 0, inner = 0;
};

template <int kP, bool kInner, typename T>
void add_sums(const T* student, const T* teacher, T ratio, int64_t n, Sums& to) {
  using V = decltype(load_lanes(student));
  V cost[kSums] = {}, inner[kSums] = {};
  for_vectors<T>(n, [&](int64_t i, int which, auto at) __attribute__((always_inline)) {
    const V x = at.read(student + i), e = x - at.read(teacher + i) * ratio;
    if constexpr (kP == 1)
      cost[which] += from_bits(magnitude_bits(e));
    else
      cost[which] += e * e;
    if constexpr (kInner) inner[which] += direction(kP, e) * x;
  });
  to.cost += total(cost);
  to.inner += total(inner);
}

template <typename T>
struct Line {  // a slope in the kernel's arithmetic
  T along, inward;
  explicit Line(const Slope& s) : along(static_cast<T>(s.along)), inward(static_cast<T>(s.inward)) {}
};

// The gradients that are not null.
template <int kP, bool kStudent, bool kTeacher, typename T>
void write_grads(const T* student, const T* teacher, T ratio, int64_t n, Line<T> of_student, T* grad_student,
                 Line<T> of_teacher, T* grad_teacher) {
  using V = decltype(load_lanes(student));
  for_vectors<T>(n, [&](int64_t i, int, auto at) __attribute__((always_inline)) {
    const V x = at.read(student + i), y = at.read(teacher + i), along = direction(kP, x - y * ratio);
    if constexpr (kStudent) at.write(grad_student + i, along * of_student.along - x * of_student.inward);
    if constexpr (kTeacher) at.write(grad_teacher + i, along * of_teacher.along - y * of_teacher.inward);
  });
}

// A factor's row, read a tile at a time: where it lies, or widened or scaled into a buffer.
template <typename T>
class Factor {
 public:
  Factor(const void* values_, DType dtype_) : values(values_), dtype(dtype_) {}

  Unit open(int64_t row_begin, int64_t n) {
    begin = row_begin;
    entries = n;
    scale = 1;
    double squares = sum_of_squares();
    if (is_in_range(static_cast<T>(squares))) return {1, squares};
    T largest = 0;
    for_tiles(entries, [&](int64_t at, int64_t count) {
      const T* x = tile(at, count);
      for (int64_t i = 0; i < count; ++i) largest = larger_magnitude(largest, x[i]);
    });
    scale = power_against(largest);
    return {static_cast<double>(scale), sum_of_squares()};
  }

  const T* tile(int64_t at, int64_t count) {
    const T* from = as_wide(values, dtype, begin + at, count, buffer);
    if (scale == 1) return from;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i] * scale;
    return buffer;
  }

  template <typename Function>
  static void for_tiles(int64_t entries, const Function& function) {
    for (int64_t at = 0; at < entries; at += kTile) function(at, smaller(kTile, entries - at));
  }

 private:
  double sum_of_squares() {
    double sum = 0;
    for_tiles(entries, [&](int64_t at, int64_t count) { sum += squares_of(tile(at, count), count); });
    return sum;
  }

  const void* const values;
  const DType dtype;
  int64_t begin = 0, entries = 0;
  T scale = 1;
  alignas(64) T buffer[kTile];
};

// A gradient's row, written a tile at a time: where it lies, or narrowed from a buffer.
template <typename T>
class Gradient {
 public:
  Gradient(void* values_, DType dtype_) : values(values_), dtype(dtype_) {}

  T* tile(int64_t at) { return !values || is_half(dtype) ? buffer : static_cast<T*>(values) + at; }
  void done(int64_t at, int64_t count) {
    if constexpr (sizeof(T) == sizeof(float))
      if (values && is_half(dtype)) narrow(buffer, dtype, static_cast<uint16_t*>(values) + at, count);
  }

 private:
  void* const values;
  const DType dtype;
  alignas(64) T buffer[kTile];
};

template <int kP, typename T>
auto choose_grads(const FactorLoss& a) {
  return !a.grad_teacher   ? write_grads<kP, true, false, T>
         : !a.grad_student ? write_grads<kP, false, true, T>
                           : write_grads<kP, true, true, T>;
}

template <int kP, typename T>
void run_rows(const FactorLoss& a, int64_t row_begin, int64_t row_end) {
  const bool wants_grads = a.grad_student || a.grad_teacher;
  const auto add = wants_grads ? add_sums<kP, true, T> : add_sums<kP, false, T>;
  const auto write = choose_grads<kP, T>(a);
  const double grad_loss = a.grad_loss ? static_cast<double>(*static_cast<const T*>(a.grad_loss)) : 1;
  Factor<T> student(a.student, a.student_dtype), teacher(a.teacher, a.teacher_dtype);
  Gradient<T> grad_student(a.grad_student, a.student_dtype), grad_teacher(a.grad_teacher, a.teacher_dtype);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t begin = row * a.entries;
    const Units units{student.open(begin, a.entries), teacher.open(begin, a.entries)};
    const T ratio = static_cast<T>(units.ratio());
    Sums sums;
    Factor<T>::for_tiles(a.entries,
                         [&](int64_t at, int64_t n) { add(student.tile(at, n), teacher.tile(at, n), ratio, n, sums); });
    if (a.row_loss) static_cast<T*>(a.row_loss)[row] = static_cast<T>(units.loss(a, sums.cost));
    if (!wants_grads) continue;
    Slope of_student, of_teacher;
    units.slopes(a, grad_loss, sums.cost, sums.inner, of_student, of_teacher);
    Factor<T>::for_tiles(a.entries, [&](int64_t at, int64_t n) {
      write(student.tile(at, n), teacher.tile(at, n), ratio, n, Line<T>(of_student), grad_student.tile(begin + at),
            Line<T>(of_teacher), grad_teacher.tile(begin + at));
      grad_student.done(begin + at, n);
      grad_teacher.done(begin + at, n);
    });
  }
}

}  // namespace

void factor_loss_cpu(const FactorLoss& args, int64_t row_begin, int64_t row_end) {
  if (args.student_dtype == DType::kFloat64)
    (args.p == 1 ? run_rows<1, double> : run_rows<2, double>)(args, row_begin, row_end);
  else
    (args.p == 1 ? run_rows<1, float> : run_rows<2, float>)(args, row_begin, row_end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(factor_loss_cpu, (const FactorLoss& args, int64_t row_begin, int64_t row_end), (args, row_begin, row_end))
