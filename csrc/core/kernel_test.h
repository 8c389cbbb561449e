// What the C++ tests of the kernels share: counts of what passed, memory that a device reaches, the definition of noise
// in scalar double, buffers between sentinels, the pairs of dtypes.
//
// PYKD_CARD: the kernels are those that nvcc compiled, and run on a card (cmake/card.cmake).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/cpu_isa.h"
#include "core/dtype.h"
#include "core/noise.h"

#if defined(PYKD_CARD)
#include <cuda_runtime.h>
#else
#include "emulation/cuda_runtime.h"
#endif

// The kernels of the levels, which the door of a room chooses from: their declarations, in the global namespace; and
// run<kernel> of those that this processor runs, each with its name, added to a vector.
#if defined(__x86_64__)
#define PYKD_DECLARE_LEVELS(function, parameters) \
  namespace pykd::baseline {                      \
  void function parameters;                       \
  }                                               \
  namespace pykd::avx2 {                          \
  void function parameters;                       \
  }                                               \
  namespace pykd::avx512 {                        \
  void function parameters;                       \
  }
#define PYKD_ADD_LEVELS(kernels, run, function)                                                       \
  kernels.push_back({"baseline", run<pykd::baseline::function>});                                     \
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx2) kernels.push_back({"avx2", run<pykd::avx2::function>}); \
  if (pykd::cpu_isa() >= pykd::CpuIsa::kAvx512) kernels.push_back({"avx512", run<pykd::avx512::function>})
#else
#define PYKD_DECLARE_LEVELS(function, parameters)
#define PYKD_ADD_LEVELS(kernels, run, function)
#endif

