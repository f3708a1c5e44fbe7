// Adds a chunk of the vocabulary to the running log-sum-exp of each row; the end after the last chunk; a chunk's gradient.
//   u = logit_scale x + bias, z = cap tanh(u / cap);   log p = z[target] - logsumexp z
//   Parallel over   rows; a row's chunk is walked twice (maximum, then exponentials), in the cache the second time
//   Memory traffic  the chunk of logits, [N, C]: read once, written once where probabilities are kept
//   Precision       the dtype of sums
//   Deterministic   yes on one processor: lanes are added in a fixed order
#include "cpu/common.h"

namespace qpeft {
namespace {

constexpr int kLanes = 16;  // partial sums: the compiler may not reorder one sum, but vectorises sixteen

template <typename Sum>
struct Logit {  // x -> z
  const Sum* bias;
  Sum scale, cap;

  bool identity() const { return !bias && scale == 1 && cap == 0; }
};

template <typename Sum>
inline void apply(Logit<Sum> logit, Sum* x, int64_t C) {  // by value: a reference might point into x
  for (int64_t c = 0; c < C; ++c) x[c] *= logit.scale;
  if (logit.bias)
    for (int64_t c = 0; c < C; ++c) x[c] += logit.bias[c];
  if (logit.cap == 0) return;
  if (is_large(logit.cap))
    for (int64_t c = 0; c < C; ++c) x[c] = logit.cap * vector_tanh_of_small(x[c] / logit.cap);
  else
    for (int64_t c = 0; c < C; ++c) x[c] = logit.cap * vector_tanh(x[c] / logit.cap);
}

template <typename Sum>
inline Sum max_of(const Sum* z, int64_t C) {
  Sum lane[kLanes], max = -INFINITY;
  for (int l = 0; l < kLanes; ++l) lane[l] = max;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = z[c + l] > lane[l] ? z[c + l] : lane[l];
  for (; c < C; ++c) max = z[c] > max ? z[c] : max;
  for (int l = 0; l < kLanes; ++l) max = lane[l] > max ? lane[l] : max;
  return max;
}

inline bool has_nan(const auto* z, int64_t C) {
  bool found = false;
  for (int64_t c = 0; c < C; ++c) found |= z[c] != z[c];
  return found;
}

// sum of exp(z - max); with kKeep z becomes exp(z - max) * dz/du.
template <bool kKeep, typename Sum>
inline Sum sum_exp(Sum* z, int64_t C, Sum max, SoftCap<Sum> cap) {
  Sum lane[kLanes] = {}, sum = 0;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const Sum e = vector_exp(z[c + l] - max);
      if (kKeep) z[c + l] = cap.cap == 0 ? e : e * cap.slope(z[c + l]);
      lane[l] += e;
    }
  for (; c < C; ++c) {
    const Sum e = vector_exp(z[c] - max);
    if (kKeep) z[c] = e * cap.slope(z[c]);
    sum += e;
  }
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

// z becomes grad * (-exp(z - lse)) * dz/du: the gradient, but for the target
template <typename Sum>
inline void minus_probabilities(Sum* z, int64_t C, Sum lse, Sum grad, SoftCap<Sum> cap) {
  if (cap.cap == 0)
    for (int64_t c = 0; c < C; ++c) z[c] = -grad * vector_exp(z[c] - lse);
  else
    for (int64_t c = 0; c < C; ++c) z[c] = -grad * vector_exp(z[c] - lse) * cap.slope(z[c]);
}

// z in bfloat16, rounded to nearest, where the row begins: each block is read before anything is written over it
inline void narrow(float* z, int64_t C) {
  auto* to = reinterpret_cast<char*>(z);
  for (int64_t c = 0; c < C; c += kLanes) {
    float block[kLanes];
    uint16_t rounded[kLanes];
    const int64_t n = std::min<int64_t>(kLanes, C - c);
    std::memcpy(block, z + c, n * sizeof(float));
    for (int l = 0; l < kLanes; ++l) {
      uint32_t bits;
      std::memcpy(&bits, &block[l], sizeof(bits));
      rounded[l] = block[l] != block[l] ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    std::memcpy(to + 2 * c, rounded, n * sizeof(uint16_t));
  }
}

// ---- one row, with clones ---------------------------------------------------------------------------------------------

QPEFT_CLONES void apply_row(Logit<float> logit, float* x, int64_t C) { apply(logit, x, C); }
QPEFT_CLONES float max_row(const float* z, int64_t C) { return max_of(z, C); }
QPEFT_CLONES float sum_row(float* z, int64_t C, float max) { return sum_exp<false>(z, C, max, SoftCap<float>{0}); }
QPEFT_CLONES float keep_row(float* z, int64_t C, float max, SoftCap<float> cap) {
  return cap.cap == 0 ? sum_exp<true>(z, C, max, SoftCap<float>{0}) : sum_exp<true>(z, C, max, cap);
}
QPEFT_CLONES void gradient_row(float* z, int64_t C, float lse, float grad, SoftCap<float> cap) {
  minus_probabilities(z, C, lse, grad, cap);
}
QPEFT_CLONES void narrow_row(float* z, int64_t C) { narrow(z, C); }
void narrow_row(double*, int64_t) {}
void apply_row(Logit<double> logit, double* x, int64_t C) { apply(logit, x, C); }
double max_row(const double* z, int64_t C) { return max_of(z, C); }
double sum_row(double* z, int64_t C, double max) { return sum_exp<false>(z, C, max, SoftCap<double>{0}); }
double keep_row(double* z, int64_t C, double max, SoftCap<double> cap) { return sum_exp<true>(z, C, max, cap); }
void gradient_row(double* z, int64_t C, double lse, double grad, SoftCap<double> cap) {
  minus_probabilities(z, C, lse, grad, cap);
}

// Whether rows are kept in bfloat16.
bool narrows(const char* op, const Tensor& logits, ScalarType kept) {
  const bool narrow = kept == ScalarType::BFloat16 && logits.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(narrow || kept == logits.scalar_type(), op,
                  ": on the CPU kept must be the dtype of logits, or bfloat16 over float32");
  return narrow;
}

void chunk(Tensor logits, std::optional<Tensor> bias, Tensor target_ids, int64_t first, double logit_scale,
           std::optional<double> soft_cap, Tensor running, std::optional<Tensor> expectation, ScalarType kept) {
  make_contiguous({&target_ids});
  make_contiguous(bias);
  check_token_log_likelihood_chunk(logits, bias, target_ids, running, expectation, kept);
  expect_soft_cap("token_log_likelihood_chunk", soft_cap);
  const bool narrow = expectation && narrows("token_log_likelihood_chunk", logits, kept);
  const int64_t N = logits.size(0), C = logits.size(1), stride = logits.stride(0);
  const int64_t D = expectation ? expectation->size(1) : 0;
  if (N == 0 || C == 0) return;
  const auto* target_at = const_data<int64_t>(target_ids);
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Logit<Sum> logit{const_data<Sum>(bias), static_cast<Sum>(logit_scale), cap_or_none<Sum>(soft_cap)};
    auto* x = data<Sum>(logits);
    auto* max_at = data<Sum>(running);
    Sum *sum_at = max_at + N, *target_z = sum_at + N;
    auto* sums = data<Sum>(expectation);
    parallel(N, 16384 / C, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Sum* z = x + row * stride;
        if (!logit.identity()) apply_row(logit, z, C);
        const int64_t target = place_in(target_at[row], first, C);
        if (target >= 0) target_z[row] = z[target];
        const Sum before = max_at[row], max = std::max(before, max_row(z, C));
        // every word so far is forbidden, exp(-inf - -inf) would be NaN; or NaN itself, which the maximum does not see
        if (max == -INFINITY) {
          if (has_nan(z, C)) sum_at[row] = NAN;
          if (sums) std::fill(z, z + C, Sum(0));  // zeros in bfloat16 too
          continue;
        }
        const Sum factor = std::exp(before - max), sum = sums ? keep_row(z, C, max, {logit.cap}) : sum_row(z, C, max);
        if (narrow) narrow_row(z, C);
        max_at[row] = max;
        sum_at[row] = sum_at[row] * factor + sum;
        if (sums && factor != 1)
          for (int64_t d = 0; d < D; ++d) sums[row * D + d] *= factor;
      }
    });
  });
}

