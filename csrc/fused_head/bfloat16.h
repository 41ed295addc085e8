// The driver for bfloat16 inputs on processors with bfloat16 GEMMs (AMX, AVX-512 BF16).
//
// For each chunk of C supervised rows, there are two loops over blocks of the vocabulary. The first computes a block of
// logits^T = W . X^T and gives it to the objective while the block is in cache. The second replaces the block with its
// gradient dz, and adds dz . X to the block's part of dW in float32. Then one product over the whole vocabulary computes
// dX = dz^T . W. With AMX the second loop also writes a copy of dz with layout (C, V) for that product, which saves more
// time than it costs.
//
// If the weight is frozen, only dX is needed. A chunk that is large compared with H then stores its logits by token, (C, V),
// if the objective has loops for that layout: dX needs no copy, and the loops keep their sums in registers.
//
// Memory traffic per chunk: the weight is read twice, the logits are written once and read twice, dz (and its copy with
// AMX) is written once and read once, dW (float32) is read once and written once.
//
// dW is the only product that ATen cannot compute (bfloat16_gemm.h); X is packed for it once per chunk. If dz is kept
// instead of dW, each chunk fills some columns of dz, and the backward pass computes dW with one product. A tile of dW
// is scaled and rounded while it is in cache, so no float32 dW is written and read back.
//
// A chunk is padded with rows of zeros, so that the rows of its transposed logits are whole cache lines: oneDNN is 5 to
// 10 % slower for 1,006 tokens than for 1,008.
#pragma once

#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>

#include "fused_head/bfloat16_gemm.h"
#include "fused_head/head.h"

namespace delib_fast {

template <typename Objective>
class Bfloat16Head {
 public:
  Bfloat16Head(const at::Tensor& weight, std::int64_t chunk_tokens, Objective& objective, HeadGradients& gradients)
      : weight_(weight), objective_(objective), gradients_(gradients), vocabulary_(weight.size(0)),
        block_rows_(std::max(MIN_BLOCK_ROWS, 4 * TILE_M * at::get_num_threads())),
        step_(chunk_of(objective, chunk_tokens, 0)), by_token_(prefers_by_token()),
        leading_(by_token_ ? leading_by_token(vocabulary_) : vocabulary_) {
    const bool copies = gradients.need_grad_hidden && !by_token_ && copies_dz();
    step_ = chunk_of(objective, chunk_tokens, copies);
    if (!gradients.keeps_dz()) logits_ = large_empty({leading_ * step_}, at::kBFloat16);
    if (copies) copy_ = large_empty({vocabulary_ * step_}, at::kBFloat16);
    objective.reserve(vocabulary_, step_, by_token_);
  }

  void run() {
    if (by_token_) {
      run_by_token();
    } else {
      run_transposed();
    }
  }

 private:
  // The tokens of a chunk whose matrices, with `copies` more than the objective needs, fit LOGITS_BYTES.
  std::int64_t chunk_of(const Objective& objective, std::int64_t chunk_tokens, std::int64_t copies) const {
    const std::int64_t token_bytes = vocabulary_ * (1 + copies + objective.matrices()) * std::int64_t{sizeof(bf16_bits)};
    const std::int64_t fits = std::clamp<std::int64_t>(LOGITS_BYTES / token_bytes, 16, MAX_TOKENS);
    return equal_chunk(objective.size(), chunk_tokens > 0 ? chunk_tokens : fits);
  }
  // By token, each chunk has to pack the weight (V, H) for the GEMM of the logits, which costs about as much as what half
  // as many logits (V, C) save.
  bool prefers_by_token() const {
    return Objective::HAS_LOOPS_BY_TOKEN && !gradients_.need_grad_weight && 2 * step_ >= weight_.size(1);
  }

  void run_by_token() {
    for (std::int64_t begin = 0; begin < objective_.size(); begin += step_) {
      const std::int64_t tokens = std::min(step_, objective_.size() - begin);
      objective_.begin(begin, begin + tokens);
      const at::Tensor padded = logits_.narrow(0, 0, leading_ * tokens).view({tokens, leading_});
      const at::Tensor logits = padded.narrow(1, 0, vocabulary_);
      const auto block_of = [&](std::int64_t v, std::int64_t rows) {
        return Block<bf16_bits>{data_of<bf16_bits>(logits) + v, leading_, v, rows};
      };
      for (std::int64_t v = 0; v < vocabulary_; v += block_rows_) {
        const std::int64_t rows = std::min(block_rows_, vocabulary_ - v);
        at::Tensor out = logits.narrow(1, v, rows);
        const at::Tensor weight = weight_.narrow(0, v, rows);
        at::mm_out(out, objective_.hidden(), weight.t());
        objective_.add_logits(block_of(v, rows), weight);
      }
      const Block<bf16_bits> all = block_of(0, vocabulary_);
      objective_.finish(all);
      if (!gradients_.need_grad_hidden) continue;
      objective_.to_gradient(all);
      // oneDNN multiplies what follows a row, up to a multiple of 32 entries, by zeros; it must not be NaN.
      padded.narrow(1, vocabulary_, leading_ - vocabulary_).zero_();
      gradients_.grad_hidden.index_copy_(0, objective_.positions(), at::mm(logits, weight_));
    }
  }

