// How the groups of weights (core/blocks.h) lie on CUDA's blocks and threads: read, reduce a group, write. Included
// after core/cuda.h.
//
// A panel is some groups side by side in one row of the grid. A thread takes packs of 16 bytes of the same columns of a
// panel, every so many rows, sums them down the columns, and puts the sums into shared memory, where a few threads a
// group add them. What a thread read stays in its registers between the passes; of panels too large for that, each pass
// reads again. Packs are regular where they are whole, aligned, and no four entries of one lie in two groups. Others
// have a sum an entry, for which registers have no room with eight: of two bytes they take four entries. Where rows are
// not made of whole aligned packs, the entries of a pack lie as far apart as makes neighbouring threads read
// neighbouring entries.
#pragma once

#include <numeric>

#include "core/blocks.h"
#include "core/cuda_list.h"
#include "core/cuda_rows.h"
#include "core/magnitude.h"

namespace pykd::PYKD_ISA {

constexpr int kHeld = 8;             // packs that a thread's registers have room for
constexpr int kNarrow = 4;           // packs across a panel of tall groups, at the least
constexpr int kSharedBytes = 48000;  // of a block, at most

PYKD_HD constexpr int entries_of_pack(size_t bytes, bool regular) {
  return bytes == 8 ? 2 : bytes == 2 && regular ? 8 : 4;
}

template <typename T>
struct Pair {
  T first, second;
};

// ---- the plan of a weight -------------------------------------------------------------------------------------------

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
  int height;     // rows of a panel
  int width;      // columns of a panel,
  int last;       // and of the last in its row of the grid
  // Entries from a pack to the thread's next, from the end of a row to the next, from one of panels to the next.
  unsigned down, wrap, back;
  bool vectors;  // packs are whole and aligned
  bool regular;

  Panels() = default;
  // `address`: those of all tensors that lie as the weight does, or-ed.
  Panels(const Blocks& b, size_t entry_bytes, uintptr_t address) : Panels(b, entry_bytes, address, true) {
    if (!regular && entries_of_pack(entry_bytes, true) != entries_of_pack(entry_bytes, false))
      *this = Panels(b, entry_bytes, address, false);
  }

  PYKD_HD int64_t count() const { return blocks.grid_rows() * across; }
  unsigned thread_blocks() const { return static_cast<unsigned>(divided(count(), together)); }
  // Of dynamic shared memory: the sums, and two values a group.
  int64_t shared_bytes(size_t entry_bytes) const { return together * panel_bytes(entry_bytes); }

 private:
  Panels(const Blocks& b, size_t entry_bytes, uintptr_t address, bool may_be_regular) : blocks(b) {
    if (b.block_rows == 1 && b.columns % b.block_columns == 0) blocks = {1, b.rows * b.columns, 1, b.block_columns};
    const int64_t height = blocks.block_rows, width = blocks.block_columns;
    const int64_t pack = entries_of_pack(entry_bytes, may_be_regular), summed = pack < 4 ? pack : 4;
    int64_t most = kThreads / divided(height, kHeld);  // packs across that leave no more than kHeld a thread
    if (most * pack < width || most < kNarrow) most = divided(width, pack) > kNarrow ? divided(width, pack) : kNarrow;
    // So many groups are whole packs.
    const int64_t unit = pack / std::gcd(pack, width);
    int64_t most_groups = most * pack / width;
    most_groups = most_groups >= unit ? most_groups / unit * unit : most_groups > 0 ? most_groups : 1;
    const int64_t columns = blocks.grid_columns(), panels = divided(columns, most_groups);
    groups = static_cast<int>(divided(columns, panels));
    if (most_groups >= unit) groups = static_cast<int>(divided(groups, unit) * unit);
    across = static_cast<int>(divided(columns, groups));
    vectors = address % (static_cast<size_t>(pack) * entry_bytes) == 0 && blocks.columns % pack == 0 &&
              (across == 1 || groups * width % pack == 0);
    regular = may_be_regular && vectors && (groups == 1 || width % summed == 0);
    this->width = static_cast<int>(groups * width);
    this->height = static_cast<int>(height);
    last = static_cast<int>(blocks.columns - (across - 1) * groups * width);
    packs = static_cast<int>(divided(groups * width, pack));
    lanes = packs <= kThreads ? kThreads / packs : 0;
    steps = static_cast<int>(lanes ? divided(height, lanes) : divided(height * packs, kThreads));
    values = groups == 1 ? kThreads : static_cast<int>(lanes * (regular ? width / summed : width));
    const int64_t stride = vectors ? pack : 1;
    down = static_cast<unsigned>(lanes ? lanes * blocks.columns : kThreads * stride);
    wrap = static_cast<unsigned>(blocks.columns - packs * stride);
    back = static_cast<unsigned>(height * blocks.columns - across * groups * width);
    const int64_t bytes = panel_bytes(entry_bytes);
    together = static_cast<int>(steps > kHeld ? 1 : smallest(kHeld / steps, kSharedBytes / bytes, count()));
    for (team = 1; team < 32 && team < values && 2 * team * together * groups <= kThreads;) team *= 2;
  }

