// block_norm without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against the definition in scalar double; blocks that do not divide, teachers of other sizes, every buffer between
// sentinels.
#include "kernels/block_norm/block_norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(block_norm_cpu, (const BlockNorm& args, int64_t unit_begin, int64_t unit_end))

namespace {

using namespace pykd::testing;
using pykd::BlockNorm;
using pykd::BlockNormWeight;
using pykd::Blocks;
using pykd::DType;

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();

// ---- one problem ---------------------------------------------------------------------------------------------------

// As the glue packs them: no rows where there are no entries.
Blocks blocks(int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns) {
  if (rows * columns == 0) return {};
  return {rows, columns, std::min(rows, block_rows), std::min(columns, block_columns)};
}

struct Pair {
  Blocks student, teacher{};
};

struct Case {
  std::vector<Pair> weights;
  DType dtype = DType::kFloat32, teacher_dtype = DType::kFloat32;
  bool linf = false, by_size = false, accumulate = false, in_place = false;
  bool wants_value = true, wants_grad = true, wants_norms = false;
  bool has_grad_value = false;
  double scale = 1, size = 1;  // size: of the weights
  int64_t offset = 0;          // entries from a well aligned address

  std::string name() const {
    std::string name = described({{"dtype", static_cast<int>(dtype)},
                                  {"teacher", static_cast<int>(teacher_dtype)},
                                  {"linf", linf},
                                  {"by_size", by_size},
                                  {"accumulate", accumulate},
                                  {"in_place", in_place},
                                  {"value", wants_value},
                                  {"grad", wants_grad},

                                  {"grad_value", has_grad_value},
                                  {"scale", scale},
                                  {"size", size},
                                  {"offset", offset}});
    for (const Pair& w : weights)
      for (const Blocks& b : {w.student, w.teacher})
        name += described({{"|", b.rows}, {"x", b.columns}, {"by", b.block_rows}, {"x", b.block_columns}});
    return name;
  }
};

struct Kernel {
  const char* name;
  void (*run)(BlockNorm& args);
};

void add_up(const BlockNorm& args, int64_t units) {
  double total = 0;
  for (int64_t i = 0; i < units; ++i) total += args.unit_value[i];
  total *= args.scale;
  if (args.dtype == DType::kFloat64)
    *static_cast<double*>(args.value) = total;
  else
    *static_cast<float*>(args.value) = static_cast<float>(total);
}

// The units in steps of 1 + step, 1 + 2 * step, ... or all at once.
template <void (*kCpu)(const BlockNorm&, int64_t, int64_t), bool kApart>
void run_units(BlockNorm& args) {
  const int64_t units = pykd::block_norm_units(args);
  Buffer values(DType::kFloat64, args.value ? units : 0);
  args.unit_value = args.value ? reinterpret_cast<double*>(values.data()) : nullptr;
  for (int64_t begin = 0; begin < units;) {
    const int64_t end = kApart ? std::min(units, begin + 1 + begin % 3) : units;
    kCpu(args, begin, end);
    begin = end;
  }
  if (args.value) add_up(args, units);
  check(values.intact(), "the units' sentinels");
}

template <void (*kCpu)(const BlockNorm&, int64_t, int64_t)>
void run_cpu(BlockNorm& args) {
  run_units<kCpu, false>(args);
}

void run_cuda(BlockNorm& args) {
  const int64_t bytes = pykd::block_norm_workspace_bytes(args);
  Buffer workspace(DType::kFloat32, bytes / 4);
  const int status = pykd::block_norm_cuda(args, bytes > 0 ? workspace.data() : nullptr, nullptr);
  check(status == 0 && workspace.intact(), "the workspace's sentinels");
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::block_norm_cpu>},
                             {"cpu, units apart", run_units<pykd::block_norm_cpu, true>}};
  PYKD_ADD_LEVELS(all, run_cpu, block_norm_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c)
      : c(c), loss_dtype(loss_dtype_of(c.dtype)), grad_value(loss_dtype, 1), value(loss_dtype, 1) {
    std::mt19937_64 random(7919);
    std::normal_distribution<double> normal(0, 1);
    // Few different magnitudes, so that many share the largest.
    const auto entry = [&] { return c.size * (c.linf ? std::round(2 * normal(random)) / 2 : normal(random)); };
    for (const Pair& w : c.weights) {
      const int64_t count = w.student.rows * w.student.columns, taught = w.teacher.rows * w.teacher.columns;
      const int64_t groups = w.student.grid_rows() * w.student.grid_columns();
      student.emplace_back(c.dtype, count, c.offset);
      teacher.emplace_back(c.teacher_dtype, taught, c.offset);
      grad.emplace_back(c.dtype, c.wants_grad && !c.in_place ? count : 0, c.offset);
      norms.emplace_back(loss_dtype, c.wants_norms ? groups : 0);
      for (int64_t i = 0; i < count; ++i) student.back().set(i, entry());
      for (int64_t i = 0; i < taught; ++i) teacher.back().set(i, entry());
      if (c.wants_grad && !c.in_place && c.accumulate)
        for (int64_t i = 0; i < count; ++i) grad.back().set(i, normal(random));
    }
    grad_value.set(0, -0.75);
  }

  // Valid while this lives and does not move.
  BlockNorm args() {
    packed.clear();
    for (size_t i = 0; i < c.weights.size(); ++i) {
      const Pair& w = c.weights[i];
      void* const gradient = c.in_place ? student[i].data() : grad[i].data();
      packed.push_back({student[i].data(), w.teacher.rows > 0 ? teacher[i].data() : nullptr,
                        c.wants_grad ? gradient : nullptr, c.wants_norms ? norms[i].data() : nullptr, w.student,
                        w.teacher});
    }
    return {packed.data(),
            static_cast<int64_t>(packed.size()),
            c.has_grad_value ? grad_value.data() : nullptr,
            nullptr,
            c.wants_value ? value.data() : nullptr,
            c.scale,
            c.dtype,
            c.teacher_dtype,
            c.linf,
            c.by_size,
            c.accumulate};
  }

  bool intact() const {
    const auto all = [](const std::vector<Buffer>& buffers) {
      return std::all_of(buffers.begin(), buffers.end(), [](const Buffer& b) { return b.intact(); });
    };
    return all(student) && all(teacher) && all(grad) && all(norms) && grad_value.intact() && value.intact();
  }

  const Buffer& gradient(size_t i) const { return c.in_place ? student[i] : grad[i]; }

  Case c;
  DType loss_dtype;
  std::vector<Buffer> student, teacher, grad, norms;
  Buffer grad_value, value;
  std::vector<BlockNormWeight> packed;
};

