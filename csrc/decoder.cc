#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "elementwise.h"
#include "norm.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kFewNumbers = 1 << 15;  // for one thread

int64_t width(const Product& product) { return product.weight->weight().rows; }

// Calls work(first, count) for parts of some rows of so many numbers.
template <class F>
void by_rows(int64_t rows, int64_t numbers, int threads, const F& work) {
  const int parts = int(std::clamp<int64_t>(rows * numbers / kFewNumbers, 1, std::min<int64_t>(rows, 4 * threads)));
  parallel_for(parts, threads, [&](int i) {
    const int64_t first = i * rows / parts;
    work(first, (i + 1) * rows / parts - first);
  });
}

// Rows rounded for the products that follow: once for those that share them.
class Rounder {
 public:
  Rounder(const float* x, int64_t stride, int64_t rows, std::vector<uint8_t>& memory, int threads)
      : x_(x), stride_(stride), rows_(rows), memory_(memory), threads_(threads) {}

  // Rows that a norm makes of x + addend, and stores as x, are rounded for the first product on the way.
  void norm(const DecoderNorm& norm, const Product& first, const float* addend, float* sum, float* y) {
    const int columns = first.weight->weight().columns;
    const NormTask task{x_, stride_, addend, stride_, sum, stride_, norm.weight, norm.bias, norm.eps,
                        norm.root_mean_square, norm.weight_shift, columns, y, stride_};
    hold(first);
    dybit::norm(task, first.weight, scale(first), &held_, int(rows_), threads_);
    x_ = y;
  }

  const RoundedRows& rows_for(const Product& product) {
    if (last_ && same(product)) return held_;
    hold(product);
    product.weight->round(x_, stride_, scale(product), held_, threads_);
    return held_;
  }

 private:
  static InputScale scale(const Product& p) { return {p.scale, p.offset, p.reach}; }
  void hold(const Product& product) {
    const size_t needed = product.weight->rounded_bytes(rows_) + 64;
    if (memory_.size() < needed) memory_.resize(needed);
    const auto start = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64;
    held_ = product.weight->rounded(rows_, reinterpret_cast<void*>(start));
    last_ = &product;
  }
  bool same(const Product& p) const {
    const auto equal = [](const float* a, const float* b) { return a == b || (a && b && *a == *b); };
    return last_->weight->shares_rows_with(*p.weight) && last_->reach == p.reach && equal(last_->scale, p.scale) &&
           equal(last_->offset, p.offset);
  }

  const float* x_;
  const int64_t stride_, rows_;
  std::vector<uint8_t>& memory_;
  const int threads_;
  const Product* last_ = nullptr;
  RoundedRows held_{};
};

}  // namespace

struct Decoder::Buffers {
  std::vector<float> h, other, x, update, inputs, attended, gate, up;
  std::vector<uint8_t> rounded;
  std::vector<RotaryTable> rotary;
  std::vector<CacheRows> added;
  std::vector<CacheQueries> asked;
};

Decoder::Decoder(const DecoderSizes& sizes, const EmbeddingTable& tokens, float embedding_scale,
                 const EmbeddingTable& positions, const std::optional<DecoderNorm>& last,
                 const std::optional<Product>& head, float logit_cap)
    : sizes_(sizes), tokens_(tokens), embedding_scale_(embedding_scale), positions_(positions), last_(last),
      head_(head), logit_cap_(logit_cap) {}

Decoder::~Decoder() = default;

