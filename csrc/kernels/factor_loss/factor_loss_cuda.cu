#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/factor_loss/factor_loss_math.h"

// The floor is memory: with both gradients a float32 entry moves 16 bytes, with the student's alone 12, for the
// value 8. A row is read once from memory and again from the caches where the rows under way fit: 1024 threads an SM,
// of 64 registers each, hence one long row; 256 KB of L1 an SM, 50 MB of L2.
//
// A row is one block's. An SM alone reads twice its share of memory's speed, so from half an H200's 132 SMs on there
// are rows enough. Fewer long ones are cut into parts: a launch for the norms, one for the costs, one for the
// gradients. Each reads the parts again, from memory where all of them exceed L2: 32 bytes an entry with both
// gradients, as the rows of single blocks do whose sizes are so large; but at the speed of all SMs.
namespace pykd::cuda {
namespace {

struct Plan : RowPlan {
  explicit Plan(const FactorLoss& a) : Plan(a, logits_of_pack(a.student_dtype, a.teacher_dtype)) {}

  bool needs_partials(const FactorLoss& a) const { return blocks > 1 && a.loss; }

 private:
  Plan(const FactorLoss& a, int pack)
      : RowPlan(a.rows, a.entries, pack, Noise{}, most_threads(pack), a.entries, most_threads(pack)) {}
};

template <typename T>
__device__ void write_loss(const FactorLoss& a, double sum) {
  *static_cast<T*>(a.loss) = static_cast<T>(sum * a.scale);
}

// The factors as unit vectors, from their sums of squares and the powers of two these are scaled by.
template <typename T>
__device__ Units units_of(const double (&squares)[2], T (&scale)[2]) {
  for (int i = 0; i < 2; ++i)
    scale[i] = is_in_range(static_cast<T>(squares[i])) ? T(1) : power_against(static_cast<T>(sqrt(squares[i])));
  const auto unit = [&](int i) { return Unit(scale[i], squares[i] * scale[i] * scale[i]); };
  return {unit(0), unit(1)};
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
    T squares[2], sums[2];
    measure(squares);
    const Units units{Unit(scale[0], squares[0]), Unit(scale[1], squares[1])};
    compare(units, sums);
    if (a.grad_student || a.grad_teacher) write(units, sums[0], sums[1]);
    return units.loss(a, sums[0]);
  }