// use(index) for each entry of the group (i, j); none where the grid has no such group.
template <typename Use>
void each_entry(const Blocks& b, int64_t i, int64_t j, const Use& use) {
  for (int64_t r = i * b.block_rows; r < std::min(b.rows, (i + 1) * b.block_rows); ++r)
    for (int64_t c = j * b.block_columns; c < std::min(b.columns, (j + 1) * b.block_columns); ++c)
      use(r * b.columns + c);
}

// The norm of a group, and how many entries attain the largest magnitude.
struct Measured {
  double norm = 0, ties = 0, entries = 0;
};

Measured measured(const Buffer& weight, const Blocks& b, int64_t i, int64_t j, bool linf) {
  Measured m;
  long double squares = 0;
  each_entry(b, i, j, [&](int64_t at) {
    const double w = std::fabs(weight.get(at));
    ++m.entries;
    squares += static_cast<long double>(w) * w;
    if (linf && w >= m.norm) m.ties = w > m.norm ? 1 : m.ties + 1;
    if (linf) m.norm = std::max(m.norm, w);
  });
  if (!linf) m.norm = static_cast<double>(sqrtl(squares));
  return m;
}

// Every kernel on one problem, against the definition.
void run(const Case& c) {
  Problem before(c);
  const double unit = 64 * roundoff(before.loss_dtype);
  double value = 0;
  std::vector<std::vector<double>> norms, grads;
  for (size_t k = 0; k < c.weights.size(); ++k) {
    const Blocks &s = c.weights[k].student, &t = c.weights[k].teacher;
    norms.emplace_back(static_cast<size_t>(s.grid_rows() * s.grid_columns()));
    grads.emplace_back(static_cast<size_t>(s.rows * s.columns));
    for (int64_t i = 0; i < std::max(s.grid_rows(), t.grid_rows()); ++i)
      for (int64_t j = 0; j < std::max(s.grid_columns(), t.grid_columns()); ++j) {
        const Measured own = measured(before.student[k], s, i, j, c.linf);
        const Measured its = measured(before.teacher[k], t, i, j, c.linf);
        const double norm = c.linf ? std::max(own.norm, its.norm) : std::hypot(own.norm, its.norm);
        const double size = c.by_size ? std::sqrt(own.entries + its.entries) : 1;
        const double scale = size * c.scale * (c.has_grad_value ? before.grad_value.get(0) : 1);
        value += c.scale * size * norm;
        if (i < s.grid_rows() && j < s.grid_columns())
          norms[k][static_cast<size_t>(i * s.grid_columns() + j)] = own.norm;
        each_entry(s, i, j, [&](int64_t at) {
          const double w = before.student[k].get(at);
          double grad = 0;
          if (!c.linf)
            grad = norm > 0 ? w / norm : 0;
          else if (own.norm > its.norm && std::fabs(w) == own.norm)
            grad = std::copysign(1, w) / own.ties;
          grads[k][static_cast<size_t>(at)] = scale * grad;
        });
      }
  }
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    BlockNorm args = p.args();
    kernel.run(args);
    const std::string name = std::string(kernel.name) + ":" + c.name();
    check(p.intact(), name + ": sentinels");
    check(!c.wants_value || std::fabs(p.value.get(0) - value) <= unit * std::fabs(value), name + ": value");
    bool good_norms = true, good_grads = true, kept = true;
    for (size_t k = 0; k < c.weights.size(); ++k) {
      for (size_t g = 0; g < norms[k].size() && c.wants_norms; ++g)
        good_norms &= std::fabs(p.norms[k].get(static_cast<int64_t>(g)) - norms[k][g]) <= unit * norms[k][g];
      for (size_t i = 0; i < grads[k].size() && c.wants_grad; ++i) {
        const int64_t at = static_cast<int64_t>(i);
        const double old = c.accumulate ? before.gradient(k).get(at) : 0, expected = old + grads[k][i];
        const double slack = unit * (std::fabs(old) + std::fabs(grads[k][i])) +
                             2 * roundoff(c.dtype) * std::fabs(expected) + (c.dtype == DType::kFloat16 ? 0x1p-24 : 0);
        good_grads &= std::fabs(p.gradient(k).get(at) - expected) <= slack;
      }
      kept &= (c.wants_grad && c.in_place) || p.student[k] == before.student[k];
      kept &= p.teacher[k] == before.teacher[k];
    }
    check(good_norms, name + ": norms");
    check(good_grads, name + ": gradients");
    check(kept, name + ": weights stay");
  }
}

