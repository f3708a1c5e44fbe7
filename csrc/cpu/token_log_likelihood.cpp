// One chunk of the vocabulary into the running log-sum-exp of each row, and the gradient of a chunk.
//   u = logit_scale x + bias, z = cap tanh(u / cap);   log p = z[target] - logsumexp z
//   Parallel over   rows; a row's chunk is walked twice (maximum, then exponentials)
//   Memory traffic  the chunk of logits, [N, C]: read twice, written once where probabilities are kept
//   Precision       the dtype of sums
//   Deterministic   yes: lanes are added in a fixed order
#include "cpu/common.h"

namespace qpeft {
namespace {

constexpr int kLanes = 16;  // partial sums: the compiler may not reorder one sum, but vectorises sixteen

template <typename Sum>
struct Logit {  // x -> z, vectorisable
  const Sum* bias;
  Sum scale, cap;

  bool identity() const { return !bias && scale == 1 && cap == 0; }
  void apply(Sum* x, int64_t C) const {
    for (int64_t c = 0; c < C; ++c) x[c] *= scale;
    if (bias)
      for (int64_t c = 0; c < C; ++c) x[c] += bias[c];
    if (cap != 0)
      for (int64_t c = 0; c < C; ++c) x[c] = cap * vector_tanh(x[c] / cap);
  }
};

template <typename Sum>
Sum max_of(const Sum* z, int64_t C) {
  Sum lane[kLanes], max = -INFINITY;
  std::fill(lane, lane + kLanes, max);
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = std::max(lane[l], z[c + l]);
  for (; c < C; ++c) max = std::max(max, z[c]);
  for (int l = 0; l < kLanes; ++l) max = std::max(max, lane[l]);
  return max;
}

// sum of exp(z - max); with kKeep z becomes exp(z - max).
template <bool kKeep, typename Sum>
Sum sum_exp(Sum* z, int64_t C, Sum max) {
  Sum lane[kLanes] = {}, sum = 0;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const Sum e = vector_exp(z[c + l] - max);
      if (kKeep) z[c + l] = e;
      lane[l] += e;
    }
  for (; c < C; ++c) {
    const Sum e = vector_exp(z[c] - max);
    if (kKeep) z[c] = e;
    sum += e;
  }
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

template <typename Sum>
const Sum* data_or_null(const std::optional<Tensor>& x) {
  return x ? static_cast<const Sum*>(x->const_data_ptr()) : nullptr;
}

void chunk(Tensor logits, std::optional<Tensor> bias, const Tensor target_ids, int64_t first, double logit_scale,
           std::optional<double> soft_cap, Tensor running, bool keep_probabilities) {
  check_token_log_likelihood_chunk(logits, bias, target_ids, running);
  const int64_t N = logits.size(0), C = logits.size(1), stride = logits.stride(0);
  if (N == 0 || C == 0) return;
  const auto* target_at = static_cast<const int64_t*>(target_ids.const_data_ptr());
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Logit<Sum> logit{data_or_null<Sum>(bias), static_cast<Sum>(logit_scale), static_cast<Sum>(soft_cap.value_or(0))};
    const SoftCap<Sum> capped{logit.cap};
    auto* x = static_cast<Sum*>(logits.mutable_data_ptr());
    auto* max_at = static_cast<Sum*>(running.mutable_data_ptr());
    Sum *sum_at = max_at + N, *target_z = sum_at + N, *factor = target_z + N;
    parallel(N, 16384 / C, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Sum* z = x + row * stride;
        if (!logit.identity()) logit.apply(z, C);
        const int64_t target = target_at[row] - first;
        if (target >= 0 && target < C) target_z[row] = z[target];
        const Sum max = std::max(max_at[row], max_of(z, C));
        if (max == -INFINITY) {  // every word so far is forbidden: exp(-inf - -inf) would be NaN
          factor[row] = 1;
          if (keep_probabilities) std::fill(z, z + C, Sum(0));
          continue;
        }
        factor[row] = std::exp(max_at[row] - max);
        max_at[row] = max;
        if (!keep_probabilities) {
          sum_at[row] = sum_at[row] * factor[row] + sum_exp<false>(z, C, max);
        } else if (logit.cap == 0) {
          sum_at[row] = sum_at[row] * factor[row] + sum_exp<true>(z, C, max);
        } else {  // the slope needs z, so the exponentials are taken once more
          sum_at[row] = sum_at[row] * factor[row] + sum_exp<false>(z, C, max);
          for (int64_t c = 0; c < C; ++c) z[c] = vector_exp(z[c] - max) * capped.slope(z[c]);
        }
      }
    });
  });
}

void chunk_backward(Tensor logits, std::optional<Tensor> bias, const Tensor target_ids, int64_t first, double logit_scale,
                    std::optional<double> soft_cap, const Tensor lse, const Tensor grad) {
  check_token_log_likelihood_chunk_backward(logits, bias, target_ids, lse, grad);
  const int64_t N = logits.size(0), C = logits.size(1), stride = logits.stride(0);
  if (N == 0 || C == 0) return;
  const auto* target_at = static_cast<const int64_t*>(target_ids.const_data_ptr());
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Logit<Sum> logit{data_or_null<Sum>(bias), static_cast<Sum>(logit_scale), static_cast<Sum>(soft_cap.value_or(0))};
    const SoftCap<Sum> capped{logit.cap};
    auto* x = static_cast<Sum*>(logits.mutable_data_ptr());
    const auto* lse_at = static_cast<const Sum*>(lse.const_data_ptr());
    const auto* grad_at = static_cast<const Sum*>(grad.const_data_ptr());
    parallel(N, 16384 / C, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Sum* z = x + row * stride;
        const Sum g = grad_at[row], l = lse_at[row];
        if (g == 0) {  // a row that does not count must not bring in its infinities
          std::fill(z, z + C, Sum(0));
          continue;
        }
        if (!logit.identity()) logit.apply(z, C);
        const int64_t target = target_at[row] - first;
        const bool here = target >= 0 && target < C;
        const Sum slope = here ? capped.slope(z[target]) : Sum(0);
        if (logit.cap == 0)
          for (int64_t c = 0; c < C; ++c) z[c] = -g * vector_exp(z[c] - l);
        else
          for (int64_t c = 0; c < C; ++c) z[c] = -g * vector_exp(z[c] - l) * capped.slope(z[c]);
        if (here) z[target] += g * slope;
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("token_log_likelihood_chunk", TORCH_BOX(&chunk));
  m.impl("token_log_likelihood_chunk_backward", TORCH_BOX(&chunk_backward));
}

}  // namespace
}  // namespace qpeft
