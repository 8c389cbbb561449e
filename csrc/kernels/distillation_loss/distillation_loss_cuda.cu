#include "core/cuda.h"
#include "core/cuda_copy.h"
#include "core/cuda_rows.h"
#include "kernels/distillation_loss/distillation_loss.h"
#include "kernels/distillation_loss/distillation_loss_math.h"

// A row belongs to one block, or to a part of one. Its threads copy their packs to shared memory, all at once and past
// the registers, perturb and keep them there; each sums up its own from its own maxima; the sums are brought to the
// row's maxima and added; the gradient is made of what was kept. Where a row exceeds shared memory, its last packs are
// kept; the others are read once more, from L2 where it holds them still, and their noise is drawn once more. Two
// blocks share an SM where half of its shared memory keeps half of a clean row: of 32000 classes in bfloat16 four
// fifths. Of 128000 a block keeps 44 % in all of an H200's 227 KB.
//
// The floor is memory: a float32 logit moves 12 bytes (student, teacher, gradient), one of two bytes 6. While an H200
// copies them (4.3 TB/s; 132 SMs of 128 lanes at 1.75 GHz) it has 83 instruction slots a float32 logit and 41 a
// two-byte one. A clean logit takes some 46 or 43 (sm_90: to read and keep it 18 or 11, for the sums 14 or 16, for the
// gradient 14 or 16), the noise of one 57 or 38: with alpha = 0.5 float32 stays at memory's limit, and two-byte logits
// are bound by arithmetic.
namespace pykd::cuda {
namespace {

constexpr double kLog2 = 0.69314718055994530942;
constexpr int64_t kRowsCounted = 1024;  // targets that each block counts for itself; more are counted beforehand
constexpr int64_t kRowsOfCount = 4096;  // targets of a block that counts beforehand
constexpr int64_t kMostCounts = 128;    // such blocks
constexpr int kMaxima = 2, kSums = 6;   // of a row
constexpr int kSharedOfSums = kSums * kMostWarps * sizeof(double);
constexpr int kSharedReserved = 1 << 10;                   // of each block on an SM, by CUDA
constexpr int kSharedAnyway = (48 << 10) - kSharedOfSums;  // more shared memory a launch has to ask for

struct Plan : RowPlan {
  explicit Plan(const DistillationLoss& a) : Plan(a, logits_of_pack(a.student_dtype, a.teacher_dtype)) {
    const bool is_double = a.student_dtype == DType::kFloat64;
    const int pack = logits_of_pack(a.student_dtype, a.teacher_dtype);
    is_clean = a.hard_weight == 1 || a.noise.sigma == 0 || a.noise.threshold == 0;
    const int student_bytes = pack * static_cast<int>(bytes_of(a.student_dtype));
    noisy_bytes = student_bytes + pack * (is_double ? 8 : 4);
    clean_bytes = student_bytes + pack * static_cast<int>(bytes_of(a.teacher_dtype));
    noisy_slots = clean_slots = static_cast<int>((packs - 1) / lanes() + 1);
    // In how many parts a row is summed up must not depend on the rows beside it, and where it is kept depends on its
    // noise: few rows have the blocks of many, none of which takes one row after another.
    if (may_exceed() && threads > least_threads()) {
      threads = least_threads();
      groups = (a.rows + rows_of_block() - 1) / rows_of_block();
      blocks = static_cast<unsigned>(groups);
    }
    if (!a.batchmean || a.hard_weight == 0 || batch_rows(a) <= kRowsCounted) return;
    const int64_t wanted = (batch_rows(a) + kRowsOfCount - 1) / kRowsOfCount;
    counts = static_cast<unsigned>(wanted < kMostCounts ? wanted : kMostCounts);
  }

  bool needs_partials(const DistillationLoss& a) const { return blocks > 1 && a.loss; }
  // Whether rows with noise exceed it: the others are kept in the same way where there are none.
  bool may_exceed() const { return int64_t{threads} * noisy_slots * noisy_bytes > kSharedAnyway; }
  int64_t shared_bytes() const {
    const int64_t clean = int64_t{clean_slots} * clean_bytes, noisy = int64_t{noisy_slots} * noisy_bytes;
    return threads * (is_clean || clean > noisy ? clean : noisy);
  }