  static int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t smallest(int64_t a, int64_t b, int64_t c) { return a < b ? (a < c ? a : c) : b < c ? b : c; }
  int64_t panel_bytes(size_t entry_bytes) const {
    return int64_t{2} * groups * (values + 1) * (entry_bytes == 8 ? 8 : 4);
  }
};

// The weights of one launch, whose blocks have the shared memory that the most demanding weight needs.
template <typename Weight>
struct Weights : List<Weight> {
  int64_t shared_bytes = 0;

  void add(const Weight& w, size_t entry_bytes) {
    List<Weight>::add(w, w.panels.thread_blocks());
    const int64_t bytes = w.panels.shared_bytes(entry_bytes);
    if (bytes > shared_bytes) shared_bytes = bytes;
  }
};

// A pack of words that are taken apart here and not before: a register each of two bytes would hold but one entry.
template <typename P>
__device__ P pack_of(Access<P> words) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(words.x), "+r"(words.y));
  if constexpr (sizeof words == sizeof(uint4)) asm volatile("" : "+r"(words.z), "+r"(words.w));
#endif
  P pack;
  memcpy(&pack, &words, sizeof pack);
  return pack;
}

// ---- the panels of a block ------------------------------------------------------------------------------------------

template <typename T, typename E, bool kRegular>
class PanelsOfBlock {
 public:
  static constexpr int kPack = entries_of_pack(sizeof(E), kRegular);
  static constexpr int kSums = !kRegular ? kPack : kPack == 8 ? 2 : 1;  // groups that a pack may lie in
  static constexpr int kSummed = kPack / kSums;                         // entries of a pack side by side in one
  using ThisPack = Pack<E, kPack>;

