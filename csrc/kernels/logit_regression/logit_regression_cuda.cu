#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/logit_regression/logit_regression.h"

// The floor is memory: a float32 logit moves 12 bytes (student, teacher, gradient), one of two bytes 6. While an H200
// (4.8 TB/s; 132 SMs of 128 lanes at 1.75 GHz) moves them it has 74 instruction slots a float32 logit and 37 a two-byte
// one. A noisy logit takes some 70 or 45 (sm_90: 40 or 32 of them Philox and Box-Muller), one of a clean row 25 or 20:
// with alpha = 0.5 memory stays the limit.
namespace pykd::cuda {
namespace {

constexpr int64_t kChunk = 8192;  // logits of a row a block takes: 64 rows of 32000 classes fill 132 SMs twice

struct Plan : RowPlan {
  explicit Plan(const LogitRegression& a) : Plan(a, logits_of_pack(a.student_dtype, a.teacher_dtype)) {}

  bool needs_partials(const LogitRegression& a) const { return blocks > 1 && (a.loss || (a.row_loss && chunks > 1)); }

 private:
  Plan(const LogitRegression& a, int pack)
      : RowPlan(a.rows, a.classes, pack, a.noise, kThreads, kChunk, most_threads(pack)) {}
};

template <typename T>
__device__ void write_loss(const LogitRegression& a, double sum_of_squares) {
  *static_cast<T*>(a.loss) = a.rows > 0 ? static_cast<T>(0.5 * sum_of_squares * a.loss_scale) : T(0);
}

// One thread's packs of one row.
template <typename T, typename Student, typename Teacher, bool kVectors>
class Row {
 public:
  static constexpr int kPack = logits_of_pack(sizeof(Student), sizeof(Teacher));
  static constexpr int kTogether = kPack == 4 ? 2 : 1;  // packs in flight that registers have room for

  __device__ Row(const LogitRegression& args, const Plan& plan, int64_t row)
      : a(args), row(row), at{row, args.classes}, noise(args.noise, plan, row) {}

  // The sum of squared differences of packs begin, begin + step, ... before `end`; writes their gradient.
  __device__ T run(int64_t begin, int64_t end, int step) {
    T sum = 0;
    stream<kTogether, Packs>(
        begin, end, step,
        [&](int64_t pack, Packs& to) {
          at.read(a.student, pack, to.student);
          at.read(a.teacher, pack, to.teacher);
        },
        [&] {
          noise.draw();
          scale = static_cast<T>(a.grad_scale);
          if (a.grad_loss) scale *= static_cast<const T*>(a.grad_loss)[row * a.grad_loss_stride];
        },
        [&](int64_t pack, const Packs& packs) { sum += run(pack, packs); });
    return sum;
  }

 private:
  struct Packs {
    Pack<Student, kPack> student;
    Pack<Teacher, kPack> teacher;
  };

  __device__ T run(int64_t pack, const Packs& packs) const {
    T difference[kPack], sum = 0;
    noise.perturb(pack, packs.teacher, difference);
    for (int j = 0; j < kPack; ++j) difference[j] = widen(packs.student.logit[j]) - difference[j];
    for (int j = 0; j < kPack; ++j)
      if (at.inside(pack, j)) sum += difference[j] * difference[j];
    if (!a.grad_student) return sum;
    Pack<Student, kPack> grad = {};
    if (a.accumulate) at.read(a.grad_student, pack, grad);
    for (int j = 0; j < kPack; ++j) narrow(difference[j] * scale + widen(grad.logit[j]), grad.logit[j]);
    at.write(grad, a.grad_student, pack);
    return sum;
  }

