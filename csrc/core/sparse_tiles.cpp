#include "core/sparse_tiles.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "core/half.h"

namespace pykd {
namespace {

// The tiles before they are laid out.
struct Tiles {
  int64_t height = 1, width = 1;
  bool pairs = false;
  std::vector<int32_t> starts{0}, outputs{}, columns{};
  std::vector<float> values{};

  int64_t runs() const { return starts.back(); }
};

int32_t narrow(int64_t value) { return static_cast<int32_t>(value); }

// The first column of the input that a row's group reads.
int64_t base_column(const SparseBlocks& b, int64_t row) { return row / (b.rows / b.groups) * b.columns; }

// Pairs of rows of about as many values: the shorter one is filled up with zeros at its own last column.
Tiles pairs_of(const SparseBlocks& b) {
  struct Entry {
    int32_t column;
    float value;
  };
  std::vector<std::vector<Entry>> rows(static_cast<size_t>(b.rows));
  const int64_t across = ceil_div(b.columns, b.block_columns);
  for (int64_t s = 0; s < b.stored; ++s)
    for (int64_t r = 0; r < b.block_rows; ++r) {
      const int64_t row = b.positions[s] / across * b.block_rows + r;
      for (int64_t c = 0; row < b.rows && c < b.block_columns; ++c)
        if (const float value = b.values[(s * b.block_rows + r) * b.block_columns + c]; value != 0)
          rows[static_cast<size_t>(row)].push_back(
              {narrow(base_column(b, row) + b.positions[s] % across * b.block_columns + c), value});
    }
  std::vector<int64_t> order(static_cast<size_t>(b.rows));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, {}, [&](int64_t row) { return rows[static_cast<size_t>(row)].size(); });
  Tiles tiles{.height = 2, .width = 1, .pairs = true};
  for (size_t i = 0; i < order.size(); i += 2) {
    const bool single = i + 1 == order.size();
    const std::vector<Entry>& first = rows[static_cast<size_t>(order[i])];
    const std::vector<Entry>& second = single ? first : rows[static_cast<size_t>(order[i + 1])];
    const size_t runs = second.size();  // the longer one
    for (size_t run = 0; run < runs; ++run) {
      const Entry mine =
          run < first.size() ? first[run] : Entry{first.empty() ? second[run].column : first.back().column, 0};
      const Entry other = single ? Entry{mine.column, 0} : second[run];
      tiles.columns.insert(tiles.columns.end(), {mine.column, other.column});
      tiles.values.insert(tiles.values.end(), {mine.value, other.value});
    }
    tiles.starts.push_back(tiles.starts.back() + narrow(static_cast<int64_t>(runs)));
    tiles.outputs.insert(tiles.outputs.end(), {narrow(order[i]), single ? -1 : narrow(order[i + 1])});
  }
  return tiles;
}

// Rows that share their columns: each row of blocks is cut into tiles.
Tiles shared_of(const SparseBlocks& b) {
  Tiles tiles{.height = narrow(std::min<int64_t>(
                  kTileRows, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(b.block_rows))))),
              .width = b.block_columns};
  const int64_t across = ceil_div(b.columns, b.block_columns), down = ceil_div(b.rows, b.block_rows);
  for (int64_t block_row = 0, s = 0; block_row < down; ++block_row) {
    int64_t end = s;
    while (end < b.stored && b.positions[end] / across == block_row) ++end;
    for (int64_t top = 0; top < b.block_rows && block_row * b.block_rows + top < b.rows; top += tiles.height) {
      const int64_t row = block_row * b.block_rows + top;
      for (int64_t r = 0; r < tiles.height; ++r)
        tiles.outputs.push_back(top + r < b.block_rows && row + r < b.rows ? narrow(row + r) : -1);
      for (int64_t i = s; i < end; ++i) {
        // A block that reaches over the edge is moved back onto the matrix, its values with it.
        const int64_t from = b.positions[i] % across * b.block_columns;
        const int64_t over = std::max<int64_t>(0, from + b.block_columns - b.columns);
        tiles.columns.push_back(narrow(base_column(b, row) + from - over));
        for (int64_t c = -over; c < b.block_columns - over; ++c)
          for (int64_t r = 0; r < tiles.height; ++r)
            tiles.values.push_back(
                c < 0 || top + r >= b.block_rows ? 0 : b.values[(i * b.block_rows + top + r) * b.block_columns + c]);
      }
      tiles.starts.push_back(tiles.starts.back() + narrow(end - s));
    }
    s = end;
  }
  return tiles;
}

