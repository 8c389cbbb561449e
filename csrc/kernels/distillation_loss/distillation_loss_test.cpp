// distillation_loss without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under
// emulation, against the definition in scalar double; ragged sizes, masks, every buffer between sentinels.
#include "kernels/distillation_loss/distillation_loss.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"
#include "core/total.h"

PYKD_DECLARE_LEVELS(distillation_loss_cpu, (const DistillationLoss& args, int64_t targets, void* workspace,
                                            int64_t row_begin, int64_t row_end))

namespace {

using namespace pykd::testing;
using pykd::DistillationLoss;
using pykd::DType;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- one problem ---------------------------------------------------------------------------------------------------

enum class GradLoss { kNull, kOne, kRows };
enum class InPlace { kNo, kStudent, kTeacher };
enum class Mask { kNone, kTeacher, kBoth };  // a third of the classes; of both, the same ones

struct Case {
  int64_t rows = 3, classes = 10;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  double temperature = 4, hard_weight = 0.25, label_smoothing = 0;
  int64_t ignore_index = -100;
  bool reverse = false, batchmean = true;
  bool per_sample = false, additive = false;
  int64_t n_teachers = 1;
  double sigma = 0.5, alpha = 0.5;
  int64_t row_offset = 0;
  bool wants_row_loss = true, wants_loss = true, wants_grad = true;
  bool accumulate = false;
  InPlace in_place = InPlace::kNo;
  GradLoss grad_loss = GradLoss::kNull;
  Mask mask = Mask::kNone;
  int64_t offset = 0;  // elements from a well aligned address to the logits'

