// How rows of logits lie on CUDA's blocks and threads, and what a thread does for its share of a row: read, perturb,
// write, sum. Included after core/cuda.h.
//
// A thread takes packs of 16 bytes: four float32 logits, or eight of two bytes, which are what one Philox counter
// perturbs. The two threads that share a float32 counter both draw it: that costs less than the half-filled sectors
// that 32 bytes a thread would write.
#pragma once

#include "core/noise.h"
#include "core/perturb.h"
#include "core/philox.h"

namespace pykd::PYKD_ISA {

constexpr int kThreads = 256;            // of a block that shares the work with others
constexpr int kThreadsAlone = 1024;      // at most, of a block that does a small problem alone, total included
constexpr int64_t kLogitsAlone = 16384;  // the largest such problem: beyond it a second launch costs less

PYKD_HD constexpr int logits_of_pack(size_t student_bytes, size_t teacher_bytes) {
  return 16 / static_cast<int>(student_bytes > teacher_bytes ? student_bytes : teacher_bytes);
}
// Of a block whose threads may use all registers: 64 each of 1024, which packs of eight and float64 exceed.
PYKD_HD constexpr int most_threads(int pack) { return pack == 4 ? kThreadsAlone : kThreadsAlone / 2; }
inline unsigned bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
inline int logits_of_pack(DType student, DType teacher) { return logits_of_pack(bytes_of(student), bytes_of(teacher)); }

// ---- packs ---------------------------------------------------------------------------------------------------------

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

// In one access: an assignment becomes one a logit.
template <typename P>
__device__ void read_whole(const void* from, P& to) {
  const auto whole = *static_cast<const Access<P>*>(from);
  memcpy(&to, &whole, sizeof to);
}
template <typename P>
__device__ Access<P> whole_of(const P& pack) {
  Access<P> whole;
  memcpy(&whole, &pack, sizeof whole);
  return whole;
}

template <typename E, int kPack>
bool is_aligned(const void* logits) {
  return reinterpret_cast<uintptr_t>(logits) % alignof(Pack<E, kPack>) == 0;
}

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

// The packs of one row. With kVectors all of them are whole and aligned.
template <int kPack, bool kVectors>
struct RowPacks {
  int64_t row, classes;

  // Whether logit j of a pack is one of the row's.
  __device__ bool inside(int64_t pack, int j) const { return kVectors || kPack * pack + j < classes; }

  template <typename E>
  __device__ const E* address(const void* logits, int64_t pack) const {
    return static_cast<const E*>(logits) + row * classes + kPack * pack;
  }

  template <typename E>
  __device__ void read(const void* logits, int64_t pack, Pack<E, kPack>& to) const {
    const E* from = address<E>(logits, pack);
    if constexpr (kVectors) {
      read_whole(from, to);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (inside(pack, j)) to.logit[j] = from[j];
    }
  }

  template <typename E>
  __device__ void write(const Pack<E, kPack>& from, void* logits, int64_t pack) const {
    E* to = static_cast<E*>(logits) + row * classes + kPack * pack;
    if constexpr (kVectors) {
      __stcs(reinterpret_cast<Access<Pack<E, kPack>>*>(to), whole_of(from));
    } else {
      for (int j = 0; j < kPack; ++j)
        if (inside(pack, j)) to[j] = from.logit[j];
    }
  }
};

// use(pack, read) for packs begin, begin + step, ... before `end`, kTogether of which read(pack, to) has under way;
// meanwhile() runs once, while the first ones are.
template <int kTogether, typename Packs, typename Index, typename Read, typename Meanwhile, typename Use>
__device__ void stream(Index begin, Index end, int step, Read read, Meanwhile meanwhile, Use use) {
  Packs packs[kTogether] = {};
  const auto read_together = [&](Index pack) {
    PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
      if (pack + i * step < end) read(pack + i * step, packs[i]);
    }
  };
  read_together(begin);
  meanwhile();
  for (Index pack = begin; pack < end; pack += kTogether * step) {
    PYKD_UNROLL for (int i = 0; i < kTogether; ++i) {
      if (pack + i * step < end) use(pack + i * step, packs[i]);
    }
    read_together(pack + kTogether * step);
  }
}

// ---- rows on blocks ------------------------------------------------------------------------------------------------

