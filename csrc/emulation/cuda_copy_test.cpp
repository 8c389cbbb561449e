// Asynchronous copies under emulation: they arrive with the wait that covers them, and are NaN before it.
#define PYKD_EMULATE_CUDA
#define PYKD_ISA cuda
#include "emulation/cuda_emulation.h"
// The emulation stands for CUDA's headers, so it comes first.
#include "core/cuda_copy.h"

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED: %s\n", what);
}

constexpr int kThreads = 64, kMoments = 4;

struct Row {
  uint4 moments[kMoments];  // what lies in shared memory
};

// Two groups of one copy each, and a copy of no group.
__global__ void copy(const uint4* from, Row* to) {
  __shared__ uint4 shared[3][kThreads];
  const unsigned i = threadIdx.x, other = kThreads - 1 - i;
  Row& row = to[i];
  for (int group = 0; group < 3; ++group) {
    pykd::cuda::copy_async(&shared[group][i], &from[i]);
    if (group < 2) pykd::cuda::commit_copies();
  }
  row.moments[0] = shared[0][i];
  pykd::cuda::wait_copies<1>();
  row.moments[1] = shared[1][i];
  __syncthreads();
  row.moments[2] = shared[0][other];
  pykd::cuda::wait_copies<0>();
  row.moments[3] = shared[2][i];
  pykd::cuda::commit_copies();
  pykd::cuda::wait_copies<0>();
  if (shared[1][i].x != from[i].x || shared[2][i].x != from[i].x) row.moments[3] = {};
}

bool same(uint4 a, uint4 b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

int main() {
  std::vector<uint4> from(kThreads);
  for (uint32_t i = 0; i < kThreads; ++i) from[i] = {i, i + 1, i + 2, i + 3};
  std::vector<Row> to(kThreads);
  PYKD_LAUNCH(1, kThreads, 0, nullptr, copy)(from.data(), to.data());
  constexpr uint4 kNone = {~0u, ~0u, ~0u, ~0u};
  bool before = true, later = true, shown = true, open = true;
  for (unsigned i = 0; i < kThreads; ++i) {
    before = before && same(to[i].moments[0], kNone);
    later = later && same(to[i].moments[1], kNone);
    shown = shown && same(to[i].moments[2], from[kThreads - 1 - i]);
    open = open && same(to[i].moments[3], kNone);
  }
  check(before, "nothing before the wait");
  check(later, "a later group has not arrived");
  check(shown, "others see what has arrived");
  check(open, "a copy of no group arrives with none, and then with its own");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
