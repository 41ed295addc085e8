// The loops declared in kernels.h. for_each_simd_target.h includes this file once per instruction set.
//
// The statistics sweep reads the pair of blocks while both are in cache, SUB_ROWS rows at a time: first the maxima, then
// the sums, so that a running sum is rescaled once per SUB_ROWS rows. The gradient sweep overwrites the student's block.
//
// Where a probability is 0, the product with its logarithm is set to 0: two logits of -inf (a masked vocabulary entry)
// add nothing.
#include <math.h>

#include <cstdint>

#include "fused_head/simd_math.h"
#include "linear_kl_divergence/kernels.h"

namespace delib_fast::SIMD_TARGET {
namespace {

constexpr std::int64_t SUB_ROWS = 32;

// log(x) for normal x > 0, to about one ulp: the polynomial of Cephes, without branches so that compilers vectorise it.
inline float log_of(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const float below = bits_to_float((bits & 0x007fffffu) | 0x3f000000u);  // the mantissa, in [0.5, 1)
  const bool small = below < 0.70710678f;
  const float e = static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 126) - (small ? 1.0f : 0.0f);
  const float f = (small ? below + below : below) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float tail = (p * f) * square + e * -2.12194440e-4f - 0.5f * square;
  return (f + tail) + e * 0.693359375f;
}
inline double log_of(double x) { return log(x); }

template <typename acc_t>
constexpr acc_t MINUS_INFINITY = -static_cast<acc_t>(INFINITY);

template <bool PLAIN, typename acc_t>
inline acc_t cooled(acc_t difference, const PairOptions<acc_t>& options) {
  return PLAIN ? difference : difference * options.inverse_temperature;
}

// probability * logarithm, 0 if the probability is 0.
template <typename acc_t>
inline acc_t product(acc_t probability, acc_t logarithm) {
  return probability == acc_t(0) ? acc_t(0) : probability * logarithm;
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void statistics(Block<scalar_t> student, Block<scalar_t> teacher, PairRunning<acc_t> running,
                PairOptions<acc_t> options, std::int64_t begin, std::int64_t end) {
  acc_t* __restrict max = running.max;
  acc_t* __restrict teacher_max = running.teacher_max;
  acc_t* __restrict shift = running.shift;
  acc_t* __restrict teacher_shift = running.teacher_shift;
  acc_t* __restrict partial = running.partial[0];
  acc_t* __restrict teacher_partial = running.partial[1];
  acc_t* __restrict difference = running.partial[2];
  acc_t* __restrict cold = running.partial[3];
  acc_t* __restrict teacher_cold = running.partial[4];
  for (std::int64_t row = 0; row < student.rows; row += SUB_ROWS) {
    const std::int64_t stop = row + SUB_ROWS < student.rows ? row + SUB_ROWS : student.rows;
    for (std::int64_t c = begin; c < end; ++c) shift[c] = max[c];
    for (std::int64_t c = begin; c < end; ++c) teacher_shift[c] = teacher_max[c];
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* __restrict logits = student.data + r * student.leading;
      const scalar_t* __restrict teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; ++c) {
        const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), options.softcap);
        const acc_t y = final_logit<PLAIN, acc_t>(load(teacher_logits + c), options.teacher_softcap);
        max[c] = x > max[c] ? x : max[c];
        teacher_max[c] = y > teacher_max[c] ? y : teacher_max[c];
      }
    }
    for (std::int64_t c = begin; c < end; ++c) {
      // If every logit so far is -inf, subtract 0, so that the sum stays 0 instead of NaN.
      const acc_t now = max[c] == MINUS_INFINITY<acc_t> ? acc_t(0) : max[c];
      const acc_t teacher_now = teacher_max[c] == MINUS_INFINITY<acc_t> ? acc_t(0) : teacher_max[c];
      const acc_t scale = exp_of(cooled<PLAIN>(shift[c] - now, options));
      const acc_t teacher_scale = exp_of(cooled<PLAIN>(teacher_shift[c] - teacher_now, options));
      running.sum[c] *= scale;
      running.teacher_sum[c] *= teacher_scale;
      if (DIRECTION == Direction::forward) running.difference[c] *= teacher_scale;
      if (DIRECTION == Direction::reverse) running.difference[c] *= scale;
      if (!PLAIN) running.cold_sum[c] *= exp_of(shift[c] - now);
      if (!PLAIN) running.teacher_cold_sum[c] *= exp_of(teacher_shift[c] - teacher_now);
      shift[c] = now;
      teacher_shift[c] = teacher_now;
      partial[c] = teacher_partial[c] = difference[c] = 0;
      if (!PLAIN) cold[c] = teacher_cold[c] = 0;
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* __restrict logits = student.data + r * student.leading;
      const scalar_t* __restrict teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; ++c) {
        const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), options.softcap);
        const acc_t y = final_logit<PLAIN, acc_t>(load(teacher_logits + c), options.teacher_softcap);
        const acc_t e = exp_of(cooled<PLAIN>(x - shift[c], options));
        const acc_t teacher_e = exp_of(cooled<PLAIN>(y - teacher_shift[c], options));
        partial[c] += e;
        teacher_partial[c] += teacher_e;
        if (DIRECTION == Direction::forward) difference[c] += product(teacher_e, cooled<PLAIN>(y - x, options));
        if (DIRECTION == Direction::reverse) difference[c] += product(e, cooled<PLAIN>(x - y, options));
        if (!PLAIN) cold[c] += exp_of(x - shift[c]);
        if (!PLAIN) teacher_cold[c] += exp_of(y - teacher_shift[c]);
      }
    }
    // Partial sums keep small probabilities from being rounded away one at a time against a sum near 1.
    for (std::int64_t c = begin; c < end; ++c) {
      running.sum[c] += partial[c];
      running.teacher_sum[c] += teacher_partial[c];
      if (DIRECTION != Direction::jsd) running.difference[c] += difference[c];
      if (!PLAIN) running.cold_sum[c] += cold[c];
      if (!PLAIN) running.teacher_cold_sum[c] += teacher_cold[c];
    }
  }
}

