#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/factor_loss/factor_loss_math.h"

// The floor is memory: with both gradients a float32 entry moves 16 bytes, with the student's alone 12, for the
// value 8. A row is read once from memory and again from the caches where the rows under way fit: 1024 threads an SM,
// of 64 registers each, hence one long row; 256 KB of L1 an SM, 50 MB of L2. A row is one block's, so fewer long rows
// than SMs leave some idle: over several blocks each pass would be a launch, and read large batches from memory again.
namespace pykd::cuda {
namespace {

struct Plan : RowPlan {
  explicit Plan(const FactorLoss& a)
      : RowPlan(a.rows, a.entries, logits_of_pack(a.student_dtype, a.teacher_dtype), Noise{}, kThreadsAlone, a.entries,
                true) {}

  bool needs_partials(const FactorLoss& a) const { return blocks > 1 && a.loss; }
};

template <typename T>
__device__ void write_loss(const FactorLoss& a, double sum) {
  *static_cast<T*>(a.loss) = static_cast<T>(sum * a.scale);
}

// The share of one row that a thread of `lanes` has: packs begin, begin + lanes, ... before `end`.
template <typename T, typename Student, typename Teacher, bool kVectors>
class Row {
 public:
  static constexpr int kPack = logits_of_pack(sizeof(Student), sizeof(Teacher));

  __device__ Row(const FactorLoss& args, int64_t row, int64_t begin, int64_t end, int lanes,
                 double (*shared)[kMostWarps])
      : a(args), at{row, args.entries}, begin(begin), end(end), lanes(lanes), shared(shared) {}

  // The row's loss, for all of its threads; writes its gradients. All threads of the block take part.
  __device__ double run() {
    const Units units = measure();
    const T ratio = static_cast<T>(units.ratio());
    T sums[2] = {};  // cost, inner
    for_entries([&](int64_t, int, T x, T y) {
      const T e = x - y * ratio;
      sums[0] += a.p == 1 ? magnitude(e) : e * e;
      sums[1] += direction(a.p, e) * x;
    });
    sum_over(lanes, sums, shared);
    if (a.grad_student || a.grad_teacher) {
      Slope of_student, of_teacher;
      const double grad_loss = a.grad_loss ? static_cast<double>(*static_cast<const T*>(a.grad_loss)) : 1;
      units.slopes(a, grad_loss, sums[0], sums[1], of_student, of_teacher);
      write(ratio, of_student, of_teacher);
    }
    return units.loss(a, sums[0]);
  }

 private:
  struct Packs {
    Pack<Student, kPack> student;
    Pack<Teacher, kPack> teacher;
  };

  template <typename Use>
  __device__ void for_packs(const Use& use) const {
    stream<kPack == 4 ? 2 : 1, Packs>(
        begin, end, lanes,
        [&](int64_t pack, Packs& to) {
          at.read(a.student, pack, to.student);
          at.read(a.teacher, pack, to.teacher);
        },
        [] {}, use);
  }

  // use(pack, place in it, x, y), of the scaled factors.
  template <typename Use>
  __device__ void for_entries(const Use& use) const {
    for_packs([&](int64_t pack, const Packs& packs) {
      for (int j = 0; j < kPack; ++j)
        if (at.inside(pack, j))
          use(pack, j, widen(packs.student.logit[j]) * scale[0], widen(packs.teacher.logit[j]) * scale[1]);
    });
  }

  __device__ void add_squares(T (&squares)[2]) const {
    squares[0] = squares[1] = 0;
    for_entries([&](int64_t, int, T x, T y) {
      squares[0] += x * x;
      squares[1] += y * y;
    });
    sum_over(lanes, squares, shared);
  }

  __device__ Units measure() {
    T squares[2];
    add_squares(squares);
    const bool in_range[2] = {is_in_range(squares[0]), is_in_range(squares[1])};
    if (__syncthreads_or(!in_range[0] || !in_range[1])) {
      T largest[2] = {};
      for_entries([&](int64_t, int, T x, T y) {
        largest[0] = larger_magnitude(largest[0], x);
        largest[1] = larger_magnitude(largest[1], y);
      });
      combine_over(lanes, largest, shared, T(0), [](T one, T other) { return larger_magnitude(one, other); });
      for (int i = 0; i < 2; ++i)
        if (!in_range[i]) scale[i] = power_against(largest[i]);
      add_squares(squares);
    }
    return {Unit(scale[0], squares[0]), Unit(scale[1], squares[1])};
  }

