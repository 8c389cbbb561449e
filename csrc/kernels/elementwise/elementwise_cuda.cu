#include "core/cuda.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/elementwise/elementwise_math.h"

// The floor is memory: 8 bytes a float, 12 of a sum; softmax reads its input twice and writes and reads the
// exponentials once more, mostly in the caches. A thread makes one float, or those of one softmax.
namespace pykd::cuda {
namespace {

constexpr int kThreads = 256;

template <Function kFunction>
__global__ void __launch_bounds__(kThreads) floats(Elementwise a, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t i = at % (a.width * a.lanes), row = at / (a.width * a.lanes), y = row % a.height;
  const int64_t channel = row / a.height % a.channels, group = row / a.height / a.channels;
  const float first = kFunction == Function::kAffine ? a.scale[channel] : a.slope;
  const float second = kFunction == Function::kAffine ? a.shift[channel] : 0;
  const float other = kFunction == Function::kAdd ? a.other.row(group, channel, y)[i] : 0;
  const float x = a.input.row(group, channel, y)[i];
  a.output.row(group, channel, y)[i] = applied<kFunction>(x, other, first, second);
}

__global__ void __launch_bounds__(kThreads) softmaxes(Softmax a, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t i = at % (a.width * a.lanes), row = at / (a.width * a.lanes);
  const float* const input = a.input.row(row / a.height, 0, row % a.height) + i;
  float* const output = a.output.row(row / a.height, 0, row % a.height) + i;
  float most = -__builtin_inff(), sum = 0;
  for (int64_t c = 0; c < a.channels; ++c) most = fmaxf(most, input[c * a.input.channel_stride]);
  for (int64_t c = 0; c < a.channels; ++c) {
    const float e = exponential(input[c * a.input.channel_stride] - most);
    output[c * a.output.channel_stride] = e;
    sum += e;
  }
  for (int64_t c = 0; c < a.channels; ++c) output[c * a.output.channel_stride] /= sum;
}

unsigned blocks(int64_t count) { return static_cast<unsigned>((count - 1) / kThreads + 1); }

template <Function kFunction>
void launch(const Elementwise& args, int64_t count, CUstream_st* stream) {
  PYKD_LAUNCH(blocks(count), kThreads, 0, stream, floats<kFunction>)(args, count);
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::elementwise_cuda(const Elementwise& args, int64_t groups, CUstream_st* stream) {
  const int64_t count = groups * args.channels * args.height * args.width * args.lanes;
  if (count == 0) return cudaSuccess;
  switch (args.function) {
    case Function::kRelu: cuda::launch<Function::kRelu>(args, count, stream); break;
    case Function::kLeakyRelu: cuda::launch<Function::kLeakyRelu>(args, count, stream); break;
    case Function::kTanh: cuda::launch<Function::kTanh>(args, count, stream); break;
    case Function::kAdd: cuda::launch<Function::kAdd>(args, count, stream); break;
    case Function::kAffine: cuda::launch<Function::kAffine>(args, count, stream); break;
    case Function::kCopy: cuda::launch<Function::kCopy>(args, count, stream); break;
  }
  return cudaGetLastError();
}

pykd::CudaStatus pykd::softmax_cuda(const Softmax& args, int64_t groups, CUstream_st* stream) {
  const int64_t count = groups * args.height * args.width * args.lanes;
  if (count == 0) return cudaSuccess;
  PYKD_LAUNCH(cuda::blocks(count), cuda::kThreads, 0, stream, cuda::softmaxes)(args, count);
  return cudaGetLastError();
}
