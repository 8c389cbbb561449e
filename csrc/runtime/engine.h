// The engine: a model file loaded, planned for one batch size and one number of threads, and run.
//
//   const auto network = pykd::runtime::load("student.pykd.safetensors");
//   pykd::runtime::Plan plan(network, {.batch = 1});
//   plan.run(image, answer);
//
// A plan owns all memory it needs: run() allocates nothing, on the CPU throws nothing, and takes no lock that another
// plan holds.
// Any number of plans of one network, one for each thread, may run at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/model_file.h"

namespace pykd::runtime {

// A loaded file: it never changes. The forms in which plans hold its weights are shared among them.
class Network;
std::shared_ptr<const Network> load(const char* path);                         // throws FormatError
std::shared_ptr<const Network> load(const unsigned char* bytes, size_t size);  // throws FormatError
std::shared_ptr<const Network> load(Model model);                              // as the reader gives it, checked
const Model& model(const Network& network);
const std::vector<int64_t>& output_shape(const Network& network);  // of one row

constexpr int64_t kMostRows = 65'536;
constexpr int kMostThreads = 256;

enum class Device { kCpu, kCuda };
enum class Precision { kFloat32, kFloat16, kBFloat16 };

struct PlanOptions {
  int64_t batch = 1;    // rows a run takes, 1 to kMostRows
  int threads = 1;      // 1 to kMostThreads; 1 starts none, as CUDA always does
  bool measure = true;  // times each layer's forms on this machine; otherwise a model of their costs decides
  std::string cache{};  // the file that remembers what was measured; empty: none
  int64_t lanes = 0;    // images side by side: 1 or a multiple of vector_lanes() (on CUDA 16) up to 64; 0: the planner
                        // decides
  Device device = Device::kCpu;
  Precision precision = Precision::kFloat32;  // on CUDA: of what tensor cores multiply, in blocks of 16 rows and an
                                              // even number of columns; their sums and all else are float32
  bool dense = false;                         // every weight lies dense, for a comparison
};

// The device that plans on CUDA use: the first one that CUDA_VISIBLE_DEVICES lets through.
struct CudaDevice {
  std::string name;
  int major, minor;     // compute capability
  int driver, runtime;  // CUDA's versions, 12060 for 12.6
  int multiprocessors;
  int64_t memory;   // bytes
  bool integrated;  // shares its memory with the processor
};
CudaDevice cuda_device();  // throws std::runtime_error, which says why there is none

// What a plan took for a layer.
struct Choice {
  int op;            // the step in Model::ops
  std::string form;  // "pairs" (unstructured), "sparse 16x16", "dense": how the weight lies
  double us;         // microseconds of the layer for the whole batch, measured, or estimated where nothing was
};

// For one batch size, used by one thread at a time.
//
// Its answers differ from exact arithmetic by the rounding of float32 sums. Where an input is not finite, a zero of the
// weight times it is 0 or NaN, depending on the form. What the planner takes changes them no further; without
// measuring, or from the same cache, the same file, options and processor give the same bits.
class Plan {
 public:
  // Throws std::invalid_argument where an option is out of range or the memory needed would exceed 2^40 bytes, and
  // std::bad_alloc, and on CUDA std::runtime_error where there is no device or it fails. Measuring takes from some
  // milliseconds to a few seconds; the cache is read and, after measuring, replaced as a whole; what cannot be read or
  // written there is as if it were not there.
  Plan(std::shared_ptr<const Network> network, const PlanOptions& options);
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  // [batch, *input_shape] to [batch, *output shape], row-major, without holes; they may not overlap. Throws
  // std::runtime_error where the CUDA device fails.
  void run(const float* input, float* output);
  // Pixels of 0 to 255 as the file's mean and std say; only where the file has them.
  void run(const uint8_t* pixels, float* output);

  std::vector<Choice> choices() const;
  int64_t workspace_bytes() const;  // what runs write to
  int64_t weight_bytes() const;     // the layers' weights in the forms taken; plans of one network share a form
  int64_t lanes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pykd::runtime