// A row's order of summation follows from its classes alone, so that its loss does not depend on the rows beside it.
struct RowPlan {
  int log2_lanes = 0;  // of the threads of a row
  int threads;         // of a block
  unsigned chunks;     // blocks of a row
  unsigned blocks;
  int64_t packs;   // of a row
  int64_t groups;  // of rows that a block takes at a time
  double weight;   // of a teacher's noise

  // Up to most_lanes threads and `chunk` logits of a row go to a block; a small problem to a single one of up to
  // most_alone threads, if there are any.
  RowPlan(int64_t rows, int64_t classes, int pack, const Noise& noise, int most_lanes, int64_t chunk, int most_alone)
      : chunks(static_cast<unsigned>((classes - 1) / chunk + 1)),
        packs((classes + pack - 1) / pack),
        weight(noise.sigma / static_cast<double>(noise.n_teachers)) {
    // A pack a thread while a warp suffices, then four.
    while (lanes() < 32 ? lanes() < packs : lanes() < most_lanes && 4 * lanes() < packs) ++log2_lanes;
    const bool small = rows == 0 || (chunks == 1 && (rows == 1 || rows * classes <= kLogitsAlone));
    const bool alone = most_alone > 0 && small;
    threads = least_threads();
    if (alone && rows > 0) {
      const int64_t wanted = (rows * lanes() + 31) / 32 * 32;
      threads = wanted < most_alone ? static_cast<int>(wanted) : most_alone;
    }
    groups = (rows + rows_of_block() - 1) / rows_of_block();
    blocks = alone ? 1 : static_cast<unsigned>(groups * chunks);
  }

  PYKD_HD int lanes() const { return 1 << log2_lanes; }
  int least_threads() const { return lanes() < kThreads ? kThreads : lanes(); }
  PYKD_HD int rows_of_block() const { return threads >> log2_lanes; }
};

// ---- noise ---------------------------------------------------------------------------------------------------------

// Adds weight times the normal values of a pack, teacher k's in a row of that global index.
template <typename T, int kPack>
__device__ void add_normals(uint64_t seed, uint64_t row, uint32_t k, int64_t pack, T weight, T (&values)[kPack]) {
  Philox<uint64_t> x[1] = {{{static_cast<uint64_t>(pack * kPack / 8), k, row, row >> 32}}};
  philox(x, seed);
  const int first = static_cast<int>(pack * kPack % 8 / 2);  // of the four words
  for (int pair = 0; pair < kPack / 2; ++pair) {
    uint64_t word = x[0].word[pair];
    for (int w = pair + kPack / 2; w < 4; w += kPack / 2)
      if (w == first + pair) word = x[0].word[w];
    T cosine, sine;
    normal_pair(static_cast<uint32_t>(word), weight, cosine, sine);
    values[2 * pair] += cosine;
    values[2 * pair + 1] += sine;
  }
}

// A thread's share of the noise of one row.
template <typename T, int kPack>
class ThreadNoise {
 public:
  __device__ ThreadNoise(const Noise& noise_, const RowPlan& plan, int64_t row)
      : noise(noise_), row(row), weight(static_cast<T>(plan.weight)) {}

  // What the whole row shares: who perturbs it, and its own noise. Comes before all else.
  __device__ void draw() {
    selected = 0;
    any_selected = false;
    row_noise = 0;
    if (noise.sigma > 0 && noise.threshold > 0) {
      seed = static_cast<uint64_t>(*noise.seed);
      teachers = static_cast<uint32_t>(noise.n_teachers);
    }
    for (uint32_t k = 0; k < teachers; ++k) {
      const RowDraw drawn = row_draw(seed, global(), k, noise.threshold);
      if (!drawn.selected) continue;
      any_selected = true;
      if (k < 32) selected |= 1u << k;
      if (!noise.per_sample) continue;
      T cosine, sine;
      normal_pair(drawn.word, weight, cosine, sine);
      row_noise += cosine;
    }
  }

  // Whether any teacher perturbs the row.
  __device__ bool any() const { return any_selected; }

  template <typename E>
  __device__ void perturb(int64_t pack, const Pack<E, kPack>& logits, T (&targets)[kPack]) const {
    T values[kPack];
    for (T& v : values) v = row_noise;
    if (any_selected && !noise.per_sample)
      for (uint32_t k = 0; k < teachers; ++k)
        if (k < 32 ? selected >> k & 1 : row_draw(seed, global(), k, noise.threshold).selected)
          add_normals(seed, global(), k, pack, weight, values);
    if (!any_selected)
      perturb<Target::kClean>(logits, values, targets);
    else if (noise.additive)
      perturb<Target::kAdditive>(logits, values, targets);
    else
      perturb<Target::kMultiplicative>(logits, values, targets);
  }

