// logit_regression without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under
// emulation, against the definition in scalar double; ragged sizes, every buffer between sentinels.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#define PYKD_ISA test  // this file's own copy of core/philox.h, in vectors of four
#include "core/kernel_test.h"
#include "core/philox.h"
#include "core/total.h"
#include "kernels/logit_regression/logit_regression.h"

PYKD_DECLARE_LEVELS(logit_regression_cpu, (const LogitRegression& args, int64_t row_begin, int64_t row_end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::LogitRegression;

// ---- one problem ---------------------------------------------------------------------------------------------------

enum class GradLoss { kNull, kOne, kRows };

struct Case {
  int64_t rows = 3, classes = 10;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  bool per_sample = false, additive = false;
  int64_t n_teachers = 1;
  double sigma = 0.5, alpha = 0.5;
  int64_t row_offset = 0;
  bool wants_row_loss = true, wants_loss = true, wants_grad = true;
  bool accumulate = false, in_place = false;
  GradLoss grad_loss = GradLoss::kNull;
  bool batchmean = true;
  int64_t offset = 0;  // elements from a well aligned address to the logits'

  std::string name() const {
    return described({{"rows", rows},
                      {"classes", classes},
                      {"student", static_cast<int>(student)},
                      {"teacher", static_cast<int>(teacher)},
                      {"per_sample", per_sample},
                      {"additive", additive},
                      {"n_teachers", n_teachers},
                      {"sigma", sigma},
                      {"alpha", alpha},
                      {"row_offset", row_offset},
                      {"row_loss", wants_row_loss},
                      {"loss", wants_loss},
                      {"grad", wants_grad},
                      {"accumulate", accumulate},
                      {"in_place", in_place},
                      {"grad_loss", static_cast<int>(grad_loss)},
                      {"batchmean", batchmean},
                      {"offset", offset}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const LogitRegression& args);
};

void add_up(const LogitRegression& args) {
  if (args.loss)
    pykd::total_cpu(args.row_loss, loss_dtype_of(args.student_dtype), args.rows, args.loss_scale, args.loss);
}

template <void (*kCpu)(const LogitRegression&, int64_t, int64_t)>
void run_cpu(const LogitRegression& args) {
  kCpu(args, 0, args.rows);
  add_up(args);
}

void run_rows_apart(const LogitRegression& args) {
  for (int64_t begin = 0; begin < args.rows;) {
    const int64_t end = std::min(args.rows, begin + 1 + begin % 7);
    pykd::logit_regression_cpu(args, begin, end);
    begin = end;
  }
  add_up(args);
}

void run_cuda(const LogitRegression& args) {
  const int64_t bytes = pykd::logit_regression_workspace_bytes(args);
  Buffer workspace(DType::kFloat64, bytes / 8);
  const int status = pykd::logit_regression_cuda(args, bytes > 0 ? workspace.data() : nullptr, nullptr);
  check(status == 0 && workspace.intact(), "the workspace's sentinels");
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::logit_regression_cpu>}, {"cpu, rows apart", run_rows_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, logit_regression_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        loss_dtype(loss_dtype_of(c.student)),
        student(c.student, c.rows * c.classes, c.offset),
        teacher(c.teacher, c.rows * c.classes, c.offset),
        grad(c.student, c.wants_grad ? c.rows * c.classes : 0, c.offset),
        grad_loss(loss_dtype, c.rows),
        row_loss(loss_dtype, c.wants_row_loss ? c.rows : 0),
        loss(loss_dtype, 1) {
    std::mt19937_64 random(static_cast<uint64_t>(c.rows * 7919 + c.classes));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t i = 0; i < c.rows * c.classes; ++i) {
      student.set(i, normal(random));
      teacher.set(i, normal(random));
      if (c.wants_grad && c.accumulate) grad.set(i, normal(random));
    }
    for (int64_t i = 0; i < c.rows; ++i) grad_loss.set(i, normal(random));
  }

  LogitRegression args() {
    const double scale = c.batchmean && c.rows > 0 ? 1.0 / static_cast<double>(c.rows) : 1.0;
    void* const gradient = c.in_place ? student.data() : grad.data();
    return {student.data(),
            teacher.data(),
            c.grad_loss == GradLoss::kNull ? nullptr : grad_loss.data(),
            c.wants_row_loss ? row_loss.data() : nullptr,
            c.wants_loss ? loss.data() : nullptr,
            c.wants_grad ? gradient : nullptr,
            c.rows,
            c.classes,
            c.grad_loss == GradLoss::kRows ? 1 : 0,
            scale,
            scale,
            c.student,
            c.teacher,
            c.accumulate,
            {c.sigma, static_cast<uint64_t>(std::llround(c.alpha * 4294967296.0)), c.sigma > 0 ? seed() : nullptr,
             c.row_offset, c.n_teachers, c.per_sample, c.additive}};
  }

  bool intact() const {
    return student.intact() && teacher.intact() && grad.intact() && grad_loss.intact() && row_loss.intact() &&
           loss.intact();
  }

  const Buffer& gradient() const { return c.in_place ? student : grad; }

  Case c;
  DType loss_dtype;
  Buffer student, teacher, grad, grad_loss, row_loss, loss;
};

// Every kernel on one problem, against the definition.
void run(const Case& c) {
  Problem before(c);
  const LogitRegression args = before.args();
  const int64_t count = c.rows * c.classes;
  // An element's error, in units of |student| + |teacher| (1 + |noise|): 16 roundings, the noise's own among them. The
  // rounding of a half-precision gradient is its own, and below float16's normal numbers 2^-25.
  const double unit = 16 * roundoff(before.loss_dtype);
  std::vector<double> row_loss(static_cast<size_t>(c.rows)), grad(static_cast<size_t>(count)), slack(grad),
      row_slack(row_loss);
  double loss = 0, loss_slack = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    const RowNoise noise = noise_of(args.noise, r, c.classes);
    const size_t row = static_cast<size_t>(r);
    double scale = args.grad_scale;
    if (c.grad_loss != GradLoss::kNull) scale *= before.grad_loss.get(r * args.grad_loss_stride);
    long double sum = 0;  // of up to 20008 terms, whose rounding in double would exceed the slack
    for (int64_t j = 0; j < c.classes; ++j) {
      const int64_t i = r * c.classes + j;
      const size_t at = static_cast<size_t>(i);
      const double s = before.student.get(i), t = before.teacher.get(i), n = noise.noise[static_cast<size_t>(j)];
      const double difference = s - (c.additive ? t + n : t + t * n);
      const double size = std::fabs(s) + std::fabs(t) + std::fabs(c.additive ? 1 + n : t * n);
      const double old = c.accumulate && c.wants_grad ? (c.in_place ? s : before.grad.get(i)) : 0;
      sum += static_cast<long double>(difference * difference / 2);
      row_slack[row] += unit * size * size;
      grad[at] = scale * difference + old;
      slack[at] = unit * (std::fabs(scale) * size + std::fabs(old)) + 2 * roundoff(c.student) * std::fabs(grad[at]) +
                  (c.student == DType::kFloat16 ? 0x1p-24 : 0);
    }
    row_loss[row] = static_cast<double>(sum);
    loss += args.loss_scale * row_loss[row];
    loss_slack += args.loss_scale * row_slack[row];
  }
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    kernel.run(p.args());
    bool ok = p.intact();
    for (int64_t r = 0; r < c.rows && c.wants_row_loss; ++r) {
      const size_t row = static_cast<size_t>(r);
      ok = ok && std::fabs(p.row_loss.get(r) - row_loss[row]) <= row_slack[row];
    }
    if (c.wants_loss) ok = ok && std::fabs(p.loss.get(0) - loss) <= loss_slack;
    for (int64_t i = 0; i < count && c.wants_grad; ++i) {
      const size_t at = static_cast<size_t>(i);
      ok = ok && std::fabs(p.gradient().get(i) - grad[at]) <= slack[at];
    }
    check(ok, std::string(kernel.name) + ":" + c.name());
  }
}

// ---- what is tested ------------------------------------------------------------------------------------------------

// Salmon et al.'s known answers, for the definition above and for core/philox.h in scalars and in every lane of a
// vector.
void test_philox() {
  struct Known {
    Words counter;
    uint64_t seed;
    Words answer;
  };
  const uint32_t ones = 0xFFFFFFFF;
  const Known known[] = {
      {{0, 0, 0, 0}, 0, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
      {{ones, ones, ones, ones}, ~uint64_t{0}, {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
      {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
       0x299F31D0A4093822,
       {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}},
  };
  for (const Known& k : known) {
    check(philox(k.counter, k.seed) == k.answer, "Philox by definition");
    pykd::test::Philox<uint64_t> scalar[1];
    pykd::test::Philox<pykd::test::Slots> vector[2];
    for (size_t i = 0; i < 4; ++i) {
      scalar[0].word[i] = k.counter[i];
      for (auto& v : vector) v.word[i] = pykd::test::Slots{} + k.counter[i];
    }
    pykd::test::philox(scalar, k.seed);
    pykd::test::philox(vector, k.seed);
    bool same_scalar = true, same_vector = true;
    for (size_t i = 0; i < 4; ++i) {
      same_scalar = same_scalar && static_cast<uint32_t>(scalar[0].word[i]) == k.answer[i];
      for (const auto& v : vector)
        for (int lane = 0; lane < pykd::test::kLanes / 2; ++lane)
          same_vector = same_vector && static_cast<uint32_t>(v.word[i][lane]) == k.answer[i];
    }
    check(same_scalar, "Philox in scalars");
    check(same_vector, "Philox in vectors");
  }
}

// Every pair of dtypes with every kind of noise.
void test_dtypes() {
  for (const auto& [student, teacher] : kDTypes)
    for (int kind = 0; kind < 4; ++kind)
      for (int64_t n_teachers : {1, 3}) {
        Case c{.rows = 5, .classes = kind % 2 == 0 ? 40 : 37, .student = student, .teacher = teacher};
        c.per_sample = kind / 2 == 1;
        c.additive = kind % 2 == 1;
        c.n_teachers = n_teachers;
        run(c);
      }
}

// Ragged sizes; the other choices are drawn, so that each meets many sizes.
void test_sizes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](int64_t rows, int64_t classes) {
    const auto [student, teacher] = kDTypes[random() % 2 == 0 ? 0 : random() % kDTypes.size()];
    Case c{.rows = rows, .classes = classes, .student = student, .teacher = teacher};
    c.per_sample = one_of(false, false, true);
    c.additive = one_of(false, true);
    c.n_teachers = one_of(int64_t{1}, int64_t{1}, int64_t{3});
    c.sigma = one_of(0.5, 0.5, 0.5, 0.0);
    c.alpha = one_of(0.5, 0.5, 1.0, 0.0);
    c.row_offset = one_of(int64_t{0}, (int64_t{1} << 32) - 2, int64_t{5} << 33);
    c.wants_loss = one_of(true, false);
    c.wants_row_loss = c.wants_loss || one_of(true, false);
    c.wants_grad = !c.wants_row_loss || one_of(true, true, false);
    c.accumulate = one_of(false, true);
    c.in_place = c.wants_grad && one_of(false, false, true);
    c.grad_loss = one_of(GradLoss::kNull, GradLoss::kOne, GradLoss::kRows);
    c.batchmean = one_of(true, false);
    c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{3});
    run(c);
  };
  for (int64_t classes : {1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 31, 32, 127, 128, 129, 511, 512, 513, 1030})
    for (int64_t rows : {1, 3, 65, 130})
      for (int i = 0; i < (rows * classes < 5000 ? 3 : 1); ++i) with(rows, classes);
  for (int64_t classes : {8191, 8192, 8193, 16388, 20008}) with(3, classes);
  run({.rows = 1100, .classes = 16});  // more rows than the threads of a block
  run({.rows = 3, .classes = 21, .n_teachers = 40});
}

// A row's loss and gradient do not depend on the rows beside it, to the bit, nor on the run.
void test_rows_stand_alone() {
  for (const auto& [student, teacher] : kDTypes)
    for (int64_t classes : {10, 129, 8200}) {
      if (classes == 8200 && student != DType::kFloat32) continue;
      Case c{.rows = classes == 8200 ? 4 : 130, .classes = classes, .student = student, .teacher = teacher};
      c.batchmean = false;
      const int64_t half = c.rows / 2;
      Problem whole(c), again(c), second(c), total(c);
      LogitRegression args = second.args();
      const auto skip = [&](const void* logits, DType dtype) {
        return static_cast<const char*>(logits) + static_cast<size_t>(half * classes) * size_of(dtype);
      };
      args.student = skip(args.student, student);
      args.teacher = skip(args.teacher, teacher);
      args.rows = half;
      args.noise.row_offset = half;
      run_cuda(whole.args());
      run_cuda(again.args());
      run_cuda(args);
      check(whole.loss == again.loss && whole.row_loss == again.row_loss && whole.grad == again.grad,
            "cuda: the same bits again:" + c.name());
      LogitRegression total_alone = total.args();
      total_alone.row_loss = nullptr;
      run_cuda(total_alone);
      check(whole.loss == total.loss && whole.grad == total.grad, "cuda: the loss needs no row_loss:" + c.name());
      bool same = true;
      for (int64_t r = 0; r < half; ++r) same = same && second.row_loss.get(r) == whole.row_loss.get(half + r);
      for (int64_t i = 0; i < half * classes; ++i)
        same = same && second.grad.get(i) == whole.grad.get(half * classes + i);
      check(same, "cuda: half a batch equals the second half of the whole:" + c.name());
    }
}

// Rows that no teacher selects, and noise of no strength, equal clean regression to the bit.
void test_clean_rows_are_clean() {
  for (const Kernel& kernel : kernels()) {
    Case c{.rows = 65, .classes = 33};
    Problem noisy(c), clean(c);
    kernel.run(noisy.args());
    LogitRegression args = clean.args();
    args.noise.threshold = 0;
    kernel.run(args);
    int selected = 0, different = 0;
    bool same = true;
    for (int64_t r = 0; r < c.rows; ++r) {
      const bool row_selected = noise_of(noisy.args().noise, r, c.classes).selected;
      const bool row_same = noisy.row_loss.get(r) == clean.row_loss.get(r);
      selected += row_selected;
      different += !row_same;
      same = same && (row_selected || row_same);
    }
    check(same && selected == different && selected > 0 && selected < c.rows,
          std::string(kernel.name) + ": the rows that differ are the selected ones");
  }
}

void test_no_rows() {
  for (const Kernel& kernel : kernels())
    for (int64_t classes : {1, 10, 20000}) {
      Problem p({.rows = 0, .classes = classes});
      LogitRegression args = p.args();
      kernel.run(args);
      check(p.loss.get(0) == 0 && p.intact(), std::string(kernel.name) + ": no rows lose nothing");
    }
}

// At the shapes of small images' classes a pass is one launch: the value, the gradient, or both.
void test_launches() {
  for (int64_t classes : {10, 100})
    for (DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (double sigma : {0.5, 0.0})
        for (bool backward : {false, true}) {
          Case c{.rows = 128, .classes = classes, .student = dtype, .teacher = dtype};
          c.sigma = sigma;
          c.wants_row_loss = false;
          c.wants_loss = !backward;
          Problem p(c);
          check(launches_once([&] { run_cuda(p.args()); }) && p.intact(), "cuda: one launch:" + c.name());
        }
}

}  // namespace

int main() {
  test_philox();
  test_dtypes();
  test_sizes();
  test_rows_stand_alone();
  test_clean_rows_are_clean();
  test_no_rows();
  test_launches();
  return report();
}
