// The parts that both CPU paths use, and the ops that are registered for torch.ops.delib_fast.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "linear_cross_entropy/cpu.h"

namespace delib_fast {

std::int64_t equal_chunk(std::int64_t rows, std::int64_t max_rows) {
  constexpr std::int64_t VECTOR = 16;
  const std::int64_t chunks = std::max<std::int64_t>((rows + max_rows - 1) / max_rows, 1);
  const std::int64_t even = (rows + chunks - 1) / chunks;
  return std::max(std::min((even + VECTOR - 1) / VECTOR, max_rows / VECTOR), std::int64_t{1}) * VECTOR;
}

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

template struct Chunk<float>;
template struct Chunk<double>;

namespace {

// A row is supervised if its target is not `ignore_index`, its weight is not 0 and, if loss_positions is given, it is
// listed there.
SupervisedRows find_supervised_rows(const at::Tensor& targets, const std::optional<at::Tensor>& loss_weights,
                                    const std::optional<at::Tensor>& loss_positions, std::int64_t ignore_index,
                                    std::int64_t vocabulary) {
  const at::Tensor target = targets.contiguous();
  const at::Tensor weight = loss_weights ? loss_weights->to(at::kDouble).contiguous() : at::Tensor();
  const at::Tensor listed = loss_positions ? loss_positions->contiguous() : at::Tensor();
  const auto* target_at = target.const_data_ptr<std::int64_t>();
  const auto* weight_at = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  const auto* position_at = listed.defined() ? listed.const_data_ptr<std::int64_t>() : nullptr;  // also null if empty
  const std::int64_t tokens = target.size(0);
  const std::int64_t candidates = listed.defined() ? listed.size(0) : tokens;
  SupervisedRows rows;
  for (std::int64_t i = 0; i < candidates; ++i) {
    const std::int64_t position = position_at ? position_at[i] : i;
    TORCH_CHECK_VALUE(position >= 0 && position < tokens, "loss_positions[", i, "] is ", position,
                      ", which is not one of the ", tokens, " rows of hidden; take it from the same packed batch");
    if (target_at[position] == ignore_index || (weight_at && weight_at[position] == 0)) continue;
    TORCH_CHECK_VALUE(target_at[position] >= 0 && target_at[position] < vocabulary, "targets[", position, "] is ",
                      target_at[position], ", which is outside the vocabulary of ", vocabulary,
                      "; check that the tokenizer belongs to the model, or set the target to ignore_index");
    rows.positions.push_back(position);
    rows.targets.push_back(target_at[position]);
    rows.weights.push_back(weight_at ? weight_at[position] : 1.0);
  }
  return rows;
}

// Whether the processor has bfloat16 instructions. Without them torch's bfloat16 GEMM is many times slower than its
// float32 GEMM, so inputs are widened.
bool has_bfloat16_gemms() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

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
  Results results;
  results.need_grad_hidden = need_grad_hidden;
  results.need_grad_weight = need_grad_weight;
  results.options = {softcap, z_loss, label_smoothing};
  results.nll = at::zeros({hidden.size(0)}, options.dtype(acc));
  results.correct = at::zeros({hidden.size(0)}, options.dtype(at::kBool));
  results.grad_hidden = need_grad_hidden ? at::zeros(hidden.sizes(), options) : at::empty({0}, options);
  const bool bfloat16 = gemm == "bfloat16";
  TORCH_CHECK_VALUE(bfloat16 ? hidden.scalar_type() == at::kBFloat16 : gemm == "widened", "gemm=", gemm, " for ",
                    hidden.scalar_type(), "; it must be widened or, for bfloat16 inputs only, bfloat16");
  TORCH_CHECK_VALUE(!keep_dz || (bfloat16 && need_grad_weight && loss_positions),
                    "keep_dz needs need_grad_weight, loss_positions and gemm=bfloat16");
  const bool sums = need_grad_weight && !keep_dz;
  results.grad_weight = sums ? large_empty(weight.sizes(), acc) : at::empty({0}, options.dtype(acc));
  const std::int64_t columns = keep_dz ? leading_dimension(loss_positions->size(0)) : 0;
  results.dz = keep_dz ? large_empty({weight.size(0), columns}, at::kBFloat16) : at::empty({0}, options);
  results.rows = at::empty({columns, hidden.size(1)}, options);
  if (rows.size() == 0) {
    results.grad_weight.zero_(), results.dz.zero_(), results.rows.zero_();
  } else {
    (bfloat16 ? run_bfloat16 : run_widened)(hidden, weight, rows, chunk_tokens, results);
  }
  at::Tensor loss_sum = at::full({}, results.loss_sum, options.dtype(acc));
  return {loss_sum, results.nll, results.correct, results.grad_hidden, results.grad_weight, results.dz, results.rows};
}

// Returns scale * dz (V, K) . rows (K, H) in the dtype of both, rounded once.
at::Tensor weight_gradient(const at::Tensor& dz, const at::Tensor& rows, const at::Tensor& scale) {
  const bool fast = dz.scalar_type() == at::kBFloat16 && dz.is_contiguous() && dz.numel() > 0 && dz.size(1) % 2 == 0;
  if (fast) return bfloat16_product(dz, rows.contiguous(), scale.item<float>());
  // Other dtypes and layouts are only used in tests.
  return at::mm(dz.to(at::kFloat), rows.to(at::kFloat)).mul_(scale.item<float>()).to(dz.scalar_type());
}

template <typename from_t, typename to_t>
void scale_all(ScaleFn<from_t, to_t> scale, const at::Tensor& from, float factor, at::Tensor& to) {
  constexpr std::int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;
  const auto* source = static_cast<const from_t*>(from.const_data_ptr());
  auto* target = static_cast<to_t*>(to.data_ptr());
  at::parallel_for(0, from.numel(), MIN_ELEMENTS_PER_THREAD, [&](std::int64_t begin, std::int64_t end) {
    scale(source + begin, target + begin, end - begin, factor);
  });
}

// Returns gradient * factor as `dtype`, in one pass that writes to huge pages. at::mul_out with a cast takes eight
// times as long, and without huge pages most of the remaining time is page faults.
at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& factor, at::ScalarType dtype) {
  at::Tensor out = large_empty(gradient.sizes(), dtype);
  const at::Tensor from = gradient.contiguous();
  const RowKernels& kernels = row_kernels();
  const auto from_dtype = from.scalar_type();
  if (from_dtype == at::kFloat && dtype == at::kFloat) {
    scale_all(kernels.scale_f32, from, factor.item<float>(), out);
  } else if (from_dtype == at::kFloat && dtype == at::kBFloat16) {
    scale_all(kernels.scale_f32_to_bf16, from, factor.item<float>(), out);
  } else if (from_dtype == at::kBFloat16 && dtype == at::kBFloat16) {
    scale_all(kernels.scale_bf16, from, factor.item<float>(), out);
  } else {
    out.copy_(from.to(at::kDouble).mul(factor.to(at::kDouble)));  // other dtypes: only used for small tensors in tests
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(delib_fast, CPU, m) {
  m.impl("linear_cross_entropy_cpu", &linear_cross_entropy_cpu);
  m.impl("scale_gradient", &scale_gradient);
  m.impl("weight_gradient", &weight_gradient);
}
TORCH_LIBRARY_FRAGMENT(delib_fast, m) { m.def("has_bfloat16_gemms() -> bool", &has_bfloat16_gemms); }

}  // namespace delib_fast