  std::string name() const {
    return described({{"rows", rows},
                      {"classes", classes},
                      {"student", static_cast<int>(student)},
                      {"teacher", static_cast<int>(teacher)},
                      {"temperature", temperature},
                      {"hard_weight", hard_weight},
                      {"label_smoothing", label_smoothing},
                      {"ignore_index", ignore_index},
                      {"reverse", reverse},
                      {"batchmean", batchmean},
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
                      {"in_place", static_cast<int>(in_place)},
                      {"grad_loss", static_cast<int>(grad_loss)},
                      {"mask", static_cast<int>(mask)},
                      {"offset", offset}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const DistillationLoss& args);
};

void add_up(const DistillationLoss& args) {
  if (args.loss) pykd::total_cpu(args.row_loss, loss_dtype_of(args.student_dtype), args.rows, 1, args.loss);
}

// Rows [begin, end), with a workspace of their own.
template <void (*kCpu)(const DistillationLoss&, int64_t, void*, int64_t, int64_t)>
void run_rows(const DistillationLoss& args, int64_t begin, int64_t end) {
  int64_t wrong;
  const int64_t targets = pykd::distillation_loss_targets_cpu(args, wrong);
  check(wrong == -1, "no target is wrong");
  const int64_t bytes = pykd::distillation_loss_workspace_bytes_cpu(args);
  Buffer workspace(DType::kFloat64, bytes / 8);
  kCpu(args, targets, bytes > 0 ? workspace.data() : nullptr, begin, end);
  check(workspace.intact(), "the workspace's sentinels");
}

template <void (*kCpu)(const DistillationLoss&, int64_t, void*, int64_t, int64_t)>
void run_cpu(const DistillationLoss& args) {
  run_rows<kCpu>(args, 0, args.rows);
  add_up(args);
}

void run_rows_apart(const DistillationLoss& args) {
  for (int64_t begin = 0; begin < args.rows;) {
    const int64_t end = std::min(args.rows, begin + 1 + begin % 7);
    run_rows<pykd::distillation_loss_cpu>(args, begin, end);
    begin = end;
  }
  add_up(args);
}

void run_cuda(const DistillationLoss& args) {
  const int64_t bytes = pykd::distillation_loss_workspace_bytes_cuda(args);
  Buffer workspace(DType::kFloat64, bytes / 8);
  const int status = pykd::distillation_loss_cuda(args, bytes > 0 ? workspace.data() : nullptr, nullptr);
  check(status == 0 && workspace.intact(), "the workspace's sentinels");
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::distillation_loss_cpu>}, {"cpu, rows apart", run_rows_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, distillation_loss_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        loss_dtype(loss_dtype_of(c.student)),
        student(c.student, c.rows * c.classes, c.offset),
        teacher(c.teacher, c.rows * c.classes, c.offset),
        grad(c.student, c.wants_grad && c.in_place == InPlace::kNo ? c.rows * c.classes : 0, c.offset),
        grad_loss(loss_dtype, c.rows),
        row_loss(loss_dtype, c.wants_row_loss ? c.rows : 0),
        loss(loss_dtype, 1) {
    std::mt19937_64 random(static_cast<uint64_t>(c.rows * 7919 + c.classes));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t i = 0; i < c.rows * c.classes; ++i) {
      const bool masked = c.mask != Mask::kNone && i % c.classes > 0 && random() % 3 == 0;
      student.set(i, masked && c.mask == Mask::kBoth ? -kInfinity : normal(random));
      teacher.set(i, masked ? -kInfinity : normal(random));
      if (c.wants_grad && c.accumulate && c.in_place == InPlace::kNo) grad.set(i, normal(random));
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      grad_loss.set(r, normal(random));
      int64_t label = static_cast<int64_t>(random() % static_cast<uint64_t>(c.classes));
      while (student.get(r * c.classes + label) == -kInfinity) --label;
      target.push_back(random() % 4 == 0 ? c.ignore_index : label);
    }
  }

  DistillationLoss args() {
    void* const gradient = c.in_place == InPlace::kStudent   ? student.data()
                           : c.in_place == InPlace::kTeacher ? teacher.data()
                                                             : grad.data();
    return {student.data(),
            teacher.data(),
            c.hard_weight > 0 ? target.data() : nullptr,
            c.grad_loss == GradLoss::kNull ? nullptr : grad_loss.data(),
            c.wants_row_loss ? row_loss.data() : nullptr,
            c.wants_loss ? loss.data() : nullptr,
            c.wants_grad ? gradient : nullptr,
            c.rows,
            c.classes,
            c.grad_loss == GradLoss::kRows ? 1 : 0,
            c.ignore_index,
            c.temperature,
            c.hard_weight,
            c.label_smoothing,
            c.student,
            c.teacher,
            c.reverse,
            c.batchmean,
            c.accumulate,
            {c.sigma, static_cast<uint64_t>(std::llround(c.alpha * 4294967296.0)), c.sigma > 0 ? seed() : nullptr,
             c.row_offset, c.n_teachers, c.per_sample, c.additive}};
  }

  bool intact() const {
    return student.intact() && teacher.intact() && grad.intact() && grad_loss.intact() && row_loss.intact() &&
           loss.intact();
  }

  const Buffer& gradient() const {
    return c.in_place == InPlace::kStudent ? student : c.in_place == InPlace::kTeacher ? teacher : grad;
  }

  Case c;
  DType loss_dtype;
  Buffer student, teacher, grad, grad_loss, row_loss, loss;
  Vector<int64_t> target;
};

// ---- the definition ------------------------------------------------------------------------------------------------

std::vector<double> log_softmax(std::vector<double> x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double v : x) sum += std::exp(v - max);
  for (double& v : x) v -= max + std::log(sum);
  return x;
}

double expectation(double weight, double value) { return weight == 0 ? 0 : weight * value; }

struct Expected {
  std::vector<double> row_loss, row_slack, grad, slack;
  double loss = 0, loss_slack = 0;
};

// The slacks are 16 roundings of a logit, of a term and of a sum; the rounding of a half-precision gradient is its own,
// and below float16's normal numbers 2^-25.
Expected expect(const Problem& p, const DistillationLoss& a) {
  const Case& c = p.c;
  const size_t classes = static_cast<size_t>(c.classes);
  int64_t wrong;
  const double targets = static_cast<double>(pykd::distillation_loss_targets_cpu(a, wrong));
  const double t = c.temperature, soft = (1 - c.hard_weight) / (c.batchmean ? static_cast<double>(c.rows) : 1);
  const double hard = c.hard_weight == 0 ? 0 : c.hard_weight / (c.batchmean ? std::max(targets, 1.0) : 1);
  const double unit = 16 * roundoff(p.loss_dtype);
  Expected e;
  for (int64_t r = 0; r < c.rows; ++r) {
    const RowNoise noise = noise_of(a.noise, r, c.classes);
    std::vector<double> s(classes), scaled_s(classes), scaled_z(classes);
    double size = 0;
    for (size_t j = 0; j < classes; ++j) {
      const int64_t at = r * c.classes + static_cast<int64_t>(j);
      s[j] = p.student.get(at);
      const double logit = p.teacher.get(at), n = noise.noise[j];
      const double z = logit == -kInfinity ? logit : c.additive ? logit + n : logit + logit * n;
      scaled_s[j] = s[j] / t;
      scaled_z[j] = z / t;
      for (double v : {s[j], z, c.additive ? n : logit * n})
        if (std::isfinite(v)) size = std::max(size, std::fabs(v));
    }
    const std::vector<double> log_q = log_softmax(scaled_s), log_p = log_softmax(scaled_z), log_h = log_softmax(s);
    const auto term = [&](size_t j) {
      return c.reverse ? expectation(std::exp(log_q[j]), log_q[j] - log_p[j])
                       : expectation(std::exp(log_p[j]), log_p[j] - log_q[j]);
    };
    double kl = 0, ce = 0;
    for (size_t j = 0; c.hard_weight < 1 && j < classes; ++j) kl += term(j);
    const int64_t target = c.hard_weight > 0 ? p.target[static_cast<size_t>(r)] : c.ignore_index;
    const auto wanted = [&](size_t j) {
      return c.label_smoothing / static_cast<double>(c.classes) +
             (static_cast<int64_t>(j) == target ? 1 - c.label_smoothing : 0);
    };
    for (size_t j = 0; target != c.ignore_index && j < classes; ++j) ce -= expectation(wanted(j), log_h[j]);
    e.row_loss.push_back(soft * t * t * kl + hard * ce);
    e.row_slack.push_back(unit * (soft * t * (t + size + (std::isfinite(kl) ? t * kl : 0)) + hard * (1 + size)));
    e.loss += e.row_loss.back();
    e.loss_slack += e.row_slack.back();
    const double upstream = a.grad_loss ? p.grad_loss.get(r * a.grad_loss_stride) : 1;
    for (size_t j = 0; c.wants_grad && j < classes; ++j) {
      const double q = std::exp(log_q[j]), h = std::exp(log_h[j]);
      double g = 0, g_size = 0;
      if (c.hard_weight < 1) {
        g = soft * t * (c.reverse ? term(j) - q * kl : q - std::exp(log_p[j]));
        g_size = soft * (t + size) * (c.reverse ? 1 + (std::isfinite(kl) ? t * kl * q : 0) : 1);
      }
      if (target != c.ignore_index) {
        g += hard * (h - wanted(j));
        g_size += hard * (1 + size);
      }
      const int64_t at = r * c.classes + static_cast<int64_t>(j);
      const double old = c.accumulate ? p.gradient().get(at) : 0;
      e.grad.push_back(upstream * g + old);
      e.slack.push_back(unit * (std::fabs(upstream) * g_size + std::fabs(old)) +
                        2 * roundoff(c.student) * std::fabs(e.grad.back()) +
                        (c.student == DType::kFloat16 ? 0x1p-24 : 0));
    }
  }
  return e;
}

// Infinite where that is expected; NaN where NaN is.
bool matches(double actual, double expected, double slack) {
  if (std::isnan(expected)) return std::isnan(actual);
  return actual == expected || std::fabs(actual - expected) <= slack;
}

// Every kernel on one problem, against the definition.
void run(const Case& c) {
  Problem before(c);
  const Expected e = expect(before, before.args());
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    kernel.run(p.args());
    bool ok = p.intact() && (c.in_place == InPlace::kStudent || p.student == before.student) &&
              (c.in_place == InPlace::kTeacher || p.teacher == before.teacher) && p.target == before.target;
    for (int64_t r = 0; r < c.rows && c.wants_row_loss; ++r) {
      const size_t row = static_cast<size_t>(r);
      ok = ok && matches(p.row_loss.get(r), e.row_loss[row], e.row_slack[row]);
    }
    if (c.wants_loss) ok = ok && matches(p.loss.get(0), e.loss, e.loss_slack);
    for (size_t i = 0; i < e.grad.size(); ++i)
      ok = ok && matches(p.gradient().get(static_cast<int64_t>(i)), e.grad[i], e.slack[i]);
    check(ok, std::string(kernel.name) + ":" + c.name());
  }
}

