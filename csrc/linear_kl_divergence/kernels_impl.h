// The loops declared in kernels.h. for_each_simd_target.h includes this file once per instruction set.
//
// The statistics sweep reads the pair of blocks while both are in cache, a few entries of the vocabulary at a time: first
// the maxima, then the sums, so that a running sum is rescaled once for all of them. The gradient sweep overwrites the
// student's block. Each sweep exists for transposed blocks, where lanes are tokens and the sums are in memory, and for
// blocks by token, where lanes are entries of one token and the sums are in registers.
//
// Where a probability is 0, the product with its logarithm is set to 0: two logits of -inf (a masked vocabulary entry)
// add nothing.
#include <math.h>

#include <cstdint>

#include "fused_head/lanes.h"
#include "linear_kl_divergence/kernels.h"

namespace delib_fast::SIMD_TARGET {
namespace {

constexpr std::int64_t SUB_ROWS = 32;        // transposed blocks: rows between two updates of the sums
constexpr std::int64_t SUB_ENTRIES = 1024;  // blocks by token: entries between two updates of the sums

template <bool PLAIN, typename lanes_t, typename acc_t>
DELIB_FAST_INLINE lanes_t cooled(lanes_t difference, const PairOptions<acc_t>& options) {
  return PLAIN ? difference : difference * options.inverse_temperature;
}

// probability * logarithm, 0 if the probability is 0.
template <typename lanes_t>
DELIB_FAST_INLINE lanes_t product(lanes_t probability, lanes_t logarithm) {
  return select(probability == lanes_t{}, lanes_t{}, probability * logarithm);
}

// Lanes of both blocks: some pairs of logits, after the softcap.
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

// Whether the loops need a sum. The plain ones leave the cold sums at 0.
template <Direction DIRECTION, bool PLAIN>
constexpr bool is_needed(int sum) {
  if (sum == DIFFERENCE) return DIRECTION != Direction::jsd;
  return sum == SUM || sum == TEACHER_SUM || !PLAIN;
}

// Adds the terms of some pairs to the partial sums.
template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t, typename lanes_t, typename Add>
DELIB_FAST_INLINE void add_terms(const Pair<PLAIN, scalar_t, acc_t>& pair, lanes_t shift, lanes_t teacher_shift,
                                 const PairOptions<acc_t>& options, const Add& add) {
  const lanes_t x = pair.x - shift, y = pair.y - teacher_shift;
  const lanes_t e = exp_for<scalar_t>(cooled<PLAIN>(x, options));
  const lanes_t teacher_e = exp_for<scalar_t>(cooled<PLAIN>(y, options));
  add(SUM, e);
  add(TEACHER_SUM, teacher_e);
  if (DIRECTION == Direction::forward) add(DIFFERENCE, product(teacher_e, cooled<PLAIN>(pair.y - pair.x, options)));
  if (DIRECTION == Direction::reverse) add(DIFFERENCE, product(e, cooled<PLAIN>(pair.x - pair.y, options)));
  if (!PLAIN) add(COLD_SUM, exp_for<scalar_t>(x));
  if (!PLAIN) add(TEACHER_COLD_SUM, exp_for<scalar_t>(y));
}

// Multiplies the sums by what the change of the maxima requires.
template <Direction DIRECTION, bool PLAIN, typename acc_t, typename lanes_t, typename Rescale>
DELIB_FAST_INLINE void rescale_sums(lanes_t change, lanes_t teacher_change, const PairOptions<acc_t>& options,
                                    const Rescale& rescale) {
  const lanes_t factor = exp_of(cooled<PLAIN>(change, options));
  const lanes_t teacher_factor = exp_of(cooled<PLAIN>(teacher_change, options));
  rescale(SUM, factor);
  rescale(TEACHER_SUM, teacher_factor);
  if (DIRECTION == Direction::forward) rescale(DIFFERENCE, teacher_factor);
  if (DIRECTION == Direction::reverse) rescale(DIFFERENCE, factor);
  if (!PLAIN) rescale(COLD_SUM, exp_of(change));
  if (!PLAIN) rescale(TEACHER_COLD_SUM, exp_of(teacher_change));
}

// sum += partial, with Kahan's compensation. Partial sums and the compensation keep small probabilities from being
// rounded away against a sum near 1. The gradient of the reverse direction subtracts a mean of differences, which may be
// large, from one of them.
template <typename lanes_t>
DELIB_FAST_INLINE void add_partial(lanes_t partial, lanes_t& sum, lanes_t& lost) {
  const lanes_t term = partial - lost, next = sum + term, rounded = (next - sum) - term;
  lost = select(rounded == rounded, rounded, lanes_t{});  // NaN if the sum is infinite
  sum = next;
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
      rescale_sums<DIRECTION, PLAIN>(load_lanes(token.shift + c) - now,
                                     load_lanes(token.teacher_shift + c) - teacher_now, options,
                                     [&](int i, lanes_t factor) {
                                       store_lanes(token.sums[i] + c, load_lanes(token.sums[i] + c) * factor);
                                       store_lanes(token.lost[i] + c, load_lanes(token.lost[i] + c) * factor);
                                     });
      store_lanes(token.shift + c, now);
      store_lanes(token.teacher_shift + c, teacher_now);
      for (acc_t* partial : token.partial) store_lanes(partial + c, lanes_t{});
    }
    for (std::int64_t r = row; r < stop; ++r) {
      const scalar_t* logits = student.data + r * student.leading;
      const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
        add_terms<DIRECTION>(pair, load_lanes(token.shift + c), load_lanes(token.teacher_shift + c), options,
                             [&](int i, lanes_t term) {
                               store_lanes(token.partial[i] + c, load_lanes(token.partial[i] + c) + term);
                             });
      }
    }
    for (int i = 0; i < SUMS; ++i) {
      if (!is_needed<DIRECTION, PLAIN>(i)) continue;
      for (std::int64_t c = begin; c < end; c += WIDTH) {
        lanes_t sum = load_lanes(token.sums[i] + c), lost = load_lanes(token.lost[i] + c);
        add_partial(load_lanes(token.partial[i] + c), sum, lost);
        store_lanes(token.sums[i] + c, sum);
        store_lanes(token.lost[i] + c, lost);
      }
    }
  }
}

