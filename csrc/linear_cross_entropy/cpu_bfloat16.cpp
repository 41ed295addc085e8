// The loss for bfloat16 inputs on processors with bfloat16 GEMMs (AMX, AVX-512 BF16).
//
// For each chunk of C supervised rows, there are two loops over blocks of the vocabulary. The first computes a block of
// logits^T = W . X^T and updates the softmax statistics while the block is in cache. The second replaces the block with
// its gradient dz, and adds dz . X to the block's part of dW in float32. Then one product over the whole vocabulary
// computes dX = dz^T . W. With AMX the second loop also writes a copy of dz with layout (C, V) for that product, which
// saves more time than it costs.
//
// Memory traffic per chunk: the weight is read twice, the logits are written once and read twice, dz (and its copy with
// AMX) is written once and read once, dW (float32) is read once and written once.
//
// dW is the only product that ATen cannot compute (bfloat16 inputs, accumulated into a float32 output). It uses the
// brgemm of oneDNN, tile by tile, with X packed once per chunk.
//
// If dz is kept instead of dW, each chunk fills some columns of dz, and the backward pass computes dW with one product.
// A tile of dW is scaled and rounded while it is in cache, so no float32 dW is written and read back.
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "linear_cross_entropy/cpu.h"

namespace delib_fast {
namespace {

constexpr std::int64_t LOGITS_BYTES = std::int64_t{320} << 20;  // including the copy
constexpr std::int64_t MAX_TOKENS = 1024;      // per chunk
constexpr std::int64_t MIN_BLOCK_ROWS = 1024;  // of the vocabulary; one block stays in cache
constexpr std::int64_t TILE_M = 64;            // vocabulary entries in a tile of dW
constexpr std::int64_t TILE_N = 64;            // hidden units in a tile of dW
constexpr std::int64_t TILE_PAIRS = 512;       // pairs of tokens per product, so that both factors stay in cache

// to[c][r] = from[r][c] for an (8, 8) tile.
inline void transpose_8x8(const bf16_bits* from, std::int64_t from_ld, bf16_bits* to, std::int64_t to_ld) {
#if defined(__x86_64__)
  __m128i row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_ld));
  for (int i = 0; i < 4; ++i) {
    pair[2 * i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const int at = 4 * half;
    quad[at] = _mm_unpacklo_epi32(pair[at], pair[at + 2]);
    quad[at + 1] = _mm_unpackhi_epi32(pair[at], pair[at + 2]);
    quad[at + 2] = _mm_unpacklo_epi32(pair[at + 1], pair[at + 3]);
    quad[at + 3] = _mm_unpackhi_epi32(pair[at + 1], pair[at + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m128i low = _mm_unpacklo_epi64(quad[i], quad[i + 4]);
    const __m128i high = _mm_unpackhi_epi64(quad[i], quad[i + 4]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i) * to_ld), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * to_ld), high);
  }
#else
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) to[c * to_ld + r] = from[r * from_ld + c];
#endif
}

// Copies columns [begin, end) of a (rows, C) block to rows [begin, end) of `to`.
void transpose(Block<bf16_bits> block, std::int64_t begin, std::int64_t end, bf16_bits* to, std::int64_t to_ld) {
  const std::int64_t whole_rows = block.rows / 8 * 8;
  const std::int64_t whole_end = begin + (end - begin) / 8 * 8;
  for (std::int64_t c = begin; c < whole_end; c += 8)
    for (std::int64_t r = 0; r < whole_rows; r += 8)
      transpose_8x8(block.data + r * block.leading + c, block.leading, to + c * to_ld + r, to_ld);
  for (std::int64_t c = begin; c < end; ++c)
    for (std::int64_t r = c < whole_end ? whole_rows : 0; r < block.rows; ++r)
      to[c * to_ld + r] = block.data[r * block.leading + c];
}