// ---- what is tested ------------------------------------------------------------------------------------------------

// Every pair of dtypes with every kind of noise.
void test_dtypes() {
  for (const auto& [student, teacher] : kDTypes)
    for (int kind = 0; kind < 4; ++kind)
      for (int64_t n_teachers : {1, 3}) {
        Case c{.rows = 5, .classes = kind % 2 == 0 ? 40 : 37, .student = student, .teacher = teacher};
        c.reverse = n_teachers == 3;
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
    c.temperature = one_of(4.0, 1.0, 0.5, 2.5);
    c.hard_weight = one_of(0.0, 0.1, 0.5, 1.0);
    c.label_smoothing = one_of(0.0, 0.0, 0.1, 1.0);
    c.ignore_index = one_of(int64_t{-100}, int64_t{0}, int64_t{-1});
    c.reverse = one_of(false, true);
    c.batchmean = one_of(true, false);
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
    if (c.wants_grad) c.in_place = one_of(InPlace::kNo, InPlace::kNo, InPlace::kStudent, InPlace::kTeacher);
    if (c.in_place == InPlace::kTeacher && student != teacher) c.in_place = InPlace::kStudent;
    c.grad_loss = one_of(GradLoss::kNull, GradLoss::kOne, GradLoss::kRows);
    c.mask = one_of(Mask::kNone, Mask::kNone, Mask::kTeacher, Mask::kBoth);
    if (c.mask == Mask::kTeacher && c.reverse) c.mask = Mask::kBoth;  // infinite otherwise
    if (c.mask != Mask::kNone && c.accumulate) c.in_place = InPlace::kNo;
    if (c.mask == Mask::kBoth) c.label_smoothing = 0;  // infinite otherwise
    c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{3});
    run(c);
  };
  for (int64_t classes : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 31, 32, 33, 100, 129, 300})
    for (int64_t rows : {0, 1, 3, 65})
      for (int i = 0; i < (rows * classes < 5000 ? 4 : 1); ++i) with(rows, classes);
  const int repeats = kSlow ? 1 : 3;
  for (int64_t classes : {1000, 1023, 1024, 1025, 2049, 5000})
    for (int64_t rows : {1, 3, classes == 1000 ? 20 : 4})
      for (int i = 0; i < repeats; ++i) with(rows, classes);
  for (int64_t classes : {8192, 9001, 20008})  // the last two in several parts under emulation
    for (int i = 0; i < repeats; ++i) with(2, classes);
  run({.rows = 1100, .classes = 16});  // more rows than a block counts targets of, or has threads
  run({.rows = 9000, .classes = 2});   // more than one block counts
  run({.rows = 3, .classes = 21, .n_teachers = 40});
}

