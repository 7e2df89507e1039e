#include "image.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "codes.h"
#include "conv_tasks.h"
#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 50000;   // elements that do not pay for a second thread
constexpr int64_t kStep = 1 << 14;   // elements that a thread rounds at a time
constexpr int64_t kTurned = 1 << 16;  // if they are turned: long lines are read
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

Finish Finish::plain(float* y, bool planar) {
  Finish finish{y, nullptr, -kInfinity, kInfinity};
  finish.planar = planar;
  return finish;
}

bool Finish::is_plain() const {
  return !addend && !image && !activation && low == -kInfinity && high == kInfinity;
}

void fill_border(const Image& image, int batch, const Extent& size, const Rounding& rounding) {
  if (!any(image.before) && !any(image.after)) return;
  uint8_t code[2 * kLanes] = {};  // more than one: kernels may write whole registers
  if (rounding.offset != 0) {
    const Image single{code, image.kind, {}, {}, 1, 1};
    const float zero = 0;
    Finish finish = Finish::plain(nullptr);
    finish.image = &single;
    finish.rounding = rounding;
    finish_some(*kernels().codes, finish, {1, 1, 1}, 1, {&zero, 1, false, 0, 1, 0, 1});
  }
  auto fill = [&](uint8_t* to, size_t bytes) {
    if (image.element() == 1 || rounding.offset == 0)
      std::memset(to, code[0], bytes);
    else
      for (size_t i = 0; i < bytes; ++i) to[i] = code[i % 2];
  };
  const Extent padded = image.padded(size);
  const size_t pixel = size_t(image.pixel()), line = pixel * padded[2];
  uint8_t* to = image.data;
  for (int i = 0; i < batch * padded[0] * padded[1]; ++i, to += line) {
    const int d = i / padded[1] % padded[0] - image.before[0], h = i % padded[1] - image.before[1];
    if (d < 0 || d >= size[0] || h < 0 || h >= size[1]) {
      fill(to, line);
    } else {
      fill(to, pixel * image.before[2]);
      fill(to + line - pixel * image.after[2], pixel * image.after[2]);
    }
  }
}

void find_places(const Image& image, const Extent& size, int64_t start, int rows, uint8_t** out) {
  const Extent padded = image.padded(size);
  Cursor cursor(start, size);
  auto place = [&] {
    const Extent& p = cursor.place;
    const Extent inner{p[0] + image.before[0], p[1] + image.before[1], p[2] + image.before[2]};
    return image.data + index_of(inner, cursor.sample, padded) * image.pixel();
  };
  uint8_t* at = place();
  for (int row = 0; row < rows; ++row) {
    out[row] = at;
    at = cursor.advance(1, size) ? place() : at + image.pixel();
  }
}

void store_planar(const Results& results, const Extent& places, int channels, float* y) {
  const int64_t all = volume(places), stride = results.stride;
  const float* from = results.data;
  for (int row = 0, count; row < results.rows; row += count, from += count * stride) {
    const int64_t sample = (results.start + row) / all, place = (results.start + row) % all;
    count = int(std::min<int64_t>(results.rows - row, all - place));
    kernels().rows->transpose(from, stride, count, results.last - results.first,
                              y + (sample * channels + results.first) * all + place, all);
  }
}

bool finish_some(const CodeKernels& codes, const Finish& finish, const Extent& places, int channels,
                 const Results& results) {
  const Image* image = finish.image;
  const int first = results.first, last = results.last, rows = results.rows;
  const int64_t at = results.start * channels + first;
  FinishTask task{results.data,
                  results.stride,
                  results.padded,
                  finish.addend ? finish.addend + at : nullptr,
                  finish.y ? finish.y + at : nullptr,
                  channels,
                  finish.low,
                  finish.high,
                  &finish.rounding,
                  image ? image->kind : InputKind::kUnsigned8,
                  nullptr,
                  last - first,
                  image && last == channels ? image->pitch - first : last - first};
  if (!image) return codes.finish(task, rows);
  Cursor cursor(results.start, places);
  // If nothing lies between the places of a line, they are finished as one row.
  if (image->pitch == channels && results.stride == channels && first == 0 && last == channels) {
    bool unknown = false;
    for (int row = 0, count; row < rows; row += count) {
      count = std::min(rows - row, places[2] - cursor.place[2]);
      uint8_t* to;
      find_places(*image, places, results.start + row, 1, &to);
      task.images = &to;
      task.channels = task.padded = count * channels;
      unknown |= codes.finish(task, 1);
      task.from += int64_t(count) * channels;
      if (task.addend) task.addend += int64_t(count) * channels;
      if (task.y) task.y += int64_t(count) * channels;
      cursor.advance(count, places);
    }
    return unknown;
  }
  static thread_local Scratch target_memory;
  auto** targets = target_memory.take<uint8_t*>(rows);
  find_places(*image, places, results.start, rows, targets);
  for (int row = 0; row < rows; ++row) targets[row] += int64_t(first) * image->element();
  task.images = targets;
  return codes.finish(task, rows);
}

bool round_to_image(const float* x, int batch, const Extent& size, const Rounding* rounding, bool by_sample,
                    const Image& image, int threads, bool planar) {
  const CodeKernels& codes = *kernels().codes;
  const int64_t places = volume(size), channels = image.channels;
  const int64_t at_once = planar ? kTurned : kStep;
  const int64_t step = std::max<int64_t>(1, at_once / channels / kLanes) * kLanes;
  const int steps = int((places + step - 1) / step);
  if (batch) fill_border(image, batch, size, rounding[0]);  // a scale by sample has no offset
  std::atomic<bool> unknown{false};
  parallel_for(batch * steps, places * batch * channels < kLittle ? 1 : threads, [&](int i) {
    const int64_t sample = i / steps, start = i % steps * step;
    const int rows = int(std::min(step, places - start));
    Finish finish = Finish::plain(nullptr);
    finish.image = &image;
    finish.rounding = rounding[by_sample ? sample : 0];
    const int64_t at = sample * places + start;
    const float* from = x + at * channels;
    if (planar && channels > 1) {
      static thread_local Scratch turned_memory;
      auto* turned = turned_memory.take<float>(rows * channels);
      kernels().rows->transpose(x + sample * places * channels + start, places, int(channels), rows, turned, channels);
      from = turned;
    }
    if (finish_some(codes, finish, size, int(channels), {from, channels, false, at, rows, 0, int(channels)}))
      unknown = true;
  });
  return !unknown;
}

}  // namespace dybit