  void run_transposed() {
    for (std::int64_t begin = 0; begin < objective_.size(); begin += step_) {
      const std::int64_t size = std::min(step_, objective_.size() - begin), tokens = leading_dimension(size);
      objective_.begin(begin, begin + size);
      const at::Tensor logits = logits_of(begin, tokens), hidden = padded(objective_.hidden(), begin, tokens);
      forward(hidden, logits);
      objective_.finish(block_at(logits, 0, vocabulary_));
      if (gradients_.need_gradient()) backward(hidden, logits, size, begin > 0);
    }
    if (gradients_.keeps_dz()) {  // columns that stay unused because some listed rows are not supervised
      const std::int64_t used = leading_dimension(objective_.size()), rest = gradients_.rows.size(0) - used;
      gradients_.dz.narrow(1, used, rest).zero_();
      gradients_.rows.narrow(0, used, rest).zero_();
    }
  }

  static constexpr std::int64_t LOGITS_BYTES = std::int64_t{320} << 20;  // including the objective's matrices, the copy
  static constexpr std::int64_t MAX_TOKENS = 1024;                       // per chunk
  static constexpr std::int64_t MIN_BLOCK_ROWS = 1024;                   // of the vocabulary; one block stays in cache

  // Returns the buffer (V, tokens) for the logits of the chunk that starts at supervised row `begin`.
  at::Tensor logits_of(std::int64_t begin, std::int64_t tokens) const {
    if (gradients_.keeps_dz()) return gradients_.dz.narrow(1, begin, tokens);
    return logits_.narrow(0, 0, vocabulary_ * tokens).view({vocabulary_, tokens});
  }
  // Returns (tokens, H): the chunk's hidden states, padded with zeros. If dz is kept, they are a part of its rows.
  at::Tensor padded(const at::Tensor& hidden, std::int64_t begin, std::int64_t tokens) const {
    const at::Tensor out = gradients_.keeps_dz() ? gradients_.rows.narrow(0, begin, tokens)
                                                 : at::empty({tokens, hidden.size(1)}, hidden.options());
    out.narrow(0, 0, hidden.size(0)).copy_(hidden);
    out.narrow(0, hidden.size(0), tokens - hidden.size(0)).zero_();
    return out;
  }
  Block<bf16_bits> block_at(const at::Tensor& logits, std::int64_t v, std::int64_t rows) const {
    return {data_of<bf16_bits>(logits) + v * logits.stride(0), logits.stride(0), v, std::min(rows, vocabulary_ - v)};
  }

  void forward(const at::Tensor& hidden, const at::Tensor& logits) {
    for (std::int64_t v = 0; v < vocabulary_; v += block_rows_) {
      const Block<bf16_bits> block = block_at(logits, v, block_rows_);
      at::Tensor out = logits.narrow(0, v, block.rows);
      const at::Tensor weight = weight_.narrow(0, v, block.rows);
      at::mm_out(out, weight, hidden.t());
      objective_.add_logits(block, weight);
    }
  }

  void backward(const at::Tensor& hidden, const at::Tensor& logits, std::int64_t size, bool add) {
    const std::int64_t tokens = hidden.size(0);
    std::optional<PackedHidden> packed;
    if (gradients_.need_grad_weight && !gradients_.keeps_dz()) packed.emplace(hidden);
    for (std::int64_t v = 0; v < vocabulary_; v += block_rows_) {
      const Block<bf16_bits> block = block_at(logits, v, block_rows_);
      objective_.to_gradient(block);
      // The gradient of the padding is NaN if W has an inf.
      logits.narrow(0, v, block.rows).narrow(1, size, tokens - size).zero_();
      if (copy_.defined()) {
        auto* copy = data_of<bf16_bits>(copy_);
        at::parallel_for(0, tokens, 16, [&](std::int64_t first, std::int64_t last) {
          transpose(block, first, last, copy + v, vocabulary_);
        });
      }
      if (packed) accumulate_grad_weight(block, *packed, add, gradients_.grad_weight);
    }
    if (!gradients_.need_grad_hidden) return;
    const at::Tensor dz = copy_.defined()
                              ? copy_.narrow(0, 0, tokens * vocabulary_).view({tokens, vocabulary_})
                              : logits.t();
    gradients_.grad_hidden.index_copy_(0, objective_.positions(), at::mm(dz, weight_).narrow(0, 0, size));
  }

  const at::Tensor& weight_;
  Objective& objective_;
  HeadGradients& gradients_;
  std::int64_t vocabulary_, block_rows_, step_;
  bool by_token_;
  std::int64_t leading_;  // by token only: elements from one token's logits to the next
  at::Tensor logits_, copy_;
};

}  // namespace delib_fast