void Decoder::add(DecoderLayer layer) {
  const DecoderSizes& s = sizes_;
  const auto fits = [](const Product& p, int64_t columns) { return p.weight->weight().columns == columns; };
  int64_t inputs = 0, gates = 0;
  bool good = fits(layer.out, s.heads * s.head_size) && width(layer.out) == s.hidden;
  for (const Product& p : layer.inputs) good = good && fits(p, s.hidden), inputs += width(p);
  for (const Product& p : layer.gates) good = good && fits(p, s.hidden), gates += width(p);
  good = good && inputs == int64_t(s.heads + 2 * s.kv_heads) * s.head_size && (layer.inputs.size() == 1 ||
         (layer.inputs.size() == 3 && width(layer.inputs[0]) == s.heads * s.head_size &&
          width(layer.inputs[1]) == width(layer.inputs[2])));
  good = good && gates == (layer.gated ? 2 : 1) * s.intermediate && layer.gates.size() <= (layer.gated ? 2 : 1);
  good = good && fits(layer.down, s.intermediate) && width(layer.down) == s.hidden;
  good = good && layer.before_attention && (layer.before_mlp || s.parallel);
  if (!good) throw std::invalid_argument("the weights of a layer do not fit the decoder");
  layers_.push_back(std::move(layer));
}

void Decoder::set_rotary(int index, const RotaryTable& table) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (index >= int(rotary_.size())) rotary_.resize(index + 1);
  rotary_[index] = table;
}

std::unique_ptr<Decoder::Buffers> Decoder::take(int64_t rows) {
  std::unique_ptr<Buffers> taken;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      taken = std::move(idle_.back());
      idle_.pop_back();
    }
    if (!taken) taken = std::make_unique<Buffers>();
    taken->rotary = rotary_;
  }
  const auto fit = [&](std::vector<float>& memory, int64_t columns) {
    const size_t needed = size_t(rows) * columns + 64;  // kernels may read whole registers at the end
    if (memory.size() < needed) memory.resize(needed);
  };
  const DecoderSizes& s = sizes_;
  for (std::vector<float>* memory : {&taken->h, &taken->other, &taken->x, &taken->update}) fit(*memory, s.hidden);
  fit(taken->inputs, int64_t(s.heads + 2 * s.kv_heads) * s.head_size);
  fit(taken->attended, int64_t(s.heads) * s.head_size);
  fit(taken->gate, 2 * int64_t(s.intermediate));
  fit(taken->up, s.intermediate);
  return taken;
}

void Decoder::check(const DecoderInput& input, const std::vector<KVCache*>& caches, const Buffers& buffers) const {
  if (caches.size() != layers_.size()) throw std::invalid_argument("the decoder needs a cache for each layer");
  for (const KVCache* cache : caches) {
    const CacheShape& shape = cache->shape();
    if (cache->sequences() != input.sequences)
      throw std::invalid_argument("the cache holds another number of sequences");
    if (shape.kv_heads != sizes_.kv_heads || shape.key_size != sizes_.head_size || shape.value_size != sizes_.head_size)
      throw std::invalid_argument("the cache holds heads of another size");
  }
  int64_t places = positions_.rows ? positions_.rows : INT64_MAX;
  for (const RotaryTable& table : buffers.rotary) places = std::min(places, table.places);
  for (int64_t i = 0; i < input.sequences * input.rows; ++i) {
    if (input.tokens && (input.tokens[i] < 0 || input.tokens[i] >= tokens_.rows))
      throw std::out_of_range("token " + std::to_string(input.tokens[i]) + " is not among the " +
                              std::to_string(tokens_.rows) + " of the vocabulary");
    const int64_t position = input.positions[i / input.rows * input.positions_stride + i % input.rows];
    if (position < 0 || position >= places)
      throw std::out_of_range("position " + std::to_string(position) + " is not among the " + std::to_string(places) +
                              " of the model");
  }
}

void Decoder::run(const DecoderInput& input, const std::vector<KVCache*>& caches, const DecoderOutput& output,
                  int threads) {
  const int64_t count = std::max<int64_t>(1, sizes_.chunk / std::max(1, input.sequences));
  std::unique_ptr<Buffers> buffers = take(input.sequences * std::min(count, input.rows));
  check(input, caches, *buffers);
  for (int64_t first = 0; first < input.rows; first += count)
    run_chunk(input, first, std::min(count, input.rows - first), caches, output, *buffers, threads);
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(buffers));
}