  // Keeps no more than fits a block's share of shared memory, of which a block may have `most`. Two blocks an SM, one
  // of which reads while the other computes, hide more than the packs cost that they keep less, if half of the row is
  // kept.
  void fit(int most) {
    const int half = (most + kSharedReserved) / 2 - kSharedReserved;
    const int64_t clean = int64_t{threads} * clean_slots * clean_bytes;
    const int bytes = (lanes() == threads && clean <= most - kSharedOfSums ? half : most) - kSharedOfSums;
    const auto limit = [&](int& slots, int slot_bytes) {
      if (slots > bytes / (threads * slot_bytes)) slots = bytes / (threads * slot_bytes);
    };
    limit(noisy_slots, noisy_bytes);
    limit(clean_slots, clean_bytes);
  }

  bool is_clean;                 // no row has noise
  int noisy_slots, clean_slots;  // packs of a row that a thread keeps, of a row with noise and of one without
  int noisy_bytes, clean_bytes;  // of one
  unsigned counts = 0;           // blocks that count targets; 0: each block counts them, where they matter

 private:
  Plan(const DistillationLoss& a, int pack)
      : RowPlan(a.rows, a.classes, pack, a.noise, lanes_of(a.classes, pack), a.classes, most_threads(pack)) {}

  // Half of the threads that an SM has registers for, unless the row takes all of its shared memory.
  static int lanes_of(int64_t classes, int pack) {
    return classes > kThreadsAlone * 7 * pack ? most_threads(pack) : most_threads(pack) / 2;
  }
};

// The packs that a thread keeps: students as they are; targets as they are computed, or, of a row without noise, as
// they are read. Neighbours lie side by side.
template <typename T, typename Student, typename Teacher, int kPack>
class Kept {
 public:
  using Students = Pack<Student, kPack>;
  using Teachers = Pack<Teacher, kPack>;

  __device__ Kept(unsigned char* shared, bool as_read) : shared(shared), as_read(as_read) {}

  // Where a pack of each is read to.
  __device__ Students* students(int slot) const {
    return reinterpret_cast<Students*>(shared + slot * slot_bytes() + thread() * static_cast<int>(sizeof(Students)));
  }
  __device__ Teachers* teachers(int slot) const { return reinterpret_cast<Teachers*>(targets(slot, 0)); }

  __device__ void put(int slot, const T (&from)[kPack]) const {
    PYKD_UNROLL for (int part = 0; part < kParts; ++part) {
      Targets some;
      for (int j = 0; j < kPart; ++j) some.logit[j] = from[part * kPart + j];
      *reinterpret_cast<uint4*>(targets(slot, part)) = whole_of(some);
    }
  }

  __device__ void get_students(int slot, T (&to)[kPack]) const { widen_all(students(slot), to); }
  __device__ void get_targets(int slot, T (&to)[kPack]) const {
    if (kNarrow && as_read) return widen_all(teachers(slot), to);
    PYKD_UNROLL for (int part = 0; part < kParts; ++part) {
      Targets some;
      read_whole(targets(slot, part), some);
      for (int j = 0; j < kPart; ++j) to[part * kPart + j] = some.logit[j];
    }
  }

 private:
  static constexpr int kPart = 16 / sizeof(T), kParts = kPack / kPart;
  static constexpr bool kNarrow = sizeof(Teacher) < sizeof(T);
  using Targets = Pack<T, kPart>;

  template <typename P>
  __device__ static void widen_all(const P* from, T (&to)[kPack]) {
    P whole;
    read_whole(from, whole);
    for (int j = 0; j < kPack; ++j) to[j] = widen(whole.logit[j]);
  }

