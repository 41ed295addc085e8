// The loss on the CPU: its objective, and the op that is registered for torch.ops.delib_fast.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "fused_head/bfloat16.h"
#include "fused_head/widened.h"
#include "linear_cross_entropy/cpu.h"

namespace delib_fast {

template <typename acc_t>
Chunk<acc_t>::Chunk(const at::Tensor& all_hidden, const SupervisedRows& rows, std::int64_t begin, std::int64_t end,
                    at::ScalarType dtype, const RowOptions<double>& wide)
    : size(end - begin),
      row_positions(rows.positions.data() + begin),
      targets(rows.targets.data() + begin),
      weights(rows.weights.data() + begin),
      options{static_cast<acc_t>(wide.softcap), static_cast<acc_t>(wide.z_loss),
              static_cast<acc_t>(wide.smoothing)},
      max(size, -std::numeric_limits<acc_t>::infinity()),
      sum(size, 0),
      total(size, 0),
      shift(size),
      partial(size),
      partial_total(size),
      target_logit(size),
      factor(size),
      offset(size),
      target_gradient(size),
      argmax(size, -1) {
  positions = at::from_blob(const_cast<std::int64_t*>(row_positions), {size}, at::kLong);
  hidden = at::index_select(all_hidden, 0, positions).to(dtype);
}

void cap_all(std::vector<float>& logits, float softcap) {
  row_kernels().cap_f32(logits.data(), static_cast<std::int64_t>(logits.size()), softcap);
}
void cap_all(std::vector<double>& logits, double softcap) {
  row_kernels().cap_f64(logits.data(), static_cast<std::int64_t>(logits.size()), softcap);
}

template <typename acc_t>
void Chunk<acc_t>::finish(std::int64_t vocabulary, Results& results) {
  if (options.softcap != 0) cap_all(target_logit, options.softcap);
  const bool plain = !results.general() && options.z_loss == 0;
  acc_t* nll = results.nll.data_ptr<acc_t>();
  bool* correct = results.correct.data_ptr<bool>();
  for (std::int64_t c = 0; c < size; ++c) {
    const auto weight = static_cast<acc_t>(weights[c]);
    const RowResult<acc_t> row =
        plain ? delib_fast::finish<true>(max[c], sum[c], total[c], target_logit[c], weight, vocabulary, options)
              : delib_fast::finish<false>(max[c], sum[c], total[c], target_logit[c], weight, vocabulary, options);
    factor[c] = row.factor;
    offset[c] = row.offset;
    target_gradient[c] = row.target_gradient;
    nll[row_positions[c]] = row.nll;
    correct[row_positions[c]] = argmax[c] == targets[c];
    results.loss_sum += weights[c] * static_cast<double>(row.loss);
  }
}

namespace {

// A row is supervised if its target is not `ignore_index`, its weight is not 0 and, if loss_positions is given, it is
// listed there.
SupervisedRows find_supervised_rows(const at::Tensor& targets, const std::optional<at::Tensor>& loss_weights,
                                    const std::optional<at::Tensor>& loss_positions, std::int64_t ignore_index,
                                    std::int64_t vocabulary) {
  const at::Tensor target = targets.contiguous();
  const at::Tensor weight = loss_weights ? loss_weights->to(at::kDouble).contiguous() : at::Tensor();
  const auto* target_at = target.const_data_ptr<std::int64_t>();
  const auto* weight_at = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  const Candidates candidates(loss_positions, target.size(0));
  SupervisedRows rows;
  for (std::int64_t i = 0; i < candidates.size(); ++i) {
    const std::int64_t position = candidates[i];
    if (target_at[position] == ignore_index || (weight_at && weight_at[position] == 0)) continue;
    check_target(target_at[position], position, vocabulary);
    rows.positions.push_back(position);
    rows.targets.push_back(target_at[position]);
    rows.weights.push_back(weight_at ? weight_at[position] : 1.0);
  }
  return rows;
}

// The loss as the objective of a driver (fused_head/head.h).
template <typename scalar, typename acc_t>
class LossObjective {
 public:
  using scalar_t = scalar;
  static constexpr bool HAS_LOOPS_BY_TOKEN = false;

