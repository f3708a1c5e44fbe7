// Similarity of distinct document tokens to a query, and the k best of each document.
//   reduce  best[m, u] = max over tokens t of query m of similarity[u, m T + t] * inverse_norms[u]
//   select  the k best distinct ids of a document by (-best, first position)
//   Parallel over   reduce: distinct rows; select: documents
//   Memory traffic  reduce: reads the [n, M T] products of one block, out of the cache; select: [B, S] slots
//   Precision       the dtype of sums
//   Deterministic   yes: a total order
#include <vector>

#include "cpu/common.h"

namespace qpeft {
namespace {

void reduce(Tensor similarity, std::optional<Tensor> inverse_norms, Tensor query_mask, Tensor best,
            Tensor query_positions) {
  make_contiguous({&similarity, &query_mask});
  make_contiguous(inverse_norms);
  check_similarity_topk_reduce(similarity, inverse_norms, query_mask, best, query_positions);
  const int64_t n = similarity.size(0), M = query_mask.size(0), T = query_mask.size(1);
  if (n == 0 || M == 0) return;
  const auto* mask = const_data<bool>(query_mask);
  const int64_t best_stride = best.stride(0), position_stride = query_positions.stride(0);
  dispatch_sum(similarity.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const auto* products = const_data<Sum>(similarity);
    const auto* norms = const_data<Sum>(inverse_norms);
    auto* out = data<Sum>(best);
    auto* out_position = data<int32_t>(query_positions);
    parallel(n, 65536 / (M * T + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t m = 0; m < M; ++m) {
          const Sum* row = products + (i * M + m) * T;
          Candidate<Sum> winner{-INFINITY, INT32_MAX};
          for (int64_t t = 0; t < T; ++t) {
            if (!mask[m * T + t]) continue;
            const Candidate<Sum> candidate{row[t], static_cast<int32_t>(t)};
            if (candidate.before(winner)) winner = candidate;
          }
          // norms are positive, so the maximum may be taken before the product
          out[m * best_stride + i] = norms && winner.position != INT32_MAX ? winner.score * norms[i] : winner.score;
          out_position[m * position_stride + i] = winner.position == INT32_MAX ? -1 : winner.position;
        }
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(Tensor best, Tensor best_positions, Tensor best_row,
                                                  std::optional<Tensor> inverse_norms, Tensor ids, Tensor slots,
                                                  int64_t k) {
  make_contiguous({&best, &best_positions, &best_row, &ids, &slots});
  make_contiguous(inverse_norms);
  check_similarity_topk_select(best, best_positions, best_row, inverse_norms, ids, slots, k);
  using torch::stable::new_empty;
  const int64_t B = ids.size(0), S = ids.size(1), M = best.size(0), U = best.size(1);
  const Tensor scores = new_empty(best, {B, k});
  const Tensor clue_ids = new_empty(ids, {B, k});
  const Tensor query_positions = new_empty(ids, {B, k});
  const Tensor chosen_norms = new_empty(best, {B, k});
  const auto* position_at = const_data<int32_t>(best_positions);
  const auto* row_of = const_data<int64_t>(best_row);
  const auto* id_at = const_data<int64_t>(ids);
  const auto* slot_at = const_data<int32_t>(slots);
  auto* out_ids = data<int64_t>(clue_ids);
  auto* out_positions = data<int64_t>(query_positions);
  dispatch_sum(best.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    const auto* score_at = const_data<Sum>(best);
    const auto* norm_at = const_data<Sum>(inverse_norms);
    auto* out_scores = data<Sum>(scores);
    auto* out_norms = data<Sum>(chosen_norms);
    parallel(B, 16384 / (S + 1), [&](int64_t begin, int64_t end) {
      std::vector<Candidate<Sum>> candidates;
      candidates.reserve(S);
      for (int64_t b = begin; b < end; ++b) {
        candidates.clear();
        const int64_t row = row_of[b];
        for (int64_t j = 0; j < S && row >= 0 && row < M; ++j) {
          const int32_t slot = slot_at[b * S + j];
          if (slot >= 0 && slot < U) candidates.push_back({score_at[row * U + slot], static_cast<int32_t>(j)});
        }
        const int64_t found = std::min<int64_t>(k, candidates.size());
        std::partial_sort(candidates.begin(), candidates.begin() + found, candidates.end(),
                          [](const auto& a, const auto& other) { return a.before(other); });
        for (int64_t c = 0; c < k; ++c) {
          const bool padding = c >= found;
          const int64_t j = padding ? 0 : b * S + candidates[c].position;
          out_scores[b * k + c] = padding ? -INFINITY : candidates[c].score;
          out_ids[b * k + c] = padding ? -1 : id_at[j];
          out_positions[b * k + c] = padding ? -1 : position_at[row * U + slot_at[j]];
          out_norms[b * k + c] = padding ? Sum(0) : norm_at ? norm_at[slot_at[j]] : Sum(1);
        }
      }
    });
  });
  return {scores, clue_ids, query_positions, chosen_norms};
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("similarity_topk_reduce", TORCH_BOX(&reduce));
  m.impl("similarity_topk_select", TORCH_BOX(&select));
}

}  // namespace
}  // namespace qpeft
