#include "core/cuda.h"
#include "kernels/pool2d/pool2d.h"
#include "kernels/pool2d/pool2d_math.h"

// The floor is memory: 4 bytes read a place of the input, 4 written a place of the output. A thread makes one place of
// the output; neighbours read neighbours, and what windows share comes from the caches.
namespace pykd::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) places(Pool2d a, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t lane = at % a.lanes, pixel = at / a.lanes, x = pixel % a.out_width, row = pixel / a.out_width;
  const int64_t y = row % a.out_height, channel = row / a.out_height % a.channels;
  const int64_t group = row / a.out_height / a.channels;
  const PoolWindow rows(y, a.height, a.kernel_h, a.stride_h, a.padding_h, a.dilation_h, a.count_padding);
  const PoolWindow columns(x, a.width, a.kernel_w, a.stride_w, a.padding_w, a.dilation_w, a.count_padding);
  float result = a.average ? 0 : -__builtin_inff();
  for (int64_t i = 0; i < rows.places; ++i) {
    const float* const from =
        a.input.row(group, channel, rows.first + i * a.dilation_h) + columns.first * a.lanes + lane;
    float line = a.average ? 0 : result;
    for (int64_t j = 0; j < columns.places; ++j) {
      const float value = from[j * a.dilation_w * a.lanes];
      line = a.average ? line + value : larger(line, value);
    }
    result = a.average ? result + line : line;
  }
  if (a.average) result /= static_cast<float>(rows.counted * columns.counted);
  a.output.row(group, channel, y)[x * a.lanes + lane] = result;
}

}  // namespace
}  // namespace pykd::cuda

pykd::CudaStatus pykd::pool2d_cuda(const Pool2d& args, int64_t groups, CUstream_st* stream) {
  const int64_t count = groups * args.channels * args.out_height * args.out_width * args.lanes;
  if (count == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((count - 1) / cuda::kThreads + 1);
  PYKD_LAUNCH(blocks, cuda::kThreads, 0, stream, cuda::places)(args, count);
  return cudaGetLastError();
}