void Decoder::embed(const DecoderInput& input, int64_t first, int64_t count, float* h, int threads) const {
  const int hidden = sizes_.hidden;
  const auto look_up = [&](const EmbeddingTable& table, int64_t row, float* to) {
    if (table.weight)
      table.weight->dequantize_row(int(row), to);
    else
      std::copy_n(table.values + row * hidden, hidden, to);
  };
  by_rows(input.sequences * count, hidden, threads, [&](int64_t from, int64_t some) {
    static thread_local Scratch place_memory;
    for (int64_t r = from; r < from + some; ++r) {
      const int64_t sequence = r / count, row = first + r % count, index = sequence * input.rows + row;
      float* const to = h + r * hidden;
      if (input.tokens) {
        look_up(tokens_, input.tokens[index], to);
        if (embedding_scale_ != 1.0f)
          for (int i = 0; i < hidden; ++i) to[i] *= embedding_scale_;
      } else {
        std::copy_n(input.embeddings + index * hidden, hidden, to);
      }
      if (!positions_.rows) continue;
      auto* const place = place_memory.take<float>(hidden);
      look_up(positions_, input.positions[sequence * input.positions_stride + row], place);
      for (int i = 0; i < hidden; ++i) to[i] += place[i];
    }
  });
}

// Queries, keys and values of the rows of a chunk, one beside the other or one after the other.
struct Decoder::Heads {
  float *q, *k, *v;
  int64_t q_stride, k_stride;  // of rows; values have that of keys
};

// Norms of each head, and rotary positions.
void Decoder::place_heads(const DecoderLayer& layer, const DecoderInput& input, int64_t first, int64_t count,
                          const Heads& heads, const Buffers& buffers, int threads) const {
  const DecoderSizes& s = sizes_;
  const RowKernels& kernels = *dybit::kernels().rows;
  const auto place = [&](const std::optional<DecoderNorm>& norm, float* x, int number, int64_t position) {
    if (norm)
      kernels.norm({x, s.head_size, nullptr, 0, nullptr, 0, norm->weight, norm->bias, norm->eps,
                    norm->root_mean_square, norm->weight_shift, s.head_size, x, s.head_size},
                   number);
    if (layer.rotary < 0) return;
    const RotaryTable& table = buffers.rotary[layer.rotary];
    const int64_t at = position * s.rotary_pairs;
    kernels.rotate(x, number, s.head_size, table.cosine + at, table.sine + at, s.rotary_pairs);
  };
  if (!layer.queries && !layer.keys && layer.rotary < 0) return;
  by_rows(input.sequences * count, (s.heads + s.kv_heads) * s.head_size, threads, [&](int64_t from, int64_t some) {
    for (int64_t r = from; r < from + some; ++r) {
      const int64_t position = input.positions[r / count * input.positions_stride + first + r % count];
      place(layer.queries, heads.q + r * heads.q_stride, s.heads, position);
      place(layer.keys, heads.k + r * heads.k_stride, s.kv_heads, position);
    }
  });
}