// ---- tests ---------------------------------------------------------------------------------------------------------

// Weights of many shapes, alone, under changing options.
void test_shapes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](std::vector<Pair> weights) {
    Case c{.weights = std::move(weights)};
    c.linf = one_of(false, true);
    c.by_size = one_of(false, true);
    c.accumulate = one_of(false, false, true);
    c.in_place = one_of(false, false, false, true);
    c.wants_value = one_of(true, true, false);
    c.wants_grad = one_of(true, true, true, false);
    c.wants_norms = !c.by_size && one_of(true, false, false);  // the glue asks for them of weights alone
    c.has_grad_value = one_of(true, false);
    c.scale = one_of(1.0, 0.125, -3.0);
    c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1});
    const auto& types = kDTypes[random() % (2 * kDTypes.size()) % kDTypes.size()];
    if (one_of(true, false)) c.dtype = types[0], c.teacher_dtype = types[1];
    run(c);
  };
  const auto alone = [&](int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns) {
    with({{blocks(rows, columns, block_rows, block_columns)}});
  };
  for (int64_t side : {1, 2, 3, 4, 5, 8, 16, 17}) {
    alone(20, 36, side, side);
    if (!kSlow) alone(33, 27, side, side);
  }
  for (int64_t kernel : {1, 9, 25}) {
    alone(30, 8 * kernel, 30, kernel);     // "in"
    alone(30, 7 * kernel, 1, 7 * kernel);  // "out"
    alone(30, 7 * kernel, 1, kernel);      // "kernel"
    alone(30, 8 * kernel, 2, kernel);
  }
  alone(64, 72, 4, 4);
  alone(9, 200, 4, 64);
  alone(9, 200, 4, 70);
  alone(12, 128, 8, 32);
  alone(12, 1024, 8, 8);    // rows that fall into the same sets of a cache
  alone(3, 1500, 3, 1500);  // wider than a panel
  alone(2, 2300, 1, 1100);
  alone(5, 1028, 1, 1028);
  alone(3, 1031, 1, 1031);
  if (kSlow) return;
  alone(100, 1032, 4, 4);
  alone(40, 1100, 16, 16);
  alone(1200, 20, 1200, 1);  // more rows than the registers of a block hold
  alone(700, 18, 700, 9);
  alone(130, 260, 128, 128);
  alone(90, 800, 90, 100);
  alone(3000, 1, 3000, 1);
  alone(1, 9000, 1, 9000);
  alone(1, 20000, 1, 4);
  alone(2, 20000, 1, 9);
}

