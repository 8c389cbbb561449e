// How a batch of images lies in memory while sparse kernels read it: [groups][channels][phases][rows][row][lanes].
//
// A group is `lanes` images side by side, pixel by pixel, so that a vector's lanes are images; of one lane they are
// pixels. A border of zeros stands for the convolution's padding. With a stride of 2 the pixels a kernel's tap meets
// are every second one: they are dealt out to phases, within which they lie side by side again. With a stride of 1 the
// zeros right of a row are those left of the next one.
//
// A batch of vectors is a batch of images of one row with one channel: [groups][1][features][lanes].
#pragma once

#include <compare>
#include <cstdint>

#include "core/dtype.h"

namespace pykd {

struct Conv2dGeometry {
  int64_t channels, height, width;  // of an image
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;

  int64_t out_height() const { return (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_width() const { return (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
};

// One side of a plane: place p of phase f is coordinate f * spread + p * step of the padded image.
struct PlaneSide {
  int64_t length;   // of the image
  int64_t padding;  // zeros before it
  int64_t step;     // >= 1
  int64_t phases;
  int64_t places;      // of a phase: rows, or the pixels from one row to the next
  int64_t spread = 1;  // from one phase to the next

  PYKD_HD int64_t coordinate(int64_t phase, int64_t place) const { return phase * spread + place * step - padding; }
  bool filled() const { return step == 1 && padding == 0 && places == length; }  // by the image alone
  auto operator<=>(const PlaneSide&) const = default;
};

struct PlaneLayout {
  int64_t channels, lanes;
  PlaneSide vertical, horizontal;

  PYKD_HD int64_t row_stride() const { return horizontal.places * lanes; }
  PYKD_HD int64_t phase_stride() const { return vertical.places * row_stride(); }
  PYKD_HD int64_t channel_stride() const { return vertical.phases * horizontal.phases * phase_stride(); }
  PYKD_HD int64_t group_stride() const { return channels * channel_stride(); }
  int64_t groups(int64_t batch) const { return (batch + lanes - 1) / lanes; }
  auto operator<=>(const PlaneLayout&) const = default;
};

// A value in memory: the pixel (group, channel, y, x) begins at their strides, in floats, from `data`; pixels of a row
// lie side by side.
struct Plane {
  float* data;
  int64_t group_stride, channel_stride, row_stride;

  PYKD_HD float* row(int64_t group, int64_t channel, int64_t y) const {
    return data + group * group_stride + channel * channel_stride + y * row_stride;
  }
};

// Floats that may be read beyond the last group, by vectors that begin within it.
constexpr int64_t kPlaneSlack = 128;

inline PlaneLayout feature_planes(int64_t features, int64_t lanes) {
  return {1, lanes, {1, 0, 1, 1, 1}, {features, 0, 1, 1, features}};
}

inline PlaneSide conv2d_side(int64_t length, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                             int64_t out) {
  int64_t phases = 0;
  for (int64_t tap = 0; tap < kernel && tap < stride; ++tap)  // from tap = stride on they come again
    phases = phases > tap * dilation % stride ? phases : tap * dilation % stride + 1;
  const int64_t places = stride == 1 ? length + 2 * padding : out + (kernel - 1) * dilation / stride;
  return {length, padding, stride, phases, places};
}

// With `taps` every column of the kernel has a phase of its own, whose rows are as long as the output's: nothing lies
// between them, and vectors of pixels begin where vectors should, for as many times the memory.
inline PlaneLayout conv2d_planes(const Conv2dGeometry& g, int64_t lanes, bool taps = false) {
  if (taps)
    return {g.channels,
            lanes,
            conv2d_side(g.height, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h, g.out_height()),
            {g.width, g.padding_w, g.stride_w, g.kernel_w, g.out_width(), g.dilation_w}};
  PlaneLayout layout{g.channels, lanes,
                     conv2d_side(g.height, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h, g.out_height()),
                     conv2d_side(g.width, g.kernel_w, g.stride_w, g.padding_w, g.dilation_w, g.out_width())};
  // Rows of the output that are no longer than image and border can share their borders: the zeros right of a row are
  // those left of the next one, and one more row closes the last.
  if (g.stride_w == 1 && g.out_width() <= g.width + g.padding_w) {
    layout.horizontal.places -= g.padding_w;
    if (g.padding_w) ++layout.vertical.places;
  }
  return layout;
}

// Where a column (channel, row of the kernel, column of the kernel) of the weight begins in a group, in floats.
inline void conv2d_offsets(const Conv2dGeometry& g, const PlaneLayout& layout, int32_t* offsets) {
  for (int64_t i = 0; i < g.kernel_h; ++i)
    for (int64_t j = 0; j < g.kernel_w; ++j) {
      const int64_t y = i * g.dilation_h, x = j * g.dilation_w;
      const bool taps = layout.horizontal.phases == g.kernel_w && layout.horizontal.places == g.out_width();
      const int64_t phase = y % g.stride_h * layout.horizontal.phases + (taps ? j : x % g.stride_w);
      const int64_t first = phase * layout.phase_stride() + y / g.stride_h * layout.row_stride() +
                            (taps ? 0 : x / g.stride_w * layout.lanes);
      for (int64_t c = 0; c < g.channels; ++c)
        offsets[(c * g.kernel_h + i) * g.kernel_w + j] = static_cast<int32_t>(first + c * layout.channel_stride());
    }
}

}  // namespace pykd
