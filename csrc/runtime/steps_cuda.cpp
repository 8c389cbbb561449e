#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <variant>

#include "core/cuda.h"
#include "runtime/cuda.h"
#include "runtime/engine.h"
#include "runtime/program.h"

namespace pykd::runtime {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not found again
  if (error == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

constexpr int kDevice = 0;  // the first one that CUDA_VISIBLE_DEVICES lets through

template <auto kFree>
struct Freed {
  template <typename T>
  void operator()(T* each) const {
    kFree(each);
  }
};
using Stream = std::unique_ptr<CUstream_st, Freed<cudaStreamDestroy>>;
using Graph = std::unique_ptr<CUgraph_st, Freed<cudaGraphDestroy>>;
using Executable = std::unique_ptr<CUgraphExec_st, Freed<cudaGraphExecDestroy>>;

std::shared_ptr<char> device_memory(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<size_t>(bytes, 1)));
  return {static_cast<char*>(memory), Freed<cudaFree>()};
}

CudaStatus enqueue(const SparseLinear& work, int64_t, cudaStream_t stream) { return sparse_linear_cuda(work, stream); }
CudaStatus enqueue(const PackPlanes& work, int64_t, cudaStream_t stream) { return pack_planes_cuda(work, stream); }
CudaStatus enqueue(const UnpackPlanes& work, int64_t, cudaStream_t stream) { return unpack_planes_cuda(work, stream); }
#define PYKD_ENQUEUE(Work, enqueued) \
  CudaStatus enqueue(const Work& work, int64_t groups, cudaStream_t stream) { return enqueued(work, groups, stream); }
PYKD_ENQUEUE(SparseConv2d, sparse_conv2d_cuda)
PYKD_ENQUEUE(Pool2d, pool2d_cuda)
PYKD_ENQUEUE(Elementwise, elementwise_cuda)
PYKD_ENQUEUE(Softmax, softmax_cuda)
PYKD_ENQUEUE(RepackPlanes, repack_planes_cuda)
#undef PYKD_ENQUEUE

void enqueue(const Step& step, int64_t groups, cudaStream_t stream) {
  std::visit([&](const auto& work) { check(static_cast<cudaError_t>(enqueue(work, groups, stream))); }, step.work);
}

// While this lives, the thread's device is the one that plans use, whatever else the thread does with CUDA.
class OnDevice {
 public:
  OnDevice() {
    check(cudaGetDevice(&before_));
    if (before_ != kDevice) check(cudaSetDevice(kDevice));
  }
  ~OnDevice() {
    if (before_ != kDevice) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = kDevice;
};

// What lies in page-locked memory: the processor's address and the device's.
struct Pinned {
  explicit Pinned(int64_t floats, bool mapped) {
    void *memory = nullptr, *seen = nullptr;
    const size_t size = static_cast<size_t>(floats) * sizeof(float);
    check(cudaHostAlloc(&memory, std::max<size_t>(size, 1), mapped ? cudaHostAllocMapped : cudaHostAllocDefault));
    host.reset(static_cast<float*>(memory));
    bytes = size;
    if (mapped) {
      check(cudaHostGetDevicePointer(&seen, memory, 0));
    } else {
      copy = device_memory(size);
      seen = copy.get();
    }
    device = static_cast<float*>(seen);
  }

  std::unique_ptr<float, Freed<cudaFreeHost>> host;
  std::shared_ptr<char> copy;  // where the device does not share the processor's memory
  float* device;
  size_t bytes;
};

// The weights of a network on the device.
struct Weights : DeviceWeights {
  std::mutex mutex;
  std::map<std::tuple<int, Form, bool>, std::weak_ptr<const DeviceTiles>> tiles;
};

bool shares_memory() {
  int integrated = 0, maps = 0;
  check(cudaDeviceGetAttribute(&integrated, cudaDevAttrIntegrated, kDevice));
  check(cudaDeviceGetAttribute(&maps, cudaDevAttrCanMapHostMemory, kDevice));
  return integrated && maps;
}

Stream new_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Stream(stream);
}

class Steps final : public CudaSteps {
 public:
  Steps(int64_t inputs, int64_t outputs)
      : mapped_(shares_memory()), stream_(new_stream()), input_(inputs, mapped_), output_(outputs, mapped_) {}

  std::shared_ptr<char> memory(size_t bytes) override {
    const OnDevice here;
    std::shared_ptr<char> memory = device_memory(bytes);
    check(cudaMemsetAsync(memory.get(), 0, bytes, stream_.get()));
    check(cudaStreamSynchronize(stream_.get()));
    return memory;
  }

  const void* copied(const void* from, size_t bytes) override {
    const OnDevice here;
    copies_.push_back(on_device(from, bytes));
    return copies_.back().get();
  }

