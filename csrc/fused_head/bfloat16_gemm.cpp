#include "fused_head/bfloat16_gemm.h"

#include <ATen/native/CPUBlas.h>

#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "fused_head/scale_kernels.h"
#include "large_buffer.h"

namespace delib_fast {
namespace {

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

}  // namespace

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

namespace {

double wide(const bf16_bits* x) { return c10::BFloat16(*x, c10::BFloat16::from_bits()); }

// Computes one tile, c (m, n) (+)= a (m, 2 pairs) . b, without brgemm. It is slow; only tests use it.
void plain_tile(std::int64_t m, std::int64_t n, std::int64_t pairs, std::int64_t lda, std::int64_t ldc, bool add,
                const bf16_bits* a, const bf16_bits* b, float* c) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double total = add ? c[i * ldc + j] : 0.0;
      for (std::int64_t k = 0; k < 2 * pairs; ++k)
        total += wide(a + i * lda + k) * wide(b + (k / 2 * TILE_N + j) * 2 + k % 2);
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
bool has_brgemm() {
  static const bool correct = brgemm_is_correct();
  return correct;
}
#else
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

}  // namespace

bool copies_dz() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return true;
#endif
}

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

namespace {

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
  scale_kernels().f32_to_bf16(panel, out, m * width, scale);
}

}  // namespace

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
