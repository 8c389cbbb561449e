#include "core/cuda.h"
#include "core/cuda_blocks.h"
#include "kernels/block_norm/block_norm.h"
#include "kernels/block_norm/block_norm_math.h"

// The floor is memory: 8 bytes a float32 weight, 12 where gradients accumulate, 4 for the value alone. While an H200
// (4.8 TB/s; 132 SMs of 128 lanes at 1.75 GHz) moves 8 bytes it has 49 instruction slots, of which l1_l2 in blocks of
// 4x4 takes some 25 (counted in PTX): 3 to set up, 8 to read, 7 to square, 7 to write. One of two bytes has half the
// bytes and slots, and takes some 18: its packs have twice the entries. Groups larger than the registers
// of a thread block (8192 entries; 512 rows of "in") are read once more for the gradient: 12 bytes, unless L2 has them.
// A teacher's norms are a launch of their own before the student's: 4 bytes for each of its entries.
namespace pykd::cuda {
namespace {

// The student's weight, or the teacher's.
struct Side {
  Panels panels;
  const void* weight;
  void* grad;            // out, or null
  void* norms;           // out [grid rows, grid columns], or null
  const void* others;    // norms of the other side's groups; null for the teacher, who adds only those that others lack
  Blocks other;          // all 0 where there is none
  int64_t grid_columns;  // of the weight
  int64_t other_grid_rows, other_grid_columns;
};

struct Call {
  const void* grad_value;
  double* partials;  // out, one a thread block; or null
  void* value;       // out, by the only thread block; or null
  double scale;
  bool linf, by_size, accumulate;
};

// Entries of the group at (row, column) of the grid.
__device__ double entries(const Blocks& b, int64_t row, int64_t column) {
  const int64_t rows = b.rows - row * b.block_rows, columns = b.columns - column * b.block_columns;
  return static_cast<double>(rows < b.block_rows ? rows : b.block_rows) *
         static_cast<double>(columns < b.block_columns ? columns : b.block_columns);
}

// For l1_linf, the largest magnitude and how many entries have it.
template <typename T>
struct Measure : Squares<T> {
  const bool linf;

