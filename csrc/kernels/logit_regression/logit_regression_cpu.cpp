#include "core/cpu_isa.h"
#include "core/half.h"
#include "core/philox.h"
#include "core/simd.h"
#include "kernels/logit_regression/logit_regression.h"
#include "kernels/logit_regression/logit_regression_math.h"

namespace pykd::PYKD_ISA {
namespace {

constexpr int64_t kTile = 1024;  // logits whose noise is held at a time: 4 KB, so that it stays in L1 beside the rows
constexpr int64_t kOctets = kTile / 8;
constexpr int kRows = 64;  // rows whose selection is drawn together: the bits of one mask
constexpr int kSlots = kLanes / 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// float runs in vectors, double (gradient checks, references) in scalars.
inline Floats load_lanes(const float* from) { return load<Floats>(from); }
inline double load_lanes(const double* from) { return *from; }
inline void store_lanes(float* to, Floats v) { store(to, v); }
inline void store_lanes(double* to, double v) { *to = v; }
inline Floats load_lanes(const float* from, int64_t n) { return load_first(from, n); }
inline double load_lanes(const double*, int64_t) { return 0; }
inline void store_lanes(float* to, Floats v, int64_t n) { store_first(to, v, n); }
inline void store_lanes(double*, double, int64_t) {}
inline double sum_lanes(double v) { return v; }
inline double sum_lanes(Floats v) {
  float halves[kLanes];
  store(halves, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
  return halves[0];
}

// ---- noise ----------------------------------------------------------------------------------------------------------

// Counters of the octets of some rows, row after row, with room for what two vectors of them read and write too much.
struct Counters {
  alignas(64) uint64_t index[kOctets + 2 * kSlots];
  alignas(64) uint64_t row[kOctets + 2 * kSlots];
};

// out[8 * j + i] is weight times the i-th normal value of counter j < count; out has the same room to spare.
// Three loops: in one, the long chain of a vector (rounds, logarithm, root) would leave the processor waiting. Each
// brings one of the arrays near that the noise is for, a line at a time: near(array, value) for every 16th value.
template <typename Near>
inline void draw_normals(const Counters& counters, int64_t count, uint32_t teacher, uint64_t seed, float weight,
                         const Near& near, float* out) {
  alignas(64) uint32_t words[kTile / 2 + 8 * kSlots];
  alignas(64) float squared[kTile / 2 + 8 * kSlots];
  for (int64_t j = 0; j < count; j += 2 * kSlots) {
    for (int64_t value = 8 * j; value < 8 * (j + 2 * kSlots); value += 16) near(0, value);
    Philox<Slots> x[2];
    for (int i = 0; i < 2; ++i) {
      const Slots row = load<Slots>(counters.row + j + i * kSlots);
      x[i] = {{load<Slots>(counters.index + j + i * kSlots), Slots{} + teacher, row, row >> 32}};
    }
    philox(x, seed);
    for (int i = 0; i < 2; ++i) {
      const Slots(&word)[4] = x[i].word;
      store(words + 4 * (j + i * kSlots), (word[0] & 0xFFFFFFFFu) | (word[1] << 32));
      store(words + 4 * (j + i * kSlots) + kLanes, (word[2] & 0xFFFFFFFFu) | (word[3] << 32));
    }
  }
  const int64_t drawn = (count + 2 * kSlots - 1) / (2 * kSlots) * (8 * kSlots);  // words, whole vectors
  for (int64_t j = 0; j < drawn; j += 2 * kLanes) {
    for (int64_t value = 2 * j; value < 2 * j + 4 * kLanes; value += 16) near(1, value);
    for (int i = 0; i < 2; ++i) store(squared + j + i * kLanes, squared_radius(load<Words>(words + j + i * kLanes)));
  }
  for (int64_t j = 0; j < drawn; j += 2 * kLanes) {
    for (int64_t value = 2 * j; value < 2 * j + 4 * kLanes; value += 16) near(2, value);
    Floats cosine[2], sine[2];
    for (int i = 0; i < 2; ++i)
      rotate(load<Words>(words + j + i * kLanes), load<Floats>(squared + j + i * kLanes), weight, cosine[i], sine[i]);
    store_pairs(out + 2 * j, cosine[0], sine[0], cosine[1], sine[1]);
  }
}

template <typename Near>
inline void draw_normals(const Counters& counters, int64_t count, uint32_t teacher, uint64_t seed, double weight,
                         const Near&, double* out) {
  for (int64_t j = 0; j < count; ++j) {
    const uint64_t row = counters.row[j];
    Philox<uint64_t> x[1] = {{{counters.index[j], teacher, row, row >> 32}}};
    philox(x, seed);
    for (int i = 0; i < 4; ++i)
      normal_pair(static_cast<uint32_t>(x[0].word[i]), weight, out[8 * j + 2 * i], out[8 * j + 2 * i + 1]);
  }
}

// Row draws of kRows rows from global row `row` on: those selected as bits, and the words of their own normal values.
inline uint64_t draw_rows(const Noise& noise, uint64_t seed, uint64_t row, uint32_t teacher, uint64_t (&words)[kRows]) {
  Slots rows{}, bits{}, selected{};
  for (int i = 0; i < kSlots; ++i) {
    rows[i] = row + static_cast<uint64_t>(i);
    bits[i] = uint64_t{1} << i;
  }
  for (int begin = 0; begin < kRows; begin += 2 * kSlots) {
    Philox<Slots> x[2];
    for (int i = 0; i < 2; ++i) {
      x[i] = {{Slots{}, Slots{} + (teacher | kRowDraw), rows, rows >> 32}};
      rows += static_cast<uint64_t>(kSlots);
    }
    philox(x, seed);
    for (int i = 0; i < 2; ++i) {
      selected |= (Slots)((x[i].word[0] & 0xFFFFFFFFu) < noise.threshold) & (bits << (begin + i * kSlots));
      store(words + begin + i * kSlots, x[i].word[1]);
    }
  }
  uint64_t all = 0;
  for (int i = 0; i < kSlots; ++i) all |= selected[i];
  return all;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Sum of squared differences of n <= kTile logits; with a gradient, grad = or += scale * difference.
template <Target kTarget, bool kGrad, bool kAccumulate, typename T>
inline double run_row(const T* student, const T* teacher, const T* noise, T* grad, T scale, int64_t n) {
  using V = decltype(load_lanes(student));
  constexpr int64_t kStep = sizeof(V) / sizeof(T);
  V sum[2] = {};
  const auto part = [&](int64_t c, V& s, const auto& read, const auto& write) __attribute__((always_inline)) {
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
  return sum_lanes(sum[0] + sum[1]);
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

inline bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

template <typename T>
const T* as_wide(const void* logits, DType dtype, int64_t at, int64_t n, T* buffer) {
  if (!is_half(dtype)) return static_cast<const T*>(logits) + at;
  if constexpr (sizeof(T) == sizeof(float)) widen(static_cast<const uint16_t*>(logits) + at, dtype, buffer, n);
  return buffer;
}

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
        teachers(a.noise.sigma > 0 && a.noise.threshold > 0 ? static_cast<uint32_t>(a.noise.n_teachers) : 0),
        seed(teachers ? static_cast<uint64_t>(*a.noise.seed) : 0),
        weight(static_cast<T>(teachers ? a.noise.sigma / static_cast<double>(a.noise.n_teachers) : 0)),
        tile(smaller(kTile, a.classes)),
        octets((tile + 7) / 8) {
    part.sum = sum;
  }

  void run(int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      part.first = row;
      const int64_t count = smaller(kRows, row_end - row);
      for (int64_t i = 0; i < count; ++i) sum[i] = 0;
      uint64_t selected = select(count);
      uint64_t others = ~selected & (~uint64_t{0} >> (kRows - count));
      part.noise = noise;
      part.noise_stride = 0;
      while (others) {
        others = take(others, tile < a.classes ? 1 : kRows);  // memory is read row after row
        for_tiles([&] { clean(a, part, widened); });
      }
      while (selected) selected = a.noise.per_sample ? run_sample(selected) : run_logits(selected);
      if (a.row_loss)
        for (int64_t i = 0; i < count; ++i) static_cast<T*>(a.row_loss)[row + i] = static_cast<T>(sum[i] / 2);
    }
  }

 private:
  // The lowest of the selected rows, `most` at the most; returns the others.
  uint64_t take(uint64_t selected, int64_t most) {
    for (part.count = 0; selected && part.count < most; selected &= selected - 1)
      part.rows[part.count++] = __builtin_ctzll(selected);
    return selected;
  }

  template <typename Function>
  void for_tiles(const Function& function) {
    for (part.class_begin = 0; part.class_begin < a.classes; part.class_begin += tile) {
      part.n = smaller(tile, a.classes - part.class_begin);
      function();
    }
  }

  uint64_t global(int64_t i) const { return static_cast<uint64_t>(a.noise.row_offset + part.first + i); }

  // Rows that any teacher perturbs; with one value a sample, their noise too.
  uint64_t select(int64_t count) {
    uint64_t any = 0;
    if (teachers && a.noise.per_sample)
      for (int64_t i = 0; i < count; ++i) row_noise[i] = 0;
    for (uint32_t k = 0; k < teachers; ++k) {
      const uint64_t selected = draw_rows(a.noise, seed, global(0), k, words) & (~uint64_t{0} >> (kRows - count));
      any |= selected;
      if (!a.noise.per_sample) continue;
      for (uint64_t rows = selected; rows; rows &= rows - 1) {
        const int i = __builtin_ctzll(rows);
        T cosine, sine;
        normal_pair(static_cast<uint32_t>(words[i]), weight, cosine, sine);
        row_noise[i] += cosine;
      }
    }
    return any;
  }

  // The lowest selected row; returns the others.
  uint64_t run_sample(uint64_t selected) {
    const uint64_t others = take(selected, 1);
    for (int64_t j = 0; j < tile; ++j) noise[j] = row_noise[part.rows[0]];
    for_tiles([&] { noisy(a, part, widened); });
    return others;
  }

  // As many of the lowest selected rows as fit one tile; returns the others.
  uint64_t run_logits(uint64_t selected) {
    const uint64_t others = take(selected, kOctets / octets);
    part.noise_stride = octets * 8;
    for_tiles([&] {
      if (teachers == 1) {
        draw(0, part.rows, part.count, noise);
      } else {
        for (int64_t j = 0; j < part.count * part.noise_stride; ++j) noise[j] = 0;
        for (uint32_t k = 0; k < teachers; ++k) add_teacher(k);
      }
      noisy(a, part, widened);
    });
    return others;
  }

  void draw(uint32_t teacher, const int* rows, int count, T* out) {
    for (int i = 0; i < count; ++i)
      for (int64_t q = 0; q < octets; ++q) {
        counters.index[i * octets + q] = static_cast<uint64_t>(part.class_begin / 8 + q);
        counters.row[i * octets + q] = global(rows[i]);
      }
    const auto draw = [&](const auto& near) {
      draw_normals(counters, count * octets, teacher, seed, weight, near, out);
    };
    if (count != 1) return draw([](int, int64_t) {});
    // A large row comes from memory: its logits are fetched while its noise is drawn.
    const int64_t at = (part.first + rows[0]) * a.classes + part.class_begin;
    const void* const arrays[3] = {a.student, a.teacher, a.grad_student ? a.grad_student : a.student};
    const DType dtypes[3] = {a.student_dtype, a.teacher_dtype, a.student_dtype};
    draw([&](int array, int64_t value) __attribute__((always_inline)) {
      const int64_t bytes = is_half(dtypes[array]) ? 2 : sizeof(T);
      if (value < part.n) __builtin_prefetch(static_cast<const char*>(arrays[array]) + (at + value) * bytes);
    });
  }

  void add_teacher(uint32_t teacher) {
    int rows[kRows], places[kRows], count = 0;
    for (int i = 0; i < part.count; ++i)
      if (row_draw(seed, global(part.rows[i]), teacher, a.noise.threshold).selected) {
        rows[count] = part.rows[i];
        places[count++] = i;
      }
    draw(teacher, rows, count, drawn);
    for (int i = 0; i < count; ++i)
      for (int64_t j = 0; j < part.noise_stride; ++j)
        noise[places[i] * part.noise_stride + j] += drawn[i * part.noise_stride + j];
  }

  const LogitRegression& a;
  const RunPart<T> clean, noisy;
  const uint32_t teachers;  // 0: no noise
  const uint64_t seed;
  const T weight;
  const int64_t tile, octets;  // classes at a time, and their counters
  Part<T> part;
  double sum[kRows];
  uint64_t words[kRows];
  T row_noise[kRows];
  Counters counters;
  alignas(64) T noise[kTile + 16 * kSlots], drawn[kTile + 16 * kSlots];
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

#if defined(PYKD_ISA_BASELINE)
void pykd::logit_regression_total_cpu(const LogitRegression& args) {
  double sum = 0;
  for (int64_t r = 0; r < args.rows; ++r)
    sum += args.student_dtype == DType::kFloat64 ? static_cast<const double*>(args.row_loss)[r]
                                                 : static_cast<const float*>(args.row_loss)[r];
  sum *= args.loss_scale;
  if (args.student_dtype == DType::kFloat64)
    *static_cast<double*>(args.loss) = sum;
  else
    *static_cast<float*>(args.loss) = static_cast<float>(sum);
}
#endif
