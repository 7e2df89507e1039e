// Rows of a table of codes, by index.
#pragma once

#include <cstdint>

#include "coded_table.h"

namespace dybit {

// out: [count][columns], rows of a table [rows][columns]. Returns false if an index is not a row.
bool look_up(const float* table, int64_t rows, int64_t columns, const int64_t* index, int64_t count, float* out,
             int threads);

enum class Bag : int { kSum = 0, kMean, kMax };

// out: [count][columns]. Returns false if an index is not a row.
bool look_up(const CodedTable& table, const int64_t* index, int64_t count, float* out, int threads);

// Bag b has the indices from starts[b] to starts[b + 1], or `length` indices if starts is null. out: [bags][columns],
// summed in order; zero for an empty bag. Returns false if an index is not a row or a start is out of order.
bool look_up_bags(const CodedTable& table, const int64_t* index, int64_t count, const int64_t* starts, int64_t length,
                  int64_t bags, Bag kind, float* out, int threads);

}  // namespace dybit
