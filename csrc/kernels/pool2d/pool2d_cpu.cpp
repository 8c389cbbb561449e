// A vector's lanes are images; or, of one lane, places of a row, which are pooled down the columns first.
#include "core/cpu_isa.h"
#include "core/simd.h"
#include "kernels/pool2d/pool2d_math.h"

namespace pykd::PYKD_ISA {
namespace {

template <bool kAverage>
constexpr float kNothing = kAverage ? 0.0f : -__builtin_inff();  // what a window begins with

template <bool kAverage, typename Float>
Float pooled(Float a, Float b) {
  if constexpr (kAverage) return a + b;
  return larger(a, b);
}

PoolWindow columns_of(const Pool2d& a, int64_t x) {
  return {x, a.width, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w, a.count_padding};
}

// A window of rows by columns of the input from `first` on; kSide: both, or 0.
template <bool kAverage, int kSide, typename Float>
Float window(const float* first, int64_t rows, int64_t row_step, int64_t columns, int64_t step) {
  if (kSide) rows = columns = kSide;
  Float result = Float{} + kNothing<kAverage>;
  for (int64_t i = 0; i < rows; ++i) {
    Float line = kAverage ? Float{} : result;  // rounding grows with a window's sides, not with its area
    for (int64_t j = 0; j < columns; ++j) line = pooled<kAverage>(line, load<Float>(first + i * row_step + j * step));
    result = kAverage ? result + line : line;
  }
  return result;
}

// One row of the output, by windows; `from` is the first row of the input that they meet.
template <bool kAverage, typename Float>
void pool_windows(const Pool2d& a, const PoolWindow& rows, const float* from, float* to) {
  const int64_t row_step = a.dilation_h * a.input.row_stride, step = a.dilation_w * a.lanes;
  for (int64_t x = 0; x < a.out_width; ++x) {
    const PoolWindow columns = columns_of(a, x);
    const float divisor = static_cast<float>(rows.counted * columns.counted);
    const auto each = [&](auto function) {
      for (int64_t lane = 0; lane < a.lanes; lane += sizeof(Float) / sizeof(float)) {
        const Float result =
            function(from + columns.first * a.lanes + lane, rows.places, row_step, columns.places, step);
        store(to + x * a.lanes + lane, kAverage ? result / divisor : result);
      }
    };
    if (rows.places == 2 && columns.places == 2)
      each(window<kAverage, 2, Float>);
    else if (rows.places == 3 && columns.places == 3)
      each(window<kAverage, 3, Float>);
    else
      each(window<kAverage, 0, Float>);
  }
}

// from[0], from[stride], ... of kLanes strides, all of which may be read.
Floats every(const float* from, int64_t stride) {
  if (stride == 1) return load<Floats>(from);
  Floats v{};
  if (stride == 2) {
    Ints even;
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
    return __builtin_shuffle(load<Floats>(from), load<Floats>(from + kLanes), even);
  }
  for (int i = 0; i < kLanes; ++i) v[i] = from[i * stride];
  return v;
}

constexpr int64_t kSpan = 512;  // places of a row that are pooled down the columns at a time

// One row of the output, of one lane and windows of two columns side by side.
template <bool kAverage>
void pool_pairs(const Pool2d& a, const PoolWindow& rows, const float* from, float* to) {
  const int64_t row_step = a.dilation_h * a.input.row_stride;
  const float divisor = static_cast<float>(2 * rows.counted);
  Ints even, odd;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int64_t x = 0; x < a.out_width; x += kLanes) {
    const int64_t n = 2 * (a.out_width - x);
    Floats low = Floats{} + kNothing<kAverage>, high = low;
    for (int64_t i = 0; i < rows.places; ++i) {
      const float* const row = from + i * row_step + 2 * x;
      low = pooled<kAverage>(low, load_some(row, n));
      high = pooled<kAverage>(high, load_some(row + kLanes, n - kLanes));
    }
    const Floats result = pooled<kAverage>(__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd));
    store_some(to + x, kAverage ? result / divisor : result, a.out_width - x);
  }
}

// How many vectors of outputs have their windows within as many places.
int64_t vectors_of_span(const Pool2d& a) { return (kSpan - (a.kernel_w - 1) * a.dilation_w) / (a.stride_w * kLanes); }

// One row of the output, of one lane. The span holds zeros at first.
template <bool kAverage>
void pool_places(const Pool2d& a, const PoolWindow& rows, const float* from, float* to, float* span) {
  const int64_t together = vectors_of_span(a) * kLanes;
  for (int64_t begin = 0; begin < a.out_width; begin += together) {
    const int64_t end = begin + together < a.out_width ? begin + together : a.out_width;
    const int64_t place = begin * a.stride_w - a.padding_w;                                       // of span[0]
    const int64_t beyond = (end - 1 - begin) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1;  // places in the span
    const int64_t inside = place < 0 ? -place : 0;
    const int64_t outside = a.width - place < beyond ? a.width - place : beyond;
    for (int64_t i = inside; i < outside; i += kLanes) {
      Floats column = Floats{} + kNothing<kAverage>;
      for (int64_t y = 0; y < rows.places; ++y)
        column =
            pooled<kAverage>(column, load_some(from + y * a.dilation_h * a.input.row_stride + place + i, outside - i));
      store_some(span + i, column, outside - i);
    }
    for (int64_t i = 0; i < inside; ++i) span[i] = kNothing<kAverage>;
    for (int64_t i = outside; i < beyond; ++i) span[i] = kNothing<kAverage>;
    for (int64_t x = begin; x < end; x += kLanes) {
      Floats result = Floats{} + kNothing<kAverage>;
      for (int64_t j = 0; j < a.kernel_w; ++j)
        result = pooled<kAverage>(result, every(span + (x - begin) * a.stride_w + j * a.dilation_w, a.stride_w));
      if constexpr (kAverage)
        for (int64_t i = 0; i < kLanes; ++i)
          result[i] /= static_cast<float>(rows.counted * columns_of(a, x + i < end ? x + i : x).counted);
      store_some(to + x, result, end - x);
    }
  }
}

template <bool kAverage>
void pool(const Pool2d& a, int64_t begin, int64_t end) {
  const bool pairs =
      a.kernel_w == 2 && a.stride_w == 2 && a.dilation_w == 1 && 2 * a.out_width <= a.width && a.padding_w == 0;
  alignas(64) float span[kSpan] = {};
  for (int64_t at = begin; at < end; ++at)
    for (int64_t y = 0; y < a.out_height; ++y) {
      const PoolWindow rows{y, a.height, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h, a.count_padding};
      const float* const from = a.input.row(at / a.channels, at % a.channels, 0) + rows.first * a.input.row_stride;
      float* const to = a.output.row(at / a.channels, at % a.channels, y);
      if (a.lanes > 1)
        pool_windows<kAverage, Floats>(a, rows, from, to);
      else if (pairs)
        pool_pairs<kAverage>(a, rows, from, to);
      else if (vectors_of_span(a) > 0)
        pool_places<kAverage>(a, rows, from, to, span);
      else
        pool_windows<kAverage, float>(a, rows, from, to);
    }
}

}  // namespace

void pool2d_cpu(const Pool2d& a, int64_t begin, int64_t end) {
  a.average ? pool<true>(a, begin, end) : pool<false>(a, begin, end);
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(pool2d_cpu, (const Pool2d& args, int64_t begin, int64_t end), (args, begin, end))
