// The noise of rows, drawn a tile of logits at a time into memory that stays in L1; and what kernels that run in such
// tiles read and write.
#pragma once

#include "core/half.h"
#include "core/noise.h"
#include "core/philox.h"
#include "core/simd.h"

namespace pykd::PYKD_ISA {

constexpr int64_t kTile = 1024;  // logits whose noise is held at a time: 4 KB, so that it stays in L1 beside the rows
constexpr int64_t kOctets = kTile / 8;
constexpr int kRows = 64;  // rows whose selection is drawn together: the bits of one mask
constexpr int kSlots = kLanes / 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// float runs in vectors, double (gradient checks, references) in scalars.
inline Floats load_lanes(const float* from) { return load<Floats>(from); }
inline double load_lanes(const double* from) { return *from; }
inline void store_lanes(float* to, Floats v) { store(to, v); }
inline void store_lanes(double* to, double v) { *to = v; }
inline Floats load_lanes(const float* from, int64_t n) { return load_first(from, n); }
inline double load_lanes(const double*, int64_t) { return 0; }
inline void store_lanes(float* to, Floats v, int64_t n) { store_first(to, v, n); }
inline void store_lanes(double*, double, int64_t) {}

inline bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

// Logits at `at`: where they are, or widened into `buffer`.
template <typename T>
const T* as_wide(const void* logits, DType dtype, int64_t at, int64_t n, T* buffer) {
  if constexpr (sizeof(T) == sizeof(float))
    if (is_half(dtype)) {
      widen(static_cast<const uint16_t*>(logits) + at, dtype, buffer, n);
      return buffer;
    }
  return static_cast<const T*>(logits) + at;
}

// A large row comes from memory: up to three arrays of n logits from `at` on, fetched while their noise is drawn.
class Near {
 public:
  struct Array {
    const void* logits;
    DType dtype;
  };

  Near() = default;  // fetches nothing
  Near(int64_t at, int64_t n_, const Array (&arrays)[3]) : n(n_) {
    for (int i = 0; i < 3; ++i) {
      bytes[i] = is_half(arrays[i].dtype) ? 2 : arrays[i].dtype == DType::kFloat32 ? 4 : 8;
      first[i] = static_cast<const char*>(arrays[i].logits) + at * bytes[i];
    }
  }

  // Brings one line: a call for every 16th value fetches all of float32.
  void operator()(int array, int64_t value) const {
    if (value < n) __builtin_prefetch(first[array] + value * bytes[array]);
  }

 private:
  const char* first[3] = {};
  int64_t bytes[3] = {}, n = 0;
};

// Counters of the octets of some rows, row after row, with room for what two vectors of them read and write too much.
struct Counters {
  alignas(64) uint64_t index[kOctets + 2 * kSlots];
  alignas(64) uint64_t row[kOctets + 2 * kSlots];
};

// out[8 * j + i] is weight times the i-th normal value of counter j < count; out has the same room to spare.
// Three loops: in one, the long chain of a vector (rounds, logarithm, root) would leave the processor waiting. Each
// fetches one of the arrays that the noise is for.
inline void draw_normals(const Counters& counters, int64_t count, uint32_t teacher, uint64_t seed, float weight,
                         const Near& near, float* out) {
  alignas(64) uint32_t words[kTile / 2 + 8 * kSlots];
  alignas(64) float squared[kTile / 2 + 8 * kSlots];
  for (int64_t j = 0; j < count; j += 2 * kSlots) {
    for (int64_t value = 8 * j; value < 8 * (j + 2 * kSlots); value += 16) near(0, value);
    Philox<Slots> x[2];
    for (int i = 0; i < 2; ++i) {
      const Slots row = load<Slots>(counters.row + j + i * kSlots);
      x[i] = {{load<Slots>(counters.index + j + i * kSlots), Slots{} + teacher, row, row >> 32}};
    }
    philox(x, seed);
    for (int i = 0; i < 2; ++i) {
      const Slots(&word)[4] = x[i].word;
      store(words + 4 * (j + i * kSlots), (word[0] & 0xFFFFFFFFu) | (word[1] << 32));
      store(words + 4 * (j + i * kSlots) + kLanes, (word[2] & 0xFFFFFFFFu) | (word[3] << 32));
    }
  }
  const int64_t drawn = (count + 2 * kSlots - 1) / (2 * kSlots) * (8 * kSlots);  // words, whole vectors
  for (int64_t j = 0; j < drawn; j += 2 * kLanes) {
    for (int64_t value = 2 * j; value < 2 * j + 4 * kLanes; value += 16) near(1, value);
    for (int i = 0; i < 2; ++i) store(squared + j + i * kLanes, squared_radius(load<Words>(words + j + i * kLanes)));
  }
  for (int64_t j = 0; j < drawn; j += 2 * kLanes) {
    for (int64_t value = 2 * j; value < 2 * j + 4 * kLanes; value += 16) near(2, value);
    Floats cosine[2], sine[2];
    for (int i = 0; i < 2; ++i)
      rotate(load<Words>(words + j + i * kLanes), load<Floats>(squared + j + i * kLanes), weight, cosine[i], sine[i]);
    store_pairs(out + 2 * j, cosine[0], sine[0], cosine[1], sine[1]);
  }
}

inline void draw_normals(const Counters& counters, int64_t count, uint32_t teacher, uint64_t seed, double weight,
                         const Near&, double* out) {
  for (int64_t j = 0; j < count; ++j) {
    const uint64_t row = counters.row[j];
    Philox<uint64_t> x[1] = {{{counters.index[j], teacher, row, row >> 32}}};
    philox(x, seed);
    for (int i = 0; i < 4; ++i)
      normal_pair(static_cast<uint32_t>(x[0].word[i]), weight, out[8 * j + 2 * i], out[8 * j + 2 * i + 1]);
  }
}

// Row draws of kRows rows from global row `row` on: those selected as bits, and the words of their own normal values.
inline uint64_t draw_rows(const Noise& noise, uint64_t seed, uint64_t row, uint32_t teacher, uint64_t (&words)[kRows]) {
  Slots rows{}, bits{}, selected{};
  for (int i = 0; i < kSlots; ++i) {
    rows[i] = row + static_cast<uint64_t>(i);
    bits[i] = uint64_t{1} << i;
  }
  for (int begin = 0; begin < kRows; begin += 2 * kSlots) {
    Philox<Slots> x[2];
    for (int i = 0; i < 2; ++i) {
      x[i] = {{Slots{}, Slots{} + (teacher | kRowDraw), rows, rows >> 32}};
      rows += static_cast<uint64_t>(kSlots);
    }
    philox(x, seed);
    for (int i = 0; i < 2; ++i) {
      selected |= (Slots)((x[i].word[0] & 0xFFFFFFFFu) < noise.threshold) & (bits << (begin + i * kSlots));
      store(words + begin + i * kSlots, x[i].word[1]);
    }
  }
  uint64_t all = 0;
  for (int i = 0; i < kSlots; ++i) all |= selected[i];
  return all;
}

// The lowest of the `selected` rows of a group, `most` at the most; returns the others.
inline uint64_t take(uint64_t selected, int64_t most, int (&places)[kRows], int& count) {
  for (count = 0; selected && count < most; selected &= selected - 1) places[count++] = __builtin_ctzll(selected);
  return selected;
}

// The noise of a group of up to kRows rows: which of them have any, and their values, a tile of classes at a time.
template <typename T>
class RowNoise {
 public:
  RowNoise(const Noise& noise_, int64_t classes)
      : noise(noise_),
        teachers(noise.sigma > 0 && noise.threshold > 0 ? static_cast<uint32_t>(noise.n_teachers) : 0),
        seed(teachers ? static_cast<uint64_t>(*noise.seed) : 0),
        weight(static_cast<T>(teachers ? noise.sigma / static_cast<double>(noise.n_teachers) : 0)),
        octets((smaller(kTile, classes) + 7) / 8) {}