// Teachers of other sizes than the student, and without a partner.
void test_teachers() {
  const std::array<Pair, 18> pairs = {{{blocks(20, 200, 4, 4), blocks(18, 170, 4, 4)},
                                       {blocks(18, 170, 4, 2), blocks(20, 200, 4, 2)},
                                       {blocks(20, 200, 8, 16), blocks(40, 100, 8, 16)},
                                       {blocks(30, 100, 1, 100), blocks(60, 150, 1, 150)},
                                       {blocks(30, 150, 1, 150), blocks(20, 100, 1, 100)},
                                       {blocks(9, 300, 4, 90), blocks(9, 150, 4, 90)},
                                       {blocks(20, 36, 4, 4), blocks(20, 36, 4, 4)},
                                       {blocks(20, 36, 4, 4), blocks(33, 50, 4, 4)},
                                       {blocks(33, 50, 4, 4), blocks(20, 36, 4, 4)},
                                       {blocks(20, 50, 5, 7), blocks(33, 36, 5, 7)},
                                       {blocks(30, 27, 30, 9), blocks(60, 45, 60, 9)},
                                       {blocks(30, 45, 30, 9), blocks(60, 27, 60, 9)},
                                       {blocks(30, 27, 1, 27), blocks(60, 45, 1, 45)},
                                       {blocks(30, 27, 1, 9), blocks(60, 45, 1, 9)},
                                       {blocks(30, 45, 1, 9), blocks(60, 18, 1, 9)},
                                       {blocks(1, 20, 4, 4), blocks(10, 10, 4, 4)},
                                       {blocks(20, 36, 4, 4), {}},
                                       {{}, blocks(20, 36, 4, 4)}}};
  const auto with = [](std::vector<Pair> weights, size_t i) {
    const auto& types = kDTypes[i % kDTypes.size()];
    run({.weights = std::move(weights),
         .dtype = types[0],
         .teacher_dtype = types[1],
         .linf = i % 2 == 0,
         .by_size = i / 2 % 2 == 0,
         .accumulate = i % 5 == 0,
         .in_place = i % 7 == 5,
         .wants_value = i % 4 != 3,
         .has_grad_value = i % 3 == 1,
         .scale = 0.5});
  };
  size_t i = 0;
  for (const Pair& pair : pairs) {
    with({pair}, i++);
    if (!kSlow) with({pair}, i);
  }
  for (i = 0; i < (kSlow ? 1 : 4); ++i) with({pairs.begin(), pairs.end()}, i);
}

