// Images that go through planes (core/planes.h) on the CPU: packed, worked on, unpacked.
#pragma once

#include <algorithm>
#include <tuple>

#include "kernels/planes/planes.h"
#include "torch/sparse.h"

namespace pykd::glue {

// Offsets of a kernel into the planes of an image are int32.
inline void check_planes(const char* op, const PlaneLayout& planes, const at::Tensor& input) {
  PYKD_CHECK(planes.group_stride() <= kMostEntries, op, ": an image must have less than 2^31 pixels in all channels, ",
             "with padding, got ", input.sizes());
}

// From images to images. Where the results lie as the kernel writes them there is nothing to unpack.
struct Pipeline {
  PackPlanes pack;
  UnpackPlanes unpack;
  bool unpacks;
  int64_t numbers;  // int32 beside the planes, for the kernel

  // run(batch, planes, results, tile_begin, tile_end, numbers) computes that many images; before that fill(numbers) is
  // called once.
  template <typename Fill, typename Run>
  void through(const SparseTiles& weight, int64_t tasks, const Fill& fill, const Run& run) const {
    const int64_t groups = pack.layout.groups(pack.batch);
    const bool whole = by_units(groups, tasks);
    const int64_t slots = whole ? tasks : groups;  // groups that have memory at one time
    const int64_t planes = pack.layout.group_stride(), results = unpacks ? unpack.layout.group_stride() : 0;
    const at::Tensor scratch = at::empty({slots * (planes + results) + kPlaneSlack + numbers}, at::kFloat);
    float* const first = scratch.mutable_data_ptr<float>() + slots * results;
    int32_t* const beside = reinterpret_cast<int32_t*>(first + slots * planes + kPlaneSlack);
    fill(beside);
    // The stages for `count` groups from `group` on, whose memory begins at `slot`.
    const auto stages = [&](int64_t group, int64_t slot) {
      PackPlanes in = pack;
      in.batch -= group * in.layout.lanes;
      in.images = static_cast<const char*>(in.images) + group * group_bytes(in.layout);
      in.planes = first + slot * planes;
      UnpackPlanes out = unpack;
      out.batch -= group * out.layout.lanes;
      out.images = static_cast<char*>(out.images) + group * group_bytes(out.layout);
      float* const at = unpacks ? first - (slots - slot) * results : static_cast<float*>(out.images);
      out.planes = at;
      return std::tuple(in, out, at);
    };
    if (whole) {
      const int64_t each = (groups + tasks - 1) / tasks;
      const auto serve = [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          for (int64_t group = task * each; group < std::min(groups, (task + 1) * each); ++group) {
            const auto [in, out, at] = stages(group, task);
            pack_planes_cpu(in, 0, in.layout.channels);
            run(std::min(in.batch, in.layout.lanes), in.planes, at, 0, weight.tiles, beside);
            if (unpacks) unpack_planes_cpu(out, 0, out.layout.channels);
          }
      };
      return tasks == 1 ? serve(0, 1) : at::parallel_for(0, tasks, 1, serve);
    }
    const auto [in, out, at] = stages(0, 0);
    at::parallel_for(0, groups * in.layout.channels, 1,
                     [&](int64_t begin, int64_t end) { pack_planes_cpu(in, begin, end); });
    share_tiles(weight, tasks, [&](int64_t begin, int64_t end) { run(in.batch, in.planes, at, begin, end, beside); });
    if (unpacks)
      at::parallel_for(0, groups * out.layout.channels, 1,
                       [&](int64_t begin, int64_t end) { unpack_planes_cpu(out, begin, end); });
  }

 private:
  int64_t group_bytes(const PlaneLayout& l) const {
    const int64_t item = pack.dtype == DType::kFloat32 ? 4 : 2;
    return l.lanes * l.channels * l.vertical.length * l.horizontal.length * item;
  }
};

}  // namespace pykd::glue
