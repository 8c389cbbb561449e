// Places outside, tiles of the weight inside: the inputs of a few vectors of places, over all channels, stay in the
// caches while every output is computed from them.
//
// Vectors run along a row of the output, or, where rows are short, through the plane: over the borders between rows,
// whose results are thrown away.
#include "core/cpu_isa.h"
#include "core/sparse_panels.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace pykd::PYKD_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What a stretch of n floats costs: a step for each vector, another each time the weight is read, and a tenth of one
// for a vector whose results are scattered.
int64_t cost(const SparseTiles& w, int64_t n, bool scattered) {
  const int64_t vectors = (n + kLanes - 1) / kLanes, step = vectors_at_once(w, vectors);
  return vectors * (scattered ? 11 : 10) + (vectors + step - 1) / step * 10;
}

// Results of consecutive places to where they belong: pieces of rows.
struct Pieces {
  int64_t count = 0;
  int64_t from[kPairVectors * kLanes], to[kPairVectors * kLanes], length[kPairVectors * kLanes];

  void add(int64_t begin, int64_t target, int64_t n) {
    from[count] = begin;
    to[count] = target;
    length[count++] = n;
  }
};

// Vector by vector, for rows are short.
__attribute__((noinline)) void scatter(const Pieces& pieces, const float* places, float* output) {
  for (int64_t i = 0; i < pieces.count; ++i) {
    const float* from = places + pieces.from[i];
    float* to = output + pieces.to[i];
    int64_t n = pieces.length[i];
    for (; n >= kLanes; n -= kLanes, from += kLanes, to += kLanes) store(to, load<Floats>(from));
    if (n) store_first(to, load<Floats>(from), n);
  }
}

// `vectors` vectors from `place` on, counted in floats from the plane's first one.
template <class Column>
void run_places(const SparseConv2d& a, int64_t group, int64_t tile_begin, int64_t tile_end, int64_t place,
                int64_t vectors, const Pieces& pieces, const Column& column) {
  alignas(64) float places[(kPairVectors + 1) * kLanes];  // a vector more is read
  const bool whole = pieces.count == 1 && pieces.length[0] == vectors * kLanes;
  float* const output = a.output + group * a.out_group_stride + (whole ? pieces.to[0] : 0);
  run_tiles(a.weight, tile_begin, tile_end, vectors, a.planes + group * a.group_stride + place, column,
            [&]<int N>(int64_t row, Floats(&results)[N]) __attribute__((always_inline)) {
              finish(results, a.bias ? a.bias[row] : 0, a.activation);
              float* const to = output + row * a.out_channel_stride;
              float* const at = whole ? to : places;
#pragma GCC unroll 16
              for (int n = 0; n < N; ++n) store(at + n * kLanes, results[n]);
              if (!whole) scatter(pieces, places, to);
            });
}

}  // namespace

void sparse_conv2d_cpu(const SparseConv2d& a, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end) {
  const int64_t width = a.out_width * a.lanes, through = (a.out_height - 1) * a.row_stride + width;
  // Rows of more padding than kernel reach into the next ones.
  const bool by_rows = width > a.row_stride || a.out_height * cost(a.weight, width, width % kLanes != 0) <=
                                                   cost(a.weight, through, width < a.row_stride);
  const int64_t stretch = by_rows ? width : through;
  const int64_t step = kLanes * vectors_at_once(a.weight, (stretch + kLanes - 1) / kLanes);
  const auto run = [&](int64_t group, int64_t place, int64_t vectors, const Pieces& pieces) {
    const auto by = [&](const auto& column) {
      run_places(a, group, tile_begin, tile_end, place, vectors, pieces, column);
    };
    a.offsets ? by([&](int64_t column) { return a.offsets[column]; }) : by([](int64_t column) { return column; });
  };
  for (int64_t group = begin; group < end; ++group)
    for (int64_t y = 0; y < (by_rows ? a.out_height : 1); ++y)
      for (int64_t at = 0; at < stretch; at += step) {
        const int64_t n = smaller(step, stretch - at);
        Pieces pieces;
        if (by_rows) {
          pieces.add(0, y * a.out_row_stride + at, n);
        } else {
          for (int64_t row = at / a.row_stride; row * a.row_stride < at + n; ++row) {
            const int64_t from = larger(at, row * a.row_stride);
            const int64_t to = smaller(at + n, row * a.row_stride + width);
            if (from < to) pieces.add(from - at, row * a.out_row_stride + from - row * a.row_stride, to - from);
          }
        }
        if (pieces.count) run(group, y * a.row_stride + at, (n + kLanes - 1) / kLanes, pieces);
      }
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(sparse_conv2d_cpu,
              (const SparseConv2d& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end),
              (args, begin, end, tile_begin, tile_end))
