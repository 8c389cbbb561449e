// A sparse matrix [rows, columns] as the kernels read it: tiles of up to 16 rows.
//
// A tile is a list of runs. A run of a *shared* tile is `width` consecutive columns in which all its `height` rows have
// values; a run of a *pair* is one column for each of its two rows, which have nothing else to do with each other than
// about as many values. Whole columns of values lie together, so that the rows of a tile are the lanes of a vector, or
// the vector's lanes are batch or image and each value is broadcast.
//
// Everything lies in one buffer that can be copied, stored and sent to another device as it is: offsets, no pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace pykd {

// What is packed: the blocks of a matrix [rows, columns], as in pykd.sparse.SparseWeight. The rows of group g, of
// rows / groups each, read the input's columns from g * columns on.
struct SparseBlocks {
  const int64_t* positions;  // [stored], ascending: block row * blocks in a row + block column
  const float* values;       // [stored, block_rows, block_columns], zero over the matrix's edge
  int64_t stored;
  int64_t rows;
  int64_t columns;
  int64_t block_rows;
  int64_t block_columns;
  int64_t groups;  // divides rows
  // float16 or bfloat16: `halves` of it, too, where blocks have 9 rows or more, an even number of columns, and values
  // that it holds, as those from rounded().
  DType halves = DType::kFloat32;
};

// The value as float16 or bfloat16: to nearest, ties to even. float16 makes an infinity of 65520 and more.
uint16_t half_bits(float value, DType halves);
float rounded(float value, DType halves);

PYKD_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kTileRows = 16;   // of the highest tile
constexpr int64_t kTileSlack = 64;  // values that may be read beyond the last

// A view of one set of tiles.
struct SparseTiles {
  const int32_t* starts;   // [tiles + 1], the first run of each tile
  const int32_t* outputs;  // [tiles * height], the matrix row of each row of a tile; -1: none, its values are 0
  const int32_t* columns;  // [runs], the first column of a run; of pairs [runs, 2]
  const float* values;     // [runs, width, height]
  const uint16_t* halves;  // [runs, width / 2, height, 2], values is null then; else null
  int64_t tiles;
  int64_t runs;
  int32_t height;  // 1, 2, 4, 8 or 16; of pairs 2
  int32_t width;   // of pairs 1
  bool pairs;
  DType dtype;  // of the halves, float16 or bfloat16; float32 of values
};

// The buffer's head. `rowwise` is for a batch whose rows are read as they lie, `panels` for one whose lanes are batch
// or image: they differ where a block has one row. `halves` has no tiles unless it was asked for.
struct PackedSparse {
  struct Set {
    int64_t tiles, runs, height, width, pairs;
    int64_t dtype;                             // as in SparseTiles
    int64_t starts, outputs, columns, values;  // bytes from the head to each
  };
  uint64_t magic;
  int64_t bytes;
  int64_t rows, columns, groups;  // of the matrix, as in SparseBlocks
  Set rowwise, panels, halves;
};
constexpr uint64_t kPackedSparse = 0x33656C6974646B70;  // "pkdtile3"

// The buffer. The arguments are the glue's and the reader's to check.
std::vector<char> pack_sparse(const SparseBlocks& blocks);

inline SparseTiles tiles_of(const void* packed, const PackedSparse::Set& set) {
  const char* head = static_cast<const char*>(packed);
  const auto dtype = static_cast<DType>(set.dtype);
  const bool halves = dtype != DType::kFloat32;
  return {reinterpret_cast<const int32_t*>(head + set.starts),
          reinterpret_cast<const int32_t*>(head + set.outputs),
          reinterpret_cast<const int32_t*>(head + set.columns),
          halves ? nullptr : reinterpret_cast<const float*>(head + set.values),
          halves ? reinterpret_cast<const uint16_t*>(head + set.values) : nullptr,
          set.tiles,
          set.runs,
          static_cast<int32_t>(set.height),
          static_cast<int32_t>(set.width),
          set.pairs != 0,
          dtype};
}

// The first tile of part `part` of `parts` that have about as many runs each.
int64_t tile_of_part(const SparseTiles& tiles, int64_t part, int64_t parts);

enum class Activation : int32_t { kNone, kRelu };

}  // namespace pykd
