// The divergence on the CPU: its objective, and the op that is registered for torch.ops.delib_fast.
//
// A chunk has two matrices of logits in the same layout: the student's, which the driver owns and in which the gradient is
// computed, and the teacher's. After the student's GEMM of a block, the objective computes the same block of the teacher's
// logits. If both share their weight, the block of the weight is in cache by then, so that the weight is read once.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "fused_head/bfloat16.h"
#include "fused_head/head.h"
#include "fused_head/widened.h"
#include "linear_kl_divergence/kernels.h"

namespace delib_fast {
namespace {

// The live rows: those whose divergence or whose nll has a weight.
struct LiveRows {
  std::vector<std::int64_t> positions;
  std::vector<std::int64_t> targets;  // -1 for none
  std::vector<double> weights, nll_weights;
  std::int64_t size() const { return static_cast<std::int64_t>(positions.size()); }
};

struct Weights {
  explicit Weights(const std::optional<at::Tensor>& given)
      : tensor(given ? given->to(at::kDouble).contiguous() : at::Tensor()),
        data(given ? tensor.const_data_ptr<double>() : nullptr) {}
  at::Tensor tensor;
  const double* data;
};

LiveRows find_live_rows(std::int64_t tokens, const std::optional<at::Tensor>& targets,
                        const std::optional<at::Tensor>& loss_weights, const std::optional<at::Tensor>& nll_weights,
                        const std::optional<at::Tensor>& loss_positions, std::int64_t ignore_index,
                        std::int64_t vocabulary) {
  const at::Tensor target = targets ? targets->contiguous() : at::Tensor();
  const auto* target_at = target.defined() ? target.const_data_ptr<std::int64_t>() : nullptr;
  const Weights weight(loss_weights), nll_weight(nll_weights);
  const Candidates candidates(loss_positions, tokens);
  LiveRows rows;
  for (std::int64_t i = 0; i < candidates.size(); ++i) {
    const std::int64_t position = candidates[i];
    const bool has_target = target_at && target_at[position] != ignore_index;
    const double of_divergence = weight.data ? weight.data[position] : 1.0;
    const double of_nll = has_target && nll_weight.data ? nll_weight.data[position] : 0.0;
    if (of_divergence == 0 && of_nll == 0) continue;
    if (has_target) check_target(target_at[position], position, vocabulary);
    rows.positions.push_back(position);
    rows.targets.push_back(has_target ? target_at[position] : -1);
    rows.weights.push_back(of_divergence);
    rows.nll_weights.push_back(of_nll);
  }
  return rows;
}

// The arguments and results of one call that the chunks share.
struct Divergence {
  const at::Tensor &hidden, &weight, &teacher_hidden, &teacher_weight;
  const LiveRows& rows;
  Direction direction;
  PairOptions<double> options;
  at::Tensor divergence, nll, teacher_nll;  // (T,); zeros on entry
  double loss_sum = 0;
  bool plain() const {
    return options.softcap == 0 && options.teacher_softcap == 0 && options.inverse_temperature == 1;
  }
  bool shares_weight() const {
    return weight.const_data_ptr() == teacher_weight.const_data_ptr() && weight.sizes() == teacher_weight.sizes() &&
           weight.strides() == teacher_weight.strides();
  }
};

float cap_of(float logit, float softcap) { return pair_kernels().cap_f32(logit, softcap); }
double cap_of(double logit, double softcap) { return pair_kernels().cap_f64(logit, softcap); }

// The softmax statistics of one chunk and what its gradient needs, one entry per token (`size` includes the padding).
template <typename acc_t>
struct Tokens {
  explicit Tokens(std::int64_t size)
      : max(size, -std::numeric_limits<acc_t>::infinity()), teacher_max(max), sum(size, 0), teacher_sum(sum),
        cold_sum(sum), teacher_cold_sum(sum), difference(sum), scratch((2 + 2 * SUMS) * size, 0), target_logit(sum),
        teacher_target_logit(sum), log_sum(sum), teacher_log_sum(sum), inverse_sum(sum), teacher_inverse_sum(sum), factor(sum), teacher_factor(sum), mean(sum),
        teacher_mean(sum), nll_factor(sum), nll(sum), target_gradient(sum) {}

