#include "core/cuda.h"
#include "core/cuda_rows.h"
#include "kernels/planes/planes.h"

// The floor is memory: 8 bytes a float32 pixel, 6 one of two bytes, 4 one of a border. While an H200 (4.8 TB/s; 132 SMs
// of 128 lanes at 1.75 GHz) moves 8 bytes it has 49 instruction slots: a thread finds out once where its pixels lie,
// some 100 instructions each, for all groups and lanes that its block moves. Planes to planes move 8 bytes a pixel and
// lane, four lanes in one access.
namespace pykd::cuda {
namespace {

constexpr int64_t kBusy = 2112;                                             // 16 for each SM
constexpr int64_t kMostAcross = 65535;                                      // blocks in y and z
constexpr int kAlone = 4;                                                   // pixels of one lane a thread has under way
constexpr int kSquareLanes = 16, kSquarePixels = 64, kSquareThreads = 256;  // of a transposition

struct Move {
  void* images;
  float* planes;
  int64_t batch, groups;
  PlaneLayout layout;
  int64_t image_stride, group_stride;  // in entries
  uint32_t pixels;                     // of a group: they begin within 2^31 floats
};

// A pixel within an image, -1 where a border is, and its first lane within a group.
struct Spot {
  int64_t image, plane;
};

// Of images: from one channel, row, pixel to the next.
struct Strides {
  int64_t channel, row, pixel;
};

// Coordinate x of the places of one side, phases side by side, so that neighbours in the image are neighbours here.
struct Coordinate {
  int64_t image;  // outside of [0, side.length): a border
  uint32_t phase, place;

  __device__ Coordinate(const PlaneSide& side, uint32_t x)
      : phase(x % static_cast<uint32_t>(side.phases)), place(x / static_cast<uint32_t>(side.phases)) {
    image = side.coordinate(phase, place);
  }
};

// The i-th pixel of a group that is packed: of its planes.
__device__ Spot packed(const PlaneLayout& l, const Strides& image, uint32_t i) {
  const auto width = static_cast<uint32_t>(l.horizontal.phases * l.horizontal.places),
             height = static_cast<uint32_t>(l.vertical.phases * l.vertical.places);
  const uint32_t row = i / width, channel = row / height;
  const Coordinate x(l.horizontal, i - row * width), y(l.vertical, row - channel * height);
  const bool inside = x.image >= 0 && x.image < l.horizontal.length && y.image >= 0 && y.image < l.vertical.length;
  return {inside ? channel * image.channel + y.image * image.row + x.image * image.pixel : -1,
          channel * l.channel_stride() + (y.phase * l.horizontal.phases + x.phase) * l.phase_stride() +
              y.place * l.row_stride() + x.place * l.lanes};
}

// The i-th pixel of a group that is unpacked: of its images.
__device__ Spot unpacked(const PlaneLayout& l, uint32_t i) {
  const auto width = static_cast<uint32_t>(l.horizontal.length), height = static_cast<uint32_t>(l.vertical.length);
  const uint32_t row = i / width, channel = row / height;
  return {i, channel * l.channel_stride() + (row - channel * height + l.vertical.padding) * l.row_stride() +
                 (i - row * width + l.horizontal.padding) * l.lanes};
}

template <bool kPack>
__device__ Spot spot_of(const Move& a, uint32_t i) {
  const int64_t height = a.layout.vertical.length, width = a.layout.horizontal.length;
  return kPack ? packed(a.layout, {height * width, width, 1}, i) : unpacked(a.layout, i);
}

// One lane: neighbouring threads take neighbouring pixels.
template <typename E, bool kPack>
__global__ void __launch_bounds__(kThreads) alone(Move a) {
  Spot spots[kAlone];
  bool present[kAlone];
  PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
    const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kAlone + i) * blockDim.x + threadIdx.x;
    present[i] = pixel < a.pixels;
    spots[i] = spot_of<kPack>(a, present[i] ? static_cast<uint32_t>(pixel) : 0);
  }
  for (int64_t group = blockIdx.y; group < a.groups; group += gridDim.y) {
    E* const image = static_cast<E*>(a.images) + group * a.image_stride;
    float* const plane = a.planes + group * a.group_stride;
    float pixels[kAlone] = {};
    PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
      if (!kPack)
        pixels[i] = plane[spots[i].plane];
      else if (spots[i].image >= 0)
        pixels[i] = widen(image[spots[i].image]);
    }
    PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
      if (!present[i]) continue;
      if (kPack)
        plane[spots[i].plane] = pixels[i];
      else
        narrow(pixels[i], image[spots[i].image]);
    }
  }
}

