// A convolution whose weight is sparse, with bias and ReLU, directly on the image: no im2col.
//
//   output[b, o, y, x] =
//       activation(bias[o] + sum_(c,i,j) weight[o, c, i, j] * input[b, c, y s + i d - p, x s + j d - p])
//
// The input lies in planes (core/planes.h): a column (c, i, j) of the weight is an offset into a group's planes, the
// same for every place of the output, and the places of a plane are what a panel is for sparse_linear, which also says
// what `halves` do on CUDA.
#pragma once

#include "core/planes.h"
#include "core/sparse_tiles.h"

struct CUstream_st;

namespace pykd {

struct SparseConv2d {
  SparseTiles weight;      // of [out, in / groups * kernel_h * kernel_w], the panels; on CUDA `halves`, too
  const float* planes;     // [groups][group_stride] and kPlaneSlack more that may be read
  const int32_t* offsets;  // [channels * kernel_h * kernel_w], of conv2d_offsets; null (CPU alone, for pairs): the
                           // weight's columns are such places already
  int64_t group_stride;    // floats, as all strides
  int64_t row_stride;
  int64_t lanes;  // 1, or a multiple of vector_lanes(), on CUDA of 16
  int64_t out_height;
  int64_t out_width;
  float* output;  // out [groups][out][out_height][out_width][lanes] by these strides
  int64_t out_group_stride;
  int64_t out_channel_stride;
  int64_t out_row_stride;
  const float* bias;  // [out], or null
  Activation activation;
};

// Single-threaded over the groups [begin, end), for the tiles [tile_begin, tile_end): the caller owns the threads.
void sparse_conv2d_cpu(const SparseConv2d& args, int64_t begin, int64_t end, int64_t tile_begin, int64_t tile_end);

// All of it for `groups` groups, enqueued on `stream`; never synchronises, never allocates.
CudaStatus sparse_conv2d_cuda(const SparseConv2d& args, int64_t groups, CUstream_st* stream);

}  // namespace pykd