// Whether nothing is lost.
bool hold(DType halves, const std::vector<float>& values) {
  return std::ranges::all_of(values, [&](float value) { return std::isnan(value) || rounded(value, halves) == value; });
}

// The values of a shared set as pairs of columns: [runs, width / 2, height, 2].
std::vector<uint16_t> halves_of(const Tiles& tiles, DType dtype) {
  std::vector<uint16_t> halves(tiles.values.size());
  const size_t height = static_cast<size_t>(tiles.height);
  for (size_t i = 0; i < halves.size(); ++i) {
    const size_t column = i / height, row = i % height;
    halves[(column / 2 * height + row) * 2 + column % 2] = half_bits(tiles.values[i], dtype);
  }
  return halves;
}

// The buffer while it is filled: each part on a cache line of its own.
struct Buffer {
  std::vector<char> bytes;

  template <class T>
  int64_t add(const std::vector<T>& part, size_t slack = 0) {
    const size_t at = (bytes.size() + 63) / 64 * 64;
    bytes.resize(at + (part.size() + slack) * sizeof(T));
    std::ranges::copy(std::as_bytes(std::span(part)), reinterpret_cast<std::byte*>(bytes.data() + at));
    return static_cast<int64_t>(at);
  }

  PackedSparse::Set add(const Tiles& tiles, DType dtype) {
    PackedSparse::Set set{static_cast<int64_t>(tiles.starts.size()) - 1,
                          tiles.runs(),
                          tiles.height,
                          tiles.width,
                          tiles.pairs,
                          static_cast<int64_t>(dtype),
                          add(tiles.starts),
                          add(tiles.outputs),
                          add(tiles.columns),
                          0};
    set.values = dtype == DType::kFloat32 ? add(tiles.values, kTileSlack) : add(halves_of(tiles, dtype), kTileSlack);
    return set;
  }
};

}  // namespace

uint16_t half_bits(float value, DType halves) {
  uint16_t bits = 0;
  PYKD_ISA::narrow(&value, halves, &bits, 1);
  return bits;
}

float rounded(float value, DType halves) {
  const uint16_t bits = half_bits(value, halves);
  PYKD_ISA::widen(&bits, halves, &value, 1);
  return value;
}

// Blocks of one row share nothing: for panels they are pairs, and rowwise they are read in vectors of a run's columns.
std::vector<char> pack_sparse(const SparseBlocks& b) {
  const bool straddles = b.groups > 1 && b.rows / b.groups % b.block_rows != 0;
  const bool single = b.block_rows == 1 || straddles;
  const Tiles panels = single ? pairs_of(b) : shared_of(b);
  PackedSparse head{kPackedSparse, 0, b.rows, b.columns, b.groups, {}, {}, {}};
  Buffer buffer{std::vector<char>(sizeof head)};
  head.panels = head.rowwise = buffer.add(panels, DType::kFloat32);
  if (single && !straddles && b.block_columns > 1) head.rowwise = buffer.add(shared_of(b), DType::kFloat32);
  if (b.halves != DType::kFloat32 && !single && panels.height == kTileRows && panels.width % 2 == 0 &&
      hold(b.halves, panels.values))
    head.halves = buffer.add(panels, b.halves);
  head.bytes = static_cast<int64_t>(buffer.bytes.size());
  std::memcpy(buffer.bytes.data(), &head, sizeof head);
  return std::move(buffer.bytes);
}

int64_t tile_of_part(const SparseTiles& tiles, int64_t part, int64_t parts) {
  // A tile costs its runs and, for what each one costs besides, one more.
  const int64_t wanted = (tiles.runs + tiles.tiles) * part / parts;
  int64_t low = 0, high = tiles.tiles;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    tiles.starts[middle] + middle < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

}  // namespace pykd
