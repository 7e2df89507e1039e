// Keys and values of a cache as codes: vectors of 16 numbers in groups that share a scale and perhaps an offset.
//
// A block holds the codes of its vectors, then the scales of its groups, then the offsets if there are any. Eight vectors
// are an octet of 16 · bits bytes, in planes: byte i has the bits of element i of several vectors, the lowest ones first.
//
//   4 bits  bytes   0 …  63   two vectors a byte      if bits is 4 to 7
//   2 bits  the next 32       four vectors a byte     if bits is 2, 3, 6 or 7
//   1 bit   the next 16       eight vectors a byte    if bits is odd
//
// At 8 bits a byte is a code; at 16 two bytes are a number in BF16. Scales and offsets are BF16. The lowest two bits of a
// scale choose the book of its group if there are several. number = level(code) · scale + offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dybit {

// How a side of a cache (keys or values) is held once a page is full.
struct CacheFormat {
  static constexpr int kFloat = 32, kHalf = 16, kMaxBooks = 4, kMaxKnees = 4;

  int bits = kFloat;             // kFloat, kHalf (BF16), or 2 to 8
  int levels = 0;                // of a book
  std::vector<float> books;      // [books][levels], ascending
  std::vector<float> reaches;    // factors of the scale that makes the largest number the largest level; the best is taken
  bool centred = false;          // an offset: the middle of the smallest and the largest number

  // Derived from the above.
  std::vector<float> table;       // up to 4 bits: [books][16], levels by code, repeated
  std::vector<float> thresholds;  // [books][levels - 1]: the code is the number of those that are not above
  float middle = 0;               // from 5 bits on: a level is t + Σ slope · (t − clamp(t, ±knee)), t = code − middle
  int knees = 0;
  float knee[kMaxKnees], slope[kMaxKnees];

  CacheFormat() = default;
  // Throws std::invalid_argument if numbers do not fit each other, or if more than 16 levels are not piecewise linear with
  // at most kMaxKnees knees, symmetric, and 1 apart in the middle.
  CacheFormat(int bits, std::vector<std::vector<float>> books, std::vector<float> reaches, bool centred);

  bool coded() const { return bits <= 8; }
  int book_count() const { return levels ? int(books.size()) / levels : 0; }
};

// The numbers of a head in a page.
struct CacheBlock {
  int vectors;  // of 16 numbers
  int group;    // vectors that share a scale: 1, 2, 4 or 8

  int padded() const { return (vectors + 7) / 8 * 8; }
  int groups() const { return vectors / group; }
  size_t code_bytes(int bits) const { return size_t(padded()) * 2 * bits; }
  size_t bytes(const CacheFormat& format, int bits) const {
    const size_t all = code_bytes(bits) + (bits > 8 ? 0 : size_t(groups()) * (format.centred ? 4 : 2));
    return (all + 63) / 64 * 64;  // the last vector of scales may reach beyond: a page ends with 64 bytes more
  }
};

}  // namespace dybit