  PairRunning<acc_t> running() {
    const auto size = static_cast<std::int64_t>(max.size());
    PairRunning<acc_t> out{max.data(), teacher_max.data(),
                           {sum.data(), teacher_sum.data(), difference.data(), cold_sum.data(), teacher_cold_sum.data()},
                           scratch.data(), scratch.data() + size, {}, {}};
    for (int i = 0; i < SUMS; ++i) {
      out.partial[i] = scratch.data() + (2 + i) * size;
      out.lost[i] = scratch.data() + (2 + SUMS + i) * size;
    }
    return out;
  }
  PairMeans<acc_t> means() {
    return {mean.data(), teacher_mean.data(), scratch.data(), scratch.data() + max.size()};
  }
  PairFinished<acc_t> finished() const {
    return {max.data(),         teacher_max.data(), log_sum.data(), teacher_log_sum.data(), inverse_sum.data(),
            teacher_inverse_sum.data(), factor.data(), teacher_factor.data(), mean.data(),    nll_factor.data()};
  }

  std::vector<acc_t> max, teacher_max, sum, teacher_sum, cold_sum, teacher_cold_sum, difference, scratch, target_logit,
      teacher_target_logit, log_sum, teacher_log_sum, inverse_sum, teacher_inverse_sum, factor, teacher_factor, mean, teacher_mean, nll_factor,
      nll, target_gradient;
};

// The divergence as the objective of a driver (fused_head/head.h).
template <typename scalar, typename acc_t>
class DivergenceObjective {
 public:
  using scalar_t = scalar;
  static constexpr at::ScalarType DTYPE = dtype_of<scalar_t>;
  static constexpr bool HAS_LOOPS_BY_TOKEN = DTYPE == at::kBFloat16;

  explicit DivergenceObjective(Divergence& call)
      : call_(call), rows_(call.rows),
        wide_sweeps_(table_of<acc_t>(pair_kernels(), false).choose(call.direction, call.plain())),
        options_{static_cast<acc_t>(call.options.softcap), static_cast<acc_t>(call.options.teacher_softcap),
                 static_cast<acc_t>(call.options.inverse_temperature), static_cast<acc_t>(call.options.beta)},
        shares_weight_(call.shares_weight()), teacher_weight_(call.teacher_weight, DTYPE) {}

  std::int64_t size() const { return rows_.size(); }
  std::int64_t matrices() const { return 1; }
  void reserve(std::int64_t vocabulary, std::int64_t step, bool by_token) {
    vocabulary_ = vocabulary;
    by_token_ = by_token;
    sweeps_ = &table_of<scalar_t>(pair_kernels(), by_token).choose(call_.direction, call_.plain());
    buffer_ = large_empty({(by_token ? leading_by_token(vocabulary) : vocabulary) * step}, DTYPE);
  }

  void begin(std::int64_t first, std::int64_t last) {
    first_ = first;
    size_ = last - first;
    tokens_.emplace(padded_size());
    auto* positions = const_cast<std::int64_t*>(rows_.positions.data()) + first;
    positions_ = at::from_blob(positions, {size_}, at::kLong);
    hidden_ = at::index_select(call_.hidden, 0, positions_).to(DTYPE);
    teacher_hidden_ = at::index_select(call_.teacher_hidden, 0, positions_).to(DTYPE);
    if (by_token_) {
      const std::int64_t leading = leading_by_token(vocabulary_);
      teacher_logits_ = buffer_.narrow(0, 0, leading * size_).view({size_, leading});
      return;
    }
    // Padded with rows of zeros, as in bfloat16.h, so that the rows of the teacher's logits are whole cache lines.
    const std::int64_t leading = padded_size();
    teacher_hidden_ = at::constant_pad_nd(teacher_hidden_, {0, 0, 0, leading - size_});
    teacher_logits_ = buffer_.narrow(0, 0, vocabulary_ * leading).view({vocabulary_, leading});
  }
  const at::Tensor& hidden() const { return hidden_; }
  const at::Tensor& positions() const { return positions_; }

