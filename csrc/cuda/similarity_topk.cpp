// The k tokens of each document that are most similar to a query: CUDA, the whole operator.
#include <string>

#include "glue.h"

namespace qpeft {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_topk(const Tensor query_embeds, const Tensor query_mask,
                                                           const Tensor table, const Tensor document_ids,
                                                           const Tensor document_mask, const Tensor query_index,
                                                           int64_t k, std::string metric) {
  constexpr auto op = "similarity_topk";
  using torch::stable::contiguous;
  using torch::stable::new_empty;
  const Tensor embeds = contiguous(query_embeds), embeds_mask = contiguous(query_mask), ids = contiguous(document_ids),
               ids_mask = contiguous(document_mask), index = contiguous(query_index),
               rows_of = table.dim() == 2 && table.size(1) > 1 && table.stride(1) != 1 ? contiguous(table) : table;
  check_similarity_topk(embeds, embeds_mask, rows_of, ids, ids_mask, index, k);
  const int64_t Q = embeds.size(0), T = embeds.size(1), B = ids.size(0), S = ids.size(1), V = table.size(0);
  STD_TORCH_CHECK(S <= kShortDocument || k <= kMostOfLongDocument, op, ": k must be at most ", kMostOfLongDocument,
                  " on CUDA for documents of more than ", kShortDocument, " tokens, got ", k);
  const OnDevice on_device(table);
  const ScalarType sum = sum_dtype(table.scalar_type());
  Tensor scores = new_empty(table, {B, k}, sum);
  Tensor clue_ids = new_empty(ids, {B, k}), positions = new_empty(ids, {B, k});
  Tensor inverse_norms = new_empty(table, {B, k}, sum);
  if (B * S == 0) {
    torch::stable::fill_(scores, -INFINITY);
    torch::stable::fill_(clue_ids, -1);
    torch::stable::fill_(positions, -1);
    torch::stable::fill_(inverse_norms, 0);
    return {scores, clue_ids, positions, inverse_norms};
  }
  const int64_t M = queries_per_group(Q, T, sum == ScalarType::Double), G = (Q + M - 1) / M;
  const DistinctSizes sizes{B, S, Q, M, G, V, (V + 31) / 32};
  const int64_t rows = most_rows(sizes), blocks = scratch_blocks(sizes);
  const Tensor bits = new_empty(ids, {2, G, sizes.words}, ScalarType::Int);
  const Tensor group_sizes = new_empty(bits, {G}), row_offsets = new_empty(ids, {G + 1}),
               row_ids = new_empty(ids, {rows});
  const Tensor query_scales = new_empty(scores, {Q, T}), row_scales = new_empty(scores, {rows});
  const Tensor best = new_empty(scores, {rows, M}), best_positions = new_empty(bits, {rows, M});
  const Tensor first = new_empty(bits, {blocks, V}), keys = new_empty(scores, {blocks, S, 2});
  const GroupedIds groups{data<uint32_t>(bits), data<int32_t>(bits) + G * sizes.words, data<int32_t>(group_sizes),
                          data<int64_t>(row_offsets), data<int64_t>(row_ids)};
  const PairInputs pairs{const_data<int64_t>(ids), const_data<bool>(ids_mask), const_data<int64_t>(index)};
  dispatch_table<__half, __nv_bfloat16>(op, table.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    const SimilarityInputs<Row> inputs{const_data<Row>(embeds),
                                       const_data<bool>(embeds_mask),
                                       const_data<Row>(rows_of),
                                       rows_of.stride(0),
                                       rows_of.size(1),
                                       T,
                                       k,
                                       metric == "cosine"};
    const SimilarityScratch<Sum> scratch{data<Sum>(query_scales),       data<Sum>(row_scales), data<Sum>(best),
                                         data<int32_t>(best_positions), data<int32_t>(first),  data<Sum>(keys)};
    const SimilarityResults<Sum> results{data<Sum>(scores), data<int64_t>(clue_ids), data<int64_t>(positions),
                                         data<Sum>(inverse_norms)};
    check_cuda(op, launch_similarity_topk(pairs, inputs, sizes, groups, scratch, results, on_device.stream));
  });
  return {scores, clue_ids, positions, inverse_norms};
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) { m.impl("similarity_topk", TORCH_BOX(&similarity_topk)); }

}  // namespace
}  // namespace qpeft
