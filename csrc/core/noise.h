// What every op that perturbs the teacher's logits is told about the noise (Sau & Balasubramanian 2016).
#pragma once

#include <cstdint>

namespace pykd {

// noise[r,c] = sigma / n_teachers * sum_k s[r,k] * xi[r,c,k],   s ~ Bernoulli(alpha),   xi ~ N(0, 1)
struct Noise {
  double sigma;         // >= 0; 0 means no noise, and seed may be null
  uint64_t threshold;   // round(alpha * 2^32): a row is selected where its 32-bit word lies below
  const int64_t* seed;  // one value, on the device of the logits
  int64_t row_offset;   // global index of row 0, >= 0
  int64_t n_teachers;   // 1 <= n_teachers < 2^31
  bool per_sample;      // one xi a row instead of one a logit
  bool additive;        // target = teacher + noise instead of teacher + teacher * noise
};

}  // namespace pykd
