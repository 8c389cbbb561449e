// sparse_linear without torch: the CPU kernel of every level this processor runs and the CUDA kernel, under emulation,
// against a dense product in double; odd sizes, every height of a tile, rows as they lie and panels, parts of the work
// apart, every output between sentinels.
#include "kernels/sparse_linear/sparse_linear.h"

#include "core/sparse_test.h"

PYKD_DECLARE_LEVELS(sparse_linear_cpu,
                    (const SparseLinear& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end))
PYKD_DECLARE_LEVELS(sparse_linear_bfloat16_cpu, (const SparseLinearBFloat16& args, int64_t begin, int64_t end,
                                                 int64_t tile_begin, int64_t tile_end))

namespace {

using namespace pykd::testing;
using pykd::DType;
using pykd::SparseLinear;
using pykd::SparseLinearBFloat16;

struct Kernel {
  const char* name;
  void (*run)(const SparseLinear& args);
};

int64_t parts_of(const SparseLinear& args) {
  return args.lanes == 1 ? args.batch : (args.batch + args.lanes - 1) / args.lanes;
}

template <void (*kCpu)(const SparseLinear&, int64_t, int64_t, int64_t, int64_t)>
void run_cpu(const SparseLinear& args) {
  kCpu(args, 0, parts_of(args), 0, args.weight.tiles);
}

void run_parts_apart(const SparseLinear& args) {
  for (int64_t begin = 0; begin < parts_of(args); begin += 2)
    for (int64_t part = 0; part < 3; ++part)
      pykd::sparse_linear_cpu(args, begin, std::min(parts_of(args), begin + 2),
                              pykd::tile_of_part(args.weight, part, 3), pykd::tile_of_part(args.weight, part + 1, 3));
}

void run_cuda(const SparseLinear& args) { check(pykd::sparse_linear_cuda(args, nullptr) == 0, "the launch"); }

std::vector<Kernel> kernels() {
  std::vector<Kernel> all = {{"cpu", run_cpu<pykd::sparse_linear_cpu>}, {"cpu, parts apart", run_parts_apart}};
  PYKD_ADD_LEVELS(all, run_cpu, sparse_linear_cpu);
  all.push_back({"cuda", run_cuda});
  return all;
}

// input is [batch, in]; what the kernel gets and gives lies as `lanes` says.
int64_t place(int64_t b, int64_t i, int64_t features, int64_t lanes) {
  return lanes == 1 ? b * features + i : (b / lanes * features + i) * lanes + b % lanes;
}

void test(const SparseMatrix& w, int64_t batch, int64_t lanes, bool relu, bool has_bias, std::mt19937& random) {
  const int64_t in = w.columns * w.groups, out = w.rows, padded = (batch + lanes - 1) / lanes * lanes;
  const Vector<float> given = filled(batch * in, random), bias = filled(out, random);
  Vector<float> input(static_cast<size_t>(padded * in));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < in; ++i)
      input[static_cast<size_t>(place(b, i, in, lanes))] = given[static_cast<size_t>(b * in + i)];
  std::vector<double> wanted, bounds;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t o = 0; o < out; ++o) {
      double sum = has_bias ? bias[static_cast<size_t>(o)] : 0, size = std::abs(sum);
      for (int64_t i = 0; i < w.columns; ++i) {
        const double term = static_cast<double>(w.dense[static_cast<size_t>(o * w.columns + i)]) *
                            given[static_cast<size_t>(b * in + o / (w.rows / w.groups) * w.columns + i)];
        sum += term;
        size += std::abs(term);
      }
      wanted.push_back(relu && sum < 0 ? 0 : sum);
      // A rounding for each of the terms and the bias, and one more where kernels sum in parts.
      bounds.push_back(static_cast<double>(w.columns + 4) * 0x1p-24 * size);
    }
  for (const Kernel& kernel : kernels()) {
    Buffer output(DType::kFloat32, padded * out);
    kernel.run({lanes == 1 ? w.rowwise() : w.panels(), input.data(), reinterpret_cast<float*>(output.data()),
                has_bias ? bias.data() : nullptr, batch, in, out, lanes,
                relu ? pykd::Activation::kRelu : pykd::Activation::kNone});
    const std::string name = kernel.name + w.name() + described({{"batch", batch}, {"lanes", lanes}, {"relu", relu}});
    bool right = true;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const int64_t b = static_cast<int64_t>(i) / out, o = static_cast<int64_t>(i) % out;
      right = right && std::abs(output.get(place(b, o, out, lanes)) - wanted[i]) <= bounds[i];
    }
    check(right, name);
    check(output.intact(), name + ": beyond the output");
  }
}

