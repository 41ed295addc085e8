// Elementary functions that the SIMD loops of the fused heads share. for_each_simd_target.h includes this file, through
// the loops, once per instruction set, so it has no include guard. They vectorise, because they have no branches.
#include <math.h>

#include <cstdint>

#include "fused_head/block.h"

namespace delib_fast::SIMD_TARGET {
namespace {

inline float bits_to_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline std::uint32_t float_to_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const bf16_bits* p) { return bits_to_float(static_cast<std::uint32_t>(*p) << 16); }

inline void store(float* p, float x) { *p = x; }
inline void store(double* p, double x) { *p = x; }
inline void store(bf16_bits* p, float x) {  // round to nearest even; a NaN stays a NaN
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<bf16_bits>(x != x ? 0x7fc0u : rounded);
}

inline double exp_of(double x) { return exp(x); }
inline double tanh_of(double x) { return tanh(x); }

// e**x for x <= 0 (a logit minus a maximum or a log-sum-exp), to about one ulp. The result is 0 below the normal range
// and NaN for NaN. The range reduction and the polynomial are those of Cephes, without branches so that compilers
// vectorise the loop.
inline float exp_of(float x) {
  constexpr float LOWEST = -87.33654f;
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: adding it puts the nearest integer into the low bits
  const float clamped = x < LOWEST ? LOWEST : (x > 88.0f ? 88.0f : x);
  const float shifted = clamped * 1.44269504088896341f + ROUND;
  const float n = shifted - ROUND;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = (p * r) * r + r + 1.0f;
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + (127u << 23));
  return x < LOWEST ? 0.0f : mantissa * scale;
}

// tanh to about one ulp: from exponentials, except near 0, where they cancel and the polynomial of Cephes is used.
inline float tanh_of(float x) {
  const float size = x < 0.0f ? -x : x;
  const float e = exp_of(-2.0f * size);
  const float far = (1.0f - e) / (1.0f + e);
  const float s = x * x;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const float near = p * s * x + x;
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// The logit after the softcap: the input of the softmax.
template <bool PLAIN, typename acc_t>
inline acc_t final_logit(acc_t z, acc_t softcap) {
  return PLAIN || softcap == acc_t(0) ? z : softcap * tanh_of(z / softcap);
}

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