// Masks of whole packs, threads, tiles, and of all classes but one.
void test_masks() {
  constexpr int64_t kClasses = 2100;
  const auto masks = std::array<std::array<int64_t, 3>, 5>{
      {{0, 1024, 1}, {1024, 2048, 1}, {0, kClasses, 2}, {2080, kClasses, 1}, {1, kClasses, 1}}};
  for (const Kernel& kernel : kernels())
    for (const auto& [begin, end, step] : masks)
      for (bool reverse : {false, true})
        for (bool both : {false, true}) {
          if (reverse && !both) continue;
          Case c{.rows = 2, .classes = kClasses, .temperature = 3, .hard_weight = 0.5, .ignore_index = 7};
          c.reverse = reverse;
          Problem p(c);
          for (int64_t r = 0; r < c.rows; ++r)
            for (int64_t j = begin; j < end; j += step) {
              p.teacher.set(r * kClasses + j, -kInfinity);
              if (both) p.student.set(r * kClasses + j, -kInfinity);
            }
          p.target = {7, begin == 0 ? (step == 1 ? 2099 : 1) : 0};
          const Expected e = expect(p, p.args());
          kernel.run(p.args());
          bool ok = p.intact() && matches(p.loss.get(0), e.loss, e.loss_slack) && std::isfinite(e.loss);
          for (size_t i = 0; i < e.grad.size(); ++i)
            ok = ok && matches(p.grad.get(static_cast<int64_t>(i)), e.grad[i], e.slack[i]);
          check(ok, std::string(kernel.name) + ": masked from " + std::to_string(begin) + " to " + std::to_string(end) +
                        " by " + std::to_string(step) + (reverse ? ", reverse" : "") + (both ? ", both" : ""));
        }
}