// X (C, H), C even, in the layout of the second operand of brgemm: pairs of tokens, (C/2, TILE_N, 2) for each tile of
// TILE_N columns of H.
class PackedHidden {
 public:
  explicit PackedHidden(const at::Tensor& hidden) : width_(hidden.size(1)), pairs_(hidden.size(0) / 2) {
    packed_ = at::empty({tiles() * pairs_ * TILE_N * 2}, hidden.options());
    const auto* from = reinterpret_cast<const bf16_bits*>(hidden.const_data_ptr());
    at::parallel_for(0, tiles() * pairs_, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) pack_pair(from, i / pairs_, i % pairs_);
    });
  }
  std::int64_t tiles() const { return (width_ + TILE_N - 1) / TILE_N; }
  std::int64_t pairs() const { return pairs_; }
  std::int64_t columns(std::int64_t tile) const { return std::min(TILE_N, width_ - tile * TILE_N); }
  const bf16_bits* tile(std::int64_t i) const { return data() + i * pairs_ * TILE_N * 2; }

 private:
  bf16_bits* data() const { return reinterpret_cast<bf16_bits*>(packed_.data_ptr()); }
  void pack_pair(const bf16_bits* from, std::int64_t tile, std::int64_t pair) const {
    bf16_bits* to = data() + (tile * pairs_ + pair) * TILE_N * 2;
    const bf16_bits* even = from + 2 * pair * width_ + tile * TILE_N;
    for (std::int64_t n = 0; n < columns(tile); ++n) {
      to[2 * n] = even[n];
      to[2 * n + 1] = even[width_ + n];
    }
  }
  std::int64_t width_, pairs_;
  at::Tensor packed_;
};

// Computes one tile, c (m, n) (+)= a (m, 2 pairs) . b, without brgemm. It is slow; only tests use it.
void plain_tile(std::int64_t m, std::int64_t n, std::int64_t pairs, std::int64_t lda, std::int64_t ldc, bool add,
                const bf16_bits* a, const bf16_bits* b, float* c) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double total = add ? c[i * ldc + j] : 0.0;
      for (std::int64_t k = 0; k < 2 * pairs; ++k)
        total += value_of(a + i * lda + k) * value_of(b + (k / 2 * TILE_N + j) * 2 + k % 2);
      c[i * ldc + j] = static_cast<float>(total);
    }
  }
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
// brgemm needs AVX-512 BF16 or AMX, and oneDNN must be enabled. torch reports only AMX (could_pack), and without either
// it reads the packed operand as a plain matrix. A small product is therefore computed and checked.
bool brgemm_is_correct() {
  constexpr std::int64_t M = 3, PAIRS = 2;
  std::vector<at::BFloat16> a(M * 2 * PAIRS), b(PAIRS * TILE_N * 2);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 7) - 2.0f;
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 11) - 5.0f;
  std::vector<float> ours(M * TILE_N, 1.0f), theirs(M * TILE_N, 1.0f);
  plain_tile(M, TILE_N, PAIRS, 2 * PAIRS, TILE_N, true, reinterpret_cast<const bf16_bits*>(a.data()),
             reinterpret_cast<const bf16_bits*>(b.data()), ours.data());
  try {
    at::native::cpublas::brgemm(M, TILE_N, 2 * PAIRS, 2 * PAIRS, TILE_N, TILE_N, true, a.data(), b.data(),
                                theirs.data(), /*is_vnni=*/true);
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  } catch (const c10::Error&) {
    return false;
  }
  return ours == theirs;  // exact: all values are small integers
}
// With AMX the product of a transposed view runs at half the speed; without AMX the speed is the same.
bool copies_dz() { return at::native::cpublas::could_pack(at::kBFloat16); }
bool has_brgemm() {
  static const bool correct = brgemm_is_correct();
  return correct;
}
#else
bool copies_dz() { return true; }
bool has_brgemm() { return false; }
#endif

void tile_gemm(bool brgemm, std::int64_t m, std::int64_t n, std::int64_t pairs, std::int64_t lda, std::int64_t ldc,
               bool add, const bf16_bits* a, const bf16_bits* b, float* c) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (brgemm) {
    at::native::cpublas::brgemm(m, n, 2 * pairs, lda, TILE_N, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
    return;
  }
#endif
  plain_tile(m, n, pairs, lda, ldc, add, a, b, c);
}

// Each thread calls this after its last tile. With AMX it releases the tile registers.
void release_brgemm([[maybe_unused]] bool brgemm) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (brgemm) at::native::cpublas::brgemm_release(/*is_vnni=*/true);
#endif
}

