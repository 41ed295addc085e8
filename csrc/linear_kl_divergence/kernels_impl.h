// The loops declared in kernels.h. for_each_simd_target.h includes this file once per instruction set.
//
// The statistics sweep reads the pair of blocks while both are in cache, SUB_ROWS rows at a time: first the maxima, then
// the sums, so that a running sum is rescaled once per SUB_ROWS rows. The gradient sweep overwrites the student's block.
//
// Where a probability is 0, the product with its logarithm is set to 0: two logits of -inf (a masked vocabulary entry)
// add nothing.
#include <math.h>

#include <cstdint>

#include "fused_head/lanes.h"
#include "linear_kl_divergence/kernels.h"

namespace delib_fast::SIMD_TARGET {
namespace {

constexpr std::int64_t SUB_ROWS = 32;

template <bool PLAIN, typename lanes_t, typename acc_t>
DELIB_FAST_INLINE lanes_t cooled(lanes_t difference, const PairOptions<acc_t>& options) {
  return PLAIN ? difference : difference * options.inverse_temperature;
}

// probability * logarithm, 0 if the probability is 0.
template <typename lanes_t>
DELIB_FAST_INLINE lanes_t product(lanes_t probability, lanes_t logarithm) {
  return select(probability == lanes_t{}, lanes_t{}, probability * logarithm);
}

// Lanes of one row of both blocks: the logits of some tokens, after the softcap.
template <bool PLAIN, typename scalar_t, typename acc_t>
struct Pair {
  using lanes_t = typename Lanes<acc_t>::type;
  lanes_t x, y;
  DELIB_FAST_INLINE Pair(const scalar_t* student, const scalar_t* teacher, const PairOptions<acc_t>& options)
      : x(capped<PLAIN>(load_lanes(student), options.softcap)),
        y(capped<PLAIN>(load_lanes(teacher), options.teacher_softcap)) {}
};

// Before the first finite logit, subtract 0 and not -inf, so that a sum stays 0 instead of NaN.
template <typename lanes_t>
DELIB_FAST_INLINE lanes_t finite_shift(lanes_t max) {
  return select(max == lanes_t{} - INFINITY, lanes_t{}, max);
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void statistics(Block<scalar_t> student, Block<scalar_t> teacher, PairRunning<acc_t> token, PairOptions<acc_t> options,
                std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr std::int64_t WIDTH = Lanes<acc_t>::WIDTH;
  for (std::int64_t row = 0; row < student.rows; row += SUB_ROWS) {
    const std::int64_t stop = row + SUB_ROWS < student.rows ? row + SUB_ROWS : student.rows;
    for (std::int64_t c = begin; c < end; c += WIDTH) {
      store_lanes(token.shift + c, load_lanes(token.max + c));
      store_lanes(token.teacher_shift + c, load_lanes(token.teacher_max + c));
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* logits = student.data + r * student.leading;
      const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
        const lanes_t max = load_lanes(token.max + c), teacher_max = load_lanes(token.teacher_max + c);
        store_lanes(token.max + c, select(pair.x > max, pair.x, max));
        store_lanes(token.teacher_max + c, select(pair.y > teacher_max, pair.y, teacher_max));
      }
    }
    for (std::int64_t c = begin; c < end; c += WIDTH) {
      const lanes_t now = finite_shift(load_lanes(token.max + c));
      const lanes_t teacher_now = finite_shift(load_lanes(token.teacher_max + c));
      const lanes_t change = load_lanes(token.shift + c) - now;
      const lanes_t teacher_change = load_lanes(token.teacher_shift + c) - teacher_now;
      const auto rescale = [&](int i, lanes_t factor) {
        store_lanes(token.sums[i] + c, load_lanes(token.sums[i] + c) * factor);
        store_lanes(token.lost[i] + c, load_lanes(token.lost[i] + c) * factor);
      };
      rescale(SUM, exp_of(cooled<PLAIN>(change, options)));
      rescale(TEACHER_SUM, exp_of(cooled<PLAIN>(teacher_change, options)));
      if (DIRECTION == Direction::forward) rescale(DIFFERENCE, exp_of(cooled<PLAIN>(teacher_change, options)));
      if (DIRECTION == Direction::reverse) rescale(DIFFERENCE, exp_of(cooled<PLAIN>(change, options)));
      if (!PLAIN) rescale(COLD_SUM, exp_of(change));
      if (!PLAIN) rescale(TEACHER_COLD_SUM, exp_of(teacher_change));
      store_lanes(token.shift + c, now);
      store_lanes(token.teacher_shift + c, teacher_now);
      for (acc_t* partial : token.partial) store_lanes(partial + c, lanes_t{});
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* logits = student.data + r * student.leading;
      const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
        const lanes_t x = pair.x - load_lanes(token.shift + c), y = pair.y - load_lanes(token.teacher_shift + c);
        const lanes_t e = exp_for<scalar_t>(cooled<PLAIN>(x, options));
        const lanes_t teacher_e = exp_for<scalar_t>(cooled<PLAIN>(y, options));
        const auto add = [&](int i, lanes_t term) {
          store_lanes(token.partial[i] + c, load_lanes(token.partial[i] + c) + term);
        };
        add(SUM, e);
        add(TEACHER_SUM, teacher_e);
        if (DIRECTION == Direction::forward) {
          add(DIFFERENCE, product(teacher_e, cooled<PLAIN>(pair.y - pair.x, options)));
        }
        if (DIRECTION == Direction::reverse) {
          add(DIFFERENCE, product(e, cooled<PLAIN>(pair.x - pair.y, options)));
        }
        if (!PLAIN) add(COLD_SUM, exp_for<scalar_t>(x));
        if (!PLAIN) add(TEACHER_COLD_SUM, exp_for<scalar_t>(y));
      }
    }
    // Partial sums, and Kahan's compensation, keep small probabilities from being rounded away against a sum near 1. The
    // gradient of the reverse direction subtracts a mean of differences, which may be large, from one of them.
    for (int i = 0; i < SUMS; ++i) {
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        const lanes_t sum = load_lanes(token.sums[i] + c);
        const lanes_t term = load_lanes(token.partial[i] + c) - load_lanes(token.lost[i] + c);
        const lanes_t next = sum + term;
        const lanes_t lost = (next - sum) - term;
        store_lanes(token.lost[i] + c, select(lost == lost, lost, lanes_t{}));  // NaN if the sum is infinite
        store_lanes(token.sums[i] + c, next);
      }
    }
  }
}

