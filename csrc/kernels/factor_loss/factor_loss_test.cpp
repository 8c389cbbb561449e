// factor_loss without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against the definition in scalar long double; ragged sizes, every buffer between sentinels.
#include "kernels/factor_loss/factor_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"
#include "core/total.h"

PYKD_DECLARE_LEVELS(factor_loss_cpu, (const FactorLoss& args, int64_t row_begin, int64_t row_end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::FactorLoss;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// ---- one problem ---------------------------------------------------------------------------------------------------

struct Case {
  int64_t rows = 3, entries = 10;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  int p = 1;
  bool by_row = false;
  bool wants_row_loss = true, wants_loss = true, wants_student = true, wants_teacher = true;
  bool has_grad_loss = false;
  int64_t student_offset = 0, teacher_offset = 0;  // elements from a well aligned address to the factors'
  double student_scale = 1, teacher_scale = 1;

  std::string name() const {
    return described({{"rows", rows},
                      {"entries", entries},
                      {"student", static_cast<int>(student)},
                      {"teacher", static_cast<int>(teacher)},
                      {"p", p},
                      {"by_row", by_row},
                      {"row_loss", wants_row_loss},
                      {"loss", wants_loss},
                      {"wants_student", wants_student},
                      {"wants_teacher", wants_teacher},
                      {"grad_loss", has_grad_loss},
                      {"student_offset", student_offset},
                      {"teacher_offset", teacher_offset},
                      {"student_scale", student_scale},
                      {"teacher_scale", teacher_scale}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const FactorLoss& args);
};

void add_up(const FactorLoss& args) {
  if (args.loss) pykd::total_cpu(args.row_loss, loss_dtype_of(args.student_dtype), args.rows, args.scale, args.loss);
}

template <void (*kCpu)(const FactorLoss&, int64_t, int64_t)>
void run_cpu(const FactorLoss& args) {
  kCpu(args, 0, args.rows);
  add_up(args);
}

void run_rows_apart(const FactorLoss& args) {
  for (int64_t begin = 0; begin < args.rows;) {
    const int64_t end = std::min(args.rows, begin + 1 + begin % 7);
    pykd::factor_loss_cpu(args, begin, end);
    begin = end;
  }
  add_up(args);
}

void run_cuda(const FactorLoss& args) {
  const int64_t bytes = pykd::factor_loss_workspace_bytes(args);
  Buffer workspace(DType::kFloat64, bytes / 8);
  const int status = pykd::factor_loss_cuda(args, bytes > 0 ? workspace.data() : nullptr, nullptr);
  check(status == 0 && workspace.intact(), "the workspace's sentinels");
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::factor_loss_cpu>}, {"cpu, rows apart", run_rows_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, factor_loss_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        loss_dtype(loss_dtype_of(c.student)),
        student(c.student, c.rows * c.entries, c.student_offset),
        teacher(c.teacher, c.rows * c.entries, c.teacher_offset),
        grad_student(c.student, c.wants_student ? c.rows * c.entries : 0, c.student_offset),
        grad_teacher(c.teacher, c.wants_teacher ? c.rows * c.entries : 0, c.teacher_offset),
        grad_loss(loss_dtype, 1),
        row_loss(loss_dtype, c.wants_row_loss ? c.rows : 0),
        loss(loss_dtype, 1) {
    std::mt19937_64 random(static_cast<uint64_t>(c.rows * 7919 + c.entries));
    std::normal_distribution<double> normal(0, 3);
    for (int64_t i = 0; i < c.rows * c.entries; ++i) {
      student.set(i, c.student_scale * normal(random));
      teacher.set(i, c.teacher_scale * normal(random));
    }
    grad_loss.set(0, -1.75);
  }

  FactorLoss args() {
    const int64_t count = c.by_row ? c.rows : c.rows * c.entries;
    return {student.data(),
            teacher.data(),
            c.has_grad_loss ? grad_loss.data() : nullptr,
            c.wants_row_loss ? row_loss.data() : nullptr,
            c.wants_loss ? loss.data() : nullptr,
            c.wants_student ? grad_student.data() : nullptr,
            c.wants_teacher ? grad_teacher.data() : nullptr,
            c.rows,
            c.entries,
            1 / static_cast<double>(std::max<int64_t>(count, 1)),
            c.student,
            c.teacher,
            c.p,
            c.by_row};
  }

  bool intact() const {
    return student.intact() && teacher.intact() && grad_student.intact() && grad_teacher.intact() &&
           grad_loss.intact() && row_loss.intact() && loss.intact();
  }

  Case c;
  DType loss_dtype;
  Buffer student, teacher, grad_student, grad_teacher, grad_loss, row_loss, loss;
};

// A row of a factor: its unit vector, or zeros.
struct Unit {
  std::vector<long double> entry;
  long double norm = 0;

  Unit(const Buffer& factor, int64_t row, int64_t entries) {
    for (int64_t i = 0; i < entries; ++i) entry.push_back(static_cast<long double>(factor.get(row * entries + i)));
    for (const long double x : entry) norm += x * x;
    norm = std::sqrt(norm);
    if (norm > 0)
      for (long double& x : entry) x /= norm;
  }
};

struct Expected {
  double value, slack;
};

// Every kernel on one problem, against the definition.
void run(const Case& c, void (*change)(Problem&) = [](Problem&) {}) {
  Problem before(c);
  change(before);
  const FactorLoss args = before.args();
  const double upstream = args.scale * (c.has_grad_loss ? before.grad_loss.get(0) : 1);
  // The error of an entry of d, in units of |a| + |b|: roundings of its own and of the norms.
  const double unit = 32 * roundoff(before.loss_dtype);
  std::vector<Expected> row_loss, of_student, of_teacher;
  double loss = 0, loss_slack = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    const Unit student(before.student, r, c.entries), teacher(before.teacher, r, c.entries);
    const size_t n = student.entry.size();
    std::vector<double> d(n), size(n), error(n), u(n);  // u: the derivative by d, error: its own
    long double cost = 0, slack = 0, sizes = 0;
    for (size_t i = 0; i < n; ++i) {
      const long double a = student.entry[i], b = teacher.entry[i];
      d[i] = static_cast<double>(a - b);
      size[i] = static_cast<double>(std::fabs(a) + std::fabs(b));
      const long double distance = std::fabs(a - b), off = unit * size[i];
      cost += c.p == 1 ? distance : distance * distance;
      slack += c.p == 1 ? off + unit * distance : 2 * distance * off + off * off + unit * distance * distance;
      sizes += static_cast<long double>(size[i]) * size[i];
    }
    const bool root = c.p == 2 && c.by_row;
    const double length = static_cast<double>(std::sqrt(cost));
    const double length_slack = unit * static_cast<double>(std::sqrt(sizes));
    row_loss.push_back(root ? Expected{length, unit * length + length_slack}
                            : Expected{static_cast<double>(cost), static_cast<double>(slack)});
    loss += args.scale * row_loss.back().value;
    loss_slack += args.scale * (row_loss.back().slack + unit * row_loss.back().value);
    for (size_t i = 0; i < n; ++i)
      if (c.p == 1) {
        u[i] = d[i] > 0 ? 1 : d[i] < 0 ? -1 : 0;
        error[i] = std::fabs(d[i]) <= unit * size[i] && size[i] > 0 ? 2 : unit;
      } else if (!root) {
        u[i] = 2 * d[i];
        error[i] = 4 * unit * size[i];
      } else {
        u[i] = length > 0 ? d[i] / length : 0;
        error[i] = 4 * (unit * size[i] + length_slack * std::fabs(u[i])) / std::max({length, length_slack, 1e-300});
      }
    const auto gradient = [&](const Unit& own, double sign, DType dtype, std::vector<Expected>& to) {
      long double along = 0, along_error = 0;
      for (size_t i = 0; i < n; ++i) {
        along += u[i] * own.entry[i];
        along_error += (error[i] + unit * std::fabs(u[i])) * std::fabs(own.entry[i]);
      }
      for (size_t i = 0; i < n; ++i) {
        const long double outer = own.norm > 0 ? sign * upstream / own.norm : 0, a = own.entry[i];
        const double value = static_cast<double>(outer * (u[i] - a * along));
        long double off = error[i] + unit * std::fabs(u[i]) + std::fabs(a) * (along_error + unit * std::fabs(along));
        off = off * std::fabs(outer) + 2 * roundoff(dtype) * std::fabs(value);
        if (dtype == DType::kFloat16) off += 0x1p-24;
        if (dtype == DType::kBFloat16 || dtype == DType::kFloat32) off += 0x1p-126;
        to.push_back({value, static_cast<double>(off)});
      }
    };
    if (c.wants_student) gradient(student, 1, c.student, of_student);
    if (c.wants_teacher) gradient(teacher, -1, c.teacher, of_teacher);
  }
  const auto matches = [](const Buffer& found, const std::vector<Expected>& expected) {
    for (size_t i = 0; i < expected.size(); ++i)
      if (!(std::fabs(found.get(static_cast<int64_t>(i)) - expected[i].value) <= expected[i].slack)) return false;
    return true;
  };
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    change(p);
    kernel.run(p.args());
    check(p.intact() && p.student == before.student && p.teacher == before.teacher,
          std::string(kernel.name) + ": the memory around:" + c.name());
    if (c.wants_row_loss) check(matches(p.row_loss, row_loss), std::string(kernel.name) + ": row_loss:" + c.name());
    if (c.wants_loss) check(matches(p.loss, {{loss, loss_slack}}), std::string(kernel.name) + ": loss:" + c.name());
    check(matches(p.grad_student, of_student), std::string(kernel.name) + ": grad_student:" + c.name());
    check(matches(p.grad_teacher, of_teacher), std::string(kernel.name) + ": grad_teacher:" + c.name());
  }
}

// ---- what is tested ------------------------------------------------------------------------------------------------

void test_dtypes() {
  for (const auto& [student, teacher] : kDTypes)
    for (int p : {1, 2})
      for (bool by_row : {false, true})
        run({.rows = 5, .entries = 70, .student = student, .teacher = teacher, .p = p, .by_row = by_row});
}

// Ragged sizes; the other choices are drawn.
void test_sizes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](int64_t rows, int64_t entries) {
    const auto& [student, teacher] = kDTypes[random() % 2 == 0 ? 0 : random() % kDTypes.size()];
    Case c{.rows = rows, .entries = entries, .student = student, .teacher = teacher, .p = one_of(1, 2)};
    c.by_row = one_of(false, true);
    c.wants_student = one_of(true, true, false);
    c.wants_teacher = one_of(true, false);
    c.has_grad_loss = one_of(false, true);
    c.student_offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{2});
    c.teacher_offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{2});
    run(c);
  };
  for (int64_t entries : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257})
    for (int64_t rows : {1, 2, 5, 33}) with(rows, entries);
  for (int64_t entries : {1000, 1023, 1024, 1025, 2048, 4099}) with(3, entries);
  with(300, 12);
  if (!kSlow) {
    with(130, 513);
    with(2, 20001);
  }
}