  LossObjective(const at::Tensor& hidden, const SupervisedRows& rows, const Sweeps<scalar_t, acc_t>& plain,
                const Sweeps<scalar_t, acc_t>& general, Results& results)
      : hidden_(hidden), rows_(rows), sweeps_(results.general() ? general : plain), results_(results) {}

  std::int64_t size() const { return rows_.size(); }
  std::int64_t matrices() const { return 0; }
  void reserve(std::int64_t vocabulary, std::int64_t, bool) { vocabulary_ = vocabulary; }
  void begin(std::int64_t first, std::int64_t last) {
    chunk_.emplace(hidden_, rows_, first, last, dtype_of<scalar_t>, results_.options);
  }
  const at::Tensor& hidden() const { return chunk_->hidden; }
  const at::Tensor& positions() const { return chunk_->positions; }
  void add_logits(const Block<scalar_t>& block, const at::Tensor&) { chunk_->add_logits(block, sweeps_); }
  void finish(const Block<scalar_t>&) { chunk_->finish(vocabulary_, results_); }
  void to_gradient(const Block<scalar_t>& block) { chunk_->to_gradient(block, sweeps_); }

 private:
  const at::Tensor& hidden_;
  const SupervisedRows& rows_;
  const Sweeps<scalar_t, acc_t>& sweeps_;
  Results& results_;
  std::int64_t vocabulary_ = 0;
  std::optional<Chunk<acc_t>> chunk_;
};

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs linear_cross_entropy_cpu(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                 const std::optional<at::Tensor>& loss_weights,
                                 const std::optional<at::Tensor>& loss_positions, std::int64_t ignore_index,
                                 std::int64_t chunk_tokens, bool need_grad_hidden, bool need_grad_weight,
                                 double softcap, double z_loss, double label_smoothing, bool keep_dz,
                                 std::string_view gemm) {
  const auto acc = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = hidden.options();
  const SupervisedRows rows = find_supervised_rows(targets, loss_weights, loss_positions, ignore_index, weight.size(0));
  HeadGradients grads(hidden, weight, loss_positions, need_grad_hidden, need_grad_weight, keep_dz, gemm);
  Results results;
  results.options = {softcap, z_loss, label_smoothing};
  results.nll = at::zeros({hidden.size(0)}, options.dtype(acc));
  results.correct = at::zeros({hidden.size(0)}, options.dtype(at::kBool));
  const RowKernels& kernels = row_kernels();
  if (rows.size() == 0) {
    grads.set_to_zero();
  } else if (gemm == "bfloat16") {
    LossObjective<bf16_bits, float> objective(hidden, rows, kernels.plain_bf16, kernels.general_bf16, results);
    Bfloat16Head(weight, chunk_tokens, objective, grads).run();
  } else if (acc == at::kDouble) {
    LossObjective<double, double> objective(hidden, rows, kernels.plain_f64, kernels.general_f64, results);
    WidenedHead(weight, chunk_tokens, objective, grads).run();
  } else {
    LossObjective<float, float> objective(hidden, rows, kernels.plain_f32, kernels.general_f32, results);
    WidenedHead(weight, chunk_tokens, objective, grads).run();
  }
  at::Tensor loss_sum = at::full({}, results.loss_sum, options.dtype(acc));
  return {loss_sum, results.nll, results.correct, grads.grad_hidden, grads.grad_weight, grads.dz, grads.rows};
}

}  // namespace

TORCH_LIBRARY_IMPL(delib_fast, CPU, m) { m.impl("linear_cross_entropy_cpu", &linear_cross_entropy_cpu); }

}  // namespace delib_fast