// The terms of the Jensen-Shannon divergence with the mixture m = (1 - beta) p + beta q. They are computed from
// log p - log q, so that nothing underflows before its logarithm is taken.
template <typename lanes_t>
struct MixtureTerms {
  lanes_t p, q;
  lanes_t over_m;          // log p - log m
  lanes_t teacher_over_m;  // log q - log m
};

template <bool PLAIN, typename scalar_t, typename acc_t, typename lanes_t>
DELIB_FAST_INLINE MixtureTerms<lanes_t> mixture(lanes_t x, lanes_t y, const PairFinished<acc_t>& token,
                                                const PairOptions<acc_t>& options, std::int64_t c) {
  const lanes_t a = cooled<PLAIN>(x - load_lanes(token.max + c), options);
  const lanes_t b = cooled<PLAIN>(y - load_lanes(token.teacher_max + c), options);
  const lanes_t log_p = a - load_lanes(token.log_sum + c), log_q = b - load_lanes(token.teacher_log_sum + c);
  const lanes_t ratio = select(log_p == log_q, lanes_t{}, log_p - log_q);  // equal: also if both are -inf
  const auto student_larger = ratio >= acc_t(0);
  // Not exp(log p), which rounds at the magnitude of log p.
  const lanes_t larger =
      exp_for<scalar_t>(select(student_larger, a, b)) *
      select(student_larger, load_lanes(token.inverse_sum + c), load_lanes(token.teacher_inverse_sum + c));
  const lanes_t share = exp_for<scalar_t>(select(student_larger, -ratio, ratio));  // min(p, q) / max(p, q)
  const lanes_t one_of_p = lanes_t{} + (acc_t(1) - options.beta), one_of_q = lanes_t{} + options.beta;
  const lanes_t larger_over_m =
      -log_of(select(student_larger, one_of_p, one_of_q) + select(student_larger, one_of_q, one_of_p) * share);
  return {select(student_larger, larger, larger * share), select(student_larger, larger * share, larger),
          select(student_larger, larger_over_m, larger_over_m + ratio),
          select(student_larger, larger_over_m - ratio, larger_over_m)};
}