// Few rows of so many entries that each is cut into parts; whole packs and ragged ones.
void test_parts() {
  run({.rows = 2, .entries = 40001, .p = 2, .by_row = true});
  run({.rows = 1, .entries = 32768, .student = DType::kBFloat16, .teacher = DType::kBFloat16, .p = 1});
  run({.rows = 1, .entries = 33000, .student = DType::kBFloat16, .wants_teacher = false, .has_grad_loss = true});
  run({.rows = 1, .entries = 32768, .p = 2, .student_scale = 1e30, .teacher_scale = 1e-36});
}

// The scale of a factor does not count, nor does it overflow.
void test_extreme_scales() {
  for (double student : {1e-30, 1.0, 1e30})
    for (double teacher : {1e-36, 1.0, 1e36})
      for (int p : {1, 2})
        run({.entries = 77, .p = p, .by_row = true, .student_scale = student, .teacher_scale = teacher});
  run({.student = DType::kFloat64, .teacher = DType::kFloat64, .student_scale = 1e-300, .teacher_scale = 1e300});
  run({.student = DType::kBFloat16, .teacher = DType::kBFloat16, .student_scale = 1e-30, .teacher_scale = 1e30});
}

// One factor alone off the alignment that whole packs ask for.
void test_alignment() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16})
    for (int64_t student : {0, 1})
      run({.entries = 64,
           .student = dtype,
           .teacher = dtype,
           .student_offset = student,
           .teacher_offset = 1 - student});
}