// More weights than one launch takes.
void test_lists() {
  run({.weights = {}, .wants_grad = false, .wants_norms = true});
  run({.weights = {{}, {}}});
  std::vector<Pair> many;
  for (int64_t i = 0; i < (kSlow ? 51 : 110); ++i)
    many.push_back({blocks(i % 7, 3 + i % 5, 2, 3), i % (kSlow ? 20 : 3) ? Blocks{} : blocks(3, 4, 2, 3)});
  run({.weights = many});
  if (!kSlow) run({.weights = many, .linf = true, .by_size = true});
}

// Gradients that are written past the caches.
void test_large() {
  for (bool linf : {false, true})
    run({.weights = {{blocks(2056, 4096, 4, 4)}, {blocks(64, 132000, 1, 132000)}}, .linf = linf, .offset = linf});
}

void test_extreme_sizes() {
  const std::vector<Pair> weights = {{blocks(12, 40, 4, 4), blocks(12, 12, 4, 4)}, {blocks(40, 6, 40, 1)}};
  for (bool linf : {false, true})
    for (double size : {1e30, 1e-30, 1e17, 1e-17}) run({.weights = weights, .linf = linf, .size = size});
  for (double size : {1e200, 1e-200})
    run({.weights = weights, .dtype = DType::kFloat64, .teacher_dtype = DType::kFloat64, .size = size});
}

// What is not a number or infinite shows in the value and in the gradient of its own group alone; groups of zeros have
// the gradient 0, also beside groups whose squares vanish.
void test_extreme_groups() {
  for (const Kernel& kernel : kernels())
    for (bool linf : {false, true})
      for (double extreme : {0.0, kNan, kInfinity, -kInfinity, 1e-36}) {
        const Case c{.weights = {{blocks(10, 40, 4, 4)}, {blocks(20, 5, 20, 1)}}, .linf = linf};
        Problem clean(c), p(c);
        const auto in_group = [](const Blocks& b, int64_t at) {
          return at / b.columns / b.block_rows == 1 && at % b.columns / b.block_columns == 2;
        };
        const Blocks& b = c.weights[0].student;
        each_entry(b, 1, 2, [&](int64_t at) {
          if (extreme == 0 || at == 5 * 40 + 9) p.student[0].set(at, extreme);
        });
        if (extreme == 1e-36) each_entry(b, 1, 2, [&](int64_t at) { p.student[0].set(at, extreme); });
        BlockNorm args = clean.args(), extremes = p.args();
        kernel.run(args);
        kernel.run(extremes);
        bool others = p.grad[1] == clean.grad[1], own = true;
        for (int64_t at = 0; at < b.rows * b.columns; ++at) {
          const double grad = p.grad[0].get(at);
          if (!in_group(b, at))
            others &= std::fabs(grad - clean.grad[0].get(at)) <= 1e-6;
          else if (extreme == 0)
            own &= grad == 0;
          else if (std::isnan(extreme))
            own &= std::isnan(grad);
          else if (extreme == 1e-36)
            own &= std::fabs(grad - (linf ? 1.0 / 16 : 0.25)) < 1e-5;
        }
        const double value = p.value.get(0);
        const std::string name =
            std::string(kernel.name) + (linf ? ": l1_linf" : ": l1_l2") + described({{"with", extreme}});
        check(others, name + ": other groups");
        check(own, name + ": its group");
        check(std::isnan(extreme)   ? std::isnan(value)
              : std::isinf(extreme) ? value == kInfinity
                                    : value > 0,
              name + ": value");
      }
}

}  // namespace

int main() {
  test_shapes();
  test_teachers();
  test_lists();
  if (!kSlow) test_large();
  test_extreme_sizes();
  test_extreme_groups();
  return report();
}
