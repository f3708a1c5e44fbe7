// Similarity of distinct document tokens to a query, and the k best of each document: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

void reduce(const Tensor similarity, std::optional<Tensor> inverse_norms, const Tensor query_mask, Tensor best,
            Tensor query_positions) {
  check_similarity_topk_reduce(similarity, inverse_norms, query_mask, best, query_positions);
  const OnDevice on_device(similarity);
  dispatch_sum(similarity.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("similarity_topk_reduce",
               launch_similarity_topk_reduce(const_data<Sum>(similarity), const_data<Sum>(inverse_norms),
                                             const_data<bool>(query_mask), similarity.size(0), query_mask.size(0),
                                             query_mask.size(1), data<Sum>(best), best.stride(0),
                                             data<int32_t>(query_positions), query_positions.stride(0), on_device.stream));
  });
}

std::tuple<Tensor, Tensor, Tensor> select(const Tensor best, const Tensor best_positions, const Tensor best_row,
                                          const Tensor ids, const Tensor slots, int64_t k) {
  check_similarity_topk_select(best, best_positions, best_row, ids, slots, k);
  const int64_t B = ids.size(0);
  const OnDevice on_device(best);
  const Tensor scores = torch::stable::new_empty(best, {B, k});
  const Tensor clue_ids = torch::stable::new_empty(ids, {B, k});
  const Tensor query_positions = torch::stable::new_empty(ids, {B, k});
  dispatch_sum(best.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("similarity_topk_select",
               launch_similarity_topk_select(const_data<Sum>(best), const_data<int32_t>(best_positions), best.size(0),
                                             best.size(1), const_data<int64_t>(best_row), const_data<int64_t>(ids),
                                             const_data<int32_t>(slots), B, ids.size(1), k, data<Sum>(scores),
                                             data<int64_t>(clue_ids), data<int64_t>(query_positions), on_device.stream));
  });
  return {scores, clue_ids, query_positions};
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("similarity_topk_reduce", TORCH_BOX(&reduce));
  m.impl("similarity_topk_select", TORCH_BOX(&select));
}

}  // namespace
}  // namespace qpeft
