// Softmax of attention scores over the distinct tokens of each document, and its backward.
//   lse[p, r] = log sum_j counts[p, j] exp(s[slot(p, j), r]);   weights[p, j, r] = counts[p, j] exp(s - lse)
//   Where lse is large, weights are divided by their sum: lse of some thousands has an error of 2e-4, and a gradient of weights
//   that do not add up to 1 is the difference of large numbers.
//   ds = weights * (grad_weights - sum of weights * grad_weights)
//   Parallel over   documents x stripes of columns
//   Memory traffic  a few passes over [n, stripe], out of the cache
//   Precision       the dtype of sums
//   Deterministic   yes: each sum has one fixed order
#include "cpu/common.h"

namespace qpeft {
namespace {

constexpr int64_t kStripe = 32;  // columns: two cache lines of float32

// f(p, first column, width) for every document and stripe; `work`: of one column, so that threads get enough of it.
template <typename F>
void for_stripes(int64_t P, int64_t R, int64_t work, const F& f) {
  const int64_t stripes = (R + kStripe - 1) / kStripe;
  parallel(P * stripes, 8192 / (work * kStripe + 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % stripes * kStripe;
      f(unit / stripes, first, std::min(kStripe, R - first));
    }
  });
}

// The scores of document tokens.
template <typename Sum>
struct Scores {
  const Sum* at;
  const int32_t* slots;
  int64_t U, R, n, first_slot;

  Scores(const Tensor& scores, const Tensor& slots_, int64_t first)
      : at(const_data<Sum>(scores)),
        slots(const_data<int32_t>(slots_)),
        U(scores.size(0)),
        R(scores.size(1)),
        n(slots_.size(1)),
        first_slot(first) {}

  const Sum* row(int64_t p, int64_t j) const {  // nullptr: padding
    const int64_t slot = slots[p * n + j], u = place_in(slot, first_slot, U);
    return slot < 0 || u < 0 ? nullptr : at + u * R;
  }
};

void log_sum_exp(Tensor scores, Tensor slots, Tensor counts, int64_t first_slot, Tensor lse) {
  make_contiguous({&scores, &slots, &counts});
  check_clue_attention_lse("clue_attention_lse", scores, slots, counts, lse);
  const auto* count_at = const_data<int32_t>(counts);
  dispatch_sum(scores.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Scores<Sum> score(scores, slots, first_slot);
    auto* lse_at = data<Sum>(lse);
    for_stripes(slots.size(0), score.R, score.n, [&](int64_t p, int64_t first, int64_t width) {
      Sum max[kStripe], sum[kStripe];
      std::fill(max, max + kStripe, Sum(-INFINITY));
      std::fill(sum, sum + kStripe, Sum(0));
      for (int64_t j = 0; j < score.n; ++j)
        if (const Sum* s = score.row(p, j))
          for (int64_t r = 0; r < width; ++r) max[r] = std::max(max[r], s[first + r]);
      for (int64_t j = 0; j < score.n; ++j)
        if (const Sum* s = score.row(p, j)) {
          const Sum count = static_cast<Sum>(count_at[p * score.n + j]);
          for (int64_t r = 0; r < width; ++r) sum[r] += count * vector_exp(s[first + r] - max[r]);
        }
      Sum* out = lse_at + p * score.R + first;
      for (int64_t r = 0; r < width; ++r) out[r] = max[r] + std::log(sum[r]);  // no token: -inf
    });
  });
}

// Divides each column of w [n, width] by its sum.
template <typename Sum>
void normalise(Sum* w, int64_t n, int64_t stride, int64_t width) {
  Sum sum[kStripe] = {};
  for (int64_t j = 0; j < n; ++j)
    for (int64_t r = 0; r < width; ++r) sum[r] += w[j * stride + r];
  for (int64_t r = 0; r < width; ++r)
    if (sum[r] == 0) sum[r] = 1;  // no token
  for (int64_t j = 0; j < n; ++j)
    for (int64_t r = 0; r < width; ++r) w[j * stride + r] /= sum[r];
}

void weigh(Tensor scores, Tensor slots, Tensor counts, Tensor lse, int64_t first_slot, Tensor weights) {
  make_contiguous({&scores, &slots, &counts, &lse});
  check_clue_attention_weights(scores, slots, counts, lse, weights, scores.scalar_type());
  const auto* count_at = const_data<int32_t>(counts);
  dispatch_sum(scores.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Scores<Sum> score(scores, slots, first_slot);
    const auto* lse_at = const_data<Sum>(lse);
    auto* weight_at = data<Sum>(weights);
    for_stripes(slots.size(0), score.R, score.n, [&](int64_t p, int64_t first, int64_t width) {
      const Sum* total = lse_at + p * score.R + first;
      for (int64_t j = 0; j < score.n; ++j) {
        Sum* w = weight_at + (p * score.n + j) * score.R + first;
        const Sum* s = score.row(p, j);
        const Sum count = s ? static_cast<Sum>(count_at[p * score.n + j]) : Sum(0);
        if (!s)
          std::fill(w, w + width, Sum(0));
        else
          for (int64_t r = 0; r < width; ++r) w[r] = count * vector_exp(s[first + r] - total[r]);
      }
      if (std::any_of(total, total + width, is_large<Sum>))
        normalise(weight_at + p * score.n * score.R + first, score.n, score.R, width);
    });
  });
}

void softmax_backward(Tensor weights, Tensor slots, Tensor grad_weights) {
  make_contiguous({&weights, &slots});
  check_clue_attention_softmax_backward(weights, slots, grad_weights, grad_weights.scalar_type());
  const int64_t P = slots.size(0), n = slots.size(1), R = weights.size(2);
  const auto* slot_at = const_data<int32_t>(slots);
  dispatch_sum(weights.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const auto* weight_at = const_data<Sum>(weights);
    auto* grad_at = data<Sum>(grad_weights);
    for_stripes(P, R, n, [&](int64_t p, int64_t first, int64_t width) {
      Sum dot[kStripe] = {};
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = (p * n + j) * R + first;
        if (slot_at[p * n + j] >= 0)
          for (int64_t r = 0; r < width; ++r) dot[r] += weight_at[at + r] * grad_at[at + r];
      }
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = (p * n + j) * R + first;
        if (slot_at[p * n + j] < 0)
          std::fill(grad_at + at, grad_at + at + width, Sum(0));
        else
          for (int64_t r = 0; r < width; ++r) grad_at[at + r] = weight_at[at + r] * (grad_at[at + r] - dot[r]);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("clue_attention_lse", TORCH_BOX(&log_sum_exp));
  m.impl("clue_attention_weights", TORCH_BOX(&weigh));
  m.impl("clue_attention_softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace qpeft