// A class of mass that the other side gives none: an infinite loss; forward, the gradient has its limit.
void test_infinite_divergence() {
  for (const Kernel& kernel : kernels())
    for (int64_t classes : {9, 1500})
      for (bool reverse : {false, true}) {
        Case c{.rows = 3, .classes = classes, .hard_weight = 0, .reverse = reverse};
        Problem p(c);
        (reverse ? p.teacher : p.student).set(classes + classes - 2, -kInfinity);
        const Expected e = expect(p, p.args());
        kernel.run(p.args());
        bool ok = p.loss.get(0) == kInfinity && p.row_loss.get(1) == kInfinity, finite = true;
        for (size_t i = 0; i < e.grad.size(); ++i) {
          const double actual = p.grad.get(static_cast<int64_t>(i));
          if (static_cast<int64_t>(i) / classes == 1) finite = finite && std::isfinite(actual);
          if (!reverse || static_cast<int64_t>(i) / classes != 1) ok = ok && matches(actual, e.grad[i], e.slack[i]);
        }
        check(ok && finite != reverse, std::string(kernel.name) + ": mass where there is none" +
                                           (reverse ? ", reverse, " : ", ") + std::to_string(classes));
      }
}

// What is not finite makes its own row NaN, the loss and every gradient, and leaves the others as they were.
void test_bad_rows() {
  for (const Kernel& kernel : kernels())
    for (int64_t classes : {9, 1500})
      for (bool reverse : {false, true})
        for (double value : {kNaN, kInfinity, -kInfinity})
          for (bool of_teacher : {false, true}) {
            Case c{.rows = 3, .classes = classes, .hard_weight = 0.5, .reverse = reverse, .wants_loss = false};
            c.alpha = 1;
            Problem clean(c), p(c);
            for (int64_t j = 0; j < classes; ++j)  // -inf: in all of the row
              if (value == -kInfinity || j == classes - 3) (of_teacher ? p.teacher : p.student).set(classes + j, value);
            kernel.run(clean.args());
            kernel.run(p.args());
            bool ok = p.intact();
            for (int64_t i = 0; i < 3 * classes; ++i)
              ok = ok && (i / classes == 1 ? std::isnan(p.grad.get(i)) : p.grad.get(i) == clean.grad.get(i));
            for (int64_t r = 0; r < 3; ++r)
              ok = ok && (r == 1 ? std::isnan(p.row_loss.get(r)) : p.row_loss.get(r) == clean.row_loss.get(r));
            check(ok, std::string(kernel.name) + ": " + (of_teacher ? "teacher " : "student ") + std::to_string(value) +
                          (reverse ? ", reverse, " : ", ") + std::to_string(classes));
          }
}

