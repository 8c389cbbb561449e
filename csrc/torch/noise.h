// The noise arguments that several ops share: their rules, and their packing for the kernels.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <optional>

#include "core/noise.h"
#include "torch/check.h"

namespace pykd::glue {

// The noise of an op with several teachers, as a schema, as types, and as a list of values.
#define PYKD_NOISE_SCHEMA "float sigma, float alpha, bool per_sample, bool additive, int n_teachers, int row_offset"
#define PYKD_NOISE_TYPES double, double, bool, bool, int64_t, int64_t
#define PYKD_NOISE_SPREAD(n) (n).sigma, (n).alpha, (n).per_sample, (n).additive, (n).n_teachers, (n).row_offset

// In the order of the schema; passed and saved as one.
struct NoiseOptions {
  double sigma;
  double alpha;
  bool per_sample;
  bool additive;
  int64_t n_teachers;
  int64_t row_offset;

  bool active() const { return sigma > 0 && alpha > 0; }
};

inline void check_noise(const char* op, const NoiseOptions& noise, const std::optional<at::Tensor>& seed,
                        const at::Tensor& logits, const char* argument = "logits") {
  PYKD_CHECK(noise.sigma >= 0 && std::isfinite(noise.sigma), op, ": sigma must be finite and >= 0, got ", noise.sigma);
  PYKD_CHECK(noise.alpha >= 0 && noise.alpha <= 1, op, ": alpha must be in [0, 1], got ", noise.alpha);
  PYKD_CHECK(noise.n_teachers >= 1 && noise.n_teachers <= std::numeric_limits<int32_t>::max(), op,
             ": n_teachers must be in [1, 2^31 - 1], got ", noise.n_teachers);
  PYKD_CHECK(noise.row_offset >= 0 && noise.row_offset <= int64_t{1} << 62, op,
             ": row_offset must be in [0, 2^62], got ", noise.row_offset);
  if (!noise.active()) return;
  PYKD_CHECK(seed.has_value() && seed->defined(), op, ": noise needs a seed");
  PYKD_CHECK_TYPE(seed->scalar_type() == at::kLong, op, ": seed must be int64, got ", seed->scalar_type());
  PYKD_CHECK(seed->sym_numel() == 1, op, ": seed must hold one value, got shape ", seed->sym_sizes());
  PYKD_CHECK_TYPE(seed->device() == logits.device(), op, ": seed must be on the device of ", argument, ", ",
                  logits.device(), ", got ", seed->device());
}

// Without a host synchronisation; a CUDA graph draws anew at each replay.
inline void draw_seed(std::optional<at::Tensor>& seed, const std::optional<at::Generator>& generator,
                      const NoiseOptions& noise, const at::Tensor& logits) {
  if (!seed && noise.active()) seed = at::empty({}, logits.options().dtype(at::kLong)).random_(generator);
}

inline Noise pack_noise(const NoiseOptions& noise, const std::optional<at::Tensor>& seed) {
  const bool active = noise.active();
  return {active ? noise.sigma : 0.0,
          static_cast<uint64_t>(std::nearbyint(noise.alpha * 4294967296.0)),
          active ? seed->const_data_ptr<int64_t>() : nullptr,
          noise.row_offset,
          noise.n_teachers,
          noise.per_sample,
          noise.additive};
}

}  // namespace pykd::glue