void finish(Tensor running, const Tensor lm_head, Tensor target_ids, double logit_scale, std::optional<double> soft_cap,
            Tensor log_p, Tensor lse, std::optional<Tensor> expectation) {
  constexpr auto op = "token_log_likelihood_finish";
  make_contiguous({&running, &target_ids});
  check_token_log_likelihood_finish(running, lm_head, target_ids, log_p, lse, expectation);
  expect_soft_cap(op, soft_cap);
  const int64_t N = target_ids.size(0), V = lm_head.size(0), D = lm_head.size(1);
  const int64_t word_stride = lm_head.stride(0), column_stride = lm_head.stride(1);
  const auto* target_at = const_data<int64_t>(target_ids);
  for (int64_t row = 0; row < N; ++row)
    STD_TORCH_CHECK(target_at[row] >= 0 && target_at[row] < V, op, ": target_ids[", row, "] is outside [0, V)");
  dispatch_table<torch::headeronly::Half, torch::headeronly::BFloat16>(
      op, lm_head.scalar_type(), [&](auto tag, auto sum_tag) {
        using Row = decltype(tag);
        using Sum = decltype(sum_tag);
        const auto* max_at = const_data<Sum>(running);
        const Sum *sum_at = max_at + N, *target_z = sum_at + N;
        const auto* words = const_data<Row>(lm_head);
        auto* log_p_at = data<Sum>(log_p);
        auto* lse_at = data<Sum>(lse);
        auto* sums = data<Sum>(expectation);
        const SoftCap<Sum> cap{cap_or_none<Sum>(soft_cap)};
        parallel(N, 65536 / std::max<int64_t>(D, 1), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const Sum log_sum = std::log(sum_at[row]);
            lse_at[row] = max_at[row] + log_sum;
            log_p_at[row] = log_probability(target_z[row], max_at[row], log_sum);
            if (!sums) continue;
            const Row* word = words + target_at[row] * word_stride;
            const Sum scale = static_cast<Sum>(logit_scale), slope = cap.slope(target_z[row]), share = 1 / sum_at[row];
            Sum* mean = sums + row * D;
            for (int64_t d = 0; d < D; ++d)
              mean[d] = scale * (slope * static_cast<Sum>(word[d * column_stride]) - share * mean[d]);
          }
        });
      });
}