// What a sweep needs of the tokens: lanes of several tokens, or one token in all lanes.
template <typename lanes_t>
struct TokenLanes {
  lanes_t max, teacher_max, log_sum, teacher_log_sum, inverse_sum, teacher_inverse_sum, factor, teacher_factor, mean,
      nll_factor;
};

template <typename acc_t, typename Load>
DELIB_FAST_INLINE auto token_lanes(const PairFinished<acc_t>& token, const Load& load_at) {
  return TokenLanes<typename Lanes<acc_t>::type>{
      load_at(token.max),         load_at(token.teacher_max),         load_at(token.log_sum),
      load_at(token.teacher_log_sum), load_at(token.inverse_sum),     load_at(token.teacher_inverse_sum),
      load_at(token.factor),      load_at(token.teacher_factor),      load_at(token.mean),
      load_at(token.nll_factor)};
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
DELIB_FAST_INLINE MixtureTerms<lanes_t> mixture(const Pair<PLAIN, scalar_t, acc_t>& pair,
                                                const TokenLanes<lanes_t>& token, const PairOptions<acc_t>& options) {
  const lanes_t a = cooled<PLAIN>(pair.x - token.max, options), b = cooled<PLAIN>(pair.y - token.teacher_max, options);
  const lanes_t log_p = a - token.log_sum, log_q = b - token.teacher_log_sum;
  const lanes_t ratio = select(log_p == log_q, lanes_t{}, log_p - log_q);  // equal: also if both are -inf
  const auto student_larger = ratio >= acc_t(0);
  // Not exp(log p), which rounds at the magnitude of log p.
  const lanes_t larger = exp_for<scalar_t>(select(student_larger, a, b)) *
                         select(student_larger, token.inverse_sum, token.teacher_inverse_sum);
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
        const auto terms = mixture(pair, token_lanes(token, [&](const acc_t* p) { return load_lanes(p + c); }), options);
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

// The gradient of the student's logits.
template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t, typename lanes_t>
DELIB_FAST_INLINE lanes_t gradient_of(const Pair<PLAIN, scalar_t, acc_t>& pair, const TokenLanes<lanes_t>& token,
                                      const PairOptions<acc_t>& options) {
  const lanes_t x = pair.x - token.max;
  const lanes_t e = exp_for<scalar_t>(cooled<PLAIN>(x, options)), p = token.factor * e;
  lanes_t dz;
  if constexpr (DIRECTION == Direction::forward) {
    const lanes_t y = pair.y - token.teacher_max;
    dz = p - token.teacher_factor * exp_for<scalar_t>(cooled<PLAIN>(y, options));
  } else if constexpr (DIRECTION == Direction::reverse) {
    dz = product(p, cooled<PLAIN>(pair.x - pair.y, options) - token.mean);
  } else {
    dz = product(p, mixture(pair, token, options).over_m - token.mean);
  }
  dz += token.nll_factor * (PLAIN ? e : exp_for<scalar_t>(x));
  if (!PLAIN && options.softcap != acc_t(0)) {
    const lanes_t ratio = pair.x / options.softcap;
    dz *= acc_t(1) - ratio * ratio;
  }
  return dz;
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void gradient(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
              std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = 0; r < student.rows; ++r) {
    scalar_t* logits = student.data + r * student.leading;
    const scalar_t* teacher_logits = teacher.data + r * teacher.leading;
    for (std::int64_t c = begin; c < end; c += Lanes<acc_t>::WIDTH) {
      const Pair<PLAIN, scalar_t, acc_t> pair(logits + c, teacher_logits + c, options);
      const auto lanes = token_lanes(token, [&](const acc_t* p) { return load_lanes(p + c); });
      store_lanes(logits + c, gradient_of<DIRECTION>(pair, lanes, options));
    }
  }
}

// --- blocks by token ----------------------------------------------------------------------------------------------

// Runs `body(pair, i)` on the logits [i, i + WIDTH) of a row, for all of its entries. The lanes that follow the last entry
// are -inf in both.
template <bool PLAIN, typename scalar_t, typename acc_t, typename Body>
DELIB_FAST_INLINE void for_lanes(const scalar_t* logits, const scalar_t* teacher_logits, std::int64_t entries,
                                 const PairOptions<acc_t>& options, const Body& body) {
  constexpr std::int64_t WIDTH = Lanes<acc_t>::WIDTH;
  std::int64_t i = 0;
  for (; i + WIDTH <= entries; i += WIDTH) {
    body(Pair<PLAIN, scalar_t, acc_t>(logits + i, teacher_logits + i, options), i);
  }
  if (i == entries) return;
  Pair<PLAIN, scalar_t, acc_t> pair(logits + i, teacher_logits + i, options);
  pair.x = first_lanes(pair.x, entries - i);
  pair.y = first_lanes(pair.y, entries - i);
  body(pair, i);
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void row_statistics(Block<scalar_t> student, Block<scalar_t> teacher, PairRunning<acc_t> token,
                    PairOptions<acc_t> options, std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  using pair_t = Pair<PLAIN, scalar_t, acc_t>;
  for (std::int64_t c = begin; c < end; ++c) {
    for (std::int64_t first = 0; first < student.rows; first += SUB_ENTRIES) {
      const std::int64_t entries = first + SUB_ENTRIES < student.rows ? SUB_ENTRIES : student.rows - first;
      const scalar_t* logits = student.data + c * student.leading + first;
      const scalar_t* teacher_logits = teacher.data + c * teacher.leading + first;
      const acc_t largest = max_of_row(logits, entries), teacher_largest = max_of_row(teacher_logits, entries);
      const lanes_t block_max = capped<PLAIN>(lanes_t{} + largest, options.softcap);
      const lanes_t teacher_block_max = capped<PLAIN>(lanes_t{} + teacher_largest, options.teacher_softcap);
      const lanes_t max = select(block_max > token.max[c], block_max, lanes_t{} + token.max[c]);
      const lanes_t teacher_max =
          select(teacher_block_max > token.teacher_max[c], teacher_block_max, lanes_t{} + token.teacher_max[c]);
      const lanes_t shift = finite_shift(max), teacher_shift = finite_shift(teacher_max);
      rescale_sums<DIRECTION, PLAIN>(token.max[c] - shift, token.teacher_max[c] - teacher_shift, options,
                                     [&](int i, lanes_t factor) {
                                       token.sums[i][c] *= first_of(factor);
                                       token.lost[i][c] *= first_of(factor);
                                     });
      token.max[c] = first_of(max);
      token.teacher_max[c] = first_of(teacher_max);
      lanes_t partial[SUMS] = {};
      for_lanes<PLAIN>(logits, teacher_logits, entries, options, [&](const pair_t& pair, std::int64_t) {
        add_terms<DIRECTION>(pair, shift, teacher_shift, options, [&](int i, lanes_t term) { partial[i] += term; });
      });
      for (int i = 0; i < SUMS; ++i) {
        if (is_needed<DIRECTION, PLAIN>(i)) add_partial(sum_of(partial[i]), token.sums[i][c], token.lost[i][c]);
      }
    }
  }
}

template <bool PLAIN, typename scalar_t, typename acc_t>
void row_means(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token, PairOptions<acc_t> options,
               PairMeans<acc_t> out, std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  for (std::int64_t c = begin; c < end; ++c) {
    const auto lanes = token_lanes(token, [&](const acc_t* p) { return lanes_t{} + p[c]; });
    for (std::int64_t first = 0; first < student.rows; first += SUB_ENTRIES) {
      const std::int64_t entries = first + SUB_ENTRIES < student.rows ? SUB_ENTRIES : student.rows - first;
      lanes_t sum = {}, teacher_sum = {};
      for_lanes<PLAIN>(student.data + c * student.leading + first, teacher.data + c * teacher.leading + first, entries,
                       options, [&](const Pair<PLAIN, scalar_t, acc_t>& pair, std::int64_t) {
                         const auto terms = mixture(pair, lanes, options);
                         sum += product(terms.p, terms.over_m);
                         teacher_sum += product(terms.q, terms.teacher_over_m);
                       });
      out.student[c] += sum_of(sum);
      out.teacher[c] += sum_of(teacher_sum);
    }
  }
}

template <Direction DIRECTION, bool PLAIN, typename scalar_t, typename acc_t>
void row_gradient(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t> token,
                  PairOptions<acc_t> options, std::int64_t begin, std::int64_t end) {
  using lanes_t = typename Lanes<acc_t>::type;
  for (std::int64_t c = begin; c < end; ++c) {
    const auto lanes = token_lanes(token, [&](const acc_t* p) { return lanes_t{} + p[c]; });
    scalar_t* logits = student.data + c * student.leading;
    for_lanes<PLAIN>(logits, teacher.data + c * teacher.leading, student.rows, options,
                     [&](const Pair<PLAIN, scalar_t, acc_t>& pair, std::int64_t i) {
                       store_lanes(logits + i, gradient_of<DIRECTION>(pair, lanes, options));
                     });
  }
}

template <Direction DIRECTION, bool PLAIN, bool BY_TOKEN, typename scalar_t, typename acc_t>
constexpr PairSweeps<scalar_t, acc_t> sweeps_of() {
  PairSweeps<scalar_t, acc_t> sweeps{};
  if constexpr (BY_TOKEN) {
    sweeps.statistics = &row_statistics<DIRECTION, PLAIN, scalar_t, acc_t>;
    if (DIRECTION == Direction::jsd) sweeps.means = &row_means<PLAIN, scalar_t, acc_t>;
    sweeps.gradient = &row_gradient<DIRECTION, PLAIN, scalar_t, acc_t>;
  } else {
    sweeps.statistics = &statistics<DIRECTION, PLAIN, scalar_t, acc_t>;
    if (DIRECTION == Direction::jsd) sweeps.means = &means<PLAIN, scalar_t, acc_t>;
    sweeps.gradient = &gradient<DIRECTION, PLAIN, scalar_t, acc_t>;
  }
  return sweeps;
}

template <Direction DIRECTION, bool BY_TOKEN, typename scalar_t, typename acc_t>
constexpr PairSweepsByOptions<scalar_t, acc_t> both_of() {
  return {sweeps_of<DIRECTION, true, BY_TOKEN, scalar_t, acc_t>(),
          sweeps_of<DIRECTION, false, BY_TOKEN, scalar_t, acc_t>()};
}

template <bool BY_TOKEN, typename scalar_t, typename acc_t>
constexpr PairTable<scalar_t, acc_t> table_of() {
  return {{both_of<Direction::forward, BY_TOKEN, scalar_t, acc_t>(),
           both_of<Direction::reverse, BY_TOKEN, scalar_t, acc_t>(),
           both_of<Direction::jsd, BY_TOKEN, scalar_t, acc_t>()}};
}

template <typename acc_t>
acc_t cap(acc_t logit, acc_t softcap) {
  return final_logit<false>(logit, softcap);
}

const PairKernels PAIR_KERNELS = {table_of<false, float, float>(),
                                  table_of<false, double, double>(),
                                  table_of<false, bf16_bits, float>(),
                                  table_of<true, bf16_bits, float>(),
                                  &cap<float>,
                                  &cap<double>};

}  // namespace
}  // namespace delib_fast::SIMD_TARGET
