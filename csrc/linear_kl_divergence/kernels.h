// The loops over a pair of blocks of logits, of the student and of the teacher, in plain C types: one table of functions
// per instruction set. A block is transposed or by token (fused_head/block.h). In a transposed block every loop runs along
// tokens, COLUMNS at a time: the rows of both blocks, and the arrays of the tokens, are padded to a multiple of it. What
// the padding contains is overwritten or ignored.
//
//   a = x / temperature, b = y / temperature       x, y: the logits of the student and of the teacher, after the softcap
//   p = softmax(a), q = softmax(b)
//
// The "plain" loops support neither a softcap nor a temperature, and are faster.
#pragma once

#include <cstdint>

#include "fused_head/block.h"

namespace delib_fast {

constexpr std::int64_t COLUMNS = 16;

enum class Direction { forward, reverse, jsd };  // KL(q || p), KL(p || q), and their mixture

template <typename acc_t>
struct PairOptions {
  acc_t softcap;          // of the student; 0 for none
  acc_t teacher_softcap;  // 0 for none
  acc_t inverse_temperature;
  acc_t beta;  // the share of the teacher in the mixture; used by jsd only
};

// Running statistics, one array of tokens each. A sum is of exp((logit - max) / temperature), a cold sum of
// exp(logit - max); the plain loops leave cold sums at 0, because both are equal. The difference is
// Σ exp(..y..) (b - a) forward and Σ exp(..x..) (a - b) reverse.
enum { SUM, TEACHER_SUM, DIFFERENCE, COLD_SUM, TEACHER_COLD_SUM, SUMS };
template <typename acc_t>
struct PairRunning {
  acc_t *max, *teacher_max;
  acc_t* sums[SUMS];
  acc_t *shift, *teacher_shift, *partial[SUMS];  // scratch of transposed blocks
  acc_t* lost[SUMS];                             // what rounding has taken from the sums; 0 at the start
};

// What the other sweeps need, one entry per token.
template <typename acc_t>
struct PairFinished {
  const acc_t *max, *teacher_max;
  const acc_t *log_sum, *teacher_log_sum;  // used by jsd only, as are the next two
  const acc_t *inverse_sum, *teacher_inverse_sum;
  const acc_t* factor;                     // of exp((x - max) / temperature)
  const acc_t* teacher_factor;             // forward: of exp((y - teacher_max) / temperature), subtracted
  const acc_t* mean;                       // reverse: E_p[a - b], jsd: E_p[log p - log m]
  const acc_t* nll_factor;                 // of exp(x - max)
};

template <typename scalar_t, typename acc_t>
using PairStatisticsFn = void (*)(Block<scalar_t> student, Block<scalar_t> teacher, PairRunning<acc_t>,
                                  PairOptions<acc_t>, std::int64_t begin, std::int64_t end);  // tokens [begin, end)

// jsd only: Σ p (log p - log m) is added to `student` and Σ q (log q - log m) to `teacher`.
template <typename acc_t>
struct PairMeans {
  acc_t *student, *teacher;
  acc_t *partial, *teacher_partial;  // scratch of transposed blocks
};
template <typename scalar_t, typename acc_t>
using PairMeansFn = void (*)(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t>, PairOptions<acc_t>,
                             PairMeans<acc_t>, std::int64_t begin, std::int64_t end);

// Replaces the student's logits of the tokens [begin, end) with their gradient.
template <typename scalar_t, typename acc_t>
using PairGradientFn = void (*)(Block<scalar_t> student, Block<scalar_t> teacher, PairFinished<acc_t>,
                                PairOptions<acc_t>, std::int64_t begin, std::int64_t end);

template <typename scalar_t, typename acc_t>
struct PairSweeps {
  PairStatisticsFn<scalar_t, acc_t> statistics;
  PairMeansFn<scalar_t, acc_t> means;  // null unless jsd
  PairGradientFn<scalar_t, acc_t> gradient;
};

template <typename scalar_t, typename acc_t>
struct PairSweepsByOptions {
  PairSweeps<scalar_t, acc_t> plain, general;
};

template <typename scalar_t, typename acc_t>
struct PairTable {
  PairSweepsByOptions<scalar_t, acc_t> by_direction[3];
  const PairSweeps<scalar_t, acc_t>& choose(Direction direction, bool plain) const {
    const auto& both = by_direction[static_cast<int>(direction)];
    return plain ? both.plain : both.general;
  }
};

struct PairKernels {
  PairTable<float, float> f32;
  PairTable<double, double> f64;
  PairTable<bf16_bits, float> bf16;
  PairTable<bf16_bits, float> bf16_by_token;
  // logit = softcap * tanh(logit / softcap), bitwise identical to what the sweeps compute.
  float (*cap_f32)(float logit, float softcap);
  double (*cap_f64)(double logit, double softcap);
};

// The table for the widest instruction set that this processor supports.
const PairKernels& pair_kernels();

}  // namespace delib_fast
