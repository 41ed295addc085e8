// The loops declared in row_kernels.h. for_each_simd_target.h includes this file once per instruction set.
//
// There are two sweeps over a block of logits. The statistics sweep reads the block while it is in cache, SUB_ROWS
// rows at a time: first the maxima, then the sums. A running sum is therefore rescaled once per SUB_ROWS rows and not
// once per element. The gradient sweep reads the block and overwrites it.
#include <math.h>

#include <cstdint>

#include "linear_cross_entropy/row_kernels.h"

namespace delib_fast::SIMD_TARGET {
namespace {

constexpr std::int64_t SUB_ROWS = 32;

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

template <bool PLAIN, typename scalar_t, typename acc_t>
void statistics(Block<scalar_t> block, Running<acc_t> running, acc_t softcap, std::int64_t begin, std::int64_t end) {
  acc_t* __restrict max = running.max;
  acc_t* __restrict sum = running.sum;
  acc_t* __restrict total = running.total;
  acc_t* __restrict partial_total = running.partial_total;
  acc_t* __restrict shift = running.shift;
  acc_t* __restrict partial = running.partial;
  std::int32_t* __restrict argmax = running.argmax;
  for (std::int64_t row = 0; row < block.rows; row += SUB_ROWS) {
    const std::int64_t stop = row + SUB_ROWS < block.rows ? row + SUB_ROWS : block.rows;
    for (std::int64_t c = begin; c < end; ++c) shift[c] = max[c];
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* __restrict logits = block.data + r * block.leading;
      const auto entry = static_cast<std::int32_t>(block.first_row + r);
      for (std::int64_t c = begin; c < end; ++c) {
        const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), softcap);
        const bool larger = x > max[c];  // strict: the first of equal logits is the argmax, as in torch
        argmax[c] = larger ? entry : argmax[c];
        max[c] = larger ? x : max[c];
      }
    }
    for (std::int64_t c = begin; c < end; ++c) {
      // If every logit so far is -inf, subtract 0, so that the sum stays 0 instead of NaN.
      const acc_t now = max[c] == -static_cast<acc_t>(INFINITY) ? acc_t(0) : max[c];
      sum[c] *= exp_of(shift[c] - now);
      shift[c] = now;
      partial[c] = 0;
      if (!PLAIN) partial_total[c] = 0;
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* __restrict logits = block.data + r * block.leading;
      for (std::int64_t c = begin; c < end; ++c) {
        const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), softcap);
        partial[c] += exp_of(x - shift[c]);
        if (!PLAIN) partial_total[c] += x;
      }
    }
    // Partial sums keep small probabilities from being rounded away one at a time against a sum near 1.
    for (std::int64_t c = begin; c < end; ++c) {
      sum[c] += partial[c];
      if (!PLAIN) total[c] += partial_total[c];
    }
  }
}

template <bool PLAIN, typename scalar_t, typename acc_t>
void gradient(Block<scalar_t> block, Finished<acc_t> token, acc_t softcap, std::int64_t begin, std::int64_t end) {
  const acc_t* __restrict max = token.max;
  const acc_t* __restrict factor = token.factor;
  const acc_t* __restrict offset = token.offset;
  for (std::int64_t r = 0; r < block.rows; ++r) {
    scalar_t* __restrict logits = block.data + r * block.leading;
    for (std::int64_t c = begin; c < end; ++c) {
      const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), softcap);
      acc_t dz = factor[c] * exp_of(x - max[c]);
      if (!PLAIN) {
        const acc_t ratio = softcap == acc_t(0) ? acc_t(0) : x / softcap;
        dz = (dz - offset[c]) * (acc_t(1) - ratio * ratio);
      }
      store(logits + c, dz);
    }
  }
}

template <typename acc_t>
void cap(acc_t* logits, std::int64_t count, acc_t softcap) {
  for (std::int64_t i = 0; i < count; ++i) logits[i] = final_logit<false>(logits[i], softcap);
}

template <typename from_t, typename to_t>
void scale(const from_t* __restrict from, to_t* __restrict to, std::int64_t count, float factor) {
  for (std::int64_t i = 0; i < count; ++i) store(to + i, load(from + i) * factor);
}

const RowKernels ROW_KERNELS = {
    SIMD_NAME,
    {&statistics<true, float, float>, &gradient<true, float, float>},
    {&statistics<false, float, float>, &gradient<false, float, float>},
    {&statistics<true, double, double>, &gradient<true, double, double>},
    {&statistics<false, double, double>, &gradient<false, double, double>},
    {&statistics<true, bf16_bits, float>, &gradient<true, bf16_bits, float>},
    {&statistics<false, bf16_bits, float>, &gradient<false, bf16_bits, float>},
    &cap<float>,
    &cap<double>,
    &scale<float, float>,
    &scale<float, bf16_bits>,
    &scale<bf16_bits, bf16_bits>,
};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