  __device__ static int threads() { return static_cast<int>(blockDim.x); }
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ int slot_bytes() const {
    return threads() * static_cast<int>(sizeof(Students) + (kNarrow && as_read ? sizeof(Teachers) : kPack * sizeof(T)));
  }
  __device__ unsigned char* targets(int slot, int part) const {
    const int bytes = kNarrow && as_read ? sizeof(Teachers) : sizeof(Targets);
    return shared + slot * slot_bytes() + threads() * static_cast<int>(sizeof(Students)) +
           (part * threads() + thread()) * bytes;
  }

  unsigned char* const shared;
  const bool as_read;
};

// One thread's share of one row.
template <typename T, typename Student, typename Teacher, bool kVectors, bool kReverse>
class Row {
 public:
  static constexpr int kPack = logits_of_pack(sizeof(Student), sizeof(Teacher));

  __device__ Row(const DistillationLoss& args, const Plan& plan, const Weights<T>& weights, unsigned char* shared,
                 int64_t row)
      : a(args),
        plan(plan),
        weights(weights),
        row(row),
        inverse_temperature(T(1) / static_cast<T>(args.temperature)),
        slope(inverse_temperature * static_cast<T>(1 / kLog2)),
        lane(static_cast<int>(threadIdx.x) & (plan.lanes() - 1)),
        at{row, args.classes},
        noise(args.noise, plan, row),
        shared(shared) {}

  // The sums of this thread's packs.
  __device__ void sum() {
    find_target();
    if (weights.soft) noise.draw();
    // Rows that share a block share the places of its slots.
    as_read = !noise.any() && (plan.is_clean || plan.lanes() == plan.threads);
    slots = as_read ? plan.clean_slots : plan.noisy_slots;
    const int wanted = (packs() - 1) / plan.lanes() + 1;
    parts = (wanted + slots - 1) / slots;
    first = wanted - (parts - 1) * slots;
    for (int part = 0; part < parts; ++part) {
      load(part);
      if (is_hard)
        add<true>(part);
      else
        add<false>(part);
    }
  }

  // The sums of the row, for all of its threads. Those of the block without a row take part.
  __device__ void combine(double (*shared)[kMostWarps]) {
    T maxima[kMaxima] = {sums.student_max, sums.teacher_max};
    max_over(plan.lanes(), maxima, shared);
    sums.template rebase<kReverse>(maxima[0], maxima[1], inverse_temperature);
    T values[kSums] = {sums.exp_b, sums.exp_a, sums.divergence, sums.hard, at_target, logit_mean};
    sum_over(plan.lanes(), values, shared);
    sums.exp_b = values[0];
    sums.exp_a = values[1];
    sums.divergence = values[2];
    sums.hard = values[3];
    at_target = values[4];
    logit_mean = values[5];
  }

  // The row's loss.
  __device__ T finish(T hard_scale) {
    const T upstream = a.grad_loss ? static_cast<const T*>(a.grad_loss)[row * a.grad_loss_stride] : T(1);
    const T loss =
        cuda::finish<kReverse>(sums, weights, is_hard ? hard_scale : T(0), upstream, at_target, logit_mean, slopes);
    if (!is_wrong) return loss;
    return slopes.hard = static_cast<T>(__builtin_nanf(""));
  }

  __device__ void write_gradient() {
    for (int part = parts; part-- > 0;) {
      if (part + 1 < parts) load(part);
      if (is_hard)
        write_gradient<true>(part);
      else
        write_gradient<false>(part);
    }
  }

 private:
  // A row goes through shared memory in parts, the first of which holds what does not fill one.
  __device__ int packs() const { return static_cast<int>(plan.packs); }
  __device__ int begin(int part) const { return (part == 0 ? 0 : first + (part - 1) * slots) * plan.lanes() + lane; }
  __device__ int end(int part) const {
    const int whole = (first + part * slots) * plan.lanes();
    return whole < packs() ? whole : packs();
  }

