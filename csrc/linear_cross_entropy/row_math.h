// The arithmetic of one row of logits: its slices, its softmax statistics, its loss and its gradient. The CUDA kernel
// uses all of it, and the CPU kernels use `finish`. Except for the qualifiers there is no CUDA in this file, so
// tests/ops/test_linear_cross_entropy_cuda.py compiles it for the host and compares it with float64.
//
//   x    = softcap * tanh(z / softcap)        z is the output of the GEMM, with bias and scale; without a softcap x = z
//   nll  = logsumexp(x) - x[target]
//   loss = nll + smoothing * (x[target] - mean(x)) + z_loss * logsumexp(x)^2
//   dz   = weight * dloss/dz
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define DELIB_FAST_HD __host__ __device__ __forceinline__
#else
#define DELIB_FAST_HD inline
#endif

namespace delib_fast {

template <typename real_t>
struct RowOptions {
  real_t softcap;    // 0: off
  real_t z_loss;     // 0: off
  real_t smoothing;  // 0: off
};

DELIB_FAST_HD float fast_exp(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return expf(x);
#endif
}

// The softmax statistics of some of a row's logits.
struct Statistics {
  float max;
  float sum;            // of exp(x - max)
  float total;          // of x; computed unless PLAIN
  std::int32_t argmax;  // the first of equal logits
};

// The statistics of no logits. They are not member initialisers because variables in shared memory cannot have those.
DELIB_FAST_HD Statistics no_statistics() { return {-INFINITY, 0.0f, 0.0f, 0x7fffffff}; }

// Adds N consecutive entries, of which x[0] is entry `first`. Calls must be in increasing order of entries.
template <bool PLAIN, int N>
DELIB_FAST_HD void add(Statistics& s, const float (&x)[N], std::int32_t first) {
  float top = x[0];
  std::int32_t at = 0;
  for (int i = 1; i < N; ++i) {
    const bool larger = x[i] > top;
    top = larger ? x[i] : top;
    at = larger ? i : at;
  }
  if (top > s.max) {
    s.sum *= fast_exp(s.max - top);
    s.max = top;
    s.argmax = first + at;
  }
  const float shift = s.max == -INFINITY ? 0.0f : s.max;  // because -inf - -inf is NaN
  float partial = 0;
  for (int i = 0; i < N; ++i) partial += fast_exp(x[i] - shift);
  s.sum += partial;
  if (!PLAIN) {
    for (int i = 0; i < N; ++i) s.total += x[i];
  }
}

DELIB_FAST_HD Statistics merge(const Statistics& a, const Statistics& b) {
  Statistics both;
  both.max = a.max > b.max ? a.max : b.max;
  const float shift = both.max == -INFINITY ? 0.0f : both.max;
  both.sum = a.sum * fast_exp(a.max - shift) + b.sum * fast_exp(b.max - shift);
  both.total = a.total + b.total;
  const bool from_a = a.max > b.max || (a.max == b.max && a.argmax < b.argmax);
  both.argmax = from_a ? a.argmax : b.argmax;
  return both;
}

// Which options a kernel is compiled for: none; z-loss and label smoothing; or these and a softcap, whose tanh costs
// several times as many instructions as the rest of a row, even where it is not taken.
enum class Terms { NONE, LOSS, SOFTCAP };

// The logit after the softcap: the input of the softmax. `inverse_softcap` is 1 / softcap: a division per logit would cost
// as much as the tanh.
template <Terms TERMS>
DELIB_FAST_HD float final_logit(float z, const RowOptions<float>& options, float inverse_softcap) {
  return TERMS == Terms::SOFTCAP ? options.softcap * tanhf(z * inverse_softcap) : z;
}

// dx/dz, as a function of x.
template <typename real_t>
DELIB_FAST_HD real_t slope(real_t x, const RowOptions<real_t>& options) {
  const real_t ratio = options.softcap > 0 ? x / options.softcap : real_t(0);
  return real_t(1) - ratio * ratio;
}

// The loss of a row, and the values that its gradient needs.
template <typename real_t>
struct RowResult {
  real_t nll;
  real_t loss;             // nll plus label smoothing and z-loss, before the weight
  real_t max;
  real_t factor;           // of exp(x - max)
  real_t offset;           // subtracted from every entry (label smoothing)
  real_t target_gradient;  // computed without cancellation for p near 1; rounded once, when stored
};

// Computes the result from the max, sum and total of a row's Statistics. `target_logit` is the final logit; for a target
// outside the vocabulary it is NaN, which makes the loss NaN.
template <bool PLAIN, typename real_t>
DELIB_FAST_HD RowResult<real_t> finish(real_t max, real_t sum, real_t total, real_t target_logit, real_t weight,
                                       std::int64_t vocabulary, const RowOptions<real_t>& options) {
  RowResult<real_t> row;
  const real_t log_sum = log(sum);
  row.max = max;
  row.nll = (max - target_logit) + log_sum;  // lse - target_logit would round at the magnitude of the logits
  row.loss = row.nll;
  row.factor = weight / sum;
  row.offset = 0;
  row.target_gradient = weight * expm1(-row.nll);
  if (PLAIN) return row;
  const real_t lse = max + log_sum;
  const real_t share = options.smoothing / static_cast<real_t>(vocabulary);
  // Skipped if smoothing is off, because 0 times the -inf of a masked vocabulary entry is NaN.
  if (options.smoothing != 0) row.loss += options.smoothing * target_logit - share * total;
  row.loss += options.z_loss * lse * lse;
  const real_t z_slope = 2 * options.z_loss * lse;
  row.factor *= 1 + z_slope;
  row.offset = weight * share;
  row.target_gradient += weight * (z_slope * exp(-row.nll) + options.smoothing - share);
  row.target_gradient *= slope(target_logit, options);
  return row;
}

// dz of an entry other than the target. `inverse_softcap` is 1 / softcap.
template <Terms TERMS>
DELIB_FAST_HD float gradient(float x, const RowResult<float>& row, float inverse_softcap) {
  const float p = row.factor * fast_exp(x - row.max);
  if (TERMS == Terms::NONE) return p;
  if (TERMS == Terms::LOSS) return p - row.offset;
  const float ratio = x * inverse_softcap;
  return (p - row.offset) * (1.0f - ratio * ratio);
}

// The part of a row that one of `parts` thread blocks processes: the entries [begin, head_end) one at a time, then
// `vectors` aligned vectors of 16 bytes, then [tail_begin, end) one at a time.
struct Slice {
  std::int32_t begin, head_end, vectors, tail_begin, end;
};

// The maximum number of entries in a part: whole vectors, so that the parts of an aligned row are aligned.
DELIB_FAST_HD std::int32_t slice_size(std::int64_t vocabulary, int element_bytes, int parts) {
  const std::int64_t width = 16 / element_bytes;
  return static_cast<std::int32_t>((vocabulary + parts * width - 1) / (parts * width) * width);
}

DELIB_FAST_HD Slice slice_of(std::uint64_t row_address, std::int64_t vocabulary, int element_bytes, int part,
                             int parts) {
  const std::int64_t width = 16 / element_bytes;
  const std::int64_t size = slice_size(vocabulary, element_bytes, parts);
  const std::int64_t begin = part * size < vocabulary ? part * size : vocabulary;
  const std::int64_t end = begin + size < vocabulary ? begin + size : vocabulary;
  const std::uint64_t address = row_address + static_cast<std::uint64_t>(begin) * element_bytes;
  const std::int64_t misaligned = static_cast<std::int64_t>((16 - address % 16) % 16) / element_bytes;
  const std::int64_t head_end = begin + misaligned < end ? begin + misaligned : end;
  const std::int64_t vectors = (end - head_end) / width;
  return {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(head_end), static_cast<std::int32_t>(vectors),
          static_cast<std::int32_t>(head_end + vectors * width), static_cast<std::int32_t>(end)};
}

}  // namespace delib_fast
