// Transposed convolutions: every place of the inputs is multiplied by the whole kernel, and the results are added where
// they overlap.
#pragma once

#include <vector>

#include "conv.h"

namespace dybit {

class ConvTransposed {
 public:
  // One weight for each group: rows by kernel position, then by output; columns are the channels of the group. `before`
  // of the geometry: outputs that are cut off. The weights must outlive this object.
  ConvTransposed(std::vector<const PackedWeight*> weights, const ConvGeometry& geometry);

  // y: [batch][places][outputs], or planar as the input. Sums are added in FP32: places in order, then kernel positions.
  // Returns false and leaves y unfinished if a dynamic scale is not finite.
  bool run(const ConvInput& input, const Extent& places, float* y, const float* bias, int threads) const;

 private:
  struct Sample;
  void add_kernel(const Sample& sample, const Extent& place, const float* from, int group) const;
  void add_group(const Sample& sample, int group, int threads) const;
  int outputs() const { return weights_[0]->weight().rows / int(volume(geometry_.kernel)); }  // of a group

  std::vector<const PackedWeight*> weights_;
  ConvGeometry geometry_;
};

}  // namespace dybit