  // Its logit is read by the thread that overwrites it, where the gradient lies in place.
  __device__ void find_target() {
    if (!weights.hard) return;
    const int64_t target = a.target[row];
    is_hard = target != a.ignore_index;
    is_wrong = is_hard && (target < 0 || target >= a.classes);
    if (!is_hard || is_wrong) return;
    target_pack = static_cast<int>(target / kPack);
    target_place = static_cast<int>(target % kPack);
    if ((target_pack & (plan.lanes() - 1)) == lane)
      at_target = widen(static_cast<const Student*>(a.student)[row * a.classes + target]);
  }

  __device__ Kept<T, Student, Teacher, kPack> kept() const { return {shared, as_read}; }

  // Begins to read a part. What is kept is not read again.
  __device__ void fetch(int part) const {
    const bool once = part + 1 == parts;
    int slot = 0;
    for (int pack = begin(part); pack < end(part); pack += plan.lanes(), ++slot) {
      fetch_pack(a.student, pack, kept().students(slot), once);
      if (weights.soft) fetch_pack(a.teacher, pack, kept().teachers(slot), once);
    }
  }

  template <typename E>
  __device__ void fetch_pack(const void* logits, int pack, Pack<E, kPack>* to, bool once) const {
    if constexpr (kVectors) {
      copy_async<sizeof(Pack<E, kPack>)>(to, at.template address<E>(logits, pack), once);
    } else {
      Pack<E, kPack> some;
      for (int j = 0; j < kPack; ++j) narrow(T(-__builtin_inff()), some.logit[j]);
      at.read(logits, pack, some);
      *reinterpret_cast<Access<Pack<E, kPack>>*>(to) = whole_of(some);
    }
  }

  __device__ void get(int slot, T (&logits)[kPack], T (&targets)[kPack]) const {
    kept().get_students(slot, logits);
    if (weights.soft)
      kept().get_targets(slot, targets);
    else
      for (T& target : targets) target = 0;
  }

  // Reads a part, perturbs it once it is there, and finds its maxima.
  __device__ void load(int part) {
    fetch(part);
    commit_copies();
    wait_copies<0>();
    student_max = teacher_max = -__builtin_inff();
    int slot = 0;
    for (int pack = begin(part); pack < end(part); pack += plan.lanes(), ++slot) {
      T logits[kPack], targets[kPack] = {};
      kept().get_students(slot, logits);
      if (weights.soft) {
        Pack<Teacher, kPack> teachers;
        read_whole(kept().teachers(slot), teachers);
        noise.perturb(pack, teachers, targets);
        if (!as_read) kept().put(slot, targets);
      }
      for (int j = 0; j < kPack; ++j) {
        student_max = larger(student_max, logits[j]);
        teacher_max = larger(teacher_max, targets[j]);
      }
    }
  }

  // Adds up the part that was loaded.
  template <bool kHard>
  __device__ void add(int part) {
    RowSums<T> more;
    more.student_max = larger(sums.student_max, student_max);
    more.teacher_max = larger(sums.teacher_max, teacher_max);
    if (part > 0) sums.template rebase<kReverse>(more.student_max, more.teacher_max, inverse_temperature);
    const T student_base = sums.base(more.student_max), teacher_base = sums.base(more.teacher_max);
    int slot = 0;
    for (int pack = begin(part); pack < end(part); pack += plan.lanes(), ++slot) {
      T logits[kPack], targets[kPack];
      get(slot, logits, targets);
      for (int j = 0; j < kPack; ++j) {
        const T of_max = logits[j] - student_base, b = of_max * slope, a2 = (targets[j] - teacher_base) * slope;
        const T exp_b = exponential2(b), exp_a = exponential2(a2);
        more.exp_b += exp_b;
        more.exp_a += exp_a;
        more.divergence += divergence_term<kReverse>(exp_a, exp_b, a2, b);
        if (kHard) more.hard += exponential2(of_max * static_cast<T>(1 / kLog2));
      }
      if (kHard && weights.smoothing > 0)
        for (int j = 0; j < kPack; ++j)
          if (at.inside(pack, j)) logit_mean += logits[j] * weights.each;
    }
    sums.student_max = more.student_max;
    sums.teacher_max = more.teacher_max;
    sums.exp_b += more.exp_b;
    sums.exp_a += more.exp_a;
    sums.divergence += more.divergence * static_cast<T>(kLog2);
    sums.hard += more.hard;
  }

