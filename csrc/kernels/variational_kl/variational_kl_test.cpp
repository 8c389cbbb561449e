// variational_kl without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against the definition in scalar double; ragged sizes, lists, every buffer between sentinels.
#include "kernels/variational_kl/variational_kl.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kernel_test.h"

PYKD_DECLARE_LEVELS(variational_kl_cpu, (const VariationalKl& args, int64_t chunk_begin, int64_t chunk_end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::VariationalKl;
using pykd::VariationalWeights;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kTiny = std::numeric_limits<float>::min();

// ---- the definition ------------------------------------------------------------------------------------------------

struct Term {
  double kl = 0, theta = 0, log_sigma2 = 0;
  double sensitivity = 0;  // how far roundings of log_alpha, a difference of logarithms, move them, relatively
};

double logistic(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

Term term_of(double theta, double log_sigma2) {
  if (theta == 0) return {};
  constexpr double k1 = 0.63576, k2 = 1.87320, k3 = 1.48695;
  const double log_theta2 = 2 * std::log(std::fabs(theta)), log_alpha = log_sigma2 - log_theta2;
  const double s = logistic(-k2 - k3 * log_alpha);  // 1 - s(k2 + k3 log_alpha)
  const double softplus = std::log1p(std::exp(-std::fabs(log_alpha))) + (log_alpha < 0 ? -log_alpha : 0);
  Term term;
  term.kl = k1 * s + 0.5 * (std::isnan(log_alpha) ? log_alpha : softplus);
  term.log_sigma2 = -k1 * k3 * s * (1 - s) - 0.5 * logistic(-log_alpha);
  term.theta = -2 / theta * term.log_sigma2;
  term.sensitivity = 1 + std::fabs(log_theta2) + std::fabs(log_sigma2);
  return term;
}

bool is_near(double actual, double expected, double slack) {
  if (std::isnan(expected)) return std::isnan(actual);
  return actual == expected || std::fabs(actual - expected) <= slack;
}

// ---- one problem ---------------------------------------------------------------------------------------------------

struct Case {
  std::vector<int64_t> sizes = {10};
  DType dtype = DType::kFloat32;
  bool wants_kl = true, wants_grad = true;
  bool accumulate = false, in_place = false, has_grad_kl = false;
  double scale = 1;
  int64_t offset = 0;  // elements from a well aligned address to the weights'

  std::string name() const {
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    return described({{"tensors", static_cast<double>(sizes.size())},
                      {"weights", static_cast<double>(total)},
                      {"dtype", static_cast<int>(dtype)},
                      {"kl", wants_kl},
                      {"grad", wants_grad},
                      {"accumulate", accumulate},
                      {"in_place", in_place},
                      {"grad_kl", has_grad_kl},
                      {"scale", scale},
                      {"offset", static_cast<double>(offset)}});
  }
};

struct Kernel {
  const char* name;
  void (*run)(const VariationalKl& args, double* kl);
};

// The caller adds what the chunks say.
template <typename Run>
void run_chunks(VariationalKl args, double* kl, const Run& run) {
  const int64_t chunks = pykd::variational_kl_chunks(args);
  Buffer sums(DType::kFloat64, std::max<int64_t>(chunks, 0));
  args.chunk_kl = args.kl ? sums.data() : nullptr;
  run(args, chunks);
  check(sums.intact(), "the sentinels of the chunks");
  *kl = 0;
  for (int64_t i = 0; i < chunks && args.kl; ++i) *kl += args.scale * sums.get(i);
}

template <void (*kCpu)(const VariationalKl&, int64_t, int64_t)>
void run_cpu(const VariationalKl& args, double* kl) {
  run_chunks(args, kl, [](const VariationalKl& a, int64_t chunks) { kCpu(a, 0, chunks); });
}

void run_chunks_apart(const VariationalKl& args, double* kl) {
  run_chunks(args, kl, [](const VariationalKl& a, int64_t chunks) {
    for (int64_t begin = 0; begin < chunks;) {
      const int64_t end = std::min(chunks, begin + 1 + begin % 3);
      pykd::variational_kl_cpu(a, begin, end);
      begin = end;
    }
  });
}

void run_cuda(const VariationalKl& args, double* kl) {
  VariationalKl a = args;
  const DType dtype = loss_dtype_of(a.dtype);
  Buffer value(dtype, args.kl ? 1 : 0), workspace(DType::kFloat64, pykd::variational_kl_workspace_bytes(a) / 8);
  a.kl = args.kl ? value.data() : nullptr;
  const int status = pykd::variational_kl_cuda(a, workspace.data(), nullptr);
  check(status == 0 && workspace.intact() && value.intact(), "the sentinels of the workspace and the value");
  *kl = args.kl ? value.get(0) : 0;
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::variational_kl_cpu>}, {"cpu, chunks apart", run_chunks_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, variational_kl_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

struct Problem {
  explicit Problem(const Case& c) : c(c), grad_kl(loss_dtype_of(c.dtype), 1) {
    std::mt19937_64 random(c.sizes.size() * 7919 + static_cast<uint64_t>(c.sizes[0]));
    std::normal_distribution<double> normal;
    for (int64_t size : c.sizes) {
      theta.emplace_back(c.dtype, size, c.offset);
      log_sigma2.emplace_back(c.dtype, size, c.offset);
      for (auto* grads : {&grad_theta, &grad_log_sigma2})
        grads->emplace_back(c.dtype, c.wants_grad && !c.in_place ? size : 0, c.offset);
      for (int64_t i = 0; i < size; ++i) {
        theta.back().set(i, random() % 16 == 0 ? 0 : 0.1 * normal(random));
        log_sigma2.back().set(i, 3 * normal(random) - 4);
        if (!c.wants_grad || c.in_place || !c.accumulate) continue;
        grad_theta.back().set(i, normal(random));
        grad_log_sigma2.back().set(i, normal(random));
      }
    }
    grad_kl.set(0, -1.75);
  }

  // As long as the problem lives. The value's place is a sign that it is wanted.
  VariationalKl args() {
    layers.clear();
    for (size_t i = 0; i < c.sizes.size(); ++i)
      layers.push_back({theta[i].data(), log_sigma2[i].data(), c.wants_grad ? grads(0)[i].data() : nullptr,
                        c.wants_grad ? grads(1)[i].data() : nullptr, c.sizes[i]});
    VariationalKl a{};
    a.layers = layers.data();
    a.count = static_cast<int64_t>(layers.size());
    a.grad_kl = c.has_grad_kl ? grad_kl.data() : nullptr;
    a.kl = c.wants_kl ? &kl : nullptr;
    a.scale = c.scale;
    a.dtype = c.dtype;
    a.accumulate = c.accumulate;
    return a;
  }

  void run(const Kernel& kernel) { kernel.run(args(), &kl); }

  std::vector<Buffer>& grads(int which) {
    if (c.in_place) return which == 0 ? theta : log_sigma2;
    return which == 0 ? grad_theta : grad_log_sigma2;
  }

  bool intact() const {
    for (const auto* buffers : {&theta, &log_sigma2, &grad_theta, &grad_log_sigma2})
      if (!std::all_of(buffers->begin(), buffers->end(), [](const Buffer& b) { return b.intact(); })) return false;
    return grad_kl.intact();
  }

  Case c;
  std::vector<Buffer> theta, log_sigma2, grad_theta, grad_log_sigma2;
  Buffer grad_kl;
  double kl = 0;
  std::vector<VariationalWeights> layers;
};

// Every kernel on one problem, against the definition.
void run(const Case& c, void (*change)(Problem&) = [](Problem&) {}) {
  Problem before(c);
  change(before);
  const double factor = c.scale * (c.has_grad_kl ? before.grad_kl.get(0) : 1);
  const double unit = 16 * roundoff(loss_dtype_of(c.dtype));
  std::array<std::vector<double>, 2> grad, slack;
  long double kl = 0;  // its rounding in double would exceed the slack
  double kl_slack = 0;
  for (size_t layer = 0; layer < c.sizes.size(); ++layer)
    for (int64_t i = 0; i < c.sizes[layer]; ++i) {
      const double theta = before.theta[layer].get(i);
      const Term term = term_of(theta, before.log_sigma2[layer].get(i));
      kl += static_cast<long double>(term.kl);
      if (std::isfinite(term.kl)) kl_slack += unit * (2 + term.sensitivity) * term.kl;
      for (int which : {0, 1}) {
        const double old = c.wants_grad && c.accumulate ? before.grads(which)[layer].get(i) : 0;
        const double own = factor * (which == 0 ? term.theta : term.log_sigma2);
        const size_t at = static_cast<size_t>(which);
        grad[at].push_back(own + old);
        // A derivative by log_sigma2 that is below the smallest normal number may be 0.
        double allowed = unit * (term.sensitivity * std::fabs(own) + std::fabs(old)) + kTiny;
        if (which == 0 && theta != 0) allowed += kTiny / std::fabs(theta);
        allowed += 2 * roundoff(c.dtype) * std::fabs(own + old) + (c.dtype == DType::kFloat16 ? 0x1p-24 : 0);
        slack[at].push_back(allowed);
      }
    }
  const double expected = c.scale * static_cast<double>(kl);
  for (const Kernel& kernel : kernels()) {
    Problem p(c);
    change(p);
    p.run(kernel);
    bool ok = p.intact() && (!c.wants_kl || is_near(p.kl, expected, std::fabs(c.scale) * kl_slack + kTiny));
    for (int which : {0, 1}) {
      size_t at = 0;
      for (size_t layer = 0; c.wants_grad && layer < c.sizes.size(); ++layer)
        for (int64_t i = 0; i < c.sizes[layer]; ++i, ++at) {
          const size_t w = static_cast<size_t>(which);
          ok = ok && is_near(p.grads(which)[layer].get(i), grad[w][at], slack[w][at]);
        }
    }
    if (!c.in_place) ok = ok && p.theta == before.theta && p.log_sigma2 == before.log_sigma2;
    check(ok, std::string(kernel.name) + ":" + c.name());
  }
}

// ---- what is tested ------------------------------------------------------------------------------------------------

constexpr std::array kAll = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// Ragged sizes, alone and in lists longer than a launch takes; the other choices are drawn.
void test_sizes() {
  std::mt19937 random(1);
  const auto one_of = [&random](auto... choices) {
    const std::array all = {choices...};
    return all[random() % all.size()];
  };
  const auto with = [&](const std::vector<int64_t>& sizes) {
    Case c{.sizes = sizes, .dtype = kAll[random() % 2 == 0 ? 0 : random() % kAll.size()]};
    c.wants_kl = one_of(true, true, false);
    c.wants_grad = !c.wants_kl || one_of(true, true, false);
    c.accumulate = c.wants_grad && one_of(false, true);
    c.in_place = c.wants_grad && one_of(false, false, true);
    c.has_grad_kl = one_of(false, true);
    c.scale = one_of(1.0, 0.25, -3.0);
    c.offset = one_of(int64_t{0}, int64_t{0}, int64_t{1}, int64_t{2});
    run(c);
  };
  for (int64_t size : {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 100, 255, 1023, 1024, 1025, 2049, 4095, 4096, 4097})
    for (int i = 0; i < (size < 300 ? 4 : 2); ++i) with({size});
  for (int64_t size : {8192, 8200, 16384, 16385, 40001}) with({size});
  with({3, 0, 5000, 1, 0, 17, 16385, 4096});
  with({0, 0});
  with({4096, 1});
  for (size_t count : {size_t{48}, size_t{49}, size_t{100}}) {
    std::vector<int64_t> sizes(count);
    for (size_t i = 0; i < count; ++i) sizes[i] = static_cast<int64_t>(i * 5 % 23);
    with(sizes);
  }
  for (DType dtype : kAll)
    for (bool accumulate : {false, true}) run({.sizes = {333, 4100}, .dtype = dtype, .accumulate = accumulate});
}

// Every pair of extreme values alone, against the limits of the definition.
void test_extreme_values() {
  static double theta, log_sigma2;
  for (DType dtype : {DType::kFloat32, DType::kFloat64})
    for (double t : {0.0, -0.0, 2e-38, 1e-20, -0.5, 1e20, 1e38, kInfinity, kNan})
      for (double l : {-kInfinity, -100.0, -30.0, 0.0, 30.0, 100.0, kInfinity, kNan}) {
        theta = t, log_sigma2 = l;
        run({.sizes = {1}, .dtype = dtype}, [](Problem& p) {
          p.theta[0].set(0, theta);
          p.log_sigma2[0].set(0, log_sigma2);
        });
      }
  run({.sizes = {3}}, [](Problem& p) {  // subnormal means: nothing is left of them
    for (int i = 0; i < 3; ++i) {
      p.theta[0].set(i, std::array{1e-45, -1e-40, 1e-38}[static_cast<size_t>(i)]);
      p.log_sigma2[0].set(i, -4);
    }
  });
}

// NaN and infinity reach the value, and the gradients in their own place alone.
void test_values_stay_in_their_place() {
  for (const Kernel& kernel : kernels())
    for (int64_t place : {int64_t{0}, int64_t{5}, int64_t{4999}}) {
      const Case c{.sizes = {7, 5000}};
      Problem clean(c), p(c);
      for (Problem* each : {&clean, &p}) each->theta[1].set(place, 0.5);
      p.log_sigma2[1].set(place, kNan);
      clean.run(kernel);
      p.run(kernel);
      bool ok = std::isnan(p.kl) && !std::isnan(clean.kl) && p.grad_theta[0] == clean.grad_theta[0];
      for (int which : {0, 1})
        for (int64_t i = 0; i < 5000; ++i) {
          const double found = p.grads(which)[1].get(i);
          ok = ok && (i == place ? std::isnan(found) : found == clean.grads(which)[1].get(i));
        }
      check(ok, std::string(kernel.name) + ": NaN stays where it is");
    }
}

// The same bits again; and gradients that do not depend on what else is asked for.
void test_same_bits() {
  for (const Kernel& kernel : kernels()) {
    Case c{.sizes = {4100, 3, 9000}};
    Problem one(c), again(c);
    one.run(kernel);
    again.run(kernel);
    c.wants_kl = false;
    Problem grads(c);
    grads.run(kernel);
    c.wants_kl = true, c.wants_grad = false;
    Problem value(c);
    value.run(kernel);
    check(one.kl == again.kl && one.grad_theta == again.grad_theta && one.grad_log_sigma2 == again.grad_log_sigma2 &&
              grads.grad_theta == one.grad_theta && grads.grad_log_sigma2 == one.grad_log_sigma2 && value.kl == one.kl,
          std::string(kernel.name) + ": the same bits");
  }
}

}  // namespace

int main() {
  test_sizes();
  test_extreme_values();
  test_values_stay_in_their_place();
  test_same_bits();
  return report();
}
