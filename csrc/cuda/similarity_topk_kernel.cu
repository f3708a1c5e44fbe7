// Similarity of distinct document tokens to a query, and the k best of each document.
//   reduce  best[m, i] = max over tokens t of query m of similarity[i, m T + t] * inverse_norms[i]
//   select  the k best distinct ids of a document by (-best, first position)
//   Parallel over   reduce: one thread per (query, distinct row); select: one block per document, k rounds of an arg-max
//   Global memory   reduce reads the products once; select reads its S slots and their scores k times, out of the cache
//   Precision       float (double for double)
//   Deterministic   yes: a total order; each round takes the best candidate after the last one, so nothing is marked
#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

template <typename Sum>
__global__ void reduce_kernel(const Sum* similarity, const Sum* inverse_norms, const bool* query_mask, int64_t n, int64_t M,
                              int64_t T, Sum* best, int64_t best_stride, int32_t* query_positions, int64_t positions_stride) {
  const int64_t at = global_thread();
  if (at >= M * n) return;
  const int64_t m = at / n, i = at % n;
  const Sum* products = similarity + (i * M + m) * T;
  Candidate<Sum> winner{-INFINITY, INT32_MAX};
  for (int64_t t = 0; t < T; ++t) {
    if (!query_mask[m * T + t]) continue;
    const Candidate<Sum> candidate{products[t], static_cast<int32_t>(t)};
    if (candidate.before(winner)) winner = candidate;
  }
  const bool found = winner.position != INT32_MAX;
  // norms are positive, so the maximum may be taken before the product
  best[m * best_stride + i] = found && inverse_norms ? winner.score * inverse_norms[i] : winner.score;
  query_positions[m * positions_stride + i] = found ? winner.position : -1;
}

template <typename Sum>
__global__ void select_kernel(const Sum* best, const int32_t* best_positions, int64_t M, int64_t U, const int64_t* best_row,
                              const int64_t* ids, const int32_t* slots, int64_t S, int64_t k, Sum* scores, int64_t* clue_ids,
                              int64_t* query_positions) {
  const int64_t pair = blockIdx.x, row = best_row[pair], base = pair * S, out = pair * k;
  const int64_t places = row < 0 || row >= M ? 0 : S;
  const Candidate<Sum> none{-INFINITY, INT32_MAX};
  Candidate<Sum> last = none;
  int64_t found = 0;
  for (; found < k; ++found) {
    Candidate<Sum> mine = none;
    for (int64_t j = threadIdx.x; j < places; j += kThreads) {
      const int32_t slot = slots[base + j];
      if (slot < 0 || slot >= U) continue;  // padding
      const Candidate<Sum> candidate{best[row * U + slot], static_cast<int32_t>(j)};
      if ((found == 0 || last.before(candidate)) && candidate.before(mine)) mine = candidate;
    }
    last = block_reduce(mine, [](Candidate<Sum> a, Candidate<Sum> b) { return b.before(a) ? b : a; });
    if (last.position == INT32_MAX) break;   // the whole block leaves together
    if (last.score != last.score) __trap();  // NaN in the table or the query
    if (threadIdx.x == 0) {
      scores[out + found] = last.score;
      clue_ids[out + found] = ids[base + last.position];
      query_positions[out + found] = best_positions[row * U + slots[base + last.position]];
    }
  }
  for (int64_t c = found + threadIdx.x; c < k; c += kThreads)
    scores[out + c] = -INFINITY, clue_ids[out + c] = -1, query_positions[out + c] = -1;
}

}  // namespace

template <typename Sum>
cudaError_t launch_similarity_topk_reduce(const Sum* similarity, const Sum* inverse_norms, const bool* query_mask, int64_t n,
                                          int64_t M, int64_t T, Sum* best, int64_t best_stride, int32_t* query_positions,
                                          int64_t positions_stride, cudaStream_t stream) {
  return launch(reduce_kernel<Sum>, blocks_for(M * n), stream, similarity, inverse_norms, query_mask, n, M, T, best,
                best_stride, query_positions, positions_stride);
}

template <typename Sum>
cudaError_t launch_similarity_topk_select(const Sum* best, const int32_t* best_positions, int64_t M, int64_t U,
                                          const int64_t* best_row, const int64_t* ids, const int32_t* slots, int64_t B,
                                          int64_t S, int64_t k, Sum* scores, int64_t* clue_ids, int64_t* query_positions,
                                          cudaStream_t stream) {
  return launch(select_kernel<Sum>, B, stream, best, best_positions, M, U, best_row, ids, slots, S, k, scores, clue_ids,
                query_positions);
}

#define INSTANTIATE(Sum)                                                                                                    \
  template cudaError_t launch_similarity_topk_reduce(const Sum*, const Sum*, const bool*, int64_t, int64_t, int64_t, Sum*, \
                                                     int64_t, int32_t*, int64_t, cudaStream_t);                            \
  template cudaError_t launch_similarity_topk_select(const Sum*, const int32_t*, int64_t, int64_t, const int64_t*,         \
                                                     const int64_t*, const int32_t*, int64_t, int64_t, int64_t, Sum*,      \
                                                     int64_t*, int64_t*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace qpeft