  // Of the part that is kept.
  template <bool kHard>
  __device__ void write_gradient(int part) const {
    const T student_base = sums.base(sums.student_max), teacher_base = sums.base(sums.teacher_max);
    int slot = 0;
    for (int pack = begin(part); pack < end(part); pack += plan.lanes(), ++slot) {
      T logits[kPack], targets[kPack];
      get(slot, logits, targets);
      T g[kPack];
      for (int j = 0; j < kPack; ++j) {
        const T of_max = logits[j] - student_base, b = of_max * slope, a2 = (targets[j] - teacher_base) * slope;
        const T other = kReverse ? b - a2 : exponential2(a2);
        const T hard = kHard ? exponential2(of_max * static_cast<T>(1 / kLog2)) : T(0);
        g[j] = gradient<kReverse, kHard>(slopes, exponential2(b), other, hard);
      }
      if (kHard && pack == target_pack)
        for (int j = 0; j < kPack; ++j)
          if (j == target_place) g[j] -= slopes.at_target;
      Pack<Student, kPack> grad = {};
      if (a.accumulate) {
        at.read(a.grad_student, pack, grad);
        for (int j = 0; j < kPack; ++j) g[j] += widen(grad.logit[j]);
      }
      for (int j = 0; j < kPack; ++j) narrow(g[j], grad.logit[j]);
      at.write(grad, a.grad_student, pack);
    }
  }

