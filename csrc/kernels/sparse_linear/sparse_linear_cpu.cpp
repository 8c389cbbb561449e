// Panels go through core/sparse_panels.h. Row by row of the batch, a tile's rows are the lanes: its values come as they
// lie, each input is broadcast for all of them, and nothing is transposed.
#include "core/cpu_isa.h"
#include "core/sparse_panels.h"
#include "kernels/sparse_linear/sparse_linear.h"

namespace pykd::PYKD_ISA {
namespace {

constexpr int kResults = kRows * 3;  // registers that hold results
constexpr int kBatchRows = 8;        // at once: more that are 4 KB apart push each other out of the cache
constexpr int64_t kRowsAtOnce = 48;  // of the batch: with 1,000 inputs 200 KB, which the caches hold

float activated(float result, Activation activation) {
  return activation == Activation::kRelu && result < 0 ? 0 : result;
}

// One number of a tile.
void put(const SparseLinear& a, int64_t b, int64_t tile, int64_t r, float sum) {
  const int32_t row = a.weight.outputs[tile * a.weight.height + r];
  if (row >= 0) a.output[b * a.out + row] = activated(sum + (a.bias ? a.bias[row] : 0), a.activation);
}

// A tile of V vectors of rows, for B rows of the batch; U columns at a time have sums of their own.
template <int V, int B, int U>
void tall(const SparseLinear& a, int64_t tile, int64_t b) {
  const SparseTiles& w = a.weight;
  const int width = w.width;
  Floats sums[U][B][V] = {};
  const auto add = [&](Floats(&to)[B][V], const float* values, const float* inputs) {
    Floats columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load<Floats>(values + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < B; ++i) {
      const Floats input = broadcast(inputs + i * a.in);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) to[i][v] += input * columns[v];
    }
  };
  for (int64_t run = w.starts[tile]; run < w.starts[tile + 1]; ++run) {
    const float* const inputs = a.input + b * a.in + w.columns[run];
    const float* values = w.values + run * width * V * kLanes;
    int c = 0;
    for (; c + U <= width; c += U, values += U * V * kLanes)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) add(sums[u], values + u * V * kLanes, inputs + c + u);
    for (; c < width; ++c, values += V * kLanes) add(sums[0], values, inputs + c);
  }
  const int32_t* const rows = w.outputs + tile * V * kLanes;
  const int32_t first = rows[0];
  const bool whole = rows[V * kLanes - 1] >= 0;  // the rows of a shared tile follow one another
#pragma GCC unroll 32
  for (int i = 0; i < B; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Floats sum = sums[0][i][v];
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum += sums[u][i][v];
      if (whole) {
        if (a.bias) sum += load<Floats>(a.bias + first + v * kLanes);
        if (a.activation == Activation::kRelu) sum = sum < 0 ? Floats{} : sum;
        store(a.output + (b + i) * a.out + first + v * kLanes, sum);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) put(a, b + i, tile, v * kLanes + lane, sum[lane]);
      }
    }
}

template <int V, int B = kResults / V < kBatchRows ? kResults / V : kBatchRows>
void tall_rest(const SparseLinear& a, int64_t tile, int64_t b, int64_t n) {
  if constexpr (B > 0) {
    if (n >= B) {
      constexpr int kUnroll = B * V * 4 <= kResults ? 4 : B * V * 2 <= kResults ? 2 : 1;
      tall<V, B, kUnroll>(a, tile, b);
      return tall_rest<V, B>(a, tile, b + B, n - B);
    }
    tall_rest<V, B - 1>(a, tile, b, n);
  }
}

// A tile of H rows, fewer than lanes: kLanes / H columns of it are a vector.
template <int H>
void low(const SparseLinear& a, int64_t tile, int64_t b) {
  constexpr int kColumns = kLanes / H;
  const SparseTiles& w = a.weight;
  Floats sums[2] = {};
  for (int64_t run = w.starts[tile]; run < w.starts[tile + 1]; ++run) {
    const float* const inputs = a.input + b * a.in + w.columns[run];
    const float* const values = w.values + run * w.width * H;
    int c = 0;
    for (; c + 2 * kColumns <= w.width; c += 2 * kColumns)
      for (int i = 0; i < 2; ++i)
        sums[i] += load<Floats>(values + (c + i * kColumns) * H) * spread<H>(inputs + c + i * kColumns);
    for (; c + kColumns <= w.width; c += kColumns) sums[0] += load<Floats>(values + c * H) * spread<H>(inputs + c);
    if (c < w.width) {
      alignas(64) float rest[kColumns] = {};
      for (int i = 0; c + i < w.width; ++i) rest[i] = inputs[c + i];
      sums[1] += load_first(values + c * H, (w.width - c) * H) * spread<H>(rest);
    }
  }
  const Floats sum = reduce_sum_to<H>(sums[0] + sums[1]);
  for (int r = 0; r < H; ++r) put(a, b, tile, r, sum[r]);
}