  // The sums of squares, of the factors times the scale that this chooses.
  __device__ void measure(T (&squares)[2]) {
    add_squares(squares);
    const bool in_range[2] = {is_in_range(squares[0]), is_in_range(squares[1])};
    if (!__syncthreads_or(!in_range[0] || !in_range[1])) return;
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

  // The cost and the inner product.
  __device__ void compare(const Units& units, T (&sums)[2]) const {
    const T ratio = static_cast<T>(units.ratio());
    sums[0] = sums[1] = 0;
    for_entries([&](int64_t, int, T x, T y) {
      const T e = x - y * ratio;
      sums[0] += a.p == 1 ? magnitude(e) : e * e;
      sums[1] += direction(a.p, e) * x;
    });
    sum_over(lanes, sums, shared);
  }

  __device__ void write(const Units& units, double cost, double inner) const {
    Slope of_student, of_teacher;
    units.slopes(a, a.grad_loss ? static_cast<double>(*static_cast<const T*>(a.grad_loss)) : 1, cost, inner, of_student,
                 of_teacher);
    const T ratio = static_cast<T>(units.ratio());
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

  T scale[2] = {1, 1};

 private:
  struct Packs {
    Pack<Student, kPack> student;
    Pack<Teacher, kPack> teacher;
  };

  template <typename Use>
  __device__ void for_packs(const Use& use) const {
    stream<2, Packs>(
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

  const FactorLoss& a;
  const RowPacks<kPack, kVectors> at;
  const int64_t begin, end;
  const int lanes;
  double (*const shared)[kMostWarps];
};

// Block b takes group b. partials[b]: its sum, unless it is the only block.
template <typename T, typename Student, typename Teacher, bool kVectors>
__global__ void __launch_bounds__(most_threads(logits_of_pack(sizeof(Student), sizeof(Teacher))))
    rows(FactorLoss a, Plan plan, double* partials) {
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

// ---- few long rows, cut into parts ---------------------------------------------------------------------------------

constexpr int64_t kFewRows = 64, kLongRow = 32768, kPartEntries = 8192;

// Of a row: not of float64, whose squares no wider type holds.
unsigned parts_of(const FactorLoss& a) {
  const bool cut = a.rows < kFewRows && a.entries >= kLongRow && a.student_dtype != DType::kFloat64;
  return cut ? static_cast<unsigned>((a.entries - 1) / kPartEntries + 1) : 1;
}

struct Part {
  double squares[2], cost, inner;
};

// The sums over a row's parts, by each warp for itself.
__device__ inline Part row_of(const Part* parts, unsigned count) {
  Part sum{};
  const auto add = [&sum](const Part& part) {
    sum.squares[0] += part.squares[0];
    sum.squares[1] += part.squares[1];
    sum.cost += part.cost;
    sum.inner += part.inner;
  };
  for (unsigned i = threadIdx.x % 32; i < count; i += 32) add(parts[i]);
  const auto other = [](double value, int offset) { return __shfl_xor_sync(~0u, value, offset); };
  for (int offset = 16; offset > 0; offset /= 2)
    add({{other(sum.squares[0], offset), other(sum.squares[1], offset)},
         other(sum.cost, offset),
         other(sum.inner, offset)});
  return sum;
}

enum class Pass { kMeasure, kCompare, kWrite };

// Block b takes part b % count of row b / count: each pass follows from what the last one left of all parts.
template <typename T, typename Student, typename Teacher, bool kVectors>
__global__ void __launch_bounds__(kThreads) pass_over_parts(FactorLoss a, Pass pass, unsigned count, Part* parts) {
  __shared__ double shared[2][kMostWarps];
  using ThisRow = Row<T, Student, Teacher, kVectors>;
  constexpr int64_t kPacks = kPartEntries / ThisRow::kPack;
  const unsigned row = blockIdx.x / count;
  const int64_t begin = blockIdx.x % count * kPacks, packs = (a.entries - 1) / ThisRow::kPack + 1;
  ThisRow part(a, row, begin + threadIdx.x, begin + kPacks < packs ? begin + kPacks : packs, kThreads, shared);
  if (pass == Pass::kMeasure) {
    T squares[2];
    part.measure(squares);
    if (threadIdx.x > 0) return;
    for (int i = 0; i < 2; ++i) {
      const double scale = part.scale[i];
      parts[blockIdx.x].squares[i] = squares[i] / scale / scale;
    }
    parts[blockIdx.x].cost = parts[blockIdx.x].inner = 0;
    return;
  }
  const Part whole = row_of(parts + row * count, count);
  const Units units = units_of(whole.squares, part.scale);
  if (pass == Pass::kWrite) return part.write(units, whole.cost, whole.inner);
  T sums[2];
  part.compare(units, sums);
  if (threadIdx.x > 0) return;
  parts[blockIdx.x].cost = sums[0];
  parts[blockIdx.x].inner = sums[1];
}

// One block: the losses, of a row by each warp.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone) finish_parts(FactorLoss a, unsigned count, const Part* parts) {
  __shared__ double shared[1][kMostWarps];
  double total = 0;
  for (int64_t row = threadIdx.x / 32; row < a.rows; row += kMostWarps) {
    const Part whole = row_of(parts + row * count, count);
    T scale[2];
    const double loss = units_of(whole.squares, scale).loss(a, whole.cost);
    if (threadIdx.x % 32 > 0) continue;
    total += loss;
    if (a.row_loss) static_cast<T*>(a.row_loss)[row] = static_cast<T>(loss);
  }
  if (!a.loss) return;
  total = sum_over(kThreadsAlone, total, shared);
  if (threadIdx.x == 0) write_loss<T>(a, total);
}

template <typename T, typename Student, typename Teacher>
CudaStatus launch(const FactorLoss& a, void* workspace, CUstream_st* stream) {
  constexpr int kPack = Row<T, Student, Teacher, true>::kPack;
  const Plan plan(a);
  double* const partials = plan.needs_partials(a) ? static_cast<double*>(workspace) : nullptr;
  const unsigned threads = static_cast<unsigned>(plan.threads);
  const bool vectors = a.entries % kPack == 0 && is_aligned<Student, kPack>(a.student) &&
                       is_aligned<Teacher, kPack>(a.teacher) && is_aligned<Student, kPack>(a.grad_student) &&
                       is_aligned<Teacher, kPack>(a.grad_teacher);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (const unsigned count = parts_of(a); count > 1 && a.rows > 0) {
      const auto kernel =
          vectors ? pass_over_parts<T, Student, Teacher, true> : pass_over_parts<T, Student, Teacher, false>;
      Part* const parts = static_cast<Part*>(workspace);
      const unsigned blocks = static_cast<unsigned>(a.rows) * count;
      for (Pass pass : {Pass::kMeasure, Pass::kCompare, Pass::kWrite})
        if (pass != Pass::kWrite || a.grad_student || a.grad_teacher)
          PYKD_LAUNCH(blocks, kThreads, 0, stream, (*kernel))(a, pass, count, parts);
      if (a.loss || a.row_loss) PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish_parts<T>)(a, count, parts);
      return cudaGetLastError();
    }
  }
  if (vectors)
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
  if (const unsigned parts = cuda::parts_of(args); parts > 1)
    return args.rows * int64_t{parts} * static_cast<int64_t>(sizeof(cuda::Part));
  const cuda::Plan plan(args);
  return plan.needs_partials(args) ? static_cast<int64_t>(plan.blocks * sizeof(double)) : 0;
}

CudaStatus factor_loss_cuda(const FactorLoss& args, void* workspace, CUstream_st* stream) {
  return cuda::with_dtypes(args.student_dtype, args.teacher_dtype, [&](auto computed, auto student, auto teacher) {
    return cuda::launch<decltype(computed), decltype(student), decltype(teacher)>(args, workspace, stream);
  });
}

}  // namespace pykd