  __device__ PanelsOfBlock(const Panels& panels, const void* weight, unsigned block, Pair<T>* shared)
      : p(panels), weight(weight), values(shared), first_panel(block * static_cast<unsigned>(panels.together)) {
    const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(p.blocks.block_columns);
    lane = thread / p.packs;
    pack = thread % p.packs;
    is_active = p.lanes == 0 || thread < p.lanes * p.packs;
    for (int j = 0; j < kSums; ++j) {
      const int place = column(pack, j * kSummed);
      group[j] = 0;
      slot[j] = p.groups == 1 && j == 0 ? thread : kNone;
      if (p.groups == 1 || !is_active || place >= p.width) continue;
      group[j] = place / width;
      slot[j] = group[j] * p.values + (lane * width + place % width) / kSummed;
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
    Pair<T> sums[kSums] = {};
    T own[kSums];
    for (T& each : own) each = 1;
    each([] {},
         [&](int panel) {
           if (of_groups) values_of(of_groups, panel, own);
         },
         [&](int, const ThisPack& entries) {
           for (int j = 0; j < kPack; ++j) sum.add(sums[j / kSummed], widen(entries.logit[j]), own[j / kSummed]);
         },
         [&](int panel) {
           if (p.groups == 1)
             for (int j = 1; j < kSums; ++j) sums[0] = sum.join(sums[0], sums[j]);
           for (int j = 0; j < kSums; ++j) {
             if (slot[j] != kNone) values[panel * p.groups * p.values + slot[j]] = sums[j];
             sums[j] = {};
           }
         });
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

  // For each of the block's panels begin(panel), use(k, pack) for the thread's packs, end(panel); fresh() where the
  // packs k have become others.
  template <typename Fresh, typename Begin, typename Use, typename End>
  __device__ void each(Fresh fresh, Begin begin, Use use, End end) {
    Place at = is_loaded ? Place{} : start();
    const int packs = p.together * p.steps;
    for (int done = 0, panel = 0, step = 0; done < packs; done += kHeld) {
      if (!is_loaded) load(at, packs - done);
      is_loaded = p.steps <= kHeld;
      fresh();
      PYKD_UNROLL for (int k = 0; k < kHeld; ++k) {
        if (done + k < packs) {
          if (step == 0) begin(panel);
          use(k, pack_of<ThisPack>(held[k]));
          if (++step == p.steps) {
            end(panel++);
            step = 0;
          }
        }
      }
    }
  }

  // What lies in another tensor where pack k lies in the weight; zeros where it has no entry.
  __device__ ThisPack read(const void* from, int k) const {
    const E* const entry = static_cast<const E*>(from) + first + offset[k];
    ThisPack to = {};
    if (kRegular || p.vectors) {
      if (count(k) > 0) read_whole(entry, to);
    } else {
      for (int j = 0; j < kPack; ++j)
        if (j < count(k)) to.logit[j] = entry[j * p.packs];
    }
    return to;
  }

  __device__ void write(int k, const ThisPack& entries, void* to) const {
    E* const entry = static_cast<E*>(to) + first + offset[k];
    if (kRegular || p.vectors) {
      if (count(k) > 0) __stcs(reinterpret_cast<Access<ThisPack>*>(entry), whole_of(entries));
    } else {
      for (int j = 0; j < kPack; ++j)
        if (j < count(k)) entry[j * p.packs] = entries.logit[j];
    }
  }

  // What each entry of the thread's packs of a panel finds at its group.
  __device__ void values_of(const T* of_groups, int panel, T (&to)[kSums]) const {
    for (int j = 0; j < kSums; ++j) to[j] = of_groups[panel * p.groups + group[j]];
  }

 private:
  static constexpr int kNone = -1;

  // A pack on the thread's way through the panels.
  struct Place {
    unsigned entry, first_entry;  // of the pack, of the thread's first pack of the panel: from `first` on
    int64_t rows_left;            // of the matrix, from the panel's first on
    int panel;                    // in its row of the grid
    int rows, columns;            // of the panel
    int step, row, pack;
  };

  __device__ int column(int pack, int j) const { return kRegular || p.vectors ? pack * kPack + j : pack + j * p.packs; }
  __device__ int count(int k) const { return counts >> 4 * k & 15; }

  __device__ Place start() {
    const Blocks& b = p.blocks;
    const int64_t row = first_panel / static_cast<unsigned>(p.across) * b.block_rows;
    Place at{};
    at.panel = static_cast<int>(first_panel % static_cast<unsigned>(p.across));
    at.rows_left = b.rows - row;
    first = (row + lane) * b.columns + int64_t{at.panel} * p.width + column(pack, 0);
    enter(at);
    return at;
  }

  // To the thread's first pack of a panel.
  __device__ void enter(Place& at) const {
    at.rows = !is_active ? 0 : at.rows_left < p.height ? static_cast<int>(at.rows_left) : p.height;
    at.columns = at.panel == p.across - 1 ? p.last : p.width;
    at.entry = at.first_entry;
    at.step = 0;
    at.row = lane;
    at.pack = pack;
  }

  __device__ void advance(Place& at) const {
    if (++at.step == p.steps) {
      at.first_entry += static_cast<unsigned>(p.width);
      if (++at.panel == p.across) {
        at.panel = 0;
        at.rows_left -= p.height;
        at.first_entry += p.back;
      }
      enter(at);
      return;
    }
    at.row += p.lanes;
    at.entry += p.down;
    if (p.lanes == 0 && (at.pack += kThreads) >= p.packs) {
      at.pack -= p.packs;
      at.entry += p.wrap;
      ++at.row;
    }
  }

  // How many entries of a pack there are.
  __device__ int count_at(const Place& at) const {
    if (at.row >= at.rows) return 0;
    if (kRegular || p.vectors) return at.pack * kPack < at.columns ? kPack : 0;
    int count = 0;
    for (int j = 0; j < kPack; ++j) count += column(at.pack, j) < at.columns;
    return count;
  }

  // The thread's next packs, at most `left`.
  __device__ void load(Place& at, int left) {
    first += at.entry;
    at.entry = 0;  // at.first_entry matters no more where a panel is loaded in parts
    counts = 0;
    PYKD_UNROLL for (int k = 0; k < kHeld; ++k) {
      offset[k] = at.entry;
      if (k < left) {
        counts |= static_cast<unsigned>(count_at(at)) << 4 * k;
        advance(at);
      }
    }
    PYKD_UNROLL for (int k = 0; k < kHeld; ++k) held[k] = whole_of(read(weight, k));
  }

  const Panels& p;
  const void* const weight;
  Pair<T>* const values;
  const unsigned first_panel;
  int lane, pack;  // of the thread in a panel
  bool is_active;
  int group[kSums], slot[kSums];  // of the panel's, of the entries of a pack; where their sums go
  bool is_loaded = false;
  Access<ThisPack> held[kHeld];
  int64_t first = 0;       // entry of the weight that offsets count from
  unsigned offset[kHeld];  // of the held packs, which lie within 2^32 entries: 2048 rows of 2 million columns
  unsigned counts = 0;     // of the entries in each, four bits a pack
};

// ---- norms ----------------------------------------------------------------------------------------------------------

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