// Two rows that share nothing, two entries of each in a vector: inputs inserted one by one come sooner than gathered.
typedef float Four __attribute__((vector_size(16)));

void pair(const SparseLinear& a, int64_t tile, int64_t b) {
  const SparseTiles& w = a.weight;
  const float* const input = a.input + b * a.in;
  const float* value = w.values + 2 * int64_t{w.starts[tile]};
  const float* const end = w.values + 2 * int64_t{w.starts[tile + 1]};
  const int32_t* column = w.columns + 2 * int64_t{w.starts[tile]};
  const auto product = [&](const float* values, const int32_t* columns) {
    const int64_t two = load<int64_t>(columns), next = load<int64_t>(columns + 2);
    return load<Four>(values) * Four{input[static_cast<int32_t>(two)], input[two >> 32],
                                     input[static_cast<int32_t>(next)], input[next >> 32]};
  };
  Four sums{}, others{};  // a sum waits for the last one four cycles
  for (; value + 8 <= end; value += 8, column += 8) {
    sums += product(value, column);
    others += product(value + 4, column + 4);
  }
  if (value + 4 <= end) {
    sums += product(value, column);
    value += 4;
    column += 4;
  }
  if (value < end) others += Four{value[0], value[1]} * Four{input[column[0]], input[column[1]]};
  sums += others;
  put(a, b, tile, 0, sums[0] + sums[2]);
  put(a, b, tile, 1, sums[1] + sums[3]);
}

void rowwise(const SparseLinear& a, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end) {
  const SparseTiles& w = a.weight;
  const auto each = [&](void (*run)(const SparseLinear&, int64_t, int64_t)) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      for (int64_t b = begin; b < end; ++b) run(a, tile, b);
  };
  if (w.pairs) return each(pair);
  if (w.height % kLanes == 0) {
    for (int64_t b = begin; b < end; b += kRowsAtOnce) {
      const int64_t n = end - b < kRowsAtOnce ? end - b : kRowsAtOnce;
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) switch (w.height / kLanes) {
          case 1: tall_rest<1>(a, tile, b, n); break;
          case 2: tall_rest<2>(a, tile, b, n); break;
          default: tall_rest<4>(a, tile, b, n);
        }
    }
    return;
  }
  switch (w.height) {
    case 1: return each(low<1>);
    case 2: return each(low<2>);
    case 4:
      if constexpr (kLanes > 4) return each(low<4>);
      break;
    default:
      if constexpr (kLanes > 8) return each(low<8>);
  }
}

}  // namespace

void sparse_linear_cpu(const SparseLinear& a, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end) {
  if (a.lanes == 1) return rowwise(a, begin, end, tile_begin, tile_end);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t batch = a.batch - panel * a.lanes, filled = batch < a.lanes ? batch : a.lanes;
    const int64_t vectors = (filled + kLanes - 1) / kLanes, step = vectors_at_once(a.weight, vectors);
    for (int64_t vector = 0; vector < vectors; vector += step)
      run_tiles(
          a.weight, tile_begin, tile_end, vectors - vector < step ? vectors - vector : step,
          a.input + panel * a.in * a.lanes + vector * kLanes, [&](int64_t column) { return column * a.lanes; },
          [&]<int N>(int64_t row, Floats(&results)[N]) __attribute__((always_inline)) {
            finish(results, a.bias ? a.bias[row] : 0, a.activation);
            float* const to = a.output + (panel * a.out + row) * a.lanes + vector * kLanes;
            for (int n = 0; n < N; ++n) store(to + n * kLanes, results[n]);
          });
  }
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(sparse_linear_cpu,
              (const SparseLinear& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end),
              (args, begin, end, tile_begin, tile_end))