void chunk_backward(Tensor logits, std::optional<Tensor> bias, Tensor target_ids, int64_t first, double logit_scale,
                    std::optional<double> soft_cap, Tensor lse, Tensor grad, ScalarType kept) {
  make_contiguous({&target_ids, &lse, &grad});
  make_contiguous(bias);
  check_token_log_likelihood_chunk_backward(logits, bias, target_ids, lse, grad, kept);
  expect_soft_cap("token_log_likelihood_chunk_backward", soft_cap);
  const bool narrow = narrows("token_log_likelihood_chunk_backward", logits, kept);
  const int64_t N = logits.size(0), C = logits.size(1), stride = logits.stride(0);
  if (N == 0 || C == 0) return;
  const auto* target_at = const_data<int64_t>(target_ids);
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const Logit<Sum> logit{const_data<Sum>(bias), static_cast<Sum>(logit_scale), cap_or_none<Sum>(soft_cap)};
    const SoftCap<Sum> cap{logit.cap};
    auto* x = data<Sum>(logits);
    const auto* lse_at = const_data<Sum>(lse);
    const auto* grad_at = const_data<Sum>(grad);
    parallel(N, 16384 / C, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        Sum* z = x + row * stride;
        const Sum g = grad_at[row];
        if (g == 0) {  // a row that does not count must not bring in its infinities
          std::fill(z, z + C, Sum(0));
          continue;
        }
        if (!logit.identity()) apply_row(logit, z, C);
        const int64_t target = place_in(target_at[row], first, C);
        const bool here = target >= 0;
        const Sum slope = here ? cap.slope(z[target]) : Sum(0);
        gradient_row(z, C, lse_at[row], g, cap);
        if (here) z[target] += g * slope;
        if (narrow) narrow_row(z, C);
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("token_log_likelihood_chunk", TORCH_BOX(&chunk));
  m.impl("token_log_likelihood_finish", TORCH_BOX(&finish));
  m.impl("token_log_likelihood_chunk_backward", TORCH_BOX(&chunk_backward));
}

}  // namespace
}  // namespace qpeft
