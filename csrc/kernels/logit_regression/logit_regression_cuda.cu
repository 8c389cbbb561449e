#include "core/cuda.h"
#include "core/philox.h"
#include "kernels/logit_regression/logit_regression.h"
#include "kernels/logit_regression/logit_regression_math.h"

// A thread takes packs of 16 bytes: four float32 logits, or eight of two bytes, which are what one Philox counter
// perturbs. The two threads that share a float32 counter both draw it: that costs less than the half-filled sectors
// that 32 bytes a thread would write.
//
// The floor is memory: a float32 logit moves 12 bytes (student, teacher, gradient), one of two bytes 6. While an H200
// (4.8 TB/s; 132 SMs of 128 lanes at 1.75 GHz) moves them it has 74 instruction slots a float32 logit and 37 a two-byte
// one. A noisy logit takes some 70 or 45 (sm_90: 40 or 32 of them Philox and Box-Muller), one of a clean row 25 or 20:
// with alpha = 0.5 memory stays the limit.
namespace pykd::cuda {
namespace {

constexpr int kThreads = 256;            // of a block that shares the work with others
constexpr int kThreadsAlone = 1024;      // at most, of a block that does a small problem alone, total included
constexpr int64_t kLogitsAlone = 16384;  // the largest such problem: beyond it a second launch costs less
constexpr int64_t kChunk = 8192;         // logits of a row a block takes: 64 rows of 32000 classes fill 132 SMs twice

constexpr int logits_of_pack(size_t student_bytes, size_t teacher_bytes) {
  return 16 / static_cast<int>(student_bytes > teacher_bytes ? student_bytes : teacher_bytes);
}

template <typename E, int kPack>
struct alignas(sizeof(E) * kPack) Pack {
  E logit[kPack];
};

// What a pack is in one access to memory; of two dtypes, the narrower one's packs have 8 bytes.
template <int kBytes>
struct AccessOf {
  using Type = uint4;
};
template <>
struct AccessOf<8> {
  using Type = uint2;
};
template <typename P>
using Access = typename AccessOf<sizeof(P)>::Type;

__device__ double widen(double x) { return x; }
__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(double x, double& to) { to = x; }
__device__ void narrow(float x, float& to) { to = x; }
__device__ void narrow(float x, __half& to) { to = __float2half(x); }
__device__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

// How the rows lie on blocks and threads. A row's order of summation follows from its classes alone, so that its loss
// does not depend on the rows beside it.
struct Plan {
  int log2_lanes = 0;  // of the threads of a row
  int threads;         // of a block
  unsigned chunks;     // blocks of a row
  unsigned blocks;
  int64_t packs;   // of a row
  int64_t groups;  // of rows that a block takes at a time
  double weight;   // of a teacher's noise

  explicit Plan(const LogitRegression& a)
      : chunks(static_cast<unsigned>((a.classes + kChunk - 1) / kChunk)),
        weight(a.noise.sigma / static_cast<double>(a.noise.n_teachers)) {
    const auto bytes = [](DType dtype) { return dtype == DType::kFloat64 ? 8u : dtype == DType::kFloat32 ? 4u : 2u; };
    const int pack = logits_of_pack(bytes(a.student_dtype), bytes(a.teacher_dtype));
    packs = (a.classes + pack - 1) / pack;
    // A pack a thread while a warp suffices, then four; a whole block at most.
    while (lanes() < 32 ? lanes() < packs : lanes() < kThreads && 4 * lanes() < packs) ++log2_lanes;
    const bool alone = a.rows == 0 || (chunks == 1 && a.rows * a.classes <= kLogitsAlone);
    const int64_t wanted = a.rows > 0 ? (a.rows * lanes() + 31) / 32 * 32 : kThreads;
    threads = !alone ? kThreads : wanted < kThreadsAlone ? static_cast<int>(wanted) : kThreadsAlone;
    groups = (a.rows + rows_of_block() - 1) / rows_of_block();
    blocks = alone ? 1 : static_cast<unsigned>(groups * chunks);
  }