// Logits near float's limits: the threads' own maxima lie further apart than float reaches.
void test_large_logits() {
  for (const Kernel& kernel : kernels())
    for (int64_t classes : {9, 5000})
      for (bool reverse : {false, true}) {
        Case c{.rows = 1, .classes = classes, .temperature = 1, .hard_weight = 0, .reverse = reverse, .sigma = 0};
        Problem p(c);
        for (int64_t j = 0; j < classes; ++j)
          for (Buffer* b : {&p.student, &p.teacher}) b->set(j, j == 3 ? 3e38 : -3e38);
        kernel.run(p.args());
        bool ok = p.loss.get(0) == 0;
        for (int64_t j = 0; j < classes; ++j) ok = ok && p.grad.get(j) == 0;
        check(ok, std::string(kernel.name) + ": logits of 3e38, " + std::to_string(classes));
      }
}

// CPU: the first wrong target is named. CUDA: its row is NaN.
void test_wrong_targets() {
  for (int64_t classes : {10, 1000, 5000})
    for (int64_t target : {classes, int64_t{-1}, int64_t{1} << 40}) {
      Case c{.rows = 4, .classes = classes, .hard_weight = 0.1, .batchmean = false, .wants_loss = false};
      Problem clean(c), p(c);
      clean.target = p.target = {1, -100, 5, 6};
      p.target[2] = target;
      int64_t wrong;
      check(pykd::distillation_loss_targets_cpu(p.args(), wrong) == 3 && wrong == 2, "the wrong target's row");
      run_cuda(clean.args());
      run_cuda(p.args());
      bool ok = p.intact();
      for (int64_t i = 0; i < 4 * classes; ++i)
        ok = ok && (i / classes == 2 ? std::isnan(p.grad.get(i)) : p.grad.get(i) == clean.grad.get(i));
      for (int64_t r = 0; r < 4; ++r)
        ok = ok && (r == 2 ? std::isnan(p.row_loss.get(r)) : p.row_loss.get(r) == clean.row_loss.get(r));
      check(ok, "cuda: a wrong target, " + std::to_string(classes));
    }
}

void test_all_targets_ignored() {
  for (const Kernel& kernel : kernels())
    for (double hard_weight : {0.5, 1.0}) {
      Case c{.rows = 5, .classes = 12, .hard_weight = hard_weight};
      Problem p(c);
      p.target.assign(5, c.ignore_index);
      const Expected e = expect(p, p.args());
      kernel.run(p.args());
      bool ok = hard_weight < 1 ? matches(p.loss.get(0), e.loss, e.loss_slack) : p.loss.get(0) == 0;
      for (size_t i = 0; i < e.grad.size(); ++i)
        ok = ok && matches(p.grad.get(static_cast<int64_t>(i)), e.grad[i], hard_weight < 1 ? e.slack[i] : 0);
      check(ok, std::string(kernel.name) + ": no targets");
    }
}

