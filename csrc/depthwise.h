// Convolutions with one channel per group: products of significands are summed channel by channel, as integers.
#pragma once

#include <vector>

#include "conv.h"

namespace dybit {

class Depthwise {
 public:
  // significands: [kernel positions][channels], integers of 16 bits. Sums of their products with inputs must stay below
  // 2^24. scales: [channels].
  Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry, const InputFormat& input);

  // As Conv::run.
  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;
  bool run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
           const Finish& finish, int threads) const;

 private:
  struct Steps;
  Image image() const;  // of FP32 inputs, without memory
  bool run_some(const ConvInput& input, float* y, const float* bias, int threads) const;
  class Lines;
  bool run_lines(const Image& image, int batch, const Extent& size, const float* scales, const std::vector<float>& bias,
                 const Finish& finish, int threads) const;
  std::vector<float> biases(const float* bias, const float* offset) const;

  ConvGeometry geometry_;
  InputFormat input_;
  int padded_channels_;  // 16 at least
  std::vector<int16_t> weights_;
  std::vector<int8_t> bytes_;  // the same; empty if one does not fit
  std::vector<float> scales_, sums_;
  std::vector<double> most_;  // the largest sum that a channel can have
};

}  // namespace dybit
