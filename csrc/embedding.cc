#include "embedding.h"

#include <algorithm>
#include <functional>

#include "pool.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 1 << 15;  // elements that do not pay for a second thread
constexpr int64_t kPiece = 1 << 14;   // elements that a thread decodes at a time
constexpr int kAhead = 4;             // rows that are fetched before they are decoded

bool all_rows(int64_t rows, const int64_t* index, int64_t count) {
  return std::all_of(index, index + count, [&](int64_t row) { return row >= 0 && row < rows; });
}

void fetch(const CodedTable& table, int64_t row) {
#if defined(__GNUC__)
  const int64_t bytes = table.row_bytes();
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(table.packed + row * bytes + i);
#else
  (void)table, (void)row;
#endif
}

// Calls work(first, last) for pieces of `count` things of so many elements each.
void in_pieces(int64_t count, int64_t elements, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(elements, 1));
  parallel_for(int((count + step - 1) / step), count * elements < kLittle ? 1 : threads,
               [&](int i) { work(i * step, std::min(count, (i + 1) * step)); });
}

void add_row(Bag kind, const float* row, int64_t columns, float* out) {
  if (kind == Bag::kMax)
    for (int64_t i = 0; i < columns; ++i) out[i] = row[i] > out[i] ? row[i] : out[i];
  else
    for (int64_t i = 0; i < columns; ++i) out[i] += row[i];
}

}  // namespace

bool look_up(const float* table, int64_t rows, int64_t columns, const int64_t* index, int64_t count, float* out,
             int threads) {
  if (!all_rows(rows, index, count)) return false;
  in_pieces(count, columns, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::copy_n(table + index[i] * columns, columns, out + i * columns);
  });
  return true;
}

bool look_up(const CodedTable& table, const int64_t* index, int64_t count, float* out, int threads) {
  if (!all_rows(table.units.rows, index, count)) return false;
  const int64_t columns = table.units.columns;
  in_pieces(count, columns, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i + kAhead < last) fetch(table, index[i + kAhead]);
      decode_row(table, index[i], out + i * columns);
    }
  });
  return true;
}

bool look_up_bags(const CodedTable& table, const int64_t* index, int64_t count, const int64_t* starts, int64_t length,
                  int64_t bags, Bag kind, float* out, int threads) {
  auto start = [&](int64_t bag) { return !starts ? bag * length : bag < bags ? starts[bag] : count; };
  for (int64_t bag = 0; bag < bags; ++bag)
    if (start(bag) < 0 || start(bag) > start(bag + 1)) return false;
  if (bags && (start(0) != 0 || start(bags) > count)) return false;
  if (!all_rows(table.units.rows, index, count)) return false;
  const int64_t columns = table.units.columns, elements = bags ? (count + bags - 1) / bags * columns : 0;
  in_pieces(bags, elements, threads, [&](int64_t first, int64_t last) {
    static thread_local Scratch row_memory;
    auto* row = row_memory.take<float>(columns);
    for (int64_t bag = first; bag < last; ++bag) {
      float* sum = out + bag * columns;
      const int64_t from = start(bag), to = start(bag + 1);
      if (from == to) std::fill_n(sum, columns, 0.0f);
      for (int64_t i = from; i < to; ++i) {
        if (i + kAhead < to) fetch(table, index[i + kAhead]);
        decode_row(table, index[i], i == from ? sum : row);
        if (i > from) add_row(kind, row, columns, sum);
      }
      if (kind == Bag::kMean && to > from)
        for (int64_t i = 0; i < columns; ++i) sum[i] /= float(to - from);
    }
  });
  return true;
}

}  // namespace dybit
