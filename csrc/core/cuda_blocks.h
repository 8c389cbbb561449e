// How the groups of weights (core/blocks.h) lie on CUDA's blocks and threads: read, reduce a group, write. Included
// after core/cuda.h.
//
// A panel is some groups side by side in one row of the grid. A thread takes packs of 16 bytes (of 8 where entries have
// two) of the same columns of a panel, every so many rows, sums them down the columns, and puts the sums into shared
// memory, where a few threads a group add them. What a thread read stays in its registers between the passes; of panels
// too large for that, each pass reads again. Where rows are not made of whole aligned packs, the entries of a pack lie
// as far apart as makes neighbouring threads read neighbouring entries.
#pragma once

#include "core/blocks.h"
#include "core/cuda_rows.h"
#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

constexpr int kHeld = 8;             // packs that a thread's registers have room for
constexpr int kNarrow = 4;           // packs across a panel of tall groups, at the least
constexpr int kSharedBytes = 48000;  // of a block, at most
constexpr int kMostWeights = 48;     // of a launch

PYKD_HD constexpr int entries_of_pack(size_t bytes) { return bytes == 8 ? 2 : 4; }

template <typename T>
struct Pair {
  T first, second;
};

// ---- the plan of a weight
// --------------------------------------------------------------------------------------------

struct Panels {
  Blocks blocks;  // as one row where groups lie one after another
  int groups;     // of a panel
  int packs;      // across a panel
  int lanes;      // threads down a column; 0: a row has more packs than the block has threads
  int steps;      // packs of a panel that a thread takes
  int values;     // sums that make a group
  int team;       // threads that add them
  int together;   // panels of a block, in registers at the same time
  int across;     // panels of a row of the grid
  bool vectors;   // packs are whole and aligned
  bool merged;    // a pack lies in one group

  Panels() = default;
  Panels(const Blocks& b, size_t entry_bytes, bool aligned) : blocks(b) {
    if (b.block_rows == 1 && b.columns % b.block_columns == 0) blocks = {1, b.rows * b.columns, 1, b.block_columns};
    const int64_t height = blocks.block_rows, width = blocks.block_columns, pack = entries_of_pack(entry_bytes);
    int64_t most = kThreads / divided(height, kHeld);  // packs across that leave no more than kHeld a thread
    if (most * pack < width || most < kNarrow) most = divided(width, pack) > kNarrow ? divided(width, pack) : kNarrow;
    // So many groups are whole packs.
    const int64_t unit = width % pack == 0 ? 1 : pack == 4 && width % 2 == 0 ? 2 : pack;
    int64_t most_groups = most * pack / width;
    most_groups = most_groups >= unit ? most_groups / unit * unit : most_groups > 0 ? most_groups : 1;
    const int64_t columns = blocks.grid_columns(), panels = divided(columns, most_groups);
    groups = static_cast<int>(divided(columns, panels));
    if (most_groups >= unit) groups = static_cast<int>(divided(groups, unit) * unit);
    across = static_cast<int>(divided(columns, groups));
    vectors = aligned && blocks.columns % pack == 0 && (across == 1 || groups * width % pack == 0);
    merged = groups == 1 || (vectors && width % pack == 0);
    packs = static_cast<int>(divided(groups * width, pack));
    lanes = packs <= kThreads ? kThreads / packs : 0;
    steps = static_cast<int>(lanes ? divided(height, lanes) : divided(height * packs, kThreads));
    values = groups == 1 ? kThreads : static_cast<int>(lanes * (merged ? width / pack : width));
    const int64_t bytes = panel_bytes(entry_bytes);
    together = static_cast<int>(steps > kHeld ? 1 : smallest(kHeld / steps, kSharedBytes / bytes, count()));
    for (team = 1; team < 32 && team < values && 2 * team * together * groups <= kThreads;) team *= 2;
  }

  PYKD_HD int64_t count() const { return blocks.grid_rows() * across; }
  unsigned thread_blocks() const { return static_cast<unsigned>(divided(count(), together)); }
  // Of dynamic shared memory: the sums, and two values a group.
  int64_t shared_bytes(size_t entry_bytes) const { return together * panel_bytes(entry_bytes); }

