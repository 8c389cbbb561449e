// Rows are stretches of width times lanes floats; where they follow upon one another, a channel is one.
#include "core/cpu_isa.h"
#include "kernels/elementwise/elementwise_math.h"

namespace pykd::PYKD_ISA {
namespace {

template <Function kFunction>
void channels(const Elementwise& a, int64_t begin, int64_t end) {
  constexpr bool kOther = kFunction == Function::kAdd;
  int64_t rows = a.height, floats = a.width * a.lanes;
  if (a.input.row_stride == floats && a.output.row_stride == floats && (!kOther || a.other.row_stride == floats)) {
    floats *= rows;
    rows = 1;
  }
  for (int64_t at = begin; at < end; ++at) {
    const int64_t group = at / a.channels, channel = at % a.channels;
    const float first = kFunction == Function::kAffine ? a.scale[channel] : a.slope;
    const float second = kFunction == Function::kAffine ? a.shift[channel] : 0;
    for (int64_t y = 0; y < rows; ++y) {
      const float* const input = a.input.row(group, channel, y);
      const float* const other = kOther ? a.other.row(group, channel, y) : input;
      float* const output = a.output.row(group, channel, y);
      for (int64_t i = 0; i < floats; i += kLanes) {
        const Floats x = load_some(input + i, floats - i), its = kOther ? load_some(other + i, floats - i) : x;
        store_some(output + i, applied<kFunction>(x, its, first, second), floats - i);
      }
    }
  }
}

// Over the channels of one place, which lie side by side.
void softmax_together(const float* input, float* output, int64_t channels) {
  const float least = -__builtin_inff();
  Floats most = Floats{} + least;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats x = load_some(input + c, channels - c, least);
    most = x > most ? x : most;
  }
  const float top = reduce_max(most);
  Floats sum{};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    store_some(output + c, exponential(load_some(input + c, n) - top), n);
    sum += load_some(output + c, n);
  }
  const float whole = reduce_sum(sum);
  for (int64_t c = 0; c < channels; c += kLanes)
    store_some(output + c, load_some(output + c, channels - c) / whole, channels - c);
}

// Over the channels of n <= kLanes floats.
void softmax_apart(const float* input, int64_t step, float* output, int64_t out_step, int64_t channels, int64_t n) {
  Floats most = Floats{} - __builtin_inff(), sum{};
  for (int64_t c = 0; c < channels; ++c) {
    const Floats x = load_some(input + c * step, n);
    most = x > most ? x : most;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Floats e = exponential(load_some(input + c * step, n) - most);
    store_some(output + c * out_step, e, n);
    sum += e;
  }
  for (int64_t c = 0; c < channels; ++c)
    store_some(output + c * out_step, load_some(output + c * out_step, n) / sum, n);
}

}  // namespace

void elementwise_cpu(const Elementwise& a, int64_t begin, int64_t end) {
  switch (a.function) {
    case Function::kRelu: return channels<Function::kRelu>(a, begin, end);
    case Function::kLeakyRelu: return channels<Function::kLeakyRelu>(a, begin, end);
    case Function::kTanh: return channels<Function::kTanh>(a, begin, end);
    case Function::kAdd: return channels<Function::kAdd>(a, begin, end);
    case Function::kAffine: return channels<Function::kAffine>(a, begin, end);
    case Function::kCopy: return channels<Function::kCopy>(a, begin, end);
  }
}

void softmax_cpu(const Softmax& a, int64_t begin, int64_t end) {
  const int64_t floats = a.width * a.lanes;
  for (int64_t at = begin; at < end; ++at) {
    const float* const input = a.input.row(at / a.height, 0, at % a.height);
    float* const output = a.output.row(at / a.height, 0, at % a.height);
    if (floats == 1 && a.input.channel_stride == 1 && a.output.channel_stride == 1) {
      softmax_together(input, output, a.channels);
      continue;
    }
    for (int64_t i = 0; i < floats; i += kLanes)
      softmax_apart(input + i, a.input.channel_stride, output + i, a.output.channel_stride, a.channels, floats - i);
  }
}

}  // namespace pykd::PYKD_ISA

PYKD_CPU_DOOR(elementwise_cpu, (const Elementwise& args, int64_t begin, int64_t end), (args, begin, end))
PYKD_CPU_DOOR(softmax_cpu, (const Softmax& args, int64_t begin, int64_t end), (args, begin, end))
