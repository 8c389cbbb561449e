// A network as a list of kernel calls on planes of one number of lanes, and the memory in between.
#pragma once

#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "kernels/elementwise/elementwise.h"
#include "kernels/planes/planes.h"
#include "kernels/pool2d/pool2d.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/sparse_linear/sparse_linear.h"
#include "runtime/cuda.h"
#include "runtime/engine.h"
#include "runtime/forms.h"
#include "runtime/thread_pool.h"

namespace pykd::runtime {

struct Step {
  int op;  // of the model; -1: moves the input or the output
  std::variant<SparseLinear, SparseConv2d, Pool2d, Elementwise, Softmax, PackPlanes, UnpackPlanes, RepackPlanes> work;
  int64_t units = 1;    // of a group, which threads may share; layers are shared by tiles or rows
  bool shared = false;  // among the threads
  LayerCost cost{};     // of a layer, for one call

  bool is_layer() const { return work.index() < 2; }
};

// A layer's weight as a program reads it.
struct LayerWeight {
  Form form{};
  std::shared_ptr<const Packed> packed{};
  std::shared_ptr<const std::vector<int32_t>> places{};  // of a convolution's pairs, in place of their columns
  std::shared_ptr<const DeviceTiles> on_device{};        // on CUDA, in place of both
};

// A batch goes through the whole network a few groups at a time, so that what lies in between stays in the caches.
// Where there are enough groups, each thread has a program of its own and takes such parts of the batch alone;
// otherwise the threads share the steps. On CUDA the whole batch is one part.
class Program {
 public:
  // Its layers have no weights yet. Throws std::invalid_argument where the network is too large, std::bad_alloc, and as
  // cuda_device() does.
  Program(std::shared_ptr<const Network> network, int64_t lanes, int64_t batch, int threads,
          Device device = Device::kCpu);

  int64_t rows() const { return rows_; }  // of a call, at most
  bool apart() const { return apart_; }   // each thread is to have a program
  int64_t lanes() const { return lanes_; }

  // [rows, *input shape] to [rows, *output shape]. pool: of the threads that share steps, or null. Throws on CUDA
  // alone, where rows are rows().
  void run(const float* input, float* output, int64_t rows, ThreadPool* pool);

  // So that run() allocates nothing, once the layers have their weights.
  void prepare();

  // For the planner.
  std::vector<Step>& steps() { return steps_; }
  void repeat(size_t step, int repeats, ThreadPool* pool) const;  // on rows(); each time counts rounds() times
  int rounds() const { return cuda_ ? CudaSteps::kRounds : 1; }
  LayerWeight weight(size_t step, const Form& form) const;  // of a layer
  void take(size_t step, LayerWeight weight);
  const LayerWeight& weight(size_t step) const { return weights_[step]; }  // that is taken

  int64_t workspace_bytes() const { return static_cast<int64_t>(floats_ * sizeof(float)); }
  int64_t weight_bytes() const;

 private:
  class Builder;

  void bind(const float* input, float* output);
  void run(const Step& step, int64_t rows, ThreadPool* pool) const noexcept;  // on the CPU

  std::shared_ptr<const Network> network_;
  int64_t lanes_, rows_ = 0;
  bool apart_ = false;
  size_t floats_ = 0;                // of memory_
  std::unique_ptr<CudaSteps> cuda_;  // null: the CPU
  std::shared_ptr<char> memory_;
  std::vector<Step> steps_;
  std::vector<std::vector<int32_t>> offsets_;  // of convolutions
  std::vector<const int32_t*> offsets_of_;     // each step
  std::vector<LayerWeight> weights_;           // of each step
  std::vector<void*> inputs_, outputs_;        // addresses of the pointers to the caller's memory
  std::vector<int64_t*> batches_;              // the numbers of rows in the steps
  int64_t batch_ = 0;                          // that they hold
};

}  // namespace pykd::runtime