 private:
  static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t smallest(int64_t a, int64_t b, int64_t c) { return a < b ? (a < c ? a : c) : b < c ? b : c; }
  int64_t panel_bytes(size_t entry_bytes) const {
    return int64_t{2} * groups * (values + 1) * (entry_bytes == 8 ? 8 : 4);
  }
};

// The weights of one launch; weight[i] has the thread blocks first[i], ... before first[i + 1].
template <typename Weight>
struct Weights {
  unsigned first[kMostWeights + 1] = {};
  Weight weight[kMostWeights];
  int count = 0;
  int64_t shared_bytes = 0;

  void add(const Weight& w, size_t entry_bytes) {
    weight[count] = w;
    first[count + 1] = first[count] + w.panels.thread_blocks();
    const int64_t bytes = w.panels.shared_bytes(entry_bytes);
    if (bytes > shared_bytes) shared_bytes = bytes;
    ++count;
  }
  unsigned thread_blocks() const { return first[count]; }

  __device__ int of_block(unsigned block) const {
    int begin = 0, end = count;
    while (end - begin > 1) {
      const int middle = (begin + end) / 2;
      (first[middle] <= block ? begin : end) = middle;
    }
    return begin;
  }
};

// ---- the panels of a block
// -------------------------------------------------------------------------------------------

template <typename T, typename E>
class PanelsOfBlock {
 public:
  static constexpr int kPack = entries_of_pack(sizeof(E));
  using ThisPack = Pack<E, kPack>;

  __device__ PanelsOfBlock(const Panels& panels, const void* weight, unsigned block, Pair<T>* shared)
      : p(panels), weight(weight), values(shared), first_panel(block * static_cast<unsigned>(panels.together)) {
    const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(p.blocks.block_columns);
    lane = thread / p.packs;
    pack = thread % p.packs;
    for (int j = 0; j < kPack; ++j) {
      group[j] = 0;
      if (p.groups == 1 || (p.merged && j > 0)) continue;
      const int place = column(pack, j);
      group[j] = is_active() && place < p.groups * width ? place / width : kNone;
    }
  }

  // One of two values of each group of the block, in shared memory.
  __device__ T* of_groups(int which) const {
    return reinterpret_cast<T*>(values + p.together * p.groups * p.values) + which * p.together * p.groups;
  }

  // finish(group, sum) for each group, by one thread; whether it said true of any. Then all threads see what it wrote.
  // The sum is what sum.join makes of pairs of zeros and of all that sum.add(to, entry, own) adds to them; zeros change
  // nothing. `own` is what of_groups has of the entry's group, 1 if it is null.
  template <typename Sum, typename Finish>
  __device__ bool reduce(const Sum& sum, const T* of_groups, Finish finish) {
    Pair<T> sums[kPack];
    T own[kPack];
    each([] {},
         [&](int panel) {
           for (int j = 0; j < kPack; ++j) {
             sums[j] = {};
             own[j] = 1;
           }
           if (of_groups) values_of(of_groups, panel, own);
         },
         [&](int, const ThisPack& entries) {
           for (int j = 0; j < kPack; ++j) sum.add(sums[j], widen(entries.logit[j]), own[j]);
         },
         [&](int panel) { put(sum, panel, sums); });
    __syncthreads();
    bool any = false;
    const int team_lane = static_cast<int>(threadIdx.x) % p.team, groups = p.together * p.groups;
    for (int first = 0; first < groups; first += kThreads / p.team) {
      const int g = first + static_cast<int>(threadIdx.x) / p.team;
      Pair<T> total{};
      if (g < groups)
        for (int i = team_lane; i < p.values; i += p.team) total = sum.join(total, values[g * p.values + i]);
      for (int offset = p.team / 2; offset > 0; offset /= 2)
        total =
            sum.join(total, {__shfl_xor_sync(~0u, total.first, offset), __shfl_xor_sync(~0u, total.second, offset)});
      if (g < groups && team_lane == 0) any |= finish(g, total);
    }
    return __syncthreads_or(any);
  }

