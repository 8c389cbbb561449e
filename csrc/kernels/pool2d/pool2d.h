// The largest or the mean of each window of an image:
//
//   output[b, c, y, x] = max or mean over (i, j) of input[b, c, y s + i d - p, x s + j d - p]
//
// As torch does it: places outside the image are no candidates of a maximum; a mean counts those of the padding if
// count_padding says so, and never those beyond it. A maximum of NaN is NaN. A global pool's kernel is the image.
#pragma once

#include "core/planes.h"

struct CUstream_st;

namespace pykd {

struct Pool2d {
  Plane input;   // [groups][channels][height][width][lanes]
  Plane output;  // out [groups][channels][out_height][out_width][lanes], nowhere in the input
  int64_t channels, lanes;
  int64_t height, width;
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;    // <= half the kernel
  int64_t dilation_h, dilation_w;  // 1 of a mean
  bool average;
  bool count_padding;
};

// Single-threaded over the channels [begin, end), counted through all groups: the caller owns the threads.
void pool2d_cpu(const Pool2d& args, int64_t begin, int64_t end);

// All of it for `groups` groups, enqueued on `stream`; never synchronises, never allocates.
CudaStatus pool2d_cuda(const Pool2d& args, int64_t groups, CUstream_st* stream);

}  // namespace pykd
