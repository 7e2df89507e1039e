// A matrix of packed codes in the portable form, decoded row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"

namespace dybit {

struct CodedTable {
  const float* values;  // [books][2^bits]
  Units units;
  int bits;
  const uint8_t* packed;  // each group starts at a byte
  PerUnit<float> scale;
  PerUnit<uint8_t> choice;
  std::vector<ValueRuns> runs;  // [books], or empty

  int64_t row_bytes() const;
};

// out: [rows][columns]
void decode_rows(const CodedTable& table, float* out, int threads);
// out: [columns]
void decode_row(const CodedTable& table, int64_t row, float* out);

}  // namespace dybit