  // use(group, row, column of the grid) for each group of the block that is there.
  template <typename Use>
  __device__ void each_group(Use use) const {
    for (int g = static_cast<int>(threadIdx.x); g < p.together * p.groups; g += kThreads) {
      const unsigned panel = first_panel + static_cast<unsigned>(g / p.groups);
      const int64_t row = panel / static_cast<unsigned>(p.across);
      const int64_t column = static_cast<int64_t>(panel % static_cast<unsigned>(p.across)) * p.groups + g % p.groups;
      if (row * p.blocks.block_rows < p.blocks.rows && column * p.blocks.block_columns < p.blocks.columns)
        use(g, row, column);
    }
  }

  // begin(panel), use(k, pack) for the thread's packs of the panel, end(panel); fresh() where the packs are others.
  template <typename Fresh, typename Begin, typename Use, typename End>
  __device__ void each(Fresh fresh, Begin begin, Use use, End end) {
    Place at = is_loaded ? Place{} : start();
    for (int panel = 0; panel < p.together; ++panel) {
      begin(panel);
      for (int done = 0; done < p.steps; done += kHeld) {
        if (!is_loaded) load(at, p.together * p.steps - done);
        if (panel == 0) fresh();
        is_loaded = p.steps <= kHeld;
        const int first = panel * p.steps, count = p.steps - done;
        PYKD_UNROLL for (int k = 0; k < kHeld; ++k) {
          if (k >= first && k < first + count) use(k, held[k]);
        }
      }
      end(panel);
    }
  }

  // What lies in another tensor where pack k lies in the weight; zeros where it has no entry.
  __device__ ThisPack read(const void* from, int k) const {
    const E* const entry = static_cast<const E*>(from) + first + offset[k];
    ThisPack to = {};
    if (p.vectors) {
      if (count(k) > 0) read_whole(entry, to);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (j < count(k)) to.logit[j] = entry[j * p.packs];
    }
    return to;
  }

  __device__ void write(int k, const ThisPack& entries, void* to) const {
    E* const entry = static_cast<E*>(to) + first + offset[k];
    if (p.vectors) {
      if (count(k) > 0) __stcs(reinterpret_cast<Access<ThisPack>*>(entry), whole_of(entries));
    } else {
      for (int j = 0; j < kPack; ++j)
        if (j < count(k)) entry[j * p.packs] = entries.logit[j];
    }
  }

  // What each entry of the thread's packs of a panel finds at its group.
  __device__ void values_of(const T* of_groups, int panel, T (&to)[kPack]) const {
    for (int j = 0; j < kPack; ++j) {
      const int g = p.merged ? group[0] : group[j];
      to[j] = of_groups[panel * p.groups + (g == kNone ? 0 : g)];
    }
  }

 private:
  static constexpr int kNone = -1;

  // A pack on the thread's way through the panels.
  struct Place {
    int64_t entry, first_entry;  // of the pack, of the thread's first pack of the panel
    int64_t rows;                // of the matrix, from the panel's first on
    int panel;                   // in its row of the grid
    int step, row, pack;
  };

  __device__ bool is_active() const { return p.lanes == 0 || lane < p.lanes; }
  __device__ int column(int pack, int j) const { return p.vectors ? pack * kPack + j : pack + j * p.packs; }
  __device__ int count(int k) const { return counts >> 4 * k & 15; }

  __device__ Place start() const {
    const Blocks& b = p.blocks;
    const int64_t row = first_panel / static_cast<unsigned>(p.across) * b.block_rows;
    const int panel = static_cast<int>(first_panel % static_cast<unsigned>(p.across));
    const int64_t entry =
        (row + lane) * b.columns + panel * (p.groups * b.block_columns) + pack * (p.vectors ? kPack : 1);
    return {entry, entry, b.rows - row, panel, 0, lane, pack};
  }

  __device__ void advance(Place& at) const {
    const Blocks& b = p.blocks;
    if (++at.step == p.steps) {
      const int64_t width = p.groups * b.block_columns;
      at.first_entry += width;
      if (++at.panel == p.across) {
        at.panel = 0;
        at.rows -= b.block_rows;
        at.first_entry += b.block_rows * b.columns - p.across * width;
      }
      at.entry = at.first_entry;
      at.step = 0;
      at.row = lane;
      at.pack = pack;
    } else if (p.lanes) {
      at.row += p.lanes;
      at.entry += p.lanes * b.columns;
    } else {
      const int entries = p.vectors ? kPack : 1;
      at.entry += kThreads * entries;
      if ((at.pack += kThreads) >= p.packs) {
        at.pack -= p.packs;
        at.entry += b.columns - int64_t{p.packs} * entries;
        ++at.row;
      }
    }
  }

