#include "core/cuda.h"
#include "core/cuda_panels.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

// Places are those of the output alone: none is computed for the borders between rows. A thread's neighbours read its
// neighbours in the planes, broken where a row ends.
pykd::CudaStatus pykd::sparse_conv2d_cuda(const SparseConv2d& args, int64_t groups, CUstream_st* stream) {
  const int64_t row = args.out_width * args.lanes;
  return cuda::launch_panels(args.weight,
                             {.count = groups * args.out_height * row,
                              .row = row,
                              .rows = args.out_height,
                              .lanes = args.lanes,
                              .input = args.planes,
                              .row_stride = args.row_stride,
                              .group_stride = args.group_stride,
                              .offsets = args.offsets,
                              .output = args.output,
                              .out_row_stride = args.out_row_stride,
                              .out_group_stride = args.out_group_stride,
                              .out_channel_stride = args.out_channel_stride,
                              .bias = args.bias,
                              .activation = args.activation},
                             stream);
}