  void add_logits(const Block<scalar_t>& student, const at::Tensor& weight) {
    const at::Tensor teacher_weight = shares_weight_ ? weight : teacher_weight_.block(student.first_row, student.rows);
    at::Tensor out = teacher_logits_.narrow(by_token_ ? 1 : 0, student.first_row, student.rows);
    if (by_token_) {
      at::mm_out(out, teacher_hidden_, teacher_weight.t());
    } else {
      at::mm_out(out, teacher_weight, teacher_hidden_.t());
    }
    const Block<scalar_t> teacher = teacher_block(student);
    for_tokens([&](std::int64_t begin, std::int64_t end) {
      sweeps_->statistics(student, teacher, tokens_->running(), options_, begin, end);
    });
    for_targets(student, [&](std::int64_t c, std::int64_t row) {
      tokens_->target_logit[c] = value_of(entry(student, c, row));
      tokens_->teacher_target_logit[c] = value_of(entry(teacher, c, row));
    });
  }

  void finish(const Block<scalar_t>& student) {
    for (std::int64_t c = 0; c < size_; ++c) finish_statistics(c);
    if (sweeps_->means != nullptr) {
      const Block<scalar_t> teacher = teacher_block(student);
      for_tokens([&](std::int64_t begin, std::int64_t end) {
        sweeps_->means(student, teacher, tokens_->finished(), options_, tokens_->means(), begin, end);
      });
    }
    for (std::int64_t c = 0; c < size_; ++c) finish_token(c);
    finish_targets();
  }

  void to_gradient(const Block<scalar_t>& student) {
    for_tokens([&](std::int64_t begin, std::int64_t end) {
      sweeps_->gradient(student, teacher_block(student), tokens_->finished(), options_, begin, end);
    });
    // Only an nll changes the target's entry in another way than the others. It is computed in full precision.
    for_targets(student, [&](std::int64_t c, std::int64_t row) {
      if (rows_.nll_weights[first_ + c] != 0) {
        assign(entry(student, c, row), tokens_->target_gradient[c]);
      }
    });
  }

 private:
  template <typename number_t>
  static const PairTable<number_t, acc_t>& table_of(const PairKernels& kernels, bool by_token) {
    if constexpr (dtype_of<number_t> == at::kBFloat16) return by_token ? kernels.bf16_by_token : kernels.bf16;
    if constexpr (dtype_of<number_t> == at::kFloat) return kernels.f32;
    if constexpr (dtype_of<number_t> == at::kDouble) return kernels.f64;
  }

  Block<scalar_t> teacher_block(const Block<scalar_t>& student) const {
    const std::int64_t leading = teacher_logits_.stride(0), step = by_token_ ? 1 : leading;
    return {data_of<scalar_t>(teacher_logits_) + student.first_row * step, leading, student.first_row, student.rows};
  }
  // The logit of token c for row `row` of the block.
  scalar_t* entry(const Block<scalar_t>& block, std::int64_t c, std::int64_t row) const {
    return block.data + (by_token_ ? c * block.leading + row : row * block.leading + c);
  }

  // Runs `sweep` on all tokens, split between threads. In transposed blocks these include the padding of the chunk.
  template <typename Function>
  void for_tokens(const Function& sweep) const {
    if (by_token_) {
      at::parallel_for(0, size_, 1, sweep);
      return;
    }
    at::parallel_for(0, padded_size() / COLUMNS, MIN_COLUMNS / COLUMNS,
                     [&](std::int64_t begin, std::int64_t end) { sweep(begin * COLUMNS, end * COLUMNS); });
  }
  std::int64_t padded_size() const { return leading_dimension(size_); }

