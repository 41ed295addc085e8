// The arithmetic of one row of logits: how it is cut up, its softmax statistics, its loss, its gradient. Used by the
// CUDA kernel, and compiled for the host by tests/ops/test_linear_cross_entropy_cuda.py, which holds it against
// float64: it has no CUDA in it but the qualifiers.
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

struct RowOptions {
  float scale;      // 1: off
  float softcap;    // 0: off
  float z_loss;     // 0: off
  float smoothing;  // 0: off
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
DELIB_FAST_HD float final_logit(float z, float bias, const RowOptions& options) {
  if (PLAIN) return z;
  const float scaled = (z + bias) * options.scale;
  return options.softcap > 0 ? options.softcap * tanhf(scaled / options.softcap) : scaled;
}

// dx/dz, from x.
DELIB_FAST_HD float slope(float x, const RowOptions& options) {
  const float bent = options.softcap > 0 ? x / options.softcap : 0.0f;
  return options.scale * (1.0f - bent * bent);
}

// A finished row: what is reported of it, and what its gradient needs.
struct RowResult {
  float nll;
  float loss;             // nll with smoothing and z-loss, without the weight
  float max;
  float factor;           // of exp(x - max)
  float offset;           // subtracted from every entry: smoothing
  float target_gradient;  // computed in float32 without cancellation where p is near 1; rounded once, when stored
};

// `target_logit` is NaN for a target outside the vocabulary, which makes the loss NaN.
template <bool PLAIN>
DELIB_FAST_HD RowResult finish(const Statistics& s, float target_logit, float weight, std::int64_t vocabulary,
                               const RowOptions& options) {
  RowResult row;
  const float log_sum = logf(s.sum);
  row.max = s.max;
  row.nll = (s.max - target_logit) + log_sum;  // not lse - target: that would round at the size of the logits
  row.loss = row.nll;
  row.factor = weight / s.sum;
  row.offset = 0;
  row.target_gradient = weight * expm1f(-row.nll);
  if (PLAIN) return row;
  const float lse = s.max + log_sum;
  const float share = options.smoothing / static_cast<float>(vocabulary);
  // not where it is off: 0 * inf would make a masked-out entry's -inf a NaN
  if (options.smoothing != 0) row.loss += options.smoothing * target_logit - share * s.total;
  row.loss += options.z_loss * lse * lse;
  const float z_slope = 2.0f * options.z_loss * lse;
  row.factor *= 1.0f + z_slope;
  row.offset = weight * share;
  row.target_gradient += weight * (z_slope * fast_exp(-row.nll) + options.smoothing - share);
  row.target_gradient *= slope(target_logit, options);
  return row;
}

// dz of an entry that is not the target.
template <bool PLAIN>
DELIB_FAST_HD float gradient(float x, const RowResult& row, const RowOptions& options) {
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
