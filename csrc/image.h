// Images: activations as significands, between convolutions that stay in integers.
//
// Tensors are channels-last: [batch][depth][height][width][channels]. Planar ones are [batch][channels][depth][height]
// [width].
#pragma once

#include <cstdint>
#include <optional>

#include "elementwise.h"
#include "extent.h"
#include "kernels.h"

namespace dybit {

// Significands with a border: [batch][before + size + after][pitch]. Each place holds `channels` significands, then
// zeros. Places of the border hold the significand of 0.
struct Image {
  uint8_t* data;
  InputKind kind;
  Extent before, after;
  int channels, pitch;

  int element() const { return element_bytes(kind); }
  int64_t pixel() const { return int64_t(pitch) * element(); }  // bytes of a place
  Extent padded(const Extent& size) const { return padded_by(before, size, after); }
};

// The end of a convolution: sums are added to the addend, clamped, and returned as FP32, as an image, or both.
struct Finish {
  float* y = nullptr;             // [batch][places][channels], or null
  const float* addend = nullptr;  // [batch][places][channels], or null
  float low, high;
  const Image* image = nullptr;  // or null
  Rounding rounding{};           // of the image; static
  bool planar = false;           // y is; for plain results only
  // Of the sums, without addend and limits; one that keeps 0.
  std::optional<Unary> activation{};

  // FP32 results as they are.
  static Finish plain(float* y, bool planar = false);
  bool is_plain() const;
};

// Writes the border of an image whose numbers are rounded like this.
void fill_border(const Image& image, int batch, const Extent& size, const Rounding& rounding);

// Rounds x, FP32 [batch][size][channels] or planar, to an image. Returns false if there is NaN.
bool round_to_image(const float* x, int batch, const Extent& size, const Rounding* rounding, bool by_sample,
                    const Image& image, int threads, bool planar = false);

// Results of a convolution that are to be finished: some channels of the places from `start` on.
struct Results {
  const float* data;  // [rows][stride]
  int64_t stride;
  bool padded;  // zeros follow the channels up to a multiple of 16
  int64_t start;
  int rows;
  int first, last;  // channels
};

// Stores results of a convolution with `channels` channels in all in a planar tensor.
void store_planar(const Results& results, const Extent& places, int channels, float* y);

// Where the places from `start` on lie in an image: out[rows].
void find_places(const Image& image, const Extent& size, int64_t start, int rows, uint8_t** out);

// Finishes results of a convolution with `channels` channels in all. Returns whether a result that is rounded is NaN.
bool finish_some(const CodeKernels& codes, const Finish& finish, const Extent& places, int channels,
                 const Results& results);

}  // namespace dybit
