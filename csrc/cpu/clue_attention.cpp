// Softmax of attention scores over the distinct tokens of each document, and its backward.
//   weights[p, j, r] = counts[p, j] exp(s[slot(p, j), r] - max) / sum;   ds = weights * (grad_weights - sum of weights * grad_weights)
//   Parallel over   forward: documents x stripes of columns; backward: stripes of columns, documents in order
//   Memory traffic  a few passes over [n, stripe], out of the cache
//   Precision       the dtype of sums
//   Deterministic   yes: each sum has one fixed order
#include "cpu/common.h"

namespace qpeft {
namespace {

constexpr int64_t kStripe = 32;  // columns: two cache lines of float32

Tensor softmax(const Tensor scores, const Tensor slots, const Tensor counts, int64_t first_slot) {
  check_clue_attention_softmax(scores, slots, counts);
  const int64_t U = scores.size(0), R = scores.size(1), P = slots.size(0), n = slots.size(1);
  const Tensor weights = torch::stable::new_empty(scores, {P, n, R});
  const auto* slot_at = static_cast<const int32_t*>(slots.const_data_ptr());
  const auto* count_at = static_cast<const int32_t*>(counts.const_data_ptr());
  const int64_t stripes = (R + kStripe - 1) / kStripe;
  dispatch_sum(scores.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const auto* score_at = static_cast<const Sum*>(scores.const_data_ptr());
    auto* weight_at = static_cast<Sum*>(weights.mutable_data_ptr());
    parallel(P * stripes, 8192 / (n * kStripe + 1), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t p = unit / stripes, first = unit % stripes * kStripe, width = std::min(kStripe, R - first);
        const int32_t* slot = slot_at + p * n;
        const auto row = [&](int64_t j) {  // nullptr: padding
          const int64_t u = slot[j] - first_slot;
          return slot[j] < 0 || u < 0 || u >= U ? nullptr : score_at + u * R + first;
        };
        Sum max[kStripe], sum[kStripe];
        std::fill(max, max + kStripe, Sum(-INFINITY));
        std::fill(sum, sum + kStripe, Sum(0));
        for (int64_t j = 0; j < n; ++j)
          if (const Sum* s = row(j))
            for (int64_t r = 0; r < width; ++r) max[r] = std::max(max[r], s[r]);
        for (int64_t j = 0; j < n; ++j) {
          Sum* w = weight_at + (p * n + j) * R + first;
          const Sum* s = row(j);
          if (!s) {
            std::fill(w, w + width, Sum(0));
            continue;
          }
          const Sum count = static_cast<Sum>(count_at[p * n + j]);
          for (int64_t r = 0; r < width; ++r) {
            w[r] = count * vector_exp(s[r] - max[r]);
            sum[r] += w[r];
          }
        }
        for (int64_t r = 0; r < width; ++r) sum[r] = sum[r] == 0 ? Sum(0) : 1 / sum[r];  // no token: zeros, not NaN
        for (int64_t j = 0; j < n; ++j) {
          Sum* w = weight_at + (p * n + j) * R + first;
          for (int64_t r = 0; r < width; ++r) w[r] *= sum[r];
        }
      }
    });
  });
  return weights;
}

void softmax_backward(const Tensor weights, Tensor grad_weights, const Tensor slots, int64_t first_slot,
                      Tensor grad_scores) {
  check_clue_attention_softmax_backward(weights, grad_weights, slots, grad_scores);
  const int64_t U = grad_scores.size(0), R = grad_scores.size(1), P = slots.size(0), n = slots.size(1);
  const auto* slot_at = static_cast<const int32_t*>(slots.const_data_ptr());
  const int64_t stripes = (R + kStripe - 1) / kStripe;
  dispatch_sum(weights.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const auto* weight_at = static_cast<const Sum*>(weights.const_data_ptr());
    auto* grad_at = static_cast<Sum*>(grad_weights.mutable_data_ptr());
    auto* out = static_cast<Sum*>(grad_scores.mutable_data_ptr());
    parallel(stripes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t stripe = begin; stripe < end; ++stripe) {
        const int64_t first = stripe * kStripe, width = std::min(kStripe, R - first);
        for (int64_t p = 0; p < P; ++p) {
          Sum dot[kStripe] = {};
          for (int64_t j = 0; j < n; ++j) {
            const int64_t at = (p * n + j) * R + first;
            for (int64_t r = 0; r < width; ++r) dot[r] += weight_at[at + r] * grad_at[at + r];
          }
          for (int64_t j = 0; j < n; ++j) {
            const int64_t at = (p * n + j) * R + first, u = slot_at[p * n + j] - first_slot;
            for (int64_t r = 0; r < width; ++r) grad_at[at + r] = weight_at[at + r] * (grad_at[at + r] - dot[r]);
            if (slot_at[p * n + j] < 0 || u < 0 || u >= U) continue;
            for (int64_t r = 0; r < width; ++r) out[u * R + first + r] += grad_at[at + r];
          }
        }
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("clue_attention_softmax", TORCH_BOX(&softmax));
  m.impl("clue_attention_softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace qpeft