  __device__ void add(Pair<T>& to, T w, T scale) const {
    if (linf)
      to = join(to, {from_bits(magnitude_bits(w)), T(1)});
    else
      Squares<T>::add(to, w, scale);
  }
  __device__ Pair<T> join(Pair<T> a, Pair<T> b) const {
    if (!linf) return Squares<T>::join(a, b);
    const auto i = magnitude_bits(a.first), j = magnitude_bits(b.first);
    return i > j ? a : i < j ? b : Pair<T>{a.first, a.second + b.second};
  }
};

template <typename T>
__device__ void write_value(void* value, double sum, double scale) {
  *static_cast<T*>(value) = static_cast<T>(sum * scale);
}

template <typename T, typename E, bool kRegular>
__device__ void run(const Call& a, const Side& side, unsigned block, Pair<T>* shared, double (*sums)[kMostWarps]) {
  using ThisPanels = PanelsOfBlock<T, E, kRegular>;
  using ThisPack = typename ThisPanels::ThisPack;
  constexpr int kPack = ThisPanels::kPack, kSums = ThisPanels::kSums, kSummed = ThisPanels::kSummed;
  ThisPanels panels(side.panels, side.weight, block, shared);
  T* const most = panels.of_groups(0);  // or the scale of squares
  T* const factor = panels.of_groups(1);
  const Measure<T> measure{{}, a.linf};
  for (bool again = false, lost = true; lost; again = true)
    lost = panels.reduce(measure, again ? most : nullptr, [&](int g, Pair<T> found) {
      if (!a.linf) return measure.finish(found, again, factor[g], most[g]);
      most[g] = found.first;
      factor[g] = 1 / found.second;
      return false;
    });

  T scale = static_cast<T>(a.scale);
  if (a.grad_value) scale = static_cast<T>(static_cast<double>(*static_cast<const T*>(a.grad_value)) * a.scale);
  double total = 0;
  panels.each_group([&](int g, int64_t row, int64_t column) {
    const T own = a.linf ? most[g] : factor[g];
    const int64_t place = row * side.panels.blocks.grid_columns() + column;
    if (side.norms) static_cast<T*>(side.norms)[place] = own;
    T norm = own, its = 0;
    double size = a.by_size ? entries(side.panels.blocks, row, column) : 1;
    if (side.other_grid_rows > 0) {
      const int64_t i = place / side.grid_columns, j = place % side.grid_columns;
      if (i < side.other_grid_rows && j < side.other_grid_columns) {
        if (!side.others) return;
        its = static_cast<const T*>(side.others)[i * side.other_grid_columns + j];
        norm = a.linf ? larger_magnitude(own, its) : static_cast<T>(hypot(double{own}, double{its}));
        if (a.by_size) size += entries(side.other, i, j);
      }
    }
    if (a.by_size) size = sqrt(size);
    total += static_cast<double>(norm) * size;
    if (a.linf)
      factor[g] *= own > its ? static_cast<T>(size) * scale : own == own ? T(0) : own;
    else
      factor[g] = limited(limited(inverse_norm(norm) * static_cast<T>(size)) * scale);
  });
  if (a.partials || a.value) {
    total = sum_over(kThreads, total, sums);
    if (threadIdx.x == 0) {
      if (a.partials)
        a.partials[blockIdx.x] = total;
      else
        write_value<T>(a.value, total, a.scale);
    }
  }
  if (!side.grad) return;
  __syncthreads();

  T factors[kSums], largest[kSums];
  constexpr int kTogether = 4;  // gradients under way, to accumulate
  Access<ThisPack> grads[kTogether] = {};
  panels.each(
      [&] {
        if (a.accumulate)
          PYKD_UNROLL for (int k = 0; k < kTogether; ++k) grads[k] = whole_of(panels.read(side.grad, k));
      },
      [&](int panel) {
        panels.values_of(factor, panel, factors);
        panels.values_of(most, panel, largest);
      },
      [&](int k, const ThisPack& entries) {
        ThisPack grad = pack_of<ThisPack>(grads[k % kTogether]);
        for (int j = 0; j < kPack; ++j) {
          T w = widen(entries.logit[j]);
          if (a.linf) w = magnitude_bits(w) == magnitude_bits(largest[j / kSummed]) ? (w < 0 ? T(-1) : T(1)) : T(0);
          narrow(w * factors[j / kSummed] + widen(grad.logit[j]), grad.logit[j]);
        }
        if (a.accumulate && k + kTogether < kHeld)
          grads[k % kTogether] = whole_of(panels.read(side.grad, k + kTogether));
        panels.write(k, grad, side.grad);
      },
      [](int) {});
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads, 2) groups(Call a, Weights<Side> sides) {
  PYKD_DYNAMIC_SHARED(Pair<T>, shared);
  __shared__ double sums[1][kMostWarps];
  const int i = sides.of_block(blockIdx.x);
  const Side& side = sides.item[i];
  const unsigned block = blockIdx.x - sides.first[i];
  side.panels.regular ? run<T, E, true>(a, side, block, shared, sums) : run<T, E, false>(a, side, block, shared, sums);
}

// One block: the value.
template <typename T>
__global__ void __launch_bounds__(kThreadsAlone)
    finish(const double* partials, unsigned count, double scale, void* value) {
  __shared__ double sums[1][kMostWarps];
  const double total = sum_partials(partials, count, sums);
  if (threadIdx.x == 0) write_value<T>(value, total, scale);
}

// ---- on the host ----------------------------------------------------------------------------------------------------

Panels panels_of(const BlockNorm& a, const BlockNormWeight& w, bool teacher) {
  const auto address = [](const void* entries) { return reinterpret_cast<uintptr_t>(entries); };
  return teacher ? Panels(w.teacher_blocks, bytes_of(a.teacher_dtype), address(w.teacher))
                 : Panels(w.blocks, bytes_of(a.dtype), address(w.student) | address(w.grad));
}

int64_t groups_of(const Blocks& b) { return b.grid_rows() * b.grid_columns(); }

// The thread blocks of all launches, and the teachers' groups, whose norms the workspace keeps after the partial sums.
struct Need {
  int64_t blocks = 0, norms = 0;

