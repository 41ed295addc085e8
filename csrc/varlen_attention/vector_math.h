// Vectors of floats and their elementary functions, for one instruction set. The loops include this file, once per
// instruction set, so it has no include guard.
#include <math.h>

#include <cstdint>

#include "varlen_attention/kernels.h"

namespace delib_fast::attention::SIMD_TARGET {
namespace {

constexpr int WIDTH = SIMD_FLOATS;

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef std::int32_t Integers __attribute__((vector_size(4 * WIDTH)));

inline float load(const float* p) { return *p; }
inline float load(const bf16_bits* p) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(*p) << 16); }
inline void store(float* p, float x) { *p = x; }
inline void store(bf16_bits* p, float x) {  // round to nearest even; a NaN stays a NaN
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
  *p = static_cast<bf16_bits>(x != x ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Vector splat(float x) { return Vector{} + x; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// e**x for x <= 0, to about one ulp, with the polynomial of Cephes. The result is 0 below the normal range and for
// -inf, and NaN for NaN.
inline Vector exp_of(Vector x) {
  const Vector lowest = splat(-87.33654f), round = splat(12582912.0f);  // 1.5 * 2**23
  const Vector clamped = x < lowest ? lowest : (x > splat(88.0f) ? splat(88.0f) : x);
  const Vector shifted = clamped * 1.44269504088896341f + round;
  const Vector n = shifted - round;
  const Vector r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vector mantissa = (p * r) * r + r + 1.0f;
  const Integers exponent = (__builtin_bit_cast(Integers, shifted) << 23) + (127 << 23);
  return x < lowest ? Vector{} : mantissa * __builtin_bit_cast(Vector, exponent);
}

inline float exp_one(float x) { return exp_of(splat(x))[0]; }

// tanh x to about one ulp: the polynomial of Cephes near 0, where 1 - 2 / (e**2x + 1) would cancel.
inline Vector tanh_of(Vector x) {
  const Vector magnitude = x < Vector{} ? -x : x, square = x * x;
  Vector p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vector e = exp_of(magnitude * -2.0f);
  const Vector far = (1.0f - e) / (1.0f + e);
  return magnitude < splat(0.625f) ? p * square * x + x : (x < Vector{} ? -far : far);
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace delib_fast::attention::SIMD_TARGET