  PYKD_HD int lanes() const { return 1 << log2_lanes; }
  PYKD_HD int rows_of_block() const { return threads >> log2_lanes; }
  bool needs_partials(const LogitRegression& a) const { return blocks > 1 && (a.loss || (a.row_loss && chunks > 1)); }
};

// The sum over every `threads` neighbouring threads, for the first of them: a power of two up to 32, or whole warps.
template <typename T>
__device__ T sum_over(int threads, T value, double (&warp_sums)[32]) {
  for (int offset = (threads < 32 ? threads : 32) / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(~0u, value, offset);
  if (threads <= 32) return value;
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  const int first = static_cast<int>(threadIdx.x) / threads * (threads / 32);
  double sum = 0;
  for (int warp = 0; warp < threads / 32; ++warp) sum += warp_sums[first + warp];
  __syncthreads();
  return static_cast<T>(sum);
}

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
      : a(args), row(row), weight(static_cast<T>(plan.weight)) {}

  // The sum of squared differences of packs begin, begin + step, ... before `end`; writes their gradient.
  __device__ T run(int64_t begin, int64_t end, int step) {
    Pack<Student, kPack> student[kTogether] = {};
    Pack<Teacher, kPack> teacher[kTogether] = {};
    const auto read_together = [&](int64_t pack) {
      PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
        if (pack + i * step >= end) continue;
        read(a.student, pack + i * step, student[i]);
        read(a.teacher, pack + i * step, teacher[i]);
      }
    };
    read_together(begin);  // under way while the row's draws are made
    draw();
    T sum = 0;
    for (int64_t pack = begin; pack < end; pack += kTogether * step) {
      PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
        if (pack + i * step < end) sum += run(pack + i * step, student[i], teacher[i]);
      }
      read_together(pack + kTogether * step);
    }
    return sum;
  }

 private:
  // What the whole row shares: who perturbs it, its own noise, the scale of its gradient.
  __device__ void draw() {
    if (a.noise.sigma > 0 && a.noise.threshold > 0) {
      seed = static_cast<uint64_t>(*a.noise.seed);
      teachers = static_cast<uint32_t>(a.noise.n_teachers);
    }
    for (uint32_t k = 0; k < teachers; ++k) {
      const RowDraw drawn = row_draw(seed, global(), k, a.noise.threshold);
      if (!drawn.selected) continue;
      any_selected = true;
      if (k < 32) selected |= 1u << k;
      if (!a.noise.per_sample) continue;
      T cosine, sine;
      normal_pair(drawn.word, weight, cosine, sine);
      row_noise += cosine;
    }
    scale = static_cast<T>(a.grad_scale);
    if (a.grad_loss) scale *= static_cast<const T*>(a.grad_loss)[row * a.grad_loss_stride];
  }

  __device__ T run(int64_t pack, const Pack<Student, kPack>& student, const Pack<Teacher, kPack>& teacher) const {
    T noise[kPack];
    for (T& n : noise) n = row_noise;
    if (any_selected && !a.noise.per_sample)
      for (uint32_t k = 0; k < teachers; ++k)
        if (k < 32 ? selected >> k & 1 : row_draw(seed, global(), k, a.noise.threshold).selected)
          add_normals(k, pack, noise);
    T difference[kPack], sum = 0;
    if (!any_selected)
      differences<Target::kClean>(student, teacher, noise, difference);
    else if (a.noise.additive)
      differences<Target::kAdditive>(student, teacher, noise, difference);
    else
      differences<Target::kMultiplicative>(student, teacher, noise, difference);
    for (int j = 0; j < kPack; ++j)
      if (inside(pack, j)) sum += difference[j] * difference[j];
    if (!a.grad_student) return sum;
    Pack<Student, kPack> grad = {};
    if (a.accumulate) read(a.grad_student, pack, grad);
    for (int j = 0; j < kPack; ++j) narrow(difference[j] * scale + widen(grad.logit[j]), grad.logit[j]);
    write(grad, pack);
    return sum;
  }

  template <Target kTarget>
  __device__ void differences(const Pack<Student, kPack>& student, const Pack<Teacher, kPack>& teacher,
                              const T (&noise)[kPack], T (&difference)[kPack]) const {
    for (int j = 0; j < kPack; ++j)
      difference[j] = logit_difference<kTarget>(widen(student.logit[j]), widen(teacher.logit[j]), noise[j]);
  }

  __device__ void add_normals(uint32_t k, int64_t pack, T (&noise)[kPack]) const {
    Philox<uint64_t> x[1] = {{{static_cast<uint64_t>(pack * kPack / 8), k, global(), global() >> 32}}};
    philox(x, seed);
    const int first = static_cast<int>(pack * kPack % 8 / 2);  // of the four words
    for (int pair = 0; pair < kPack / 2; ++pair) {
      uint64_t word = x[0].word[pair];
      for (int w = pair + kPack / 2; w < 4; w += kPack / 2)
        if (w == first + pair) word = x[0].word[w];
      T cosine, sine;
      normal_pair(static_cast<uint32_t>(word), weight, cosine, sine);
      noise[2 * pair] += cosine;
      noise[2 * pair + 1] += sine;
    }
  }