  std::shared_ptr<const DeviceTiles> tiles(const Network& network, int op, const Form& form, bool rowwise) override {
    const OnDevice here;
    auto& weights = static_cast<Weights&>(network.on_device([] { return std::make_shared<Weights>(); }));
    const std::scoped_lock lock(weights.mutex);
    std::weak_ptr<const DeviceTiles>& kept = weights.tiles[{op, form, rowwise}];
    if (auto known = kept.lock()) return known;
    const auto packed = network.packed(op, form);
    const PackedSparse& head = packed->head();
    const PackedSparse::Set& set = head.halves.tiles ? head.halves : rowwise ? head.rowwise : head.panels;
    SparseTiles tiles = tiles_of(&head, set);
    // The set's parts lie one after another; nothing of the others is copied.
    const char* const begin = packed->bytes.get() + set.starts;
    const int64_t value = tiles.halves ? sizeof *tiles.halves : sizeof *tiles.values;
    const int64_t size = set.values - set.starts + (tiles.runs * tiles.width * tiles.height + kTileSlack) * value;
    auto made = std::make_shared<DeviceTiles>(on_device(begin, static_cast<size_t>(size)), tiles, size);
    const auto move = [&](auto*& pointer) {
      using Pointer = std::remove_reference_t<decltype(pointer)>;
      if (pointer)
        pointer = reinterpret_cast<Pointer>(made->bytes.get() + (reinterpret_cast<const char*>(pointer) - begin));
    };
    move(made->tiles.starts);
    move(made->tiles.outputs);
    move(made->tiles.columns);
    move(made->tiles.values);
    move(made->tiles.halves);
    kept = made;
    return made;
  }

  const float* input() const override { return input_.device; }
  float* output() const override { return output_.device; }

  void prepare(const std::vector<Step>& steps, int64_t groups) override {
    if (graph_) return;
    const OnDevice here;
    repeated_.clear();
    for (const Step& step : steps) enqueue(step, groups, stream_.get());  // loads the kernels, which no capture may
    check(cudaStreamSynchronize(stream_.get()));
    graph_ = captured([&] {
      if (!mapped_) copy(input_.device, input_.host.get(), input_.bytes, cudaMemcpyHostToDevice);
      for (const Step& step : steps) enqueue(step, groups, stream_.get());
      if (!mapped_) copy(output_.host.get(), output_.device, output_.bytes, cudaMemcpyDeviceToHost);
    });
  }

  void run(const std::vector<Step>& steps, int64_t groups, const float* input, float* output) override {
    prepare(steps, groups);
    const OnDevice here;
    std::memcpy(input_.host.get(), input, input_.bytes);
    check(cudaGraphLaunch(graph_.get(), stream_.get()));
    check(cudaStreamSynchronize(stream_.get()));
    std::memcpy(output, output_.host.get(), output_.bytes);
  }

  void changed() override { graph_.reset(); }

  void repeat(const Step& step, int64_t groups, int repeats, const std::shared_ptr<const void>& held) override {
    const OnDevice here;
    auto& [graph, weight] = repeated_[{&step, held.get()}];
    if (!graph) {
      enqueue(step, groups, stream_.get());
      check(cudaStreamSynchronize(stream_.get()));
      weight = held;
      graph = captured([&] {
        for (int i = 0; i < kRounds; ++i) enqueue(step, groups, stream_.get());
      });
    }
    for (int i = 0; i < repeats; ++i) check(cudaGraphLaunch(graph.get(), stream_.get()));
    check(cudaStreamSynchronize(stream_.get()));
  }

 private:
  void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()));
  }

  std::shared_ptr<char> on_device(const void* from, size_t bytes) {
    std::shared_ptr<char> memory = device_memory(bytes);
    copy(memory.get(), from, bytes, cudaMemcpyHostToDevice);
    check(cudaStreamSynchronize(stream_.get()));
    return memory;
  }

  template <typename Work>
  Executable captured(const Work& work) {
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    std::exception_ptr thrown;
    try {
      work();
    } catch (...) {
      thrown = std::current_exception();  // the capture is to end all the same
    }
    cudaGraph_t recorded = nullptr;
    const cudaError_t error = cudaStreamEndCapture(stream_.get(), &recorded);
    const Graph graph(recorded);
    if (thrown) std::rethrow_exception(thrown);
    check(error);
    cudaGraphExec_t made = nullptr;
    check(cudaGraphInstantiate(&made, graph.get(), 0));
    return Executable(made);
  }

  bool mapped_;
  Stream stream_;
  Pinned input_, output_;
  std::vector<std::shared_ptr<char>> copies_;
  Executable graph_;
  std::map<std::pair<const Step*, const void*>, std::pair<Executable, std::shared_ptr<const void>>> repeated_;
};

}  // namespace

CudaDevice cuda_device() {
  int count = 0, driver = 0, runtime = 0;
  cudaDeviceProp found{};
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA finds no device here") +
                             (error == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(error)));
  }
  check(cudaGetDeviceProperties(&found, kDevice));
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  return {found.name,
          found.major,
          found.minor,
          driver,
          runtime,
          found.multiProcessorCount,
          static_cast<int64_t>(found.totalGlobalMem),
          found.integrated != 0};
}

std::unique_ptr<CudaSteps> cuda_steps(int64_t inputs, int64_t outputs) {
  cuda_device();
  const OnDevice here;
  return std::make_unique<Steps>(inputs, outputs);
}

}  // namespace pykd::runtime
