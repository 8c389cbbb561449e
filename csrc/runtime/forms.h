// How a layer's weight may lie, what each form costs, and the packed buffers that plans share.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/sparse_tiles.h"
#include "runtime/model_file.h"

namespace pykd::runtime {

// Blocks of the weight's matrix; those without a value other than 0 are left out.
struct Form {
  int64_t rows = 1, columns = 1;   // columns 0: the matrix's own
  DType values = DType::kFloat32;  // of two bytes: rounded, for CUDA's tensor cores
  auto operator<=>(const Form&) const = default;
};

std::string name(const Form& form);  // "pairs", "sparse 16x16", "dense float16"

constexpr int64_t kCudaLanes = 16;  // images side by side on CUDA: 1, or a multiple of

// Memory that begins with a cache line.
struct AlignedDelete {
  void operator()(char* bytes) const noexcept { ::operator delete[](bytes, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<char[], AlignedDelete>;
inline AlignedBytes aligned_bytes(size_t size) {
  return AlignedBytes(static_cast<char*>(::operator new[](size, std::align_val_t{64})));
}

// A weight in one form.
struct Packed {
  AlignedBytes bytes;
  const PackedSparse& head() const { return *reinterpret_cast<const PackedSparse*>(bytes.get()); }
};

// A form of a layer's weight, and how many blocks it has.
struct FormCount {
  Form form;
  int64_t blocks;
};

// What a network has on a device, of which CUDA's part of the engine knows more.
struct DeviceWeights {
  virtual ~DeviceWeights() = default;
};

class Network {
 public:
  explicit Network(Model model);

  const Model& model() const { return model_; }
  const std::vector<int64_t>& shape(int value) const {  // of a value's row: 0 is the input, k the result of step k
    return value ? model_.ops[static_cast<size_t>(value - 1)].shape : model_.input_shape;
  }
  // The forms that may be taken for a step's weight, the file's own first.
  const std::vector<FormCount>& forms(int op) const { return forms_[static_cast<size_t>(op)]; }
  std::shared_ptr<const Packed> packed(int op, const Form& form) const;  // made once, while anyone holds it
  // What make() made the first time.
  template <typename Make>
  DeviceWeights& on_device(const Make& make) const {
    const std::scoped_lock lock(mutex_);
    if (!on_device_) on_device_ = make();
    return *on_device_;
  }
  uint64_t fingerprint() const { return fingerprint_; }  // of the steps and their weights

 private:
  Model model_;
  std::vector<std::vector<FormCount>> forms_;
  uint64_t fingerprint_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int, Form>, std::weak_ptr<const Packed>> packed_;
  mutable std::shared_ptr<DeviceWeights> on_device_;
};

// A layer for the cost model: how often its weight is applied to a vector.
struct LayerCost {
  int64_t rows, columns;  // of the weight's matrix
  int64_t lanes;
  int64_t batch;                       // of a linear layer
  int64_t out_height, out_width, row;  // of a convolution: the output, and the input's row, in pixels; else 0
};

double seconds(const FormCount& count, const LayerCost& layer);  // estimated, on one thread

}  // namespace pykd::runtime