  template <typename Function>
  void for_targets(const Block<scalar_t>& block, const Function& call) {
    for (std::int64_t c = 0; c < size_; ++c) {
      const std::int64_t row = rows_.targets[first_ + c] - block.first_row;
      if (rows_.targets[first_ + c] >= 0 && row >= 0 && row < block.rows) call(c, row);
    }
  }

  void finish_statistics(std::int64_t c) {
    Tokens<acc_t>& t = *tokens_;
    if (call_.plain()) {
      t.cold_sum[c] = t.sum[c];
      t.teacher_cold_sum[c] = t.teacher_sum[c];
    }
    t.log_sum[c] = std::log(t.sum[c]);
    t.teacher_log_sum[c] = std::log(t.teacher_sum[c]);
    t.inverse_sum[c] = 1 / t.sum[c];
    t.teacher_inverse_sum[c] = 1 / t.teacher_sum[c];
  }

  // Computes the losses of a token and what its gradient needs.
  void finish_token(std::int64_t c) {
    Tokens<acc_t>& t = *tokens_;
    const auto weight = static_cast<acc_t>(rows_.weights[first_ + c]);
    const auto nll_weight = static_cast<acc_t>(rows_.nll_weights[first_ + c]);
    const acc_t inverse_temperature = options_.inverse_temperature;
    // The difference of the log-sum-exps, without rounding at their magnitude.
    const acc_t lse_difference =
        (t.max[c] - t.teacher_max[c]) * inverse_temperature + std::log(t.sum[c] / t.teacher_sum[c]);
    acc_t divergence = 0;
    t.factor[c] = weight * inverse_temperature / t.sum[c];
    if (call_.direction == Direction::forward) {
      divergence = t.difference[c] / t.teacher_sum[c] + lse_difference;
      t.teacher_factor[c] = weight * inverse_temperature / t.teacher_sum[c];
    } else if (call_.direction == Direction::reverse) {
      t.mean[c] = t.difference[c] / t.sum[c];
      divergence = t.mean[c] - lse_difference;
    } else {
      divergence = options_.beta * t.teacher_mean[c] + (1 - options_.beta) * t.mean[c];
      t.factor[c] *= 1 - options_.beta;
    }
    if (divergence < 0) divergence = 0;  // by rounding; a NaN stays
    t.nll_factor[c] = nll_weight / t.cold_sum[c];
    const std::int64_t position = rows_.positions[first_ + c];
    data_of<acc_t>(call_.divergence)[position] = divergence;
    if (weight != 0) call_.loss_sum += rows_.weights[first_ + c] * static_cast<double>(divergence);
    if (rows_.targets[first_ + c] < 0) return;
    t.nll[c] = (t.max[c] - capped(t.target_logit[c], options_.softcap)) + std::log(t.cold_sum[c]);
    data_of<acc_t>(call_.nll)[position] = t.nll[c];
    data_of<acc_t>(call_.teacher_nll)[position] =
        (t.teacher_max[c] - capped(t.teacher_target_logit[c], options_.teacher_softcap)) +
        std::log(t.teacher_cold_sum[c]);
    if (nll_weight != 0) call_.loss_sum += rows_.nll_weights[first_ + c] * static_cast<double>(t.nll[c]);
  }