using BFloat16Kernel = void (*)(const SparseLinearBFloat16&, int64_t, int64_t, int64_t, int64_t);

void test_bfloat16(const SparseMatrix& w, int64_t batch, DType dtype, std::mt19937& random) {
  std::vector<std::pair<const char*, BFloat16Kernel>> all = {{"door", pykd::sparse_linear_bfloat16_cpu}};
#if defined(__x86_64__)
  all.push_back({"baseline", pykd::baseline::sparse_linear_bfloat16_cpu});
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx2) all.push_back({"avx2", pykd::avx2::sparse_linear_bfloat16_cpu});
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx512) all.push_back({"avx512", pykd::avx512::sparse_linear_bfloat16_cpu});
#endif
  const Vector<float> given = filled(batch * w.columns, random), bias = filled(w.rows, random);
  std::vector<uint16_t> input(given.size());
  std::ranges::transform(given, input.begin(), [](float value) { return pykd::half_bits(value, DType::kBFloat16); });
  const bool relu = random() % 2;
  std::vector<double> wanted, bounds;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t o = 0; o < w.rows; ++o) {
      double sum = bias[static_cast<size_t>(o)], size = std::abs(sum);
      for (int64_t i = 0; i < w.columns; ++i) {
        const double term =
            w.dense[static_cast<size_t>(o * w.columns + i)] *
            static_cast<double>(pykd::rounded(given[static_cast<size_t>(b * w.columns + i)], DType::kBFloat16));
        sum += term;
        size += std::abs(term);
      }
      wanted.push_back(relu && sum < 0 ? 0 : sum);
      // Processors may round products and sums of pairs apart, and take what is below 2^-126 for 0.
      const double bound = static_cast<double>(2 * w.columns + 4) * 0x1p-24 * size + 0x1p-120;
      bounds.push_back(bound + (dtype == DType::kBFloat16 ? 0x1p-8 * (std::abs(wanted.back()) + bound) : 0));
    }
  for (const auto& [level, kernel] : all)
    for (const bool squares : {false, true}) {
      Buffer output(dtype, batch * w.rows);
      kernel({w.halves(), input.data(), output.data(), bias.data(), w.columns, w.rows,
              relu ? pykd::Activation::kRelu : pykd::Activation::kNone, dtype, squares},
             0, batch, 0, w.halves().tiles);
      bool right = true;
      for (size_t i = 0; i < wanted.size(); ++i)
        right = right && std::abs(output.get(static_cast<int64_t>(i)) - wanted[i]) <= bounds[i];
      const std::string name = std::string("bfloat16 ") + level + w.name() +
                               described({{"batch", batch}, {"squares", squares}, {"dtype", static_cast<int>(dtype)}});
      check(right, name);
      check(output.intact(), name + ": beyond the output");
    }
}