// More lanes: a block transposes squares of kSquareLanes images and kSquarePixels pixels in shared memory. Threads are
// neighbours by pixels at the images, by lanes at the planes.
template <typename E, bool kPack>
__global__ void __launch_bounds__(kSquareThreads) squares(Move a) {
  constexpr int kSteps = kSquareLanes * kSquarePixels / kSquareThreads;
  constexpr int kImages = kSquareThreads / kSquarePixels, kPixels = kSquareThreads / kSquareLanes;  // of a step
  __shared__ float squares[2][kSquareLanes][kSquarePixels + 2];  // the next one is filled while this one is read
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSquareLanes, image = thread / kSquarePixels,
            pixel = thread % kSquarePixels;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSquarePixels;
  const auto spot = [&](int p) {
    return spot_of<kPack>(a, static_cast<uint32_t>(first + p < a.pixels ? first + p : 0));
  };
  const bool present = first + pixel < a.pixels;
  const int64_t at_image = present ? spot(pixel).image : -1;
  int64_t at_plane[kSteps];
  PYKD_UNROLL for (int i = 0; i < kSteps; ++i) {
    const int p = thread / kSquareLanes + i * kPixels;
    at_plane[i] = first + p < a.pixels ? spot(p).plane + lane : -1;
  }
  int turn = 0;
  for (int64_t group = blockIdx.y; group < a.groups; group += gridDim.y)
    for (int64_t from = static_cast<int64_t>(blockIdx.z) * kSquareLanes; from < a.layout.lanes;
         from += static_cast<int64_t>(gridDim.z) * kSquareLanes, turn ^= 1) {
      auto& square = squares[turn];
      float* const plane = a.planes + group * a.group_stride + from;
      const int64_t batch = group * a.layout.lanes + from + image;  // of this thread's first image
      E* const images = static_cast<E*>(a.images) + batch * a.image_stride + at_image;
      const auto has_image = [&](int i) { return at_image >= 0 && batch + i * kImages < a.batch; };
      float pixels[kSteps] = {};
      if constexpr (kPack) {
        PYKD_UNROLL for (int i = 0; i < kSteps; ++i) {
          if (has_image(i)) pixels[i] = widen(images[i * kImages * a.image_stride]);
        }
        PYKD_UNROLL for (int i = 0; i < kSteps; ++i) square[image + i * kImages][pixel] = pixels[i];
      } else {
        PYKD_UNROLL for (int i = 0; i < kSteps; ++i) {
          if (at_plane[i] >= 0) pixels[i] = plane[at_plane[i]];
        }
        PYKD_UNROLL for (int i = 0; i < kSteps; ++i) square[lane][thread / kSquareLanes + i * kPixels] = pixels[i];
      }
      __syncthreads();
      PYKD_UNROLL for (int i = 0; i < kSteps; ++i) {
        if (kPack && at_plane[i] >= 0) plane[at_plane[i]] = square[lane][thread / kSquareLanes + i * kPixels];
        if (!kPack && has_image(i)) narrow(square[image + i * kImages][pixel], images[i * kImages * a.image_stride]);
      }
    }
}

// Planes to planes, E of lanes an entry: neighbouring threads take neighbouring lanes, then pixels.
template <typename E>
__global__ void __launch_bounds__(kThreads) repack(RepackPlanes a, int64_t groups, uint32_t entries) {
  constexpr int kLanes = sizeof(E) / sizeof(float);
  const auto lanes = static_cast<uint32_t>(a.layout.lanes / kLanes);
  Spot spots[kAlone];
  PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kAlone + i) * blockDim.x + threadIdx.x;
    const uint32_t entry = at < entries ? static_cast<uint32_t>(at) : 0, pixel = entry / lanes;
    const Spot spot = packed(a.layout, {a.input.channel_stride, a.input.row_stride, a.layout.lanes}, pixel);
    const uint32_t lane = (entry - pixel * lanes) * kLanes;
    spots[i] = {at < entries && spot.image >= 0 ? spot.image + lane : -1, spot.plane + lane};
  }
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    const float* const from = a.input.data + group * a.input.group_stride;
    float* const to = a.planes + group * a.layout.group_stride();
    E values[kAlone] = {};
    PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
      if (spots[i].image >= 0) values[i] = *reinterpret_cast<const E*>(from + spots[i].image);
    }
    PYKD_UNROLL for (int i = 0; i < kAlone; ++i) {
      if (spots[i].image >= 0) *reinterpret_cast<E*>(to + spots[i].plane) = values[i];
    }
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------

