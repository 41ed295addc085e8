// Matrix products of bfloat16 with float32 sums, with AMX (SIMD_AMX 1) or with the dot products of AVX-512 BF16.
//
// B is stored as words of two bfloat16: word (k / 2, n) has B[k][n] in its low and B[k + 1][n] in its high half.
#include <immintrin.h>

#include <cstdint>

namespace delib_fast::attention::SIMD_TARGET {
namespace {

using word = std::uint32_t;  // two bfloat16, of consecutive k

#if SIMD_AMX

// Configures the tile registers of this thread, 16 rows of 64 bytes each, until the end of the scope.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t row_bytes[16];
      std::uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory");  // GCC does not know that all of it is read
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// C (16 M, 16 N) (+)= A (16 M, depth) . B, for M and N of 1 or 2.
template <int M, int N>
inline void tiles(std::int64_t depth, const bf16_bits* a, std::int64_t lda, const word* b, std::int64_t ldb, float* c,
                  std::int64_t ldc, bool add) {
  const std::int64_t a_row = 2 * lda, b_row = 4 * ldb, c_row = 4 * ldc;
  if (add) {
    _tile_loadd(0, c, c_row);
    if constexpr (N == 2) _tile_loadd(1, c + 16, c_row);
    if constexpr (M == 2) _tile_loadd(2, c + 16 * ldc, c_row);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c + 16 * ldc + 16, c_row);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (std::int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, a_row);
    _tile_loadd(6, b + k / 2 * ldb, b_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + k / 2 * ldb + 16, b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, a + 16 * lda + k, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if constexpr (N == 2) _tile_stored(1, c + 16, c_row);
  if constexpr (M == 2) _tile_stored(2, c + 16 * ldc, c_row);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 16 * ldc + 16, c_row);
}

#else

struct TileRegisters {
  TileRegisters() {}
  ~TileRegisters() {}
};

template <int M, int N>
inline void tiles(std::int64_t depth, const bf16_bits* a, std::int64_t lda, const word* b, std::int64_t ldb, float* c,
                  std::int64_t ldc, bool add) {
  constexpr int ROWS = 8;  // their sums and a row of B fit the vector registers
  for (int first = 0; first < 16 * M; first += ROWS, a += ROWS * lda, c += ROWS * ldc) {
    __m512 sum[ROWS][N];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < N; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
    for (std::int64_t k = 0; k < depth / 2; ++k) {
      __m512bh row[N];
      for (int j = 0; j < N; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * j);
      for (int i = 0; i < ROWS; ++i) {
        int pair;
        __builtin_memcpy(&pair, a + i * lda + 2 * k, sizeof pair);
        for (int j = 0; j < N; ++j)
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)_mm512_set1_epi32(pair), row[j]);
      }
    }
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < N; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
  }
}

#endif

// C (rows, columns) (+)= A (rows, depth) . B. rows and columns must be multiples of 16, depth a multiple of 32.
inline void product(std::int64_t rows, std::int64_t columns, std::int64_t depth, const bf16_bits* a, std::int64_t lda,
                    const word* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
  __asm__ volatile("" ::: "memory");  // GCC does not know that tile loads read memory
  for (std::int64_t j = 0; j < columns; j += 32) {
    const bool two_columns = columns - j > 16;
    for (std::int64_t i = 0; i < rows; i += 32) {
      const bool two_rows = rows - i > 16;
      const auto run = two_rows ? (two_columns ? tiles<2, 2> : tiles<2, 1>) : (two_columns ? tiles<1, 2> : tiles<1, 1>);
      run(depth, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
  }
}

// Transposes 16 rows of 16 words in registers.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // now lane j of r[4 g + i] has column 4 j + i of rows 4 g to 4 g + 3
    const __m512i low_0 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44);
    const __m512i low_1 = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xee);
    const __m512i high_0 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x44);
    const __m512i high_1 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xee);
    t[i] = _mm512_shuffle_i32x4(low_0, high_0, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(low_0, high_0, 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(low_1, high_1, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(low_1, high_1, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// to[w][r] = from[r][w] for `words` words of `rows` rows, of which rows from `count` on are zero. `rows` must be a
// multiple of 16. If `words` is not one, zeros follow up to the next multiple. `stride` is in bytes.
inline void transpose_words(const void* from, std::int64_t stride, std::int64_t count, std::int64_t rows,
                            std::int64_t words, word* to, std::int64_t ld) {
  for (std::int64_t w = 0; w < words; w += 16) {
    const auto mask = static_cast<__mmask16>(words - w >= 16 ? 0xffff : (1 << (words - w)) - 1);
    for (std::int64_t r = 0; r < rows; r += 16) {
      __m512i block[16];
      const char* first = static_cast<const char*>(from) + r * stride + 4 * w;
      for (int i = 0; i < 16; ++i)
        block[i] = r + i < count ? _mm512_maskz_loadu_epi32(mask, first + i * stride) : _mm512_setzero_si512();
      transpose(block);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (w + i) * ld + r, block[i]);
    }
  }
}

inline __m512i widened(const bf16_bits* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Pairs the rows: to[r / 2][d] has from[r][d] and from[r + 1][d]. Rows from `count` on are zero; `rows` must be even
// and `dim` a multiple of 16.
inline void pair_rows(const bf16_bits* from, std::int64_t stride, std::int64_t count, std::int64_t rows,
                      std::int64_t dim, word* to) {
  for (std::int64_t r = 0; r < rows; r += 2, to += dim) {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m512i low = r < count ? widened(from + r * stride + d) : _mm512_setzero_si512();
      const __m512i high = r + 1 < count ? widened(from + (r + 1) * stride + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// Copies `count` rows and appends zeros, up to `rows` rows of `padded_dim`. dim must be a multiple of 16.
inline void copy_rows(const bf16_bits* from, std::int64_t stride, std::int64_t count, std::int64_t rows,
                      std::int64_t dim, std::int64_t padded_dim, bf16_bits* to) {
  for (std::int64_t r = 0; r < rows; ++r, to += padded_dim)
    for (std::int64_t d = 0; d < padded_dim; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d),
                          r < count && d < dim
                              ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * stride + d))
                              : _mm256_setzero_si256());
}

inline void store_rounded(bf16_bits* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// to[q][d] = from[d][q], rounded, for q < count. dim must be a multiple of 16; rows of `from` have `ld` floats.
inline void scatter_transposed(const float* from, std::int64_t ld, std::int64_t count, std::int64_t dim, bf16_bits* to,
                               std::int64_t stride) {
  for (std::int64_t q = 0; q < count; q += 16) {
    for (std::int64_t d = 0; d < dim; d += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(from + (d + i) * ld + q);
      transpose(block);
      for (int i = 0; i < 16 && q + i < count; ++i) store_rounded(to + (q + i) * stride + d, (__m512)block[i]);
    }
  }
}

// The bfloat16 of two rows of probabilities as words, low and high half.
inline __m512i paired(__m512 low, __m512 high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low in the first 16 entries
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

}  // namespace
}  // namespace delib_fast::attention::SIMD_TARGET
