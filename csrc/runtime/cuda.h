// CUDA's part of a program: the device's memory, the weights on it, and the graph of the steps. What fails throws
// std::runtime_error, memory that is not there std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/forms.h"

namespace pykd::runtime {

struct Step;

// Tiles in the device's memory, which live as long as anyone holds `bytes`.
struct DeviceTiles {
  std::shared_ptr<const char> bytes;
  SparseTiles tiles;
  int64_t size;
};

class CudaSteps {
 public:
  static constexpr int kRounds = 16;  // of repeat()

  virtual ~CudaSteps() = default;

  virtual std::shared_ptr<char> memory(size_t bytes) = 0;  // zeros
  // A copy of what lies at `from`, as long as this lives.
  virtual const void* copied(const void* from, size_t bytes) = 0;
  // A weight's tiles, which plans of one network share.
  virtual std::shared_ptr<const DeviceTiles> tiles(const Network& network, int op, const Form& form, bool rowwise) = 0;

  // Where the steps find a call's rows and leave its answers, for the device.
  virtual const float* input() const = 0;
  virtual float* output() const = 0;

  // Makes a graph of the steps, unless there is one of them; changed() tells that there is none.
  virtual void prepare(const std::vector<Step>& steps, int64_t groups) = 0;
  virtual void changed() = 0;
  // All steps on other rows, prepared.
  virtual void run(const std::vector<Step>& steps, int64_t groups, const float* input, float* output) = 0;
  // One step kRounds times as often; its weight is `held`.
  virtual void repeat(const Step& step, int64_t groups, int repeats, const std::shared_ptr<const void>& held) = 0;
};

// Of a program whose calls read and write so many floats. Throws as cuda_device() does.
std::unique_ptr<CudaSteps> cuda_steps(int64_t inputs, int64_t outputs);

}  // namespace pykd::runtime
