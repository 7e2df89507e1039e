// Products of rows of inputs that are found by their addresses with weights that are unpacked once, finished in
// registers. All instruction sets give the bits of weight.h and of CodeKernels::finish.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace dybit {

// A weight unpacked to words of 4 bytes: four significands of 8 bits, or two of 16 bits. Its blocks are cut into units
// that share the words of the inputs.
struct Panels {
  const Weight* weight;
  InputKind kind;
  int unit_count, word_count;    // words of a row
  const int32_t* segment_words;  // [segments]
  const uint8_t* words;          // unit by unit: [word_count][rows of the unit's blocks], 4 bytes each
  const int32_t* starts;         // [blocks][segments][16]: what the sums begin with
  int max_input;                 // largest magnitude; added to signed bytes, and the starts make up for it

  int first_block(int unit) const { return int(int64_t(weight->blocks) * unit / unit_count); }
  const uint8_t* words_at(int block) const { return words + size_t(block) * kBlockRows * 4 * word_count; }
  const int32_t* starts_at(int block, int s) const {
    return starts + (size_t(block) * weight->segment_count + s) * kBlockRows;
  }
};

// Word k of row m lies at `at[m] + shift + offsets[k]`.
struct InputRows {
  int count;
  const uint8_t* const* at;
  int64_t shift;
  const int32_t* offsets;
  const float* scales;  // of each row
};

// What becomes of the sums: y = min(max(sum · scales + bias + addend, low), high), returned as FP32, rounded, or both.
struct Ending {
  const float* bias;    // [blocks · 16]
  const float* addend;  // [rows][stride], or null
  float* y;             // [rows][stride], or null
  int64_t stride;
  float low, high;
  const Rounding* rounding;  // static
  InputKind kind;
  uint8_t* const* images;  // [rows]: the place that significand `first` and the following belong to; or null
  int first;
  int channels, padded;  // of the weight; zeros follow the significands up to `padded`
};

struct PanelKernels {
  int unit_blocks;    // of a unit, at most
  int segment_words;  // the words of a segment are padded to a multiple of these
  // Some units of the weight. Returns whether a result that is rounded is NaN.
  bool (*run)(const Panels&, const InputRows&, const Ending&, int first_unit, int last_unit);
};

}  // namespace dybit
