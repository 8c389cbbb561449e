// One lane copies rows; more lanes transpose squares of as many images as pixels in registers.
#include "core/cpu_isa.h"
#include "core/half.h"
#include "kernels/planes/planes.h"

namespace pykd::PYKD_ISA {
namespace {

// Pixels of a cache line: images are powers of two apart, where only few lines last until they are read again.
constexpr int64_t kLine = 16;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// n <= kLanes values of an image, the others 0.
struct LoadFloat {
  static constexpr int64_t kBytes = 4;
  Floats operator()(const char* from, int64_t n) const {
    const float* const floats = reinterpret_cast<const float*>(from);
    return n == kLanes ? load<Floats>(floats) : load_first(floats, n);
  }
};
struct LoadHalf {
  static constexpr int64_t kBytes = 2;
  DType dtype;
  Floats operator()(const char* from, int64_t n) const {
    alignas(64) float wide[kLanes] = {};
    widen(from, dtype, wide, n);
    return load<Floats>(wide);
  }
};

struct StoreFloat {
  static constexpr int64_t kBytes = 4;
  void operator()(char* to, Floats values, int64_t n) const {
    float* const floats = reinterpret_cast<float*>(to);
    n == kLanes ? store(floats, values) : store_first(floats, values, n);
  }
};
struct StoreHalf {
  static constexpr int64_t kBytes = 2;
  DType dtype;
  void operator()(char* to, Floats values, int64_t n) const {
    alignas(64) float wide[kLanes];
    store(wide, values);
    narrow(wide, dtype, to, n);
  }
};

void clear(float* to, int64_t n) {
  for (; n >= kLanes; n -= kLanes, to += kLanes) store(to, Floats{});
  for (; n > 0; --n) *to++ = 0;
}

// The rows of one channel of one group, as images and as planes: each is called with the row in both.
template <class Row>
void each_row(const PlaneLayout& l, const Row& row) {
  for (int64_t y = 0; y < l.vertical.length; ++y) {
    const int64_t padded = y + l.vertical.padding, phase = padded % l.vertical.step, place = padded / l.vertical.step;
    if (phase < l.vertical.phases && place < l.vertical.places)
      row(y, phase * l.horizontal.phases * l.phase_stride() + place * l.row_stride());
  }
}

// The pixels of a row that a phase has: places [begin, end), the first of them pixel x.
struct Reach {
  int64_t begin, end, x;
};
constexpr int64_t kReaches = 16;  // of phases, found once a channel
Reach reach_of(const PlaneSide& side, int64_t phase) {
  const int64_t before = side.padding - phase * side.spread;  // zeros
  const int64_t begin = before <= 0 ? 0 : side.step == 1 ? before : (before + side.step - 1) / side.step;
  const int64_t x = begin * side.step - before, left = side.length - x;
  const int64_t end = begin + (left <= 0 ? 0 : side.step == 1 ? left : (left + side.step - 1) / side.step);
  return {smaller(begin, side.places), smaller(end, side.places), x};
}

// A row of a channel of the images to one of each phase, zeros around it. Where a vector's floats of other rows follow
// in both, whole vectors may be read and written.
template <class Load>
inline void pack_row(const PlaneLayout& l, const Reach* reaches, const Load& load_image, const char* from,
                     int64_t image_bytes, int64_t present, bool follows, float* to) {
  const PlaneSide& side = l.horizontal;
  for (int64_t phase = 0; phase < side.phases; ++phase, to += l.phase_stride()) {
    const Reach reach = phase < kReaches ? reaches[phase] : reach_of(side, phase);
    if (follows && l.lanes == 1 && side.step == 1) {
      const char* const first = from + (reach.x - reach.begin) * Load::kBytes;
      for (int64_t place = 0; place < reach.begin; place += kLanes) store(to + place, Floats{});
      for (int64_t place = reach.begin; place < reach.end; place += kLanes)
        store(to + place, load_image(first + place * Load::kBytes, kLanes));
      for (int64_t place = reach.end; place < side.places; place += kLanes) store(to + place, Floats{});
      continue;
    }
    clear(to, reach.begin * l.lanes);
    clear(to + reach.end * l.lanes, (side.places - reach.end) * l.lanes);
    int64_t place = reach.begin;
    const char* pixel = from + reach.x * Load::kBytes;
    if (side.step > 1) {
      for (; place < reach.end; ++place, pixel += side.step * Load::kBytes)
        for (int64_t lane = 0; lane < l.lanes; ++lane)
          to[place * l.lanes + lane] = lane < present ? load_image(pixel + lane * image_bytes, 1)[0] : 0;
      continue;
    }
    if (l.lanes == 1) {
      for (; place + kLanes <= reach.end; place += kLanes, pixel += kLanes * Load::kBytes)
        store(to + place, load_image(pixel, kLanes));
      if (const int64_t n = reach.end - place; n > 0) store_first(to + place, load_image(pixel, n), n);
      continue;
    }
    for (; place < reach.end; place += kLine, pixel += kLine * Load::kBytes)
      for (int64_t lane = 0; lane < l.lanes; lane += kLanes)
        for (int64_t at = 0; at < smaller(kLine, reach.end - place); at += kLanes) {
          const int64_t n = smaller(kLanes, reach.end - place - at);
          const char* const image = pixel + lane * image_bytes + at * Load::kBytes;
          Floats square[kLanes];
          if (n == kLanes && lane + kLanes <= present) {
            for (int64_t i = 0; i < kLanes; ++i) square[i] = load_image(image + i * image_bytes, kLanes);
            transpose(square);
            for (int64_t i = 0; i < kLanes; ++i) store(to + (place + at + i) * l.lanes + lane, square[i]);
            continue;
          }
          for (int64_t i = 0; i < kLanes; ++i)
            square[i] = lane + i < present ? load_image(image + i * image_bytes, n) : Floats{};
          transpose(square);
          for (int64_t i = 0; i < n; ++i) store(to + (place + at + i) * l.lanes + lane, square[i]);
        }
  }
}

template <class Load>
void pack(const PackPlanes& a, const Load& load_image, int64_t group, int64_t channel) {
  const PlaneLayout& l = a.layout;
  const int64_t row_bytes = l.horizontal.length * Load::kBytes,
                image_bytes = l.channels * l.vertical.length * row_bytes;
  const char* const images =
      static_cast<const char*>(a.images) + group * l.lanes * image_bytes + channel * l.vertical.length * row_bytes;
  const int64_t present = smaller(l.lanes, a.batch - group * l.lanes);
  Reach reaches[kReaches];
  for (int64_t phase = 0; phase < smaller(kReaches, l.horizontal.phases); ++phase)
    reaches[phase] = reach_of(l.horizontal, phase);
  float* to = a.planes + group * l.group_stride() + channel * l.channel_stride();
  for (int64_t phase = 0; phase < l.vertical.phases; ++phase, to += l.horizontal.phases * l.phase_stride())
    for (int64_t place = 0; place < l.vertical.places; ++place) {
      const int64_t y = l.vertical.coordinate(phase, place);
      float* const row = to + place * l.row_stride();
      if (y >= 0 && y < l.vertical.length)
        pack_row(l, reaches, load_image, images + y * row_bytes, image_bytes, present,
                 smaller((l.vertical.length - 1 - y) * l.horizontal.length,
                         (l.vertical.places - 1 - place) * l.horizontal.places) >= kLanes,
                 row);
      else
        for (int64_t i = 0; i < l.horizontal.phases; ++i) clear(row + i * l.phase_stride(), l.row_stride());
    }
}

template <class Store>
void unpack(const UnpackPlanes& a, const Store& store_image, int64_t group, int64_t channel) {
  const PlaneLayout& l = a.layout;
  const int64_t width = l.horizontal.length, row_bytes = width * Store::kBytes;
  const int64_t image_bytes = l.channels * l.vertical.length * row_bytes;
  char* const images =
      static_cast<char*>(a.images) + group * l.lanes * image_bytes + channel * l.vertical.length * row_bytes;
  const float* const planes = a.planes + group * l.group_stride() + channel * l.channel_stride();
  const int64_t present = smaller(l.lanes, a.batch - group * l.lanes);
  for (int64_t y = 0; y < l.vertical.length; ++y) {
    char* const to = images + y * row_bytes;
    const float* const from = planes + (y + l.vertical.padding) * l.row_stride() + l.horizontal.padding * l.lanes;
    if (l.lanes == 1) {
      for (int64_t x = 0; x < width; x += kLanes) {
        const int64_t n = smaller(kLanes, width - x);
        store_image(to + x * Store::kBytes, n == kLanes ? load<Floats>(from + x) : load_first(from + x, n), n);
      }
      continue;
    }
    for (int64_t line = 0; line < width; line += kLine)
      for (int64_t lane = 0; lane < present; lane += kLanes)
        for (int64_t x = line; x < smaller(line + kLine, width); x += kLanes) {
          const int64_t n = smaller(kLanes, width - x), lanes = smaller(kLanes, present - lane);
          const float* const first = from + x * l.lanes + lane;
          char* const image = to + lane * image_bytes + x * Store::kBytes;
          Floats square[kLanes];
          if (n == kLanes && lanes == kLanes) {
            for (int64_t i = 0; i < kLanes; ++i) square[i] = load<Floats>(first + i * l.lanes);
            transpose(square);
            for (int64_t i = 0; i < kLanes; ++i) store_image(image + i * image_bytes, square[i], kLanes);
            continue;
          }
          for (int64_t i = 0; i < kLanes; ++i) square[i] = i < n ? load<Floats>(first + i * l.lanes) : Floats{};
          transpose(square);
          for (int64_t i = 0; i < lanes; ++i) store_image(image + i * image_bytes, square[i], n);
        }
  }
}

void repack(const RepackPlanes& a, int64_t group, int64_t channel) {
  const PlaneLayout& l = a.layout;
  const PlaneSide& side = l.horizontal;
  float* const planes = a.planes + group * l.group_stride() + channel * l.channel_stride();
  each_row(l, [&](int64_t y, int64_t row) {
    const float* const from = a.input.row(group, channel, y);
    for (int64_t phase = 0; phase < side.phases; ++phase) {
      int64_t place = phase < side.padding ? (side.padding - phase + side.step - 1) / side.step : 0;
      int64_t x = place * side.step + phase - side.padding;
      float* const to = planes + row + phase * l.phase_stride();
      for (; x < side.length && place < side.places; x += side.step, ++place) {
        if (l.lanes == 1) {
          to[place] = from[x];
          continue;
        }
        for (int64_t lane = 0; lane < l.lanes; lane += kLanes)
          store(to + place * l.lanes + lane, load<Floats>(from + x * l.lanes + lane));
      }
    }
  });
}

}  // namespace

void pack_planes_cpu(const PackPlanes& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / args.layout.channels, channel = at % args.layout.channels;
    args.dtype == DType::kFloat32 ? pack(args, LoadFloat(), group, channel)
                                  : pack(args, LoadHalf{args.dtype}, group, channel);
  }
}

void unpack_planes_cpu(const UnpackPlanes& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / args.layout.channels, channel = at % args.layout.channels;
    args.dtype == DType::kFloat32 ? unpack(args, StoreFloat(), group, channel)
                                  : unpack(args, StoreHalf{args.dtype}, group, channel);
  }
}

void repack_planes_cpu(const RepackPlanes& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) repack(args, at / args.layout.channels, at % args.layout.channels);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(pack_planes_cpu, (const PackPlanes& args, int64_t begin, int64_t end), (args, begin, end))
PYKD_CPU_DOOR(unpack_planes_cpu, (const UnpackPlanes& args, int64_t begin, int64_t end), (args, begin, end))
PYKD_CPU_DOOR(repack_planes_cpu, (const RepackPlanes& args, int64_t begin, int64_t end), (args, begin, end))