  // How many rows' values one draw holds, and how far apart they lie there.
  int64_t most_rows() const { return smaller(kRows, kOctets / octets); }
  int64_t stride() const { return octets * 8; }

  // Rows of the group from `first` on that any teacher perturbs, as bits.
  uint64_t select(int64_t first_row, int64_t count) {
    first = noise.row_offset + first_row;
    uint64_t any = 0;
    if (noise.per_sample)
      for (int64_t i = 0; teachers && i < count; ++i) row_noise[i] = 0;
    for (uint32_t k = 0; k < teachers; ++k) {
      const uint64_t selected = draw_rows(noise, seed, global(0), k, words) & (~uint64_t{0} >> (kRows - count));
      any |= selected;
      if (!noise.per_sample) continue;
      for (uint64_t rows = selected; rows; rows &= rows - 1) {
        const int i = __builtin_ctzll(rows);
        T cosine, sine;
        normal_pair(static_cast<uint32_t>(words[i]), weight, cosine, sine);
        row_noise[i] += cosine;
      }
    }
    return any;
  }

  // The noise of some of the selected rows, named by their places in the group, for a tile of classes from class_begin
  // on: valid until the next call. `near` is what the first of them perturbs.
  const T* draw(const int* places, int count, int64_t class_begin, const Near& near) {
    if (noise.per_sample) {
      for (int i = 0; i < count; ++i)
        for (int64_t j = 0; j < stride(); ++j) values[i * stride() + j] = row_noise[places[i]];
    } else if (teachers == 1) {
      draw_teacher(0, places, count, class_begin, count == 1 ? near : Near(), values);
    } else {
      for (int64_t j = 0; j < count * stride(); ++j) values[j] = 0;
      for (uint32_t k = 0; k < teachers; ++k) add_teacher(k, places, count, class_begin);
    }
    return values;
  }

 private:
  uint64_t global(int place) const { return static_cast<uint64_t>(first + place); }

  void draw_teacher(uint32_t teacher, const int* places, int count, int64_t class_begin, const Near& near, T* out) {
    for (int i = 0; i < count; ++i)
      for (int64_t q = 0; q < octets; ++q) {
        counters.index[i * octets + q] = static_cast<uint64_t>(class_begin / 8 + q);
        counters.row[i * octets + q] = global(places[i]);
      }
    draw_normals(counters, count * octets, teacher, seed, weight, near, out);
  }

  void add_teacher(uint32_t teacher, const int* places, int count, int64_t class_begin) {
    int drawn_places[kRows], to[kRows], drawn_count = 0;
    for (int i = 0; i < count; ++i)
      if (row_draw(seed, global(places[i]), teacher, noise.threshold).selected) {
        drawn_places[drawn_count] = places[i];
        to[drawn_count++] = i;
      }
    draw_teacher(teacher, drawn_places, drawn_count, class_begin, Near(), drawn);
    for (int i = 0; i < drawn_count; ++i)
      for (int64_t j = 0; j < stride(); ++j) values[to[i] * stride() + j] += drawn[i * stride() + j];
  }

  const Noise noise;
  const uint32_t teachers;  // 0: no noise
  const uint64_t seed;
  const T weight;
  const int64_t octets;  // of a tile
  int64_t first = 0;     // the group's first row among all
  uint64_t words[kRows];
  T row_noise[kRows];
  Counters counters;
  alignas(64) T values[kTile + 16 * kSlots] = {};  // all of it is read, in vectors
  alignas(64) T drawn[kTile + 16 * kSlots];
};

}  // namespace pykd::PYKD_ISA
