#include "panels.h"

#include <algorithm>
#include <cstring>

namespace dybit {

PanelWeight::PanelWeight(const PackedWeight& packed, const std::vector<Word>& words, const PanelKernels& kernels) {
  const Weight& w = packed.weight();
  segment_words_.assign(w.segment_count, 0);
  for (const Word& word : words) ++segment_words_[word.segment];
  starts_.assign(size_t(w.blocks) * w.segment_count * kBlockRows, 0);
  memory_.resize(size_t(w.blocks) * words.size());
  panels_ = {&w,
             packed.kind(),
             (w.blocks + kernels.unit_blocks - 1) / kernels.unit_blocks,
             int(words.size()),
             segment_words_.data(),
             memory_.data()->bytes,
             starts_.data(),
             packed.max_input()};
  for (int unit = 0; unit < panels_.unit_count; ++unit) unpack(words, unit);
}

void PanelWeight::unpack(const std::vector<Word>& words, int unit) {
  const Weight& w = *panels_.weight;
  const int first = panels_.first_block(unit), blocks = panels_.first_block(unit + 1) - first;
  const bool wide = panels_.kind == InputKind::kSigned16;
  Line* const panel = memory_.data() + size_t(first) * words.size();
  for (int j = 0; j < blocks; ++j) {
    const int block = first + j;
    for (size_t k = 0; k < words.size(); ++k) {
      const Segment& segment = w.segments[words[k].segment];
      const uint8_t *codes = w.codes_at(block, words[k].segment), *choices = w.choices_at(block, words[k].segment);
      int32_t* starts = starts_.data() + (size_t(block) * w.segment_count + words[k].segment) * kBlockRows;
      for (int i = 0; i < (wide ? 2 : 4); ++i) {
        if (words[k].columns[i] == Word::kNone) continue;
        const int column = words[k].columns[i] - segment.start;
        const uint8_t* chunk = codes + column / kChunk * w.chunk_bytes;
        for (int row = 0; row < kBlockRows; ++row) {
          const int value = w.significand(chunk, row, column % kChunk, choices[row]);
          uint8_t* to = panel[k * blocks + j].bytes + row * 4;
          if (wide) {
            const int16_t number = int16_t(value);
            std::memcpy(to + 2 * i, &number, 2);
          } else {
            to[i] = uint8_t(value);
            if (panels_.kind == InputKind::kSigned8) starts[row] -= panels_.max_input * value;
          }
        }
      }
    }
  }
}

}  // namespace dybit
