// What the engine asks of CUDA's runtime beside launches, on the CPU: memory, streams, and graphs that are captured and
// launched. A device that shares its memory with the processor, or one that does not, as a test chooses.
//
// What a stream is given is done at once, unless the stream is captured. Under AddressSanitizer the host may not touch
// the device's memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2;

struct CUstream_st {
  bool captured = false;
  std::vector<std::function<void()>> work{};
};
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
using cudaStream_t = CUstream_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;

namespace pykd::emulation {

// The device, and what it may be asked to do.
struct Device {
  bool present = true;
  bool integrated = true;
  size_t memory = size_t{1} << 30;
  int fails_after = -1;                // calls that may fail until one does; -1: none does
  std::atomic<unsigned> launches = 0;  // of kernels, so far
  size_t used = 0;
  std::map<char*, size_t> blocks{};
  std::recursive_mutex mutex{};  // plans of several threads

  static Device& get() {
    static Device device;
    return device;
  }

  static int& current() {  // the thread's device, of two; the other one does nothing
    static thread_local int current = 0;
    return current;
  }
  static cudaError_t& last() {  // of the calling thread
    thread_local cudaError_t error = cudaSuccess;
    return error;
  }
  cudaError_t failed(cudaError_t error) { return last() = error; }
  bool fails() {
    if (current() != 0) return true;
    if (fails_after < 0) return false;
    return fails_after-- == 0;
  }
  void forbid([[maybe_unused]] bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
    for (const auto& [begin, size] : blocks)
      forbidden ? __asan_poison_memory_region(begin, size) : __asan_unpoison_memory_region(begin, size);
#endif
  }
};

// While the device works: the host's threads take turns.
class Working {
 public:
  Working() : lock_(Device::get().mutex) {
    if (depth()++ == 0) Device::get().forbid(false);
  }
  ~Working() {
    if (--depth() == 0) Device::get().forbid(true);
  }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  static int& depth() {
    static int depth = 0;
    return depth;
  }
  std::lock_guard<std::recursive_mutex> lock_;
};

// Now, or when the graph that the stream is captured for is launched.
inline void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream && stream->captured) {
    stream->work.push_back(std::move(work));
    return;
  }
  const Working working;
  work();
}

}  // namespace pykd::emulation

// ---- errors and devices --------------------------------------------------------------------------------------------

inline cudaError_t cudaGetLastError() { return std::exchange(pykd::emulation::Device::last(), cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "invalid argument" : "no error";
}

inline constexpr int kMultiprocessors = 132;         // of an H200: what tests call large keeps it busy
inline constexpr int kSharedMemoryOptin = 64 << 10;  // the least that a card on sale lets a block ask for
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrIntegrated,
  cudaDevAttrCanMapHostMemory
};
struct cudaDeviceProp {
  char name[256] = "emulated device";
  int major = 8, minor = 7, multiProcessorCount = kMultiprocessors, integrated = 0;
  size_t totalGlobalMem = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDeviceCount(int* count) {
  pykd::emulation::Device& device = pykd::emulation::Device::get();
  *count = device.present;
  return device.present ? cudaSuccess : device.failed(cudaErrorInvalidValue);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = pykd::emulation::Device::current();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  pykd::emulation::Device::current() = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedMemoryOptin; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    default: *value = pykd::emulation::Device::get().integrated;
  }
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const pykd::emulation::Device& device = pykd::emulation::Device::get();
  properties->integrated = device.integrated;
  properties->totalGlobalMem = device.memory;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

// ---- memory --------------------------------------------------------------------------------------------------------

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocMapped = 2;

inline cudaError_t cudaMalloc(void** to, size_t size) {
  pykd::emulation::Device& device = pykd::emulation::Device::get();
  const pykd::emulation::Working working;
  if (device.fails() || size > device.memory - device.used) return device.failed(cudaErrorMemoryAllocation);
  char* const block = static_cast<char*>(std::aligned_alloc(256, (size + 255) / 256 * 256));
  std::memset(block, 0xA5, size);
  device.blocks[block] = size;
  device.used += size;
  *to = block;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* block) {
  pykd::emulation::Device& device = pykd::emulation::Device::get();
  const pykd::emulation::Working working;
  const auto at = device.blocks.find(static_cast<char*>(block));
  if (at == device.blocks.end()) return block ? device.failed(cudaErrorInvalidValue) : cudaSuccess;
  device.used -= at->second;
  device.blocks.erase(at);
  std::free(block);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** to, size_t size, unsigned) {
  if (pykd::emulation::Device::get().fails()) return pykd::emulation::Device::get().failed(cudaErrorMemoryAllocation);
  *to = std::malloc(size);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* block) {
  std::free(block);
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** to, void* block, unsigned) {
  *to = block;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  if (pykd::emulation::Device::get().fails()) return pykd::emulation::Device::get().failed(cudaErrorInvalidValue);
  pykd::emulation::enqueue(stream, [=] { std::memcpy(to, from, size); });
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  pykd::emulation::enqueue(stream, [=] { std::memset(to, value, size); });
  return cudaSuccess;
}

// ---- streams and graphs --------------------------------------------------------------------------------------------

inline constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return pykd::emulation::Device::get().fails() ? pykd::emulation::Device::get().failed(cudaErrorInvalidValue)
                                                : cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->captured = true;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->captured = false;
  *graph = new CUgraph_st{std::exchange(stream->work, {})};
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  if (pykd::emulation::Device::get().fails()) return pykd::emulation::Device::get().failed(cudaErrorMemoryAllocation);
  *made = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (pykd::emulation::Device::get().fails()) return pykd::emulation::Device::get().failed(cudaErrorInvalidValue);
  for (const auto& each : graph->work) pykd::emulation::enqueue(stream, each);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
