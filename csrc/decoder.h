// A decoder-only transformer: all layers, for rows of several sequences, in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "feed_forward.h"
#include "kv_cache.h"

namespace dybit {

struct DecoderNorm {
  const float *weight, *bias;  // or null
  float eps;
  bool root_mean_square;
  float weight_shift;
};

// Row i of a table: the values of the weight's row, or FP32.
struct EmbeddingTable {
  const PackedWeight* weight;  // or null
  const float* values;         // [rows][hidden]
  int64_t rows;                // 0: no table
};

// Angles of rotary positions: the cosine and sine of each place and pair of numbers.
struct RotaryTable {
  const float *cosine, *sine;  // [places][pairs]
  int64_t places;
};

struct DecoderLayer {
  std::optional<DecoderNorm> before_attention, after_attention, before_mlp, after_mlp;
  std::optional<DecoderNorm> queries, keys;  // of each head
  std::vector<Product> inputs;               // of queries, keys and values; or one for all three
  Product out;
  std::vector<Product> gates;  // gate and up; one for both, or one alone without a gate
  bool gated;
  Product down;
  Activation activation;
  float scale, soft_cap;  // of scores; 0: no cap
  int window;             // tokens that a query sees, itself included; 0: all before it
  int rotary;             // which table; -1: none
};

struct DecoderSizes {
  int hidden, intermediate, heads, kv_heads, head_size;
  int rotary_pairs;  // of a head, from its first number on; a pair is i and i + rotary_pairs
  bool parallel;     // attention and MLP have the same input, and both are added to it
  int chunk;         // rows that pass through the layers at a time
};

// Rows of tokens: the same number for each sequence, one after the other.
struct DecoderInput {
  int sequences;
  int64_t rows;               // of a sequence
  const int64_t* tokens;      // [sequences][rows], or null
  const float* embeddings;    // [sequences][rows][hidden] instead
  const int64_t* positions;   // [sequences][rows]; a stride of 0 shares them
  int64_t positions_stride;
  const int32_t* starts;      // the first token of each sequence that counts, or null: earlier ones are padding
};

struct DecoderOutput {
  float* hidden;       // [sequences][rows][hidden] after the last norm, or null
  float* logits;       // [sequences][logit_rows][outputs of the head], or null
  int64_t logit_rows;  // the last ones
};

// Threads may run one decoder at the same time, with caches of their own.
class Decoder {
 public:
  // Throws std::invalid_argument if sizes do not fit each other.
  Decoder(const DecoderSizes& sizes, const EmbeddingTable& tokens, float embedding_scale,
          const EmbeddingTable& positions, const std::optional<DecoderNorm>& last, const std::optional<Product>& head,
          float logit_cap);
  ~Decoder();
  void add(DecoderLayer layer);
  // Replaces a table, for later runs.
  void set_rotary(int index, const RotaryTable& table);

  // Appends keys and values of the rows to the caches, one for each layer, and computes the outputs. All tokens and
  // positions must be within the tables.
  void run(const DecoderInput& input, const std::vector<KVCache*>& caches, const DecoderOutput& output, int threads);

 private:
  struct Buffers;
  struct Heads;
  struct Stream {  // what the layers add to, and memory for the next sum
    float *h, *free;
    float* pending;  // still to be added to h, or null
  };
  void check(const DecoderInput& input, const std::vector<KVCache*>& caches, const Buffers& buffers) const;
  std::unique_ptr<Buffers> take(int64_t rows);
  void embed(const DecoderInput& input, int64_t first, int64_t count, float* h, int threads) const;
  void place_heads(const DecoderLayer& layer, const DecoderInput& input, int64_t first, int64_t count,
                   const Heads& heads, const Buffers& buffers, int threads) const;
  void run_layer(const DecoderLayer& layer, const DecoderInput& input, int64_t first, int64_t count, KVCache& cache,
                 Buffers& buffers, Stream& stream, int threads) const;
  void run_chunk(const DecoderInput& input, int64_t first, int64_t count, const std::vector<KVCache*>& caches,
                 const DecoderOutput& output, Buffers& buffers, int threads) const;
  void cap(float* x, int64_t count, int threads) const;

  const DecoderSizes sizes_;
  const EmbeddingTable tokens_;
  const float embedding_scale_;
  const EmbeddingTable positions_;
  const std::optional<DecoderNorm> last_;
  const std::optional<Product> head_;
  const float logit_cap_;
  std::vector<DecoderLayer> layers_;
  std::vector<RotaryTable> rotary_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffers>> idle_;
};

// Whether each sequence of a mask [sequences][length] is zeros and then ones; starts receives where these begin.
bool left_padding(const int64_t* mask, int64_t sequences, int64_t length, int32_t* starts);

}  // namespace dybit