  // Computes the gradients of the targets' logits: the sweep's, without the nll, plus that of the nll, in which the
  // probability minus 1 does not cancel.
  void finish_targets() {
    Tokens<acc_t>& t = *tokens_;
    const std::int64_t columns = padded_size();
    const std::vector<acc_t> no_nll(columns, 0);
    PairFinished<acc_t> finished = t.finished();
    finished.nll_factor = no_nll.data();
    t.target_gradient = t.target_logit;
    wide_sweeps_.gradient({t.target_gradient.data(), columns, 0, 1},
                          {t.teacher_target_logit.data(), columns, 0, 1}, finished, options_, 0, columns);
    for (std::int64_t c = 0; c < size_; ++c) {
      const acc_t softcap = options_.softcap;
      const acc_t ratio = softcap == 0 ? 0 : capped(t.target_logit[c], softcap) / softcap;
      const auto nll_weight = static_cast<acc_t>(rows_.nll_weights[first_ + c]);
      t.target_gradient[c] += nll_weight * std::expm1(-t.nll[c]) * (1 - ratio * ratio);
    }
  }

  static acc_t capped(acc_t logit, acc_t softcap) { return softcap == 0 ? logit : cap_of(logit, softcap); }

  Divergence& call_;
  const LiveRows& rows_;
  const PairSweeps<scalar_t, acc_t>* sweeps_ = nullptr;
  const PairSweeps<acc_t, acc_t>& wide_sweeps_;
  const PairOptions<acc_t> options_;
  const bool shares_weight_;
  WideWeight teacher_weight_;
  std::int64_t vocabulary_ = 0, first_ = 0, size_ = 0;
  bool by_token_ = false;
  std::optional<Tokens<acc_t>> tokens_;
  at::Tensor positions_, hidden_, teacher_hidden_, teacher_logits_, buffer_;
};

Direction direction_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "forward" || name == "reverse" || name == "jsd", "direction=", name,
                    "; it must be forward, reverse or jsd");
  return name == "forward" ? Direction::forward : name == "reverse" ? Direction::reverse : Direction::jsd;
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                           at::Tensor>;

Outputs linear_kl_divergence_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& teacher_hidden,
                                 const at::Tensor& teacher_weight, const std::optional<at::Tensor>& targets,
                                 const std::optional<at::Tensor>& loss_weights,
                                 const std::optional<at::Tensor>& nll_weights,
                                 const std::optional<at::Tensor>& loss_positions, std::int64_t ignore_index,
                                 std::int64_t chunk_tokens, bool need_grad_hidden, bool need_grad_weight,
                                 std::string_view direction, double beta, double temperature, double softcap,
                                 double teacher_softcap, bool keep_dz, std::string_view gemm) {
  const auto acc = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = hidden.options().dtype(acc);
  const LiveRows rows = find_live_rows(hidden.size(0), targets, loss_weights, nll_weights, loss_positions,
                                       ignore_index, weight.size(0));
  HeadGradients grads(hidden, weight, loss_positions, need_grad_hidden, need_grad_weight, keep_dz, gemm);
  const auto per_token = [&] { return at::zeros({hidden.size(0)}, options); };
  Divergence call{hidden, weight, teacher_hidden, teacher_weight, rows, direction_of(direction),
                  {softcap, teacher_softcap, 1 / temperature, beta}, per_token(), per_token(), per_token()};
  if (rows.size() == 0) {
    grads.set_to_zero();
  } else if (gemm == "bfloat16") {
    DivergenceObjective<bf16_bits, float> objective(call);
    Bfloat16Head(weight, chunk_tokens, objective, grads).run();
  } else if (acc == at::kDouble) {
    DivergenceObjective<double, double> objective(call);
    WidenedHead(weight, chunk_tokens, objective, grads).run();
  } else {
    DivergenceObjective<float, float> objective(call);
    WidenedHead(weight, chunk_tokens, objective, grads).run();
  }
  const at::Tensor loss_sum = at::full({}, call.loss_sum, options);
  return {loss_sum,          call.divergence,   call.nll, call.teacher_nll,
          grads.grad_hidden, grads.grad_weight, grads.dz, grads.rows};
}

}  // namespace

TORCH_LIBRARY_IMPL(delib_fast, CPU, m) { m.impl("linear_kl_divergence_cpu", &linear_kl_divergence_cpu); }

}  // namespace delib_fast
