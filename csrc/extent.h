// Sizes and places in three dimensions: depth, height, width. Convolutions of fewer dimensions have leading ones.
#pragma once

#include <array>
#include <cstdint>

namespace dybit {

using Extent = std::array<int, 3>;

inline int64_t volume(const Extent& extent) { return int64_t(extent[0]) * extent[1] * extent[2]; }

inline bool any(const Extent& extent) { return extent[0] || extent[1] || extent[2]; }

inline Extent minus(const Extent& a, const Extent& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }

// A size with what is added before and after each dimension.
inline Extent padded_by(const Extent& before, const Extent& size, const Extent& after) {
  Extent result;
  for (int d = 0; d < 3; ++d) result[d] = before[d] + size[d] + after[d];
  return result;
}

// The place with an index, in the order of memory.
inline Extent place_at(int64_t index, const Extent& size) {
  return {int(index / size[2] / size[1]), int(index / size[2] % size[1]), int(index % size[2])};
}

// The index of a place of a sample.
inline int64_t index_of(const Extent& place, int64_t sample, const Extent& size) {
  return ((sample * size[0] + place[0]) * size[1] + place[1]) * size[2] + place[2];
}

// Walks over the places of all samples in order.
struct Cursor {
  Extent place;
  int64_t sample;

  Cursor(int64_t index, const Extent& size)
      : place(place_at(index % volume(size), size)), sample(index / volume(size)) {}

  // Moves on within a line, or to the start of the next one. Returns whether a new line starts.
  bool advance(int count, const Extent& size) {
    place[2] += count;
    if (place[2] < size[2]) return false;
    place[2] = 0;
    if (++place[1] == size[1]) {
      place[1] = 0;
      if (++place[0] == size[0]) {
        place[0] = 0;
        ++sample;
      }
    }
    return true;
  }
};

}  // namespace dybit