namespace pykd::testing {

// Slow to run, so that what is large is left out.
#if defined(__SANITIZE_THREAD__) || defined(PYKD_EMULATED)
constexpr bool kSlow = true;
#else
constexpr bool kSlow = false;
#endif

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  (ok ? passed : failed)++;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// What main returns.
inline int report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

// A case's name, from its fields.
inline std::string described(std::initializer_list<std::pair<const char*, double>> fields) {
  std::string name;
  for (const auto& [what, value] : fields) {
    char text[64];
    std::snprintf(text, sizeof text, " %s %.12g", what, value);
    name += text;
  }
  return name;
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Blocks of a card's memory to use again, by their exact size: a new one costs more than most kernels.
inline std::map<size_t, std::vector<void*>>& free_blocks() {
  static std::map<size_t, std::vector<void*>> blocks;
  return blocks;
}

// Allocates what the host and the device reach at the same address. Whatever a kernel is given pointers to lies there.
template <typename T>
struct Mapped {
  using value_type = T;

  Mapped() = default;
  template <typename Other>
  Mapped(const Mapped<Other>&) {}

  T* allocate(size_t count) {
    // Read when CUDA starts: a launch waits for its kernel, and tells what the kernel did wrong.
    static const int blocking [[maybe_unused]] = setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
    std::vector<void*>& kept = free_blocks()[count * sizeof(T)];
    void* memory = nullptr;
    if (!kept.empty()) {
      memory = kept.back();
      kept.pop_back();
    } else if (const cudaError_t error = cudaHostAlloc(&memory, count * sizeof(T), cudaHostAllocMapped)) {
      std::printf("no memory that a device reaches: %s\n", cudaGetErrorString(error));
      std::exit(1);
    }
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, [[maybe_unused]] size_t count) {
#if defined(PYKD_CARD)
    free_blocks()[count * sizeof(T)].push_back(memory);
#else
    cudaFreeHost(memory);
#endif
  }
  bool operator==(const Mapped&) const = default;
};

template <typename T>
using Vector = std::vector<T, Mapped<T>>;

// Whether a call launches one kernel. A card does not count them.
template <typename Call>
bool launches_once(const Call& call) {
#if defined(PYKD_CARD)
  call();
  return true;
#else
  const unsigned before = emulation::Device::get().launches;
  call();
  return emulation::Device::get().launches == before + 1;
#endif
}

// ---- noise by its definition ---------------------------------------------------------------------------------------

// Where every test's seed lies.
inline const int64_t* seed() {
  static const Vector<int64_t> value = {-0x123456789ABCDEF};
  return value.data();
}

using Words = std::array<uint32_t, 4>;

inline Words philox(Words counter, uint64_t seed) {
  std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * counter[0], p1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

inline Words draw(uint64_t seed, uint64_t row, uint64_t index, uint32_t stream) {
  return philox({static_cast<uint32_t>(index), stream, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)},
                seed);
}

inline std::array<double, 2> normals(uint32_t word) {
  const double pi = std::acos(-1.0);
  const double uniform = (2.0 * (word >> 12) + 1) / (1 << 21), sign = word >> 11 & 1 ? -1 : 1;
  const double angle = (2.0 * (word & 0x7FF) - 2047) / 2048 * pi / 2, radius = std::sqrt(-2 * std::log(uniform));
  return {sign * radius * std::cos(angle), sign * radius * std::sin(angle)};
}

struct RowNoise {
  bool selected = false;  // by any teacher
  std::vector<double> noise;
};

inline RowNoise noise_of(const Noise& n, int64_t row, int64_t classes) {
  RowNoise result{false, std::vector<double>(static_cast<size_t>(classes))};
  if (n.sigma == 0) return result;
  const uint64_t seed = static_cast<uint64_t>(*n.seed), global = static_cast<uint64_t>(n.row_offset + row);
  for (uint32_t k = 0; k < n.n_teachers; ++k) {
    const Words whole = draw(seed, global, 0, k | 1u << 31);
    if (whole[0] >= n.threshold) continue;
    result.selected = true;
    for (int64_t c = 0; c < classes; ++c) {
      const uint32_t word =
          n.per_sample ? whole[1] : draw(seed, global, static_cast<uint64_t>(c / 8), k)[static_cast<size_t>(c % 8 / 2)];
      const size_t which = n.per_sample ? 0 : static_cast<size_t>(c % 2);
      result.noise[static_cast<size_t>(c)] += n.sigma / static_cast<double>(n.n_teachers) * normals(word)[which];
    }
  }
  return result;
}

// ---- buffers -------------------------------------------------------------------------------------------------------

inline size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Elements of one dtype between sentinels; filled with ones, which is a NaN. Under a sanitizer of memory nothing lies
// behind them, so that it sees a read beyond the end, too.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, int64_t offset = 0)
      : dtype(dtype),
        begin(kSentinel + static_cast<size_t>(offset) * size_of(dtype)),
        end(begin + static_cast<size_t>(count) * size_of(dtype)),
        bytes(end + kBehind, kMark) {
    std::memset(data(), 0xFF, end - begin);
  }

  unsigned char* data() { return bytes.data() + begin; }
  bool operator==(const Buffer& other) const { return bytes == other.bytes; }

  double get(int64_t i) const {
    const unsigned char* from = bytes.data() + begin + static_cast<size_t>(i) * size_of(dtype);
    const auto as = [from]<typename T>(T value) {
      std::memcpy(&value, from, sizeof value);
      return value;
    };
    switch (dtype) {
      case DType::kFloat64: return as(double{});
      case DType::kFloat32: return static_cast<double>(as(float{}));
      case DType::kFloat16: return static_cast<double>(as(Half{}));
      case DType::kBFloat16: break;
    }
    return static_cast<double>(__builtin_bit_cast(float, static_cast<uint32_t>(as(uint16_t{})) << 16));
  }

  void set(int64_t i, double value) {  // bfloat16: towards zero
    const auto as = [&](auto rounded) {
      std::memcpy(data() + static_cast<size_t>(i) * size_of(dtype), &rounded, sizeof rounded);
    };
    switch (dtype) {
      case DType::kFloat64: return as(value);
      case DType::kFloat32: return as(static_cast<float>(value));
      case DType::kFloat16: return as(static_cast<Half>(value));
      case DType::kBFloat16: break;
    }
    as(static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(value)) >> 16));
  }

  bool intact() const {
    const auto marked = [](unsigned char byte) { return byte == kMark; };
    return std::all_of(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(begin), marked) &&
           std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(end), bytes.end(), marked);
  }

 private:
#if defined(__SANITIZE_ADDRESS__) || defined(PYKD_CARD)
  static constexpr size_t kSentinel = 64, kBehind = 0;
#else
  static constexpr size_t kSentinel = 64, kBehind = kSentinel;
#endif
  static constexpr unsigned char kMark = 0xA5;
  DType dtype;
  size_t begin, end;
  Vector<unsigned char> bytes;
};

// ---- dtypes --------------------------------------------------------------------------------------------------------

// Unit roundoff of a value kept as dtype.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0x1p-53;
    case DType::kFloat32: return 0x1p-24;
    case DType::kFloat16: return 0x1p-11;
    case DType::kBFloat16: break;
  }
  return 0x1p-8;
}

inline DType loss_dtype_of(DType student) { return student == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

inline const std::array<std::array<DType, 2>, 10> kDTypes = {{{DType::kFloat32, DType::kFloat32},
                                                              {DType::kFloat64, DType::kFloat64},
                                                              {DType::kFloat16, DType::kFloat16},
                                                              {DType::kBFloat16, DType::kBFloat16},
                                                              {DType::kFloat32, DType::kFloat16},
                                                              {DType::kFloat32, DType::kBFloat16},
                                                              {DType::kFloat16, DType::kFloat32},
                                                              {DType::kFloat16, DType::kBFloat16},
                                                              {DType::kBFloat16, DType::kFloat32},
                                                              {DType::kBFloat16, DType::kFloat16}}};

}  // namespace pykd::testing