  explicit Need(const BlockNorm& a) {
    for (int64_t i = 0; i < a.count; ++i)
      for (bool teacher : {true, false}) {
        const Blocks& b = teacher ? a.weights[i].teacher_blocks : a.weights[i].blocks;
        if (b.rows == 0) continue;
        blocks += panels_of(a, a.weights[i], teacher).thread_blocks();
        if (teacher) norms += groups_of(b);
      }
  }
  int64_t partials(const BlockNorm& a) const { return a.value && blocks > 1 ? blocks : 0; }
};

// All weights of one side.
template <typename T, typename E>
void launch(const BlockNorm& a, Call& call, bool teacher, T* norms, CUstream_st* stream) {
  Weights<Side> sides;
  const auto flush = [&] {
    if (sides.count == 0) return;
    PYKD_LAUNCH(sides.blocks(), kThreads, static_cast<size_t>(sides.shared_bytes), stream, groups<T, E>)
    (call, sides);
    if (call.partials) call.partials += sides.blocks();
    sides = {};
  };
  for (int64_t i = 0; i < a.count; ++i) {
    const BlockNormWeight& w = a.weights[i];
    const Blocks& own = teacher ? w.teacher_blocks : w.blocks;
    const Blocks& other = teacher ? w.blocks : w.teacher_blocks;
    if (own.rows > 0)
      sides.add({panels_of(a, w, teacher), teacher ? w.teacher : w.student, teacher ? nullptr : w.grad,
                 teacher ? norms : w.norms, teacher ? nullptr : norms, other, own.grid_columns(), other.grid_rows(),
                 other.grid_columns()},
                sizeof(E));
    if (norms) norms += groups_of(w.teacher_blocks);
    if (sides.is_full()) flush();
  }
  flush();
}

template <typename T, typename E>
void launch_student(const BlockNorm& a, void* workspace, CUstream_st* stream) {
  const Need need(a);
  double* const partials = static_cast<double*>(workspace);
  T* const norms = need.norms > 0 ? reinterpret_cast<T*>(partials + need.partials(a)) : nullptr;
  Call call{a.grad_value,
            need.partials(a) > 0 ? partials : nullptr,
            need.blocks == 1 ? a.value : nullptr,
            a.scale,
            a.linf,
            a.by_size,
            a.accumulate};
  if (norms) {
    if constexpr (sizeof(T) == sizeof(double))
      launch<double, double>(a, call, true, norms, stream);
    else if (a.teacher_dtype == DType::kFloat16)
      launch<float, __half>(a, call, true, norms, stream);
    else if (a.teacher_dtype == DType::kBFloat16)
      launch<float, __nv_bfloat16>(a, call, true, norms, stream);
    else
      launch<float, float>(a, call, true, norms, stream);
  }
  launch<T, E>(a, call, false, norms, stream);
  if (a.value && need.blocks != 1)
    PYKD_LAUNCH(1u, kThreadsAlone, 0, stream, finish<T>)(partials, static_cast<unsigned>(need.blocks), a.scale,
                                                         a.value);
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

int64_t block_norm_workspace_bytes(const BlockNorm& args) {
  const cuda::Need need(args);
  return need.partials(args) * 8 + need.norms * (args.dtype == DType::kFloat64 ? 8 : 4);
}

CudaStatus block_norm_cuda(const BlockNorm& args, void* workspace, CUstream_st* stream) {
  switch (args.dtype) {
    case DType::kFloat64: cuda::launch_student<double, double>(args, workspace, stream); break;
    case DType::kFloat32: cuda::launch_student<float, float>(args, workspace, stream); break;
    case DType::kFloat16: cuda::launch_student<float, __half>(args, workspace, stream); break;
    case DType::kBFloat16: cuda::launch_student<float, __nv_bfloat16>(args, workspace, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace pykd
