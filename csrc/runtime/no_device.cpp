// What stands in for steps_cuda.cpp where the engine is built without CUDA.
#include <stdexcept>

#include "runtime/cuda.h"
#include "runtime/engine.h"

#if !PYKD_WITH_CUDA
namespace pykd::runtime {

CudaDevice cuda_device() { throw std::runtime_error("this engine is built without CUDA: " PYKD_CUDA_REASON); }

std::unique_ptr<CudaSteps> cuda_steps(int64_t, int64_t) {
  cuda_device();
  return nullptr;
}

}  // namespace pykd::runtime
#endif
