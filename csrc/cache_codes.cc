#include "cache_codes.h"

#include <algorithm>
#include <stdexcept>

namespace dybit {
namespace {

// Finds the knees of levels that are 1 apart in the middle.
void find_knees(CacheFormat& format) {
  const std::vector<float>& level = format.books;
  format.middle = float(format.levels - 1) / 2;
  const int first = format.levels / 2;  // the smallest positive level, or the one after zero
  float step = 1;
  for (int i = first; i + 1 < format.levels; ++i) {
    const float next = level[i + 1] - level[i];
    if (next == step) continue;
    if (format.knees == CacheFormat::kMaxKnees)
      throw std::invalid_argument("more than 16 levels must be piecewise linear with at most 4 knees");
    format.knee[format.knees] = float(i) - format.middle;
    format.slope[format.knees++] = next - step;
    step = next;
  }
  for (int i = 0; i < format.levels; ++i) {
    const float t = float(i) - format.middle;
    float value = t;
    for (int k = 0; k < format.knees; ++k)
      value += format.slope[k] * (t - std::clamp(t, -format.knee[k], format.knee[k]));
    if (value != level[i]) throw std::invalid_argument("more than 16 levels must be symmetric, and 1 apart in the middle");
  }
}

}  // namespace

CacheFormat::CacheFormat(int bits, std::vector<std::vector<float>> given, std::vector<float> reaches, bool centred)
    : bits(bits), reaches(std::move(reaches)), centred(centred) {
  if (bits == kFloat || bits == kHalf) return;
  const int count = int(given.size());
  if (bits < 2 || bits > 8 || count < 1 || count > kMaxBooks || this->reaches.empty())
    throw std::invalid_argument("a cache needs 2 to 8 bits, 1 to 4 books and a reach");
  levels = int(given[0].size());
  if (levels < 2 || levels > 1 << bits) throw std::invalid_argument("a book has 2 to 2^bits levels");
  for (const std::vector<float>& book : given) {
    if (int(book.size()) != levels || book.front() >= 0 || book.back() <= 0 ||
        !std::is_sorted(book.begin(), book.end(), std::less_equal<float>()))
      throw std::invalid_argument("books have the same number of levels, which ascend from below to above zero");
    books.insert(books.end(), book.begin(), book.end());
    for (int i = 0; i + 1 < levels; ++i) thresholds.push_back((book[i] + book[i + 1]) / 2);
    for (int i = 0; bits <= 4 && i < 16; ++i) table.push_back(book[std::min(i % (1 << bits), levels - 1)]);
  }
  if (bits <= 4) return;
  if (count > 1) throw std::invalid_argument("more than 16 levels are one book");
  find_knees(*this);
}

}  // namespace dybit