// rows of dW (+)= rows of dz . X, for the vocabulary entries of one block. dW is (V, H) float32, dz is (V, C).
void accumulate_grad_weight(const Block<bf16_bits>& dz, const PackedHidden& hidden, bool add, at::Tensor& grad_weight) {
  const std::int64_t width = grad_weight.size(1);
  float* out = grad_weight.data_ptr<float>() + dz.first_row * width;
  const bool brgemm = has_brgemm();
  at::parallel_for(0, (dz.rows + TILE_M - 1) / TILE_M, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t v = i * TILE_M, m = std::min(TILE_M, dz.rows - v);
      for (std::int64_t j = 0; j < hidden.tiles(); ++j) {
        tile_gemm(brgemm, m, hidden.columns(j), hidden.pairs(), dz.leading, width, add, dz.data + v * dz.leading,
                  hidden.tile(j), out + v * width + j * TILE_N);
      }
    }
    release_brgemm(brgemm);
  });
}

// Writes m rows of scale * dz . X to `out` (m, H) bfloat16. `panel` (m, H) float32 holds the sums and stays in cache.
void product_rows(const bf16_bits* dz, const PackedHidden& hidden, bool brgemm, float scale, std::int64_t m,
                  std::int64_t width, float* panel, bf16_bits* out) {
  const std::int64_t tokens = 2 * hidden.pairs();
  for (std::int64_t j = 0; j < hidden.tiles(); ++j) {
    for (std::int64_t pair = 0; pair < hidden.pairs(); pair += TILE_PAIRS) {
      tile_gemm(brgemm, m, hidden.columns(j), std::min(TILE_PAIRS, hidden.pairs() - pair), tokens, width, pair > 0,
                dz + 2 * pair, hidden.tile(j) + pair * TILE_N * 2, panel + j * TILE_N);
    }
  }
  row_kernels().scale_f32_to_bf16(panel, out, m * width, scale);
}

// The loop over the chunks of one call, and the buffers that the chunks share. A chunk is padded with rows of zeros, so
// that the rows of its transposed logits are whole cache lines: oneDNN is 5 to 10 % slower for 1,006 tokens than for
// 1,008.
class Bfloat16Loss {
 public:
  Bfloat16Loss(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows,
               std::int64_t chunk_tokens, Results& results)
      : hidden_(hidden), weight_(weight), rows_(rows), results_(results), vocabulary_(weight.size(0)),
        block_rows_(std::max(MIN_BLOCK_ROWS, 4 * TILE_M * at::get_num_threads())),
        sweeps_(results.choose(row_kernels().plain_bf16, row_kernels().general_bf16)) {
    const bool copies = results.need_grad_hidden && copies_dz();
    const std::int64_t fits = LOGITS_BYTES / (vocabulary_ * (copies ? 2 : 1) * std::int64_t{sizeof(bf16_bits)});
    const std::int64_t max_tokens = chunk_tokens > 0 ? chunk_tokens : std::clamp<std::int64_t>(fits, 16, MAX_TOKENS);
    step_ = equal_chunk(rows.size(), max_tokens);
    if (!results.keeps_dz()) logits_ = large_empty({vocabulary_ * step_}, at::kBFloat16);
    if (copies) by_token_ = large_empty({vocabulary_ * step_}, at::kBFloat16);
  }

  void run() {
    for (std::int64_t begin = 0; begin < rows_.size(); begin += step_) {
      const std::int64_t end = std::min(begin + step_, rows_.size());
      Chunk<float> chunk(hidden_, rows_, begin, end, at::kBFloat16, results_.options);
      const std::int64_t tokens = leading_dimension(chunk.size);
      const at::Tensor logits = logits_of(begin, tokens), hidden = padded(chunk.hidden, begin, tokens);
      forward(chunk, hidden, logits);
      chunk.finish(vocabulary_, results_);
      if (results_.need_gradient()) backward(chunk, hidden, logits, begin > 0);
    }
    if (results_.keeps_dz()) {  // columns that stay unused because some listed rows are not supervised
      const std::int64_t used = leading_dimension(rows_.size()), rest = results_.rows.size(0) - used;
      results_.dz.narrow(1, used, rest).zero_();
      results_.rows.narrow(0, used, rest).zero_();
    }
  }