int64_t divided(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// Blocks side by side first, then as many over groups and lanes as keep the card busy.
dim3 grid_of(int64_t across, int64_t groups, int64_t lanes) {
  const int64_t y = smaller(groups, divided(kBusy, across * lanes));
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(smaller(y, kMostAcross)),
              static_cast<unsigned>(smaller(lanes, kMostAcross)));
}

// Of a block whose threads have kAlone of so many each.
unsigned threads_for(int64_t entries) {
  return static_cast<unsigned>(smaller(kThreads, divided(entries, 32 * kAlone) * 32));
}

template <typename E, bool kPack>
CudaStatus launch(const Move& a, CUstream_st* stream) {
  if (a.batch == 0 || a.pixels == 0) return cudaSuccess;
  if (a.layout.lanes == 1) {
    const unsigned threads = threads_for(a.pixels);
    const dim3 grid = grid_of(divided(a.pixels, threads * kAlone), a.groups, 1);
    PYKD_LAUNCH(grid, threads, 0, stream, alone<E, kPack>)(a);
  } else {
    const dim3 grid = grid_of(divided(a.pixels, kSquarePixels), a.groups, divided(a.layout.lanes, kSquareLanes));
    PYKD_LAUNCH(grid, kSquareThreads, 0, stream, squares<E, kPack>)(a);
  }
  return cudaGetLastError();
}

template <typename E>
CudaStatus launch_repack(const RepackPlanes& a, int64_t groups, CUstream_st* stream) {
  const int64_t entries =
      a.layout.group_stride() * static_cast<int64_t>(sizeof(float)) / static_cast<int64_t>(sizeof(E));
  if (groups == 0 || entries == 0) return cudaSuccess;
  const unsigned threads = threads_for(entries);
  const dim3 grid = grid_of(divided(entries, threads * kAlone), groups, 1);
  PYKD_LAUNCH(grid, threads, 0, stream, repack<E>)(a, groups, static_cast<uint32_t>(entries));
  return cudaGetLastError();
}

template <bool kPack>
CudaStatus move(void* images, float* planes, int64_t batch, const PlaneLayout& l, DType dtype, CUstream_st* stream) {
  const int64_t image = l.channels * l.vertical.length * l.horizontal.length;
  const Move a{images,
               planes,
               batch,
               l.groups(batch),
               l,
               image,
               l.group_stride(),
               static_cast<uint32_t>(kPack ? l.group_stride() / l.lanes : image)};
  switch (dtype) {
    case DType::kFloat16: return launch<__half, kPack>(a, stream);
    case DType::kBFloat16: return launch<__nv_bfloat16, kPack>(a, stream);
    default: return launch<float, kPack>(a, stream);
  }
}

}  // namespace
}  // namespace pykd::cuda

namespace pykd {

CudaStatus pack_planes_cuda(const PackPlanes& a, CUstream_st* stream) {
  return cuda::move<true>(const_cast<void*>(a.images), a.planes, a.batch, a.layout, a.dtype, stream);
}

CudaStatus unpack_planes_cuda(const UnpackPlanes& a, CUstream_st* stream) {
  return cuda::move<false>(a.images, const_cast<float*>(a.planes), a.batch, a.layout, a.dtype, stream);
}

CudaStatus repack_planes_cuda(const RepackPlanes& a, int64_t groups, CUstream_st* stream) {
  int64_t all = a.layout.lanes | a.input.group_stride | a.input.channel_stride | a.input.row_stride;
  for (const float* pointer : {static_cast<const float*>(a.input.data), static_cast<const float*>(a.planes)})
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) / sizeof(float));
  return all % 4 == 0 ? cuda::launch_repack<uint4>(a, groups, stream) : cuda::launch_repack<float>(a, groups, stream);
}

}  // namespace pykd