// Some rows of zeros, whatever the gradient from above; the others are as without them.
void test_zeros() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64})
    for (int p : {1, 2})
      for (bool by_row : {false, true})
        run({.rows = 4,
             .entries = 37,
             .student = dtype,
             .teacher = dtype,
             .p = p,
             .by_row = by_row,
             .has_grad_loss = true},
            [](Problem& problem) {
              problem.grad_loss.set(0, 1e9);
              for (int64_t i = 0; i < 37; ++i) {
                problem.student.set(i, 0);
                problem.teacher.set(37 + i, 0);
                problem.student.set(74 + i, 0);
                problem.teacher.set(74 + i, 0);
              }
            });
}

// Equal factors cost nothing, whatever power of two lies between them, to the bit.
void test_equal_factors() {
  std::vector<Case> cases;
  for (int p : {1, 2})
    for (bool by_row : {false, true})
      for (int64_t entries : {1, 13, 700, 1025})
        for (double factor : {1.0, 0x1p-90, 0x1p90})
          cases.push_back({.rows = 2, .entries = entries, .p = p, .by_row = by_row, .teacher_scale = factor});
  for (const Kernel& kernel : kernels())
    for (const Case& c : cases) {
      Problem problem(c);
      for (int64_t i = 0; i < c.rows * c.entries; ++i) problem.teacher.set(i, c.teacher_scale * problem.student.get(i));
      kernel.run(problem.args());
      bool ok = problem.loss.get(0) == 0 && problem.intact();
      for (int64_t i = 0; i < c.rows * c.entries; ++i)
        ok = ok && problem.grad_student.get(i) == 0 && problem.grad_teacher.get(i) == 0;
      check(ok, std::string(kernel.name) + ": equal factors:" + c.name());
    }
}

