// Weights unpacked once for products with rows that are found by their addresses (panel_kernels.h).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "packed_weight.h"
#include "panel_kernels.h"

namespace dybit {

// A word of 4 bytes of the inputs of a row, and the columns of the weight that it is multiplied with.
struct Word {
  static constexpr int kNone = -1;

  int segment;
  int32_t line, at;            // where it lies: bytes from the start of a line of the inputs
  std::array<int, 4> columns;  // two if significands are wide; kNone: times zero
};

class PanelWeight {
 public:
  // The words of a segment follow each other. The weight must outlive this object.
  PanelWeight(const PackedWeight& packed, const std::vector<Word>& words, const PanelKernels& kernels);

  const Panels& panels() const { return panels_; }

 private:
  void unpack(const std::vector<Word>& words, int unit);

  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  Panels panels_{};
  std::vector<int32_t> segment_words_, starts_;
  std::vector<Line> memory_;
};

}  // namespace dybit