  const DistillationLoss& a;
  const Plan& plan;
  const Weights<T>& weights;
  const int64_t row;
  const T inverse_temperature, slope;  // of logits; of powers of two
  const int lane;
  const RowPacks<kPack, kVectors> at;
  ThreadNoise<T, kPack> noise;
  unsigned char* const shared;
  bool as_read = false;     // whether targets are kept as they are read
  int slots, parts, first;  // packs kept, parts of the row, and packs of a thread in the first of them
  int target_pack = -1, target_place = 0;
  bool is_hard = false, is_wrong = false;  // whether the row has a target, and whether it is no class
  T student_max, teacher_max;              // of the part at hand
  RowSums<T> sums;
  T at_target = 0, logit_mean = 0;
  Slopes<T> slopes;
};

// This thread's share of the targets in [row_begin, row_end) that are not ignored.
__device__ double count(const DistillationLoss& a, int64_t row_begin, int64_t row_end) {
  double counted = 0;
  for (int64_t row = row_begin + threadIdx.x; row < row_end; row += blockDim.x)
    counted += a.target[row] != a.ignore_index;
  return counted;
}

__global__ void __launch_bounds__(kThreadsAlone) count_targets(DistillationLoss a, double* counts) {
  __shared__ double shared[1][kMostWarps];
  const int64_t rows = (batch_rows(a) + gridDim.x - 1) / gridDim.x, all = a.rows + a.rows_after;
  const int64_t begin = blockIdx.x * rows - a.rows_before;
  const double counted = count(a, begin, begin + rows < all ? begin + rows : all);
  const double total = sum_over(kThreadsAlone, counted, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// The weight of a row's cross-entropy.
template <typename T>
__device__ T hard_scale(const DistillationLoss& a, const Plan& plan, const double* counts,
                        double (*shared)[kMostWarps]) {
  const T weight = static_cast<T>(a.hard_weight);
  if (a.hard_weight == 0 || !a.batchmean) return weight;
  double counted = plan.counts == 0 ? count(a, -a.rows_before, a.rows + a.rows_after) : 0;
  for (unsigned i = threadIdx.x; i < plan.counts; i += blockDim.x) counted += counts[i];
  const T targets = static_cast<T>(sum_over(plan.threads, counted, shared));
  return targets > 0 ? weight / targets : T(0);
}

// partials[b]: the losses of block b's rows, unless it is the only block.
template <typename T, typename Student, typename Teacher, bool kVectors, bool kReverse>
__global__ void __launch_bounds__(most_threads(logits_of_pack(sizeof(Student), sizeof(Teacher))))
    rows(DistillationLoss a, Plan plan, Weights<T> weights, const double* counts, double* partials) {
  __shared__ double shared[kSums][kMostWarps];
  PYKD_DYNAMIC_SHARED(unsigned char, kept);
  const T hard = hard_scale<T>(a, plan, counts, shared);
  double total = 0;
  for (int64_t group = blockIdx.x; group < plan.groups; group += gridDim.x) {
    const int64_t row = group * plan.rows_of_block() + (threadIdx.x >> plan.log2_lanes);
    Row<T, Student, Teacher, kVectors, kReverse> thread(a, plan, weights, kept, row);
    if (row < a.rows) thread.sum();
    thread.combine(shared);
    if (row >= a.rows) continue;
    const T loss = thread.finish(hard);
    if (a.grad_student) thread.write_gradient();
    if ((threadIdx.x & (plan.lanes() - 1)) > 0) continue;
    total += loss;
    if (a.row_loss) static_cast<T*>(a.row_loss)[row] = loss;
  }
  if (!a.loss) return;
  total = sum_over(plan.threads, total, shared);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1)
    *static_cast<T*>(a.loss) = static_cast<T>(total);
  else
    partials[blockIdx.x] = total;
}

template <typename T>
__global__ void __launch_bounds__(kThreadsAlone) finish(T* loss, const double* partials, unsigned blocks) {
  __shared__ double shared[1][kMostWarps];
  const double total = sum_partials(partials, blocks, shared);
  if (threadIdx.x == 0) *loss = static_cast<T>(total);
}

template <typename T, typename Student, typename Teacher>
CudaStatus launch(const DistillationLoss& a, void* workspace, CUstream_st* stream) {
  constexpr int kPack = logits_of_pack(sizeof(Student), sizeof(Teacher));
  const bool vectors = a.classes % kPack == 0 && is_aligned<Student, kPack>(a.student) &&
                       is_aligned<Teacher, kPack>(a.teacher) && is_aligned<Student, kPack>(a.grad_student);
  const auto kernel =
      vectors ? (a.reverse ? rows<T, Student, Teacher, true, true> : rows<T, Student, Teacher, true, false>)
              : (a.reverse ? rows<T, Student, Teacher, false, true> : rows<T, Student, Teacher, false, false>);
  Plan plan(a);
  if (plan.packs > INT32_MAX / 2) return cudaErrorInvalidValue;  // a row of some 4e9 classes
  const unsigned threads = static_cast<unsigned>(plan.threads);
  if (plan.may_exceed()) {
    int device, most;
    if (const CudaStatus status = cudaGetDevice(&device)) return status;
    if (const CudaStatus status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
      return status;
    plan.fit(most);
    if (const CudaStatus status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kSharedOfSums))
      return status;
  }
  double *const counts = static_cast<double*>(workspace), *const partials = counts + plan.counts;
  if (plan.counts > 0) PYKD_LAUNCH(plan.counts, kThreadsAlone, 0, stream, count_targets)(a, counts);
  PYKD_LAUNCH(plan.blocks, threads, static_cast<size_t>(plan.shared_bytes()), stream, (*kernel))
  (a, plan, Weights<T>(a), counts, partials);
  if (plan.needs_partials(a))
    PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish<T>)(static_cast<T*>(a.loss), partials, plan.blocks);
  return cudaGetLastError();
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t distillation_loss_workspace_bytes_cuda(const DistillationLoss& args) {
  const cuda::Plan plan(args);
  return static_cast<int64_t>((plan.counts + (plan.needs_partials(args) ? plan.blocks : 0)) * sizeof(double));
}

CudaStatus distillation_loss_cuda(const DistillationLoss& args, void* workspace, CUstream_st* stream) {
  return cuda::with_dtypes(args.student_dtype, args.teacher_dtype, [&](auto computed, auto student, auto teacher) {
    return cuda::launch<decltype(computed), decltype(student), decltype(teacher)>(args, workspace, stream);
  });
}

}  // namespace pykd
