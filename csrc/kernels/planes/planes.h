// Images and vectors as torch holds them, [batch, channels, height, width], to planes (core/planes.h) and back.
//
// Cost: every value is read and written once; the borders are written, too.
#pragma once

#include "core/planes.h"

struct CUstream_st;

namespace pykd {

struct PackPlanes {
  const void* images;  // [batch, channels, height, width], row-major, dtype
  float* planes;       // out [groups][layout.group_stride()]; images beyond the batch are zeros
  int64_t batch;
  PlaneLayout layout;
  DType dtype;  // float32, float16, bfloat16
};

struct UnpackPlanes {
  const float* planes;  // [groups][layout.group_stride()]
  void* images;         // out [batch, channels, height, width], row-major, dtype
  int64_t batch;
  PlaneLayout layout;  // without phases
  DType dtype;
};

// Planes to planes with phases, of the same lanes. Places that no pixel has stay as they are.
struct RepackPlanes {
  Plane input;    // [groups][channels][height][width][lanes]
  float* planes;  // out [groups][layout.group_stride()]
  PlaneLayout layout;
};

// Single-threaded over the channels [begin, end), counted through all groups: the caller owns the threads.
void pack_planes_cpu(const PackPlanes& args, int64_t begin, int64_t end);
void unpack_planes_cpu(const UnpackPlanes& args, int64_t begin, int64_t end);
void repack_planes_cpu(const RepackPlanes& args, int64_t begin, int64_t end);

// Enqueue on `stream` and return; never synchronise, never allocate.
CudaStatus pack_planes_cuda(const PackPlanes& args, CUstream_st* stream);
CudaStatus unpack_planes_cuda(const UnpackPlanes& args, CUstream_st* stream);
CudaStatus repack_planes_cuda(const RepackPlanes& args, int64_t groups, CUstream_st* stream);

}  // namespace pykd
