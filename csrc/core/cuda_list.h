// A list of tensors, all done by one launch: their descriptors lie in the kernel's parameters, which every thread reads
// at the cost of a constant. Included after core/cuda.h.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pykd::PYKD_ISA {

// Item i has the thread blocks first[i], ... before first[i + 1].
template <typename Item>
struct List {
  static constexpr int kMost = 4000 / (sizeof(Item) + sizeof(unsigned));  // a launch's parameters may have 4 KB
  unsigned first[kMost + 1] = {};
  Item item[kMost];
  int count = 0;

  bool is_full() const { return count == kMost; }
  void add(const Item& one, unsigned blocks) {
    item[count] = one;
    first[count + 1] = first[count] + blocks;
    ++count;
  }
  unsigned blocks() const { return first[count]; }

  __device__ int of_block(unsigned block) const {
    int begin = 0, end = count;
    while (end - begin > 1) {
      const int middle = (begin + end) / 2;
      (first[middle] <= block ? begin : end) = middle;
    }
    return begin;
  }
};

}  // namespace pykd::PYKD_ISA