  __device__ void write(T ratio, const Slope& of_student, const Slope& of_teacher) const {
    const T student_along = static_cast<T>(of_student.along), student_inward = static_cast<T>(of_student.inward);
    const T teacher_along = static_cast<T>(of_teacher.along), teacher_inward = static_cast<T>(of_teacher.inward);
    for_packs([&](int64_t pack, const Packs& packs) {
      Packs grads = {};
      for (int j = 0; j < kPack; ++j) {
        const T x = widen(packs.student.logit[j]) * scale[0], y = widen(packs.teacher.logit[j]) * scale[1];
        const T along = direction(a.p, x - y * ratio);
        narrow(along * student_along - x * student_inward, grads.student.logit[j]);
        narrow(along * teacher_along - y * teacher_inward, grads.teacher.logit[j]);
      }
      if (a.grad_student) at.write(grads.student, a.grad_student, pack);
      if (a.grad_teacher) at.write(grads.teacher, a.grad_teacher, pack);
    });
  }

  const FactorLoss& a;
  const RowPacks<kPack, kVectors> at;
  const int64_t begin, end;
  const int lanes;
  double (*const shared)[kMostWarps];
  T scale[2] = {1, 1};
};

// Block b takes group b. partials[b]: its sum, unless it is the only block.
template <typename T, typename Student, typename Teacher, bool kVectors>
__global__ void __launch_bounds__(kThreadsAlone) rows(FactorLoss a, Plan plan, double* partials) {
  __shared__ double shared[2][kMostWarps];
  const int lanes = plan.lanes(), lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  double total = 0;
  for (int64_t group = blockIdx.x; group < plan.groups; group += gridDim.x) {
    const int64_t row = group * plan.rows_of_block() + (threadIdx.x >> plan.log2_lanes);
    const int64_t packs = row < a.rows ? plan.packs : 0;
    const double loss = Row<T, Student, Teacher, kVectors>(a, row, lane, packs, lanes, shared).run();
    if (lane > 0 || row >= a.rows) continue;
    total += loss;
    if (a.row_loss) static_cast<T*>(a.row_loss)[row] = static_cast<T>(loss);
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

// One block: the loss over all rows.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone) finish(FactorLoss a, Plan plan, const double* partials) {
  __shared__ double shared[1][kMostWarps];
  const double total = sum_partials(partials, plan.blocks, shared);
  if (threadIdx.x == 0) write_loss<T>(a, total);
}

template <typename T, typename Student, typename Teacher>
CudaStatus launch(const FactorLoss& a, void* workspace, CUstream_st* stream) {
  constexpr int kPack = Row<T, Student, Teacher, true>::kPack;
  const Plan plan(a);
  double* const partials = plan.needs_partials(a) ? static_cast<double*>(workspace) : nullptr;
  const unsigned threads = static_cast<unsigned>(plan.threads);
  if (a.entries % kPack == 0 && is_aligned<Student, kPack>(a.student) && is_aligned<Teacher, kPack>(a.teacher) &&
      is_aligned<Student, kPack>(a.grad_student) && is_aligned<Teacher, kPack>(a.grad_teacher))
    PYKD_LAUNCH(plan.blocks, threads, 0, stream, rows<T, Student, Teacher, true>)(a, plan, partials);
  else
    PYKD_LAUNCH(plan.blocks, threads, 0, stream, rows<T, Student, Teacher, false>)(a, plan, partials);
  if (partials) PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish<T>)(a, plan, partials);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t factor_loss_workspace_bytes(const FactorLoss& args) {
  const cuda::Plan plan(args);
  return plan.needs_partials(args) ? static_cast<int64_t>(plan.blocks * sizeof(double)) : 0;
}

CudaStatus factor_loss_cuda(const FactorLoss& args, void* workspace, CUstream_st* stream) {
  return cuda::with_dtypes(args.student_dtype, args.teacher_dtype, [&](auto computed, auto student, auto teacher) {
    return cuda::launch<decltype(computed), decltype(student), decltype(teacher)>(args, workspace, stream);
  });
}

}  // namespace pykd
