// The arithmetic of one row of logits: how it is cut up, its softmax statistics, its loss, its gradient. Used by the
// CUDA kernel (and `finish` by the CPU's), and compiled for the host by tests/ops/test_linear_cross_entropy_cuda.py,
// which holds it against float64: it has no CUDA in it but the qualifiers.
//
//   x    = softcap * tanh(scale * (z + bias) / softcap)        z is what the GEMM left; without options x = z
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
  real_t scale;      // 1: off
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

// What a softmax needs to know of some of a row's logits.
struct Statistics {
  float max;
  float sum;            // of exp(x - max)
  float total;          // of x; counted unless PLAIN
  std::int32_t argmax;  // the first of equals
};

// Of no logits. A function and no initialisers: shared memory takes none.
DELIB_FAST_HD Statistics no_statistics() { return {-INFINITY, 0.0f, 0.0f, 0x7fffffff}; }

// Takes N neighbours in, x[0] being entry `first`. Entries come in rising order.
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
  const float shift = s.max == -INFINITY ? 0.0f : s.max;  // -inf - -inf would be NaN
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

// The logit that the softmax sees.
template <bool PLAIN>
DELIB_FAST_HD float final_logit(float z, float bias, const RowOptions<float>& options) {
  if (PLAIN) return z;
  const float scaled = (z + bias) * options.scale;
  return options.softcap > 0 ? options.softcap * tanhf(scaled / options.softcap) : scaled;
}

// dx/dz, from x.
template <typename real_t>
DELIB_FAST_HD real_t slope(real_t x, const RowOptions<real_t>& options) {
  const real_t bent = options.softcap > 0 ? x / options.softcap : real_t(0);
  return options.scale * (real_t(1) - bent * bent);
}

// A finished row: what is reported of it, and what its gradient needs.
template <typename real_t>
struct RowResult {
  real_t nll;
  real_t loss;             // nll with smoothing and z-loss, without the weight
  real_t max;
  real_t factor;           // of exp(x - max)
  real_t offset;           // subtracted from every entry: smoothing
  real_t target_gradient;  // without cancellation where p is near 1; rounded once, when stored
};

// From a row's max, sum and total as in Statistics. `target_logit`, as the softmax sees it, is NaN for a target
// outside the vocabulary, which makes the loss NaN.
template <bool PLAIN, typename real_t>
DELIB_FAST_HD RowResult<real_t> finish(real_t max, real_t sum, real_t total, real_t target_logit, real_t weight,
                                       std::int64_t vocabulary, const RowOptions<real_t>& options) {
  RowResult<real_t> row;
  const real_t log_sum = log(sum);
  row.max = max;
  row.nll = (max - target_logit) + log_sum;  // not lse - target: that would round at the size of the logits
  row.loss = row.nll;
  row.factor = weight / sum;
  row.offset = 0;
  row.target_gradient = weight * expm1(-row.nll);
  if (PLAIN) return row;
  const real_t lse = max + log_sum;
  const real_t share = options.smoothing / static_cast<real_t>(vocabulary);
  // not where it is off: 0 * inf would make a masked-out entry's -inf a NaN
  if (options.smoothing != 0) row.loss += options.smoothing * target_logit - share * total;
  row.loss += options.z_loss * lse * lse;
  const real_t z_slope = 2 * options.z_loss * lse;
  row.factor *= 1 + z_slope;
  row.offset = weight * share;
  row.target_gradient += weight * (z_slope * exp(-row.nll) + options.smoothing - share);
  row.target_gradient *= slope(target_logit, options);
  return row;
}

// dz of an entry that is not the target.
template <bool PLAIN>
DELIB_FAST_HD float gradient(float x, const RowResult<float>& row, const RowOptions<float>& options) {
  const float p = row.factor * fast_exp(x - row.max);
  return PLAIN ? p : (p - row.offset) * slope(x, options);
}

// The part of a row that one of `parts` thread blocks has: entries [begin, head_end) one by one, then `vectors`
// aligned vectors of 16 bytes, then [tail_begin, end) one by one.
struct Slice {
  std::int32_t begin, head_end, vectors, tail_begin, end;
};

// How many entries a part has at most; whole vectors, so that parts of an aligned row are aligned.
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