  const LogitRegression& a;
  const int64_t row;
  const RowPacks<kPack, kVectors> at;
  ThreadNoise<T, kPack> noise;
  T scale;
};

// Block b takes chunk b % chunks of group b / chunks. partials[b]: its sum of squares, unless it is the only block.
template <typename T, typename Student, typename Teacher, bool kVectors>
__global__ void __launch_bounds__(most_threads(logits_of_pack(sizeof(Student), sizeof(Teacher))))
    rows(LogitRegression a, Plan plan, double* partials) {
  __shared__ double shared[1][kMostWarps];
  const int lanes = plan.lanes(), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  using ThreadRow = Row<T, Student, Teacher, kVectors>;
  constexpr int64_t kChunkPacks = kChunk / ThreadRow::kPack;
  const int64_t begin = blockIdx.x % plan.chunks * kChunkPacks + lane;
  const int64_t end = begin - lane + kChunkPacks < plan.packs ? begin - lane + kChunkPacks : plan.packs;
  double total = 0;
  for (int64_t group = blockIdx.x / plan.chunks; group < plan.groups; group += gridDim.x / plan.chunks) {
    const int64_t row = group * plan.rows_of_block() + (threadIdx.x >> plan.log2_lanes);
    T sum = 0;
    if (row < a.rows) sum = ThreadRow(a, plan, row).run(begin, end, lanes);
    sum = sum_over(lanes, sum, shared);
    if (lane > 0 || row >= a.rows) continue;
    total += sum;
    if (a.row_loss && plan.chunks == 1) static_cast<T*>(a.row_loss)[row] = sum / 2;
  }
  const bool alone = gridDim.x == 1;
  if (alone ? !a.loss : !partials) return;
  total = sum_over(plan.threads, total, shared);
  if (threadIdx.x > 0) return;
  if (alone)
    write_loss<T>(a, total);
  else
    partials[blockIdx.x] = total;
}

// One block: the losses of rows in several chunks, and the loss over all rows.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone) finish(LogitRegression a, Plan plan, const double* partials) {
  __shared__ double shared[1][kMostWarps];
  if (a.row_loss && plan.chunks > 1)
    for (int64_t row = threadIdx.x; row < a.rows; row += kThreadsAlone) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += partials[row * plan.chunks + chunk];
      static_cast<T*>(a.row_loss)[row] = static_cast<T>(sum / 2);
    }
  if (!a.loss) return;
  const double total = sum_partials(partials, plan.blocks, shared);
  if (threadIdx.x == 0) write_loss<T>(a, total);
}

template <typename T, typename Student, typename Teacher>
CudaStatus launch(const LogitRegression& a, void* workspace, CUstream_st* stream) {
  constexpr int kPack = Row<T, Student, Teacher, true>::kPack;
  const Plan plan(a);
  double* const partials = plan.needs_partials(a) ? static_cast<double*>(workspace) : nullptr;
  const unsigned threads = static_cast<unsigned>(plan.threads);
  if (a.classes % kPack == 0 && is_aligned<Student, kPack>(a.student) && is_aligned<Teacher, kPack>(a.teacher) &&
      is_aligned<Student, kPack>(a.grad_student))
    PYKD_LAUNCH(plan.blocks, threads, 0, stream, rows<T, Student, Teacher, true>)(a, plan, partials);
  else
    PYKD_LAUNCH(plan.blocks, threads, 0, stream, rows<T, Student, Teacher, false>)(a, plan, partials);
  if (partials) PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish<T>)(a, plan, partials);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t logit_regression_workspace_bytes(const LogitRegression& args) {
  const cuda::Plan plan(args);
  return plan.needs_partials(args) ? static_cast<int64_t>(plan.blocks * sizeof(double)) : 0;
}

CudaStatus logit_regression_cuda(const LogitRegression& args, void* workspace, CUstream_st* stream) {
  return cuda::with_dtypes(args.student_dtype, args.teacher_dtype, [&](auto computed, auto student, auto teacher) {
    return cuda::launch<decltype(computed), decltype(student), decltype(teacher)>(args, workspace, stream);
  });
}

}  // namespace pykd