// One layer on h, and `pending`, which is still to be added to it. Both may be replaced by other buffers.
void Decoder::run_layer(const DecoderLayer& layer, const DecoderInput& input, int64_t first, int64_t count,
                        KVCache& cache, Buffers& buffers, Stream& stream, int threads) const {
  const DecoderSizes& s = sizes_;
  const int64_t rows = input.sequences * count, hidden = s.hidden;
  const auto multiply = [&](const Product& p, Rounder& x, float* y, int64_t stride, LinearFinish finish = {}) {
    finish.bias = p.bias;
    p.weight->multiply(x.rows_for(p), p.offset, finish, y, stride, threads);
  };
  const auto normed = [&](const DecoderNorm& norm, const Product& consumer) {
    Rounder x(stream.h, hidden, rows, buffers.rounded, threads);
    x.norm(norm, consumer, stream.pending, stream.pending ? stream.h : nullptr, buffers.x.data());
    stream.pending = nullptr;
    return x;
  };
  // Adds a product to the stream, at once or after a norm.
  const auto add = [&](const Product& p, Rounder& x, const std::optional<DecoderNorm>& norm) {
    if (!norm) {
      multiply(p, x, stream.free, hidden, {nullptr, Activation::kNone, nullptr, 0, stream.h, hidden});
      return std::swap(stream.h, stream.free);
    }
    float* const y = buffers.update.data();
    multiply(p, x, y, hidden);
    const NormTask task{y, hidden, nullptr, 0, nullptr, 0, norm->weight, norm->bias, norm->eps,
                        norm->root_mean_square, norm->weight_shift, s.hidden, y, hidden};
    dybit::norm(task, nullptr, {}, nullptr, int(rows), threads);
    stream.pending = y;
  };

  Rounder x = normed(*layer.before_attention, layer.inputs[0]);
  const int64_t q_width = int64_t(s.heads) * s.head_size, k_width = int64_t(s.kv_heads) * s.head_size;
  float* const all = buffers.inputs.data();
  const bool joined = layer.inputs.size() == 1;
  const Heads heads = joined ? Heads{all, all + q_width, all + q_width + k_width, q_width + 2 * k_width,
                                     q_width + 2 * k_width}
                             : Heads{all, all + rows * q_width, all + rows * (q_width + k_width), q_width, k_width};
  multiply(layer.inputs[0], x, heads.q, heads.q_stride);
  if (!joined) multiply(layer.inputs[1], x, heads.k, heads.k_stride), multiply(layer.inputs[2], x, heads.v, k_width);
  place_heads(layer, input, first, count, heads, buffers, threads);
  float* const attended = buffers.attended.data();
  buffers.added.clear(), buffers.asked.clear();
  for (int i = 0; i < input.sequences; ++i) {
    const int64_t at = i * count * heads.k_stride, from = i * count * heads.q_stride;
    buffers.added.push_back({i, int(count), heads.k + at, heads.v + at, {s.head_size, heads.k_stride},
                             {s.head_size, heads.k_stride}});
    buffers.asked.push_back({i, int(count), input.starts ? input.starts[i] : 0, heads.q + from,
                             {s.head_size, heads.q_stride}, attended + i * count * q_width, {s.head_size, q_width}});
  }
  cache.append(buffers.added.data(), input.sequences, threads);
  cache.attend(buffers.asked.data(), input.sequences, {s.heads, layer.scale, layer.window, layer.soft_cap}, threads);

  const auto mlp = [&](Rounder& x) {
    float *const gate = buffers.gate.data(), *const up = buffers.up.data();
    const int64_t inner = s.intermediate;
    int64_t stride = inner;
    if (layer.gates.size() == 2) {
      multiply(layer.gates[1], x, up, inner);
      multiply(layer.gates[0], x, gate, inner, {nullptr, layer.activation, up, inner});
    } else if (layer.gated) {
      stride = 2 * inner;
      multiply(layer.gates[0], x, gate, stride);
      const LinearFinish finish{nullptr, layer.activation, gate + inner, stride};
      by_rows(rows, inner, threads, [&](int64_t from, int64_t some) {
        LinearFinish part = finish;
        part.factor += from * stride;
        layer.gates[0].weight->kernels().rows->finish(part, gate + from * stride, stride, int(some), int(inner));
      });
    } else {
      multiply(layer.gates[0], x, gate, inner, {nullptr, layer.activation});
    }
    Rounder hidden(gate, stride, rows, buffers.rounded, threads);
    add(layer.down, hidden, layer.after_mlp);
  };
  const auto mix = [&] {
    Rounder mixed(attended, q_width, rows, buffers.rounded, threads);
    add(layer.out, mixed, layer.after_attention);
  };
  if (s.parallel) {  // both have the same input, so the MLP can come first
    Rounder same(buffers.x.data(), hidden, rows, buffers.rounded, threads);
    Rounder next = layer.before_mlp ? normed(*layer.before_mlp, layer.gates[0]) : same;
    mlp(next);
    mix();
  } else {
    mix();
    Rounder next = normed(*layer.before_mlp, layer.gates[0]);
    mlp(next);
  }
}