 private:
  // Returns the buffer (V, tokens) for the logits of the chunk that starts at supervised row `begin`.
  at::Tensor logits_of(std::int64_t begin, std::int64_t tokens) const {
    if (results_.keeps_dz()) return results_.dz.narrow(1, begin, tokens);
    return logits_.narrow(0, 0, vocabulary_ * tokens).view({vocabulary_, tokens});
  }
  // Returns (tokens, H): the chunk's hidden states, padded with zeros. If dz is kept, they are a part of results.rows.
  at::Tensor padded(const at::Tensor& hidden, std::int64_t begin, std::int64_t tokens) const {
    const at::Tensor out = results_.keeps_dz() ? results_.rows.narrow(0, begin, tokens)
                                               : at::empty({tokens, hidden.size(1)}, hidden.options());
    out.narrow(0, 0, hidden.size(0)).copy_(hidden);
    out.narrow(0, hidden.size(0), tokens - hidden.size(0)).zero_();
    return out;
  }
  Block<bf16_bits> block_at(const at::Tensor& logits, std::int64_t v) const {
    auto* data = reinterpret_cast<bf16_bits*>(logits.data_ptr());
    return {data + v * logits.stride(0), logits.stride(0), v, std::min(block_rows_, vocabulary_ - v)};
  }

  void forward(Chunk<float>& chunk, const at::Tensor& hidden, const at::Tensor& logits) {
    for (std::int64_t v = 0; v < vocabulary_; v += block_rows_) {
      const Block<bf16_bits> block = block_at(logits, v);
      at::Tensor out = logits.narrow(0, v, block.rows);
      at::mm_out(out, weight_.narrow(0, v, block.rows), hidden.t());
      chunk.add_logits(block, sweeps_);
    }
  }

  void backward(Chunk<float>& chunk, const at::Tensor& hidden, const at::Tensor& logits, bool add) {
    const std::int64_t tokens = hidden.size(0);
    std::optional<PackedHidden> packed;
    if (results_.need_grad_weight && !results_.keeps_dz()) packed.emplace(hidden);
    for (std::int64_t v = 0; v < vocabulary_; v += block_rows_) {
      const Block<bf16_bits> block = block_at(logits, v);
      chunk.to_gradient(block, sweeps_);
      // The gradient of the padding is NaN if W has an inf.
      logits.narrow(0, v, block.rows).narrow(1, chunk.size, tokens - chunk.size).zero_();
      if (by_token_.defined()) {
        auto* copy = reinterpret_cast<bf16_bits*>(by_token_.data_ptr());
        at::parallel_for(0, tokens, 16, [&](std::int64_t first, std::int64_t last) {
          transpose(block, first, last, copy + v, vocabulary_);
        });
      }
      if (packed) accumulate_grad_weight(block, *packed, add, results_.grad_weight);
    }
    if (!results_.need_grad_hidden) return;
    const at::Tensor dz = by_token_.defined()
                              ? by_token_.narrow(0, 0, tokens * vocabulary_).view({tokens, vocabulary_})
                              : logits.t();
    results_.grad_hidden.index_copy_(0, chunk.positions, at::mm(dz, weight_).narrow(0, 0, chunk.size));
  }

  const at::Tensor &hidden_, &weight_;
  const SupervisedRows& rows_;
  Results& results_;
  std::int64_t vocabulary_, block_rows_, step_ = 0;
  Sweeps<bf16_bits, float> sweeps_;
  at::Tensor logits_, by_token_;
};

}  // namespace

void run_bfloat16(const at::Tensor& hidden, const at::Tensor& weight, const SupervisedRows& rows,
                  std::int64_t chunk_tokens, Results& results) {
  Bfloat16Loss(hidden, weight, rows, chunk_tokens, results).run();
}

at::Tensor bfloat16_product(const at::Tensor& dz, const at::Tensor& rows, float scale) {
  const std::int64_t vocabulary = dz.size(0), width = rows.size(1);
  at::Tensor product = large_empty({vocabulary, width}, at::kBFloat16);
  const PackedHidden hidden(rows);
  const auto* from = reinterpret_cast<const bf16_bits*>(dz.const_data_ptr());
  auto* to = reinterpret_cast<bf16_bits*>(product.data_ptr());
  const bool brgemm = has_brgemm();
  at::parallel_for(0, (vocabulary + TILE_M - 1) / TILE_M, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> panel(TILE_M * width);
    for (std::int64_t v = begin * TILE_M; v < std::min(end * TILE_M, vocabulary); v += TILE_M) {
      const std::int64_t m = std::min(TILE_M, vocabulary - v);
      product_rows(from + v * dz.size(1), hidden, brgemm, scale, m, width, panel.data(), to + v * width);
    }
    release_brgemm(brgemm);
  });
  return product;
}

}  // namespace delib_fast