// NaN and infinity reach the loss and the gradients of their own row alone.
void test_values_stay_in_their_row() {
  for (const Kernel& kernel : kernels())
    for (int p : {1, 2})
      for (double bad : {kNan, kInfinity, -kInfinity})
        for (bool in_student : {false, true}) {
          const Case c{.rows = 3, .entries = 50, .p = p, .by_row = true};
          Problem clean(c), problem(c);
          (in_student ? problem.student : problem.teacher).set(50 + 17, bad);
          kernel.run(clean.args());
          kernel.run(problem.args());
          bool ok = std::isnan(problem.loss.get(0)) && problem.intact();
          for (int64_t r = 0; r < 3; ++r)
            for (int64_t i = 50 * r; i < 50 * (r + 1); ++i)
              for (const auto& [found, expected] : {std::pair(problem.grad_student.get(i), clean.grad_student.get(i)),
                                                    std::pair(problem.grad_teacher.get(i), clean.grad_teacher.get(i))})
                ok = ok && (r == 1 ? std::isnan(found) : found == expected);
          check(ok, std::string(kernel.name) + ": NaN stays in its row:" + c.name());
        }
}

// The same bits again; gradients that do not depend on what else is asked for; rows that do not on those beside them.
void test_same_bits() {
  for (const Kernel& kernel : kernels())
    for (int p : {1, 2})
      for (int64_t entries : {33, 1500}) {
        Case c{.rows = 6, .entries = entries, .p = p, .by_row = true};
        Problem whole(c), again(c), tail(c);
        kernel.run(whole.args());
        kernel.run(again.args());
        c.wants_teacher = c.wants_row_loss = c.wants_loss = false;
        Problem student_alone(c);
        kernel.run(student_alone.args());
        FactorLoss args = tail.args();
        args.student = tail.student.data() + 3 * entries * 4;
        args.teacher = tail.teacher.data() + 3 * entries * 4;
        args.rows = 3;
        kernel.run(args);
        bool ok = whole.loss == again.loss && whole.grad_student == again.grad_student &&
                  whole.grad_teacher == again.grad_teacher && student_alone.grad_student == whole.grad_student;
        for (int64_t r = 0; r < 3; ++r) ok = ok && tail.row_loss.get(r) == whole.row_loss.get(3 + r);
        for (int64_t i = 0; i < 3 * entries; ++i)
          ok = ok && tail.grad_teacher.get(i) == whole.grad_teacher.get(3 * entries + i);
        check(ok, std::string(kernel.name) + ": the same bits:" + c.name());
      }
}

void test_no_rows() {
  for (const Kernel& kernel : kernels())
    for (int64_t entries : {1, 10, 20000}) {
      Problem problem({.rows = 0, .entries = entries});
      kernel.run(problem.args());
      check(problem.loss.get(0) == 0 && problem.intact(), std::string(kernel.name) + ": no rows lose nothing");
    }
}

}  // namespace

int main() {
  test_dtypes();
  test_sizes();
  test_parts();
  test_alignment();
  test_extreme_scales();
  test_zeros();
  test_equal_factors();
  test_values_stay_in_their_row();
  test_same_bits();
  test_no_rows();
  return report();
}
