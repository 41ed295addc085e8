// The loops declared in row_kernels.h. for_each_simd_target.h includes this file once per instruction set.
//
// There are two sweeps over a block of logits. The statistics sweep reads the block while it is in cache, SUB_ROWS
// rows at a time: first the maxima, then the sums. A running sum is therefore rescaled once per SUB_ROWS rows and not
// once per element. The gradient sweep reads the block and overwrites it.
#include <math.h>

#include <cstdint>

#include "linear_cross_entropy/row_kernels.h"

#include "fused_head/simd_math.h"

namespace delib_fast::SIMD_TARGET {
namespace {

constexpr std::int64_t SUB_ROWS = 32;

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
};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