  __device__ uint64_t global() const { return static_cast<uint64_t>(a.noise.row_offset + row); }

  // Whether logit j of a pack is one of the row's.
  __device__ bool inside(int64_t pack, int j) const { return kVectors || kPack * pack + j < a.classes; }

  template <typename E>
  __device__ void read(const void* logits, int64_t pack, Pack<E, kPack>& to) const {
    const E* from = static_cast<const E*>(logits) + row * a.classes + kPack * pack;
    if constexpr (kVectors) {
      const auto whole = *reinterpret_cast<const Access<Pack<E, kPack>>*>(from);
      memcpy(&to, &whole, sizeof to);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (inside(pack, j)) to.logit[j] = from[j];
    }
  }

  __device__ void write(const Pack<Student, kPack>& from, int64_t pack) const {
    Student* to = static_cast<Student*>(a.grad_student) + row * a.classes + kPack * pack;
    if constexpr (kVectors) {
      Access<Pack<Student, kPack>> whole;
      memcpy(&whole, &from, sizeof whole);
      __stcs(reinterpret_cast<Access<Pack<Student, kPack>>*>(to), whole);  // an assignment becomes a store a logit
    } else {
      for (int j = 0; j < kPack; ++j)
        if (inside(pack, j)) to[j] = from.logit[j];
    }
  }

  const LogitRegression& a;
  const int64_t row;
  const T weight;
  uint32_t teachers = 0;  // 0: no noise
  uint32_t selected = 0;  // of the first 32 teachers, as bits
  bool any_selected = false;
  uint64_t seed = 0;
  T row_noise = 0, scale;
};

// Block b takes chunk b % chunks of group b / chunks. partials[b]: its sum of squares, unless it is the only block.
template <typename T, typename Student, typename Teacher, bool kVectors>
__global__ void __launch_bounds__(kThreadsAlone) rows(LogitRegression a, Plan plan, double* partials) {
  __shared__ double warp_sums[32];
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
    sum = sum_over(lanes, sum, warp_sums);
    if (lane > 0 || row >= a.rows) continue;
    total += sum;
    if (a.row_loss && plan.chunks == 1) static_cast<T*>(a.row_loss)[row] = sum / 2;
  }
  const bool alone = gridDim.x == 1;
  if (alone ? !a.loss : !partials) return;
  total = sum_over(plan.threads, total, warp_sums);
  if (threadIdx.x > 0) return;
  if (alone)
    write_loss<T>(a, total);
  else
    partials[blockIdx.x] = total;
}

// One block: the losses of rows in several chunks, and the loss over all rows.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone) finish(LogitRegression a, Plan plan, const double* partials) {
  __shared__ double warp_sums[32];
  if (a.row_loss && plan.chunks > 1)
    for (int64_t row = threadIdx.x; row < a.rows; row += kThreadsAlone) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += partials[row * plan.chunks + chunk];
      static_cast<T*>(a.row_loss)[row] = static_cast<T>(sum / 2);
    }
  if (!a.loss) return;
  double total = 0;
  for (unsigned block = threadIdx.x; block < plan.blocks; block += kThreadsAlone) total += partials[block];
  total = sum_over(kThreadsAlone, total, warp_sums);
  if (threadIdx.x == 0) write_loss<T>(a, total);
}

template <typename E, int kPack>
bool is_aligned(const void* logits) {
  return reinterpret_cast<uintptr_t>(logits) % alignof(Pack<E, kPack>) == 0;
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

template <typename Student>
CudaStatus choose_teacher(const LogitRegression& a, void* workspace, CUstream_st* stream) {
  switch (a.teacher_dtype) {
    case DType::kFloat16: return launch<float, Student, __half>(a, workspace, stream);
    case DType::kBFloat16: return launch<float, Student, __nv_bfloat16>(a, workspace, stream);
    default: return launch<float, Student, float>(a, workspace, stream);
  }
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t logit_regression_workspace_bytes(const LogitRegression& args) {
  const cuda::Plan plan(args);
  return plan.needs_partials(args) ? static_cast<int64_t>(plan.blocks * sizeof(double)) : 0;
}

CudaStatus logit_regression_cuda(const LogitRegression& args, void* workspace, CUstream_st* stream) {
  switch (args.student_dtype) {
    case DType::kFloat64: return cuda::launch<double, double, double>(args, workspace, stream);
    case DType::kFloat16: return cuda::choose_teacher<__half>(args, workspace, stream);
    case DType::kBFloat16: return cuda::choose_teacher<__nv_bfloat16>(args, workspace, stream);
    default: return cuda::choose_teacher<float>(args, workspace, stream);
  }
}

}  // namespace pykd
