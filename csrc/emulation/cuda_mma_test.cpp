// Tensor cores under emulation: where the numbers of a product lie, by the definition of mma.m16n8k16 for two bytes,
// and those of the matrices that ldmatrix reads.
#define PYKD_EMULATE_CUDA
#define PYKD_ISA cuda
#include "emulation/cuda_emulation.h"
// The emulation stands for CUDA's headers, so it comes first.
#include <random>

#include "core/cuda_mma.h"

namespace {

using pykd::DType;

int passed = 0, failed = 0;

void check(bool ok, const char* what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED: %s\n", what);
}

constexpr int kRows = 16, kColumns = 8, kSum = 16;

struct Product {
  float a[kRows][kSum], b[kSum][kColumns], sums[kRows][kColumns];
};

template <DType kHalves>
__global__ void multiply(Product* p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  Product& mine = p[threadIdx.x / 32];
  uint32_t a[4], b[2];
  float sums[4];
  for (int i = 0; i < 8; i += 2) {  // of i and i + 1, which are a register
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, k = member * 2 + (i >= 4 ? 8 : 0);
    a[i / 2] = pykd::cuda::pair_of<kHalves>(mine.a[row][k], mine.a[row][k + 1]);
  }
  for (int i = 0; i < 4; i += 2) {
    const int k = member * 2 + (i >= 2 ? 8 : 0);
    b[i / 2] = pykd::cuda::pair_of<kHalves>(mine.b[k][group], mine.b[k + 1][group]);
  }
  const auto sum_of = [&](int i) -> float& { return mine.sums[i < 2 ? group : group + 8][member * 2 + i % 2]; };
  for (int i = 0; i < 4; ++i) sums[i] = sum_of(i);
  pykd::cuda::mma<kHalves>(sums, {a[0], a[1], a[2], a[3]}, {b[0], b[1]});
  for (int i = 0; i < 4; ++i) sum_of(i) = sums[i];
}

// Whole numbers up to 8, whose sums of products are exact.
template <DType kHalves>
void test(const char* what) {
  std::mt19937 random(20267);
  const auto fill = [&](auto& rows) {
    for (auto& row : rows)
      for (float& x : row) x = static_cast<float>(random() % 17) - 8;
  };
  std::vector<Product> products(2);
  for (Product& p : products) fill(p.a), fill(p.b), fill(p.sums);
  std::vector<Product> wanted = products;
  for (Product& p : wanted)
    for (int row = 0; row < kRows; ++row)
      for (int column = 0; column < kColumns; ++column)
        for (int k = 0; k < kSum; ++k) p.sums[row][column] += p.a[row][k] * p.b[k][column];
  PYKD_LAUNCH(1, 64, 0, nullptr, multiply<kHalves>)(products.data());
  check(std::memcmp(products.data(), wanted.data(), 2 * sizeof(Product)) == 0, what);
}

// Row 2 r + c of the numbers, 8 of them, is row r % 8 of the matrix 2 (r / 8) + c, as rows of two matrices side by
// side.
__global__ void read(uint32_t* to) {
  alignas(16) __shared__ uint32_t pairs[32][4];
  const unsigned lane = threadIdx.x % 32;
  for (uint32_t i = 0; i < 4; ++i) pairs[lane][i] = 4 * lane + i;
  __syncwarp();
  const unsigned matrix = lane / 8, row = matrix / 2 * 8 + lane % 8, column = matrix % 2;
  const uint4 read = pykd::cuda::read_matrices(pairs[2 * row + column]);
  const uint32_t each[4] = {read.x, read.y, read.z, read.w};
  for (int i = 0; i < 4; ++i) to[4 * lane + static_cast<unsigned>(i)] = each[i];
}

void test_matrices() {
  std::vector<uint32_t> to(128);
  PYKD_LAUNCH(1, 32, 0, nullptr, read)(to.data());
  bool right = true;
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const unsigned row = matrix / 2 * 8 + lane / 4, column = matrix % 2;
      right = right && to[4 * lane + matrix] == 4 * (2 * row + column) + lane % 4;
    }
  check(right, "matrices");
}

}  // namespace

int main() {
  test_matrices();
  test<DType::kFloat16>("float16");
  test<DType::kBFloat16>("bfloat16");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