// Halves are made where nothing is lost, and hold the values as pairs of columns.
void test_packed_halves(DType halves, std::mt19937& random) {
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{9, 2}, {16, 16}, {40, 6}, {8, 2}, {16, 3}, {1, 2}}) {
    const SparseMatrix w(40, 30, height, width, 0.5, random, 1, halves);
    const bool made = height > 8 && width % 2 == 0;
    const pykd::SparseTiles tiles = w.halves(), floats = w.panels();
    bool right = made ? tiles.tiles == floats.tiles && tiles.runs == floats.runs && tiles.dtype == halves
                      : tiles.tiles == 0 && tiles.halves == nullptr;
    for (int64_t i = 0; made && i < tiles.runs * width * 16; ++i) {
      const int64_t column = i / 16, half = (column / 2 * 16 + i % 16) * 2 + column % 2;
      right = right && tiles.halves[half] == pykd::half_bits(floats.values[i], halves);
    }
    check(right, "packed halves" + w.name());
  }
  const int64_t position = 0;
  const bool narrow = halves == DType::kFloat16;
  for (const auto& [value, held] : {std::pair{1 + 0x1p-7f, true},
                                    {1 + 0x1p-10f, narrow},
                                    {1 + 0x1p-11f, false},
                                    {65504.0f, narrow},
                                    {0x1p17f, !narrow},
                                    {0x1p-24f, true},
                                    {0x1p-25f, !narrow}}) {
    std::vector<float> values(32, 1);
    values[9] = value;
    const std::vector<char> packed = pykd::pack_sparse({&position, values.data(), 1, 16, 2, 16, 2, 1, halves});
    const auto* head = reinterpret_cast<const pykd::PackedSparse*>(packed.data());
    check((head->halves.tiles != 0) == held && (pykd::rounded(value, halves) == value) == held,
          "halves" + described({{"hold", value}, {"halves", static_cast<int>(halves)}}));
  }
  check(pykd::rounded(1 + 0x1p-8f, DType::kBFloat16) == 1 &&
            pykd::rounded(1 + 0x1.8p-7f, DType::kBFloat16) == 1 + 0x1p-6f,
        "bfloat16 rounds to nearest, ties to even");
  check(pykd::rounded(1 + 0x1p-11f, DType::kFloat16) == 1 &&
            pykd::rounded(1 + 0x1.8p-10f, DType::kFloat16) == 1 + 0x1p-9f &&
            std::isinf(pykd::rounded(65520, DType::kFloat16)),
        "float16 rounds to nearest, ties to even");
}

}  // namespace

int main() {
  std::mt19937 random(20261);
  for (const DType halves : {DType::kFloat16, DType::kBFloat16}) test_packed_halves(halves, random);
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{16, 16}, {33, 70}, {96, 64}, {40, 128}})
    for (const auto& [r, c] : {std::pair<int64_t, int64_t>{16, 16}, {16, 32}, {12, 6}, {32, 64}, {1000, 1000}})
      for (const double density : {0.0, 0.3, 1.0}) {
        if (kSlow && random() % 4) continue;
        const SparseMatrix w(rows, columns, r, c, density, random, 1, DType::kBFloat16);
        check(w.halves().tiles == w.panels().tiles, "halves" + w.name());
        for (const int64_t batch : {0, 1, 5, 16, 85})
          test_bfloat16(w, batch, batch % 2 ? DType::kFloat32 : DType::kBFloat16, random);
      }
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{1, 1}, {7, 5}, {16, 16}, {33, 70}, {50, 131}, {96, 64}})
    for (const auto& [r, c] : {std::pair<int64_t, int64_t>{1, 1},
                               {1, 16},
                               {1, 3},
                               {2, 5},
                               {3, 5},
                               {4, 4},
                               {8, 8},
                               {8, 1},
                               {16, 16},
                               {16, 3},
                               {20, 7},
                               {32, 32},
                               {1000, 1000}})
      for (const double density : {0.0, 0.3, 1.0}) {
        if (kSlow && random() % 4) continue;
        const SparseMatrix w(rows, columns, r, c, density, random);
        check(w.halves().tiles == 0, "no halves" + w.name());
        for (const int64_t batch : {0, 1, 2, 13}) test(w, batch, 1, batch % 2, random() % 2, random);
        for (const auto& [batch, lanes] : {std::pair<int64_t, int64_t>{1, 16}, {21, 16}, {40, 32}, {50, 48}})
          test(w, batch, lanes, batch % 2, random() % 2, random);
      }
  return report();
}