// The terms of the Jensen-Shannon divergence with the mixture m = (1 - beta) p + beta q. They are computed from
// log p - log q, so that nothing underflows before its logarithm is taken.
template <typename acc_t>
struct MixtureTerms {
  acc_t log_p, log_q;    // the logarithms of the probabilities
  acc_t over_m;          // log p - log m
  acc_t teacher_over_m;  // log q - log m
  acc_t lesser;          // min(p, q) / max(p, q)
};

template <bool PLAIN, typename acc_t>
inline MixtureTerms<acc_t> mixture(acc_t x, acc_t y, const PairFinished<acc_t>& token,
                                   const PairOptions<acc_t>& options, std::int64_t c) {
  MixtureTerms<acc_t> terms;
  terms.log_p = cooled<PLAIN>(x - token.max[c], options) - token.log_sum[c];
  terms.log_q = cooled<PLAIN>(y - token.teacher_max[c], options) - token.teacher_log_sum[c];
  const acc_t ratio = terms.log_p == terms.log_q ? acc_t(0) : terms.log_p - terms.log_q;  // equal: also if both are -inf
  const bool student_larger = ratio >= acc_t(0);
  terms.lesser = exp_of(student_larger ? -ratio : ratio);
  const acc_t larger_share = student_larger ? acc_t(1) - options.beta : options.beta;
  const acc_t larger_over_m = -log_of(larger_share + (acc_t(1) - larger_share) * terms.lesser);
  terms.over_m = student_larger ? larger_over_m : larger_over_m + ratio;
  terms.teacher_over_m = student_larger ? larger_over_m - ratio : larger_over_m;
  return terms;
}