  // How many entries of a pack there are.
  __device__ int count_at(const Place& at) const {
    const Blocks& b = p.blocks;
    if (!is_active() || at.row >= at.rows || at.row >= b.block_rows) return 0;
    const int64_t width = p.groups * b.block_columns, left = b.columns - at.panel * width;
    const int64_t columns = left < width ? left : width;
    int inside = 0;
    for (int j = 0; j < kPack; ++j) inside += column(at.pack, j) < columns;
    return inside;
  }

  // The thread's next packs, at most `left`; zeros where the weight has no entry.
  __device__ void load(Place& at, int left) {
    first = at.entry;
    counts = 0;
    PYKD_UNROLL for (int k = 0; k < kHeld; ++k) {
      offset[k] = static_cast<unsigned>(at.entry - first);
      if (k >= left) continue;
      counts |= static_cast<unsigned>(count_at(at)) << 4 * k;
      advance(at);
    }
    PYKD_UNROLL for (int k = 0; k < kHeld; ++k) held[k] = read(weight, k);
  }

  template <typename Sum>
  __device__ void put(const Sum& sum, int panel, const Pair<T> (&sums)[kPack]) {
    Pair<T>* const to = values + panel * p.groups * p.values;
    if (p.merged) {
      Pair<T> total = sums[0];
      for (int j = 1; j < kPack; ++j) total = sum.join(total, sums[j]);
      const int width = static_cast<int>(p.blocks.block_columns) / kPack;
      if (p.groups == 1)
        to[threadIdx.x] = total;
      else if (group[0] != kNone)
        to[group[0] * p.values + lane * width + pack - group[0] * width] = total;
    } else {
      const int width = static_cast<int>(p.blocks.block_columns);
      for (int j = 0; j < kPack; ++j)
        if (group[j] != kNone) to[group[j] * p.values + lane * width + column(pack, j) - group[j] * width] = sums[j];
    }
  }

  const Panels& p;
  const void* const weight;
  Pair<T>* const values;
  const unsigned first_panel;
  int lane, pack;    // of the thread in a panel
  int group[kPack];  // of the panel's, of the entries of a pack
  bool is_loaded = false;
  ThisPack held[kHeld];
  int64_t first = 0;  // entry of the held packs
  unsigned offset[kHeld];
  unsigned counts = 0;  // of the entries in each, four bits a pack
};

// ---- norms
// -----------------------------------------------------------------------------------------------------------

// Of entries times a scale of their group, the sum of squares; and the largest magnitude.
template <typename T>
struct Squares {
  __device__ static void add(Pair<T>& to, T w, T scale) {
    const T scaled = w * scale;
    to.first += scaled * scaled;
    to.second = larger_magnitude(to.second, w);
  }
  __device__ static Pair<T> join(Pair<T> a, Pair<T> b) {
    return {a.first + b.first, larger_magnitude(a.second, b.second)};
  }

  // The norm of a group; -1, and the scale to try again with, where the squares overflowed or vanished.
  __device__ static bool finish(Pair<T> sum, bool again, T& norm, T& scale) {
    constexpr T kInfinity = static_cast<T>(__builtin_inff()),
                kMostScale = static_cast<T>(sizeof(T) == sizeof(float) ? 1e38 : 1e300);
    if (again) {
      if (norm < 0) norm = root(sum.first) / scale;
      return false;
    }
    const T most = sum.second;
    const bool lost = !is_regular(sum.first) && most > 0 && most < kInfinity;
    scale = lost ? (1 / most < kMostScale ? 1 / most : kMostScale) : 1;
    norm = lost ? -1 : is_regular(sum.first) ? root(sum.first) : most;
    return lost;
  }

 private:
  __device__ static float root(float x) { return square_root(x); }
  __device__ static double root(double x) { return sqrt(x); }
};

}  // namespace pykd::PYKD_ISA
