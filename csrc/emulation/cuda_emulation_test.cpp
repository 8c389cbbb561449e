// The emulation itself: indices, both kinds of shared memory, barriers, shuffles, votes, atomics, half types.
#include "emulation/cuda_emulation.h"

#include <limits>
#include <numeric>

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED: %s\n", what);
}

__global__ void indices(unsigned* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * threads + thread;
}

// Each thread hands its value to the next one, first through static, then through dynamic shared memory.
__global__ void pass_on(int* values) {
  __shared__ int fixed[70];
  PYKD_DYNAMIC_SHARED(int, dynamic);
  const unsigned rank = threadIdx.x, next = (rank + 1) % blockDim.x;
  int* const mine = values + blockIdx.x * blockDim.x + rank;
  fixed[rank] = *mine;
  __syncthreads();
  dynamic[rank] = fixed[next];
  __syncthreads();
  *mine = dynamic[next];
}

__global__ void shuffles(int* down, int* exchanged, int* broadcast) {
  const int rank = static_cast<int>(threadIdx.x);
  down[rank] = __shfl_down_sync(~0u, rank, 3);
  exchanged[rank] = __shfl_xor_sync(~0u, rank, 1);
  broadcast[rank] = __shfl_sync(~0u, rank, 2);
}

__global__ void votes(unsigned* ballot, int* any, int* all) {
  const int rank = static_cast<int>(threadIdx.x);
  ballot[rank] = __ballot_sync(~0u, rank % 32 < 5);
  any[rank] = __any_sync(~0u, rank == 0);
  all[rank] = __all_sync(~0u, rank < 32);
}

// Thread `for_it` of 70 votes for yes in the second of three votes.
__global__ void votes_of_block(unsigned for_it, int* votes) {
  for (int i = 0; i < 3; ++i) {
    const int any = __syncthreads_or(i == 1 && threadIdx.x == for_it);
    if (threadIdx.x == 69 - for_it) votes[i] = any;
  }
}

__global__ void count(unsigned* counter) {
  if (threadIdx.x % 2 == 0) return;  // a thread that returned holds nobody up
  __syncthreads();
  atomicAdd(counter, 1u);
}

// Writes and reads all of the shared memory that a block may ask for.
__global__ void fill(int bytes, bool* same) {
  PYKD_DYNAMIC_SHARED(unsigned char, shared);
  std::memset(shared, 7, static_cast<size_t>(bytes));
  *same = std::all_of(shared, shared + bytes, [](unsigned char byte) { return byte == 7; });
}

// A warp's threads take turns at one word.
__global__ void take_turns(unsigned* word) {
  for (unsigned turn = 0; turn < warpSize; ++turn) {
    if (threadIdx.x == turn) *word = *word * 3 + turn;
    __syncwarp();
  }
}

void test_model() {
  std::vector<unsigned> seen(2 * 3 * 2 * 4 * 3 * 2), wanted(seen.size());
  std::iota(wanted.begin(), wanted.end(), 0u);
  PYKD_LAUNCH(dim3(2, 3, 2), dim3(4, 3, 2), 0, nullptr, indices)(seen.data());
  check(seen == wanted, "every thread of every block has indices of its own");

  std::vector<int> values(3 * 70), passed_on(values.size());
  std::iota(values.begin(), values.end(), 0);
  for (int i = 0; i < 3 * 70; ++i) passed_on[static_cast<size_t>(i)] = i / 70 * 70 + (i + 2 - i / 70 * 70) % 70;
  PYKD_LAUNCH(3, 70, 70 * sizeof(int), nullptr, pass_on)(values.data());
  check(values == passed_on, "barriers order shared memory");

  std::vector<int> down(40), exchanged(40), broadcast(40);
  PYKD_LAUNCH(1, 40, 0, nullptr, shuffles)(down.data(), exchanged.data(), broadcast.data());
  bool ok = true;
  for (int i = 0; i < 40; ++i) {
    const size_t at = static_cast<size_t>(i);
    const int end = i < 32 ? 32 : 40;  // the second warp has eight lanes
    ok = ok && down[at] == (i + 3 < end ? i + 3 : i) && exchanged[at] == (i ^ 1) && broadcast[at] == i / 32 * 32 + 2;
  }
  check(ok, "shuffles");

  std::vector<unsigned> ballot(40);
  std::vector<int> any(40), all(40);
  PYKD_LAUNCH(1, 40, 0, nullptr, votes)(ballot.data(), any.data(), all.data());
  check(ballot[0] == 0x1F && ballot[39] == 0x1F && any[31] == 1 && any[32] == 0 && all[31] == 1 && all[32] == 0,
        "votes");

  for (unsigned for_it : {0u, 69u}) {
    int of_block[3] = {-1, -1, -1};
    PYKD_LAUNCH(1, 70, 0, nullptr, votes_of_block)(for_it, of_block);
    check(of_block[0] == 0 && of_block[1] != 0 && of_block[2] == 0, "votes of a block");
  }

  unsigned counter = 0;
  PYKD_LAUNCH(5, 66, 0, nullptr, count)(&counter);
  check(counter == 5 * 33, "atomics");

  unsigned word = 0;
  PYKD_LAUNCH(1, 32, 0, nullptr, take_turns)(&word);
  unsigned in_order = 0;
  for (unsigned turn = 0; turn < 32; ++turn) in_order = in_order * 3 + turn;
  check(word == in_order, "warp barriers");

  int device = -1, bytes = 0;
  bool same = false;
  const bool asked = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                     cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
  PYKD_LAUNCH(1, 1, static_cast<size_t>(bytes), nullptr, fill)(bytes, &same);
  check(asked && bytes > 48 << 10 && same, "a block may ask for more shared memory");
}

void test_half_types() {
  check(__half2float(__float2half(1 + 0x1p-11f)) == 1 && __half2float(__float2half(1 + 0x1.8p-10f)) == 1 + 0x1p-9f,
        "float16 rounds to nearest, ties to even");
  check(__half2float(__float2half(65520.0f)) == std::numeric_limits<float>::infinity(),
        "float16 overflows to infinity");
  check(__float2bfloat16(1 + 0x1p-8f).bits == 0x3F80 && __float2bfloat16(1 + 0x1.8p-7f).bits == 0x3F82,
        "bfloat16 rounds to nearest, ties to even");
  check(std::isnan(__bfloat162float(__float2bfloat16(__builtin_bit_cast(float, 0x7F800001)))),
        "a bfloat16 NaN stays one");
}

}  // namespace

int main() {
  test_model();
  test_half_types();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