void Decoder::run_chunk(const DecoderInput& input, int64_t first, int64_t count,
                        const std::vector<KVCache*>& caches, const DecoderOutput& output, Buffers& buffers,
                        int threads) const {
  const int64_t rows = input.sequences * count, hidden = sizes_.hidden;
  Stream stream{buffers.h.data(), buffers.other.data(), nullptr};
  embed(input, first, count, stream.h, threads);
  for (size_t i = 0; i < layers_.size(); ++i)
    run_layer(layers_[i], input, first, count, *caches[i], buffers, stream, threads);
  if (stream.pending)
    dybit::binary(Binary::kAdd, {1, 1, rows * hidden}, {stream.h, {0, 0, 1}}, {stream.pending, {0, 0, 1}}, stream.h,
                  {0, 0, 1}, threads);
  const auto last_norm = [&](const float* x, int64_t some, float* y) {
    if (!last_) return void(std::copy_n(x, some * hidden, y));
    const NormTask task{x, hidden, nullptr, 0, nullptr, 0, last_->weight, last_->bias, last_->eps,
                        last_->root_mean_square, last_->weight_shift, sizes_.hidden, y, hidden};
    dybit::norm(task, nullptr, {}, nullptr, int(some), threads);
  };
  if (output.hidden)
    for (int sequence = 0; sequence < input.sequences; ++sequence)
      last_norm(stream.h + sequence * count * hidden, count,
                output.hidden + (sequence * input.rows + first) * hidden);
  const int64_t skipped = std::max<int64_t>(0, input.rows - output.logit_rows - first), asked = count - skipped;
  if (!output.logits || asked <= 0) return;
  float* const x = buffers.x.data();
  for (int sequence = 0; sequence < input.sequences; ++sequence)
    last_norm(stream.h + (sequence * count + skipped) * hidden, asked, x + sequence * asked * hidden);
  Rounder rounder(x, hidden, input.sequences * asked, buffers.rounded, threads);
  const RoundedRows& given = rounder.rows_for(*head_);
  const int64_t outputs = width(*head_), before = first + skipped - (input.rows - output.logit_rows);
  const auto multiply = [&](int64_t from, int64_t some, float* y) {
    head_->weight->multiply(head_->weight->slice(given, int(from), int(some)), head_->offset, {head_->bias}, y, outputs,
                            threads);
    if (logit_cap_ != 0) cap(y, some * outputs, threads);
  };
  if (asked == output.logit_rows) return multiply(0, input.sequences * asked, output.logits);
  for (int sequence = 0; sequence < input.sequences; ++sequence)
    multiply(sequence * asked, asked, output.logits + (sequence * output.logit_rows + before) * outputs);
}

// cap · tanh(x / cap)
void Decoder::cap(float* x, int64_t count, int threads) const {
  const auto scale = [&](Binary kind) {
    dybit::binary(kind, {1, 1, count}, {x, {0, 0, 1}}, {&logit_cap_, {0, 0, 0}}, x, {0, 0, 1}, threads);
  };
  scale(Binary::kDiv);
  unary(Unary::kTanh, x, count, x, threads);
  scale(Binary::kMul);
}

bool left_padding(const int64_t* mask, int64_t sequences, int64_t length, int32_t* starts) {
  for (int64_t sequence = 0; sequence < sequences; ++sequence, mask += length) {
    const int64_t* const first = std::find_if(mask, mask + length, [](int64_t m) { return m != 0; });
    if (std::find(first, mask + length, 0) != mask + length) return false;
    starts[sequence] = int32_t(first - mask);
  }
  return true;
}

}  // namespace dybit