template <bool PLAIN, typename scalar_t, typename acc_t>
void means(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
           acc_t* __restrict student_mean, acc_t* __restrict teacher_mean, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = 0; r < student.rows; ++r) {
    const scalar_t* __restrict logits = student.data + r * student.leading;
    const scalar_t* __restrict teacher_logits = teacher.data + r * teacher.leading;
    for (std::int64_t c = begin; c < end; ++c) {
      const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), options.softcap);
      const acc_t y = final_logit<PLAIN, acc_t>(load(teacher_logits + c), options.teacher_softcap);
      const MixtureTerms<acc_t> terms = mixture<PLAIN>(x, y, token, options, c);
      const bool student_larger = terms.log_p >= terms.log_q;
      const acc_t larger = exp_of(student_larger ? terms.log_p : terms.log_q);
      const acc_t lesser = larger * terms.lesser;
      student_mean[c] += product(student_larger ? larger : lesser, terms.over_m);
      teacher_mean[c] += product(student_larger ? lesser : larger, terms.teacher_over_m);
    }
  }
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void gradient(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
              std::int64_t begin, std::int64_t end) {
  const acc_t* __restrict max = token.max;
  const acc_t* __restrict teacher_max = token.teacher_max;
  const acc_t* __restrict factor = token.factor;
  const acc_t* __restrict teacher_factor = token.teacher_factor;
  const acc_t* __restrict mean = token.mean;
  const acc_t* __restrict nll_factor = token.nll_factor;
  for (std::int64_t r = 0; r < student.rows; ++r) {
    scalar_t* __restrict logits = student.data + r * student.leading;
    const scalar_t* __restrict teacher_logits = teacher.data + r * teacher.leading;
    for (std::int64_t c = begin; c < end; ++c) {
      const acc_t x = final_logit<PLAIN, acc_t>(load(logits + c), options.softcap);
      const acc_t y = final_logit<PLAIN, acc_t>(load(teacher_logits + c), options.teacher_softcap);
      const acc_t e = exp_of(cooled<PLAIN>(x - max[c], options));
      const acc_t cold = PLAIN ? e : exp_of(x - max[c]);
      acc_t dz = 0;
      if (DIRECTION == Direction::forward) {
        dz = factor[c] * e - teacher_factor[c] * exp_of(cooled<PLAIN>(y - teacher_max[c], options));
      } else if (DIRECTION == Direction::reverse) {
        dz = product(factor[c] * e, cooled<PLAIN>(x - y, options) - mean[c]);
      } else {
        dz = product(factor[c] * e, mixture<PLAIN>(x, y, token, options, c).over_m - mean[c]);
      }
      dz += nll_factor[c] * cold;
      if (!PLAIN) {
        const acc_t ratio = options.softcap == acc_t(0) ? acc_t(0) : x / options.softcap;
        dz *= acc_t(1) - ratio * ratio;
      }
      store(logits + c, dz);
    }
  }
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
constexpr PairSweeps<scalar_t, acc_t> sweeps_of() {
  PairMeansFn<scalar_t, acc_t> means_of = nullptr;
  if (DIRECTION == Direction::jsd) means_of = &means<PLAIN, scalar_t, acc_t>;
  return {&statistics<DIRECTION, PLAIN, scalar_t, acc_t>, means_of, &gradient<DIRECTION, PLAIN, scalar_t, acc_t>};
}

template <typename scalar_t, typename acc_t>
constexpr PairTable<scalar_t, acc_t> table_of() {
  return {{{sweeps_of<Direction::forward, false, scalar_t, acc_t>(), sweeps_of<Direction::forward, true, scalar_t, acc_t>()},
           {sweeps_of<Direction::reverse, false, scalar_t, acc_t>(), sweeps_of<Direction::reverse, true, scalar_t, acc_t>()},
           {sweeps_of<Direction::jsd, false, scalar_t, acc_t>(), sweeps_of<Direction::jsd, true, scalar_t, acc_t>()}}};
}

template <typename acc_t>
acc_t cap(acc_t logit, acc_t softcap) {
  return final_logit<false>(logit, softcap);
}

const PairKernels PAIR_KERNELS = {table_of<float, float>(), table_of<double, double>(), table_of<bf16_bits, float>(),
                                  &cap<float>, &cap<double>};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
