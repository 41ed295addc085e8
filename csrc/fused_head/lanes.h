// Vectors of float32 lanes for loops that compilers do not vectorise, and the same functions for one double.
// for_each_simd_target.h includes this file, through the loops, once per instruction set, so it has no include guard. A
// loop that is written for the type Lanes<acc_t>::type runs on SIMD_FLOATS entries of float32 at a time, or on one
// double. On x86-64 the source file includes <immintrin.h> first.
#include "fused_head/simd_math.h"

#define DELIB_FAST_INLINE inline __attribute__((always_inline))

namespace delib_fast::SIMD_TARGET {
namespace {

typedef float floats __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::int32_t ints __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::uint32_t uints __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::uint16_t shorts __attribute__((vector_size(2 * SIMD_FLOATS)));

template <typename acc_t>
struct Lanes;
template <>
struct Lanes<float> {
  using type = floats;
  static constexpr std::int64_t WIDTH = SIMD_FLOATS;
};
template <>
struct Lanes<double> {
  using type = double;
  static constexpr std::int64_t WIDTH = 1;
};

DELIB_FAST_INLINE floats load_lanes(const float* p) {
  floats x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
DELIB_FAST_INLINE floats load_lanes(const bf16_bits* p) {
  shorts bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
#if SIMD_FLOATS == 16 && defined(__x86_64__)  // one instruction; GCC 12 makes five of the general form
  return (floats)((uints)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return (floats)(__builtin_convertvector(bits, uints) << 16);
#endif
}
DELIB_FAST_INLINE double load_lanes(const double* p) { return *p; }

DELIB_FAST_INLINE void store_lanes(float* p, floats x) { __builtin_memcpy(p, &x, sizeof(x)); }
DELIB_FAST_INLINE void store_lanes(bf16_bits* p, floats x) {  // round to nearest even; a NaN stays a NaN
#if SIMD_FLOATS == 16 && defined(__x86_64__)  // six instructions; GCC 12 makes ten of the general form
  const __m512i bits = (__m512i)x, below = _mm512_set1_epi32(0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(bits, below);
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  const __m512i high = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23, 21,
                                        19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const shorts out = (shorts)_mm512_castsi512_si256(_mm512_permutexvar_epi16(high, rounded));
#else
  const uints bits = (uints)x;
  const uints rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uints nan = (uints)(x != x);
  const shorts out = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), shorts);
#endif
  __builtin_memcpy(p, &out, sizeof(out));
}
DELIB_FAST_INLINE void store_lanes(double* p, double x) { *p = x; }

DELIB_FAST_INLINE floats select(ints mask, floats a, floats b) { return mask ? a : b; }
DELIB_FAST_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }

// Lane 0, and reductions of all lanes.
DELIB_FAST_INLINE float first_of(floats x) { return x[0]; }
#if SIMD_FLOATS == 16 && defined(__x86_64__)
DELIB_FAST_INLINE float max_of(floats x) { return _mm512_reduce_max_ps((__m512)x); }
DELIB_FAST_INLINE float sum_of(floats x) { return _mm512_reduce_add_ps((__m512)x); }
#else
DELIB_FAST_INLINE float max_of(floats x) {
  float max = x[0];
  for (int i = 1; i < SIMD_FLOATS; ++i) max = x[i] > max ? x[i] : max;
  return max;
}
DELIB_FAST_INLINE float sum_of(floats x) {
  float sum = x[0];
  for (int i = 1; i < SIMD_FLOATS; ++i) sum += x[i];
  return sum;
}
#endif

// The maximum of a row of bfloat16 logits. A NaN may be ignored, or may be the result.
DELIB_FAST_INLINE float max_of_row(const bf16_bits* row, std::int64_t entries) {
  std::int64_t i = 0;
  float max = -INFINITY;
#if SIMD_FLOATS == 16 && defined(__x86_64__)
  // Without their sign bit, the bits of negative numbers are in descending order; inverted, they are in order as integers.
  const auto in_order = [](__m512i bits) {
    return _mm512_ternarylogic_epi32(bits, _mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7fff), 0x78);
  };
  if (entries >= 32) {
    __m512i largest = in_order(_mm512_loadu_si512(row));
    for (i = 32; i + 32 <= entries; i += 32) {
      largest = _mm512_max_epi16(largest, in_order(_mm512_loadu_si512(row + i)));
    }
    bf16_bits lanes[32];
    const __m512i bits = in_order(largest);
    __builtin_memcpy(lanes, &bits, sizeof(lanes));
    const floats low = load_lanes(lanes), high = load_lanes(lanes + 16);
    max = max_of(low > high ? low : high);
  }
#else
  if (entries >= SIMD_FLOATS) {
    floats largest = load_lanes(row);
    for (i = SIMD_FLOATS; i + SIMD_FLOATS <= entries; i += SIMD_FLOATS) {
      const floats x = load_lanes(row + i);
      largest = x > largest ? x : largest;
    }
    max = max_of(largest);
  }
#endif
  for (; i < entries; ++i) max = load(row + i) > max ? load(row + i) : max;
  return max;
}

// The first `count` lanes, and -inf in the others.
DELIB_FAST_INLINE floats first_lanes(floats x, std::int64_t count) {
  floats out;
  for (int i = 0; i < SIMD_FLOATS; ++i) out[i] = i < count ? x[i] : -INFINITY;
  return out;
}

// As exp_of(float) in simd_math.h, to about one ulp.
DELIB_FAST_INLINE floats exp_of(floats x) {
  constexpr float LOWEST = -87.33654f, ROUND = 12582912.0f;
  constexpr floats ZERO = {};
  const floats clamped = ZERO + LOWEST > x ? ZERO + LOWEST : x;
  const floats shifted = clamped * 1.44269504088896341f + ROUND;
  const floats n = shifted - ROUND;
  const floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const floats mantissa = (p * r) * r + r + 1.0f;
  const floats scale = (floats)(((uints)shifted << 23) + (127u << 23));
  return x < LOWEST ? ZERO : mantissa * scale;
}

// e**x for x <= 0 and 16-bit logits: 2**n * 2**r for the integer n that is nearest to x * log2(e), and a minimax
// polynomial for 2**r. The relative error is about 2e-7 + 2e-8 * |x|. The result is exactly 1 for 0, 0 below the normal
// range, and NaN for NaN. It takes two thirds of the instructions of exp_of.
DELIB_FAST_INLINE floats short_exp_of(floats x) {
  constexpr float LOWEST = -87.33654f, ROUND = 12582912.0f, LOG2E = 1.44269502e+0f;
  constexpr floats ZERO = {};
#if SIMD_FLOATS == 16 && defined(__x86_64__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(LOWEST), _CMP_NLT_UQ);
  const floats clamped = (floats)_mm512_mask_blend_ps(normal, _mm512_set1_ps(LOWEST), (__m512)x);
#else
  const floats clamped = ZERO + LOWEST > x ? ZERO + LOWEST : x;
#endif
  const floats shifted = clamped * LOG2E + ROUND;
  const floats n = shifted - ROUND;
  const floats r = clamped * LOG2E - n;
  floats p = r * 1.3264727165e-3f + 9.6715126419e-3f;
  p = p * r + 5.5507337434e-2f;
  p = p * r + 2.4022242085e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.0f;
#if SIMD_FLOATS == 16 && defined(__x86_64__)
  return (floats)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const floats scale = (floats)(((uints)shifted << 23) + (127u << 23));
  return x < LOWEST ? ZERO : p * scale;
#endif
}

// The exponential that is accurate enough for logits of this type.
template <typename scalar_t, typename lanes_t>
DELIB_FAST_INLINE lanes_t exp_for(lanes_t x) {
  if constexpr (sizeof(scalar_t) == 2) return short_exp_of(x);
  return exp_of(x);
}

// As tanh_of(float).
DELIB_FAST_INLINE floats tanh_of(floats x) {
  const floats size = x < 0.0f ? -x : x;
  const floats e = exp_of(-2.0f * size);
  const floats far = (1.0f - e) / (1.0f + e);
  const floats s = x * x;
  floats p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const floats near = p * s * x + x;
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// log(x) for normal x > 0, to about one ulp: the polynomial of Cephes.
DELIB_FAST_INLINE floats log_of(floats x) {
  const uints bits = (uints)x;
  const floats below = (floats)((bits & 0x007fffffu) | 0x3f000000u);  // the mantissa, in [0.5, 1)
  const ints small = below < 0.70710678f;
  const floats exponent = __builtin_convertvector((ints)(bits >> 23) - 126 + small, floats);  // a mask of true is -1
  const floats f = (small ? below + below : below) - 1.0f;
  floats p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const floats square = f * f;
  const floats tail = (p * f) * square + exponent * -2.12194440e-4f - 0.5f * square;
  return (f + tail) + exponent * 0.693359375f;
}
DELIB_FAST_INLINE double log_of(double x) { return log(x); }

// The logit after the softcap.
template <bool PLAIN, typename lanes_t, typename acc_t>
DELIB_FAST_INLINE lanes_t capped(lanes_t z, acc_t softcap) {
  if (PLAIN || softcap == acc_t(0)) return z;
  return softcap * tanh_of(z / softcap);
}

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
