// Convolutions with one channel per group: products are summed channel by channel, in FP32, exactly.
#pragma once

#include <vector>

#include "conv.h"

namespace dybit {

class Depthwise {
 public:
  // significands: [kernel positions][channels]. Sums of their products with inputs must stay below 2^24. scales:
  // [channels].
  Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry, const InputFormat& input);

  // As Conv::run.
  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;
  bool run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
           const Finish& finish, int threads) const;

 private:
  struct Source;
  class Band;
  bool run_bands(const Source& source, const std::vector<float>& bias, const Finish& finish, int threads) const;
  std::vector<float> biases(const float* bias, const float* offset) const;

  ConvGeometry geometry_;
  InputFormat input_;
  int padded_channels_;
  std::vector<float> weights_, scales_, sums_;
};

}  // namespace dybit