 private:
  template <Target kTarget, typename E>
  __device__ static void perturb(const Pack<E, kPack>& logits, const T (&values)[kPack], T (&targets)[kPack]) {
    for (int j = 0; j < kPack; ++j) targets[j] = PYKD_ISA::perturb<kTarget>(widen(logits.logit[j]), values[j]);
  }

  __device__ uint64_t global() const { return static_cast<uint64_t>(noise.row_offset + row); }

  const Noise& noise;
  const int64_t row;
  const T weight;
  uint32_t teachers = 0;  // 0: no noise
  uint32_t selected = 0;  // of the first 32 teachers, as bits
  bool any_selected = false;
  uint64_t seed = 0;
  T row_noise = 0;
};

// ---- sums ----------------------------------------------------------------------------------------------------------

constexpr int kMostWarps = kThreadsAlone / 32;

// Combines the values of every `threads` neighbouring threads (a power of two up to 32, or whole warps), for all of
// them and in an order that `threads` alone decides. All threads of the block take part; `shared` has a row a value.
template <typename T, int kValues, typename Combine>
__device__ void combine_over(int threads, T (&values)[kValues], double (*shared)[kMostWarps], T none, Combine combine) {
  const auto over_lanes = [&](int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) PYKD_UNROLL for (int i = 0; i < kValues; ++i) {
        values[i] = combine(values[i], __shfl_xor_sync(~0u, values[i], offset));
      }
  };
  over_lanes(threads < 32 ? threads : 32);
  if (threads <= 32) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, warps = threads / 32;
  PYKD_UNROLL for (int i = 0; i < kValues; ++i) {
    if (lane == 0) shared[i][warp] = values[i];
  }
  __syncthreads();
  PYKD_UNROLL for (int i = 0; i < kValues; ++i) {
    values[i] = lane < warps ? static_cast<T>(shared[i][warp / warps * warps + lane]) : none;
  }
  over_lanes(32);
  __syncthreads();
}

template <typename T, int kValues>
__device__ void sum_over(int threads, T (&values)[kValues], double (*shared)[kMostWarps]) {
  combine_over(threads, values, shared, T(0), [](T a, T b) { return a + b; });
}
template <typename T>
__device__ T sum_over(int threads, T value, double (*shared)[kMostWarps]) {
  T values[1] = {value};
  sum_over(threads, values, shared);
  return values[0];
}

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

template <typename T, int kValues>
__device__ void max_over(int threads, T (&values)[kValues], double (*shared)[kMostWarps]) {
  combine_over(threads, values, shared, T(-__builtin_inff()), [](T a, T b) { return larger(a, b); });
}

// The sum of partial sums, for all of a block of kThreadsAlone.
__device__ inline double sum_partials(const double* partials, unsigned count, double (*shared)[kMostWarps]) {
  double sum = 0;
  for (unsigned i = threadIdx.x; i < count; i += kThreadsAlone) sum += partials[i];
  return sum_over(kThreadsAlone, sum, shared);
}

// ---- dtypes --------------------------------------------------------------------------------------------------------

template <typename Student, typename Launch>
CudaStatus with_teacher(DType teacher, const Launch& launch) {
  switch (teacher) {
    case DType::kFloat16: return launch(float{}, Student{}, __half{});
    case DType::kBFloat16: return launch(float{}, Student{}, __nv_bfloat16{});
    default: return launch(float{}, Student{}, float{});
  }
}

// launch(T{}, Student{}, Teacher{}): what to compute in, and what the logits are.
template <typename Launch>
CudaStatus with_dtypes(DType student, DType teacher, const Launch& launch) {
  switch (student) {
    case DType::kFloat64: return launch(double{}, double{}, double{});
    case DType::kFloat16: return with_teacher<__half>(teacher, launch);
    case DType::kBFloat16: return with_teacher<__nv_bfloat16>(teacher, launch);
    default: return with_teacher<float>(teacher, launch);
  }
}

}  // namespace pykd::PYKD_ISA