template <bool PLAIN, typename scalar_t, typename acc_t>
void means(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
           PairMeans<acc_t> out, std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  constexpr std::int64_t WIDTH = Lanes<acc_t>::WIDTH;
  const auto add = [](acc_t* sum, lanes_t term) { store_lanes(sum, load_lanes(sum) + term); };
  for (std::int64_t row = 0; row < student.rows; row += SUB_ROWS) {
    const std::int64_t stop = row + SUB_ROWS < student.rows ? row + SUB_ROWS : student.rows;
    for (std::int64_t c = begin; c < end; c += WIDTH) {
      store_lanes(out.partial + c, lanes_t{});
      store_lanes(out.teacher_partial + c, lanes_t{});
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* logits = student.data + r * student.leading;
      const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
        const MixtureTerms<lanes_t> terms = mixture<PLAIN, scalar_t>(pair.x, pair.y, token, options, c);
        add(out.partial + c, product(terms.p, terms.over_m));
        add(out.teacher_partial + c, product(terms.q, terms.teacher_over_m));
      }
    }
    for (std::int64_t c = begin; c < end; c += WIDTH) {
      add(out.student + c, load_lanes(out.partial + c));
      add(out.teacher + c, load_lanes(out.teacher_partial + c));
    }
  }
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void gradient(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
              std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  for (std::int64_t r = 0; r < student.rows; ++r) {
    scalar_t* logits = student.data + r * student.leading;
    const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
    for (std::int64_t c = begin; c < end; c += Lanes<acc_t>::WIDTH) {
      const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
      const lanes_t x = pair.x - load_lanes(token.max + c);
      const lanes_t e = exp_for<scalar_t>(cooled<PLAIN>(x, options)), p = load_lanes(token.factor + c) * e;
      lanes_t dz;
      if constexpr (DIRECTION == Direction::forward) {
        const lanes_t y = pair.y - load_lanes(token.teacher_max + c);
        dz = p - load_lanes(token.teacher_factor + c) * exp_for<scalar_t>(cooled<PLAIN>(y, options));
      } else if constexpr (DIRECTION == Direction::reverse) {
        dz = product(p, cooled<PLAIN>(pair.x - pair.y, options) - load_lanes(token.mean + c));
      } else {
        const lanes_t over_m = mixture<PLAIN, scalar_t>(pair.x, pair.y, token, options, c).over_m;
        dz = product(p, over_m - load_lanes(token.mean + c));
      }
      dz += load_lanes(token.nll_factor + c) * (PLAIN ? e : exp_for<scalar_t>(x));
      if (!PLAIN && options.softcap != acc_t(0)) {
        const lanes_t ratio = pair.x / options.softcap;
        dz *= acc_t(1) - ratio * ratio;
      }
      store_lanes(logits + c, dz);
    }
  }
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
constexpr PairSweeps<scalar_t, acc_t> sweeps_of() {
  PairMeansFn<scalar_t, acc_t> means_of = nullptr;
  if (DIRECTION == Direction::jsd) means_of = &means<PLAIN, scalar_t, acc_t>;
  return {&statistics<DIRECTION, PLAIN, scalar_t, acc_t>, means_of, &gradient<DIRECTION, PLAIN, scalar_t, acc_t>};
}

template <Direction DIRECTION, typename scalar_t, typename acc_t>
constexpr PairSweepsByOptions<scalar_t, acc_t> both_of() {
  return {sweeps_of<DIRECTION, true, scalar_t, acc_t>(), sweeps_of<DIRECTION, false, scalar_t, acc_t>()};
}

template <typename scalar_t, typename acc_t>
constexpr PairTable<scalar_t, acc_t> table_of() {
  return {{both_of<Direction::forward, scalar_t, acc_t>(), both_of<Direction::reverse, scalar_t, acc_t>(),
           both_of<Direction::jsd, scalar_t, acc_t>()}};
}

template <typename acc_t>
acc_t cap(acc_t logit, acc_t softcap) {
  return final_logit<false>(logit, softcap);
}

const PairKernels PAIR_KERNELS = {table_of<float, float>(), table_of<double, double>(), table_of<bf16_bits, float>(),
                                  &cap<float>, &cap<double>};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