// A row's loss and gradient do not depend on which rows of its batch are beside it, to the bit, nor on the run.
void test_rows_stand_alone() {
  for (const auto& [student, teacher] : kDTypes)
    for (int64_t classes : {2, 10, 129, 9001}) {
      if (classes != 10 && teacher != DType::kFloat32) continue;
      if ((classes == 2 || classes == 9001) && (kSlow || student != DType::kFloat32)) continue;
      const int64_t rows = classes == 2 ? 9000 : classes == 9001 ? 4 : 130;  // of 9000, blocks count the targets
      Case c{.rows = rows, .classes = classes, .student = student, .teacher = teacher};
      const int64_t half = c.rows / 2;
      Problem whole(c), again(c), second(c), total(c);
      DistillationLoss args = second.args();
      const auto skip = [&](const void* logits, DType dtype) {
        return static_cast<const char*>(logits) + static_cast<size_t>(half * classes) * size_of(dtype);
      };
      args.student = skip(args.student, student);
      args.teacher = skip(args.teacher, teacher);
      args.target += half;
      args.rows = args.rows_before = half;
      args.noise.row_offset = half;
      run_cuda(whole.args());
      run_cuda(again.args());
      run_cuda(args);
      check(whole.loss == again.loss && whole.row_loss == again.row_loss && whole.grad == again.grad,
            "cuda: the same bits again:" + c.name());
      DistillationLoss total_alone = total.args();
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

// However threads divide the rows, the bits are the same.
void test_rows_apart_are_the_same() {
  for (int64_t classes : {10, 33, 1000, 2049})
    for (bool reverse : {false, true}) {
      Case c{.rows = 70, .classes = classes, .reverse = reverse};
      Problem whole(c), apart(c);
      run_cpu<pykd::distillation_loss_cpu>(whole.args());
      run_rows_apart(apart.args());
      check(whole.loss == apart.loss && whole.row_loss == apart.row_loss && whole.grad == apart.grad,
            "cpu: rows apart have the same bits:" + c.name());
    }
}

// Rows that no teacher selects, and noise of no strength, equal the clean loss to the bit.
void test_clean_rows_are_clean() {
  for (const Kernel& kernel : kernels())
    for (const auto& [student, teacher] : kDTypes) {
      Case c{.rows = 65, .classes = 33, .student = student, .teacher = teacher};
      Problem noisy(c), clean(c);
      kernel.run(noisy.args());
      DistillationLoss args = clean.args();
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
      kernel.run(p.args());
      check(p.loss.get(0) == 0 && p.intact(), std::string(kernel.name) + ": no rows lose nothing");
    }
}

// Rows about as long as shared memory holds, whose noise decides how much of them that is: a row without any has the
// bits it has where no row has noise.
void test_kept_rows() {
  run({.rows = 3, .classes = 5000, .teacher = DType::kBFloat16});  // few, but none may follow another in a block
  for (int64_t classes : {6144, 6152, 8192, 16384}) {
    if (kSlow && classes != 8192) continue;
    Case c{.rows = 4, .classes = classes, .student = DType::kBFloat16, .teacher = DType::kBFloat16};
    run(c);
    Problem noisy(c), clean(c);
    run_cuda(noisy.args());
    DistillationLoss args = clean.args();
    args.noise.threshold = 0;
    run_cuda(args);
    int selected = 0;
    bool same = true;
    for (int64_t r = 0; r < c.rows; ++r) {
      const bool row_selected = noise_of(noisy.args().noise, r, classes).selected;
      selected += row_selected;
      same = same && row_selected == (noisy.row_loss.get(r) != clean.row_loss.get(r));
      for (int64_t i = r * classes; !row_selected && i < (r + 1) * classes; ++i)
        same = same && noisy.grad.get(i) == clean.grad.get(i);
    }
    check(same && selected > 0 && selected < c.rows, "cuda: rows without noise keep their bits:" + c.name());
  }
}

// At the shapes of small images' classes a pass is one launch: the value, the gradient, or both.
void test_launches() {
  for (int64_t classes : {10, 100})
    for (DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (double sigma : {0.5, 0.0})
        for (bool backward : {false, true}) {
          Case c{.rows = 128,
                 .classes = classes,
                 .student = dtype,
                 .teacher = dtype,
                 .hard_weight = classes == 10 ? 0.5 : 0};
          c.sigma = sigma;
          c.wants_row_loss = false;
          c.wants_loss = !backward;
          Problem p(c);
          check(launches_once([&] { run_cuda(p.args()); }) && p.intact(), "cuda: one launch:" + c.name());
        }
}

}  // namespace

int main() {
  test_dtypes();
  test_sizes();
  test_masks();
  test_infinite_divergence();
  test_bad_rows();
  test_large_logits();
  test_wrong_targets();
  test_all_targets_ignored();
  test_rows_stand_alone();
  test_rows_apart_are_the_same();
  test_clean_rows_are_clean();
  test_no_rows();
  test_kept_rows();
  test_launches();
  return report();
}
