// The launchers of the CUDA kernels: what <op>.cpp (torch, no nvcc) calls and <op>_kernel.cu (nvcc, no torch) defines.
// Arguments and results are those of the schemas in ../ops.cpp; sizes follow the pointers, letters as there.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qpeft {

// document_rows. Indices of pairs are in [0, Q); Q / M rounded up = G groups of M neighbours; words = ceil(V / 32).
struct DistinctSizes {
  int64_t B, S, Q, M, G, V, words;
};
// The numbered ids of each group, on the device; later kernels look them up.
struct GroupedIds {
  uint32_t* bits;        // [G, words], zeros before
  int32_t* prefix;       // [G, words]: ids of the group in the words before
  int32_t* sizes;        // [G]
  int64_t* row_offsets;  // [G + 1]
  int64_t* rows;         // [most_rows]; what follows row_offsets[G] is not written
};
inline int64_t most_rows(const DistinctSizes& sizes) {
  return sizes.B * sizes.S < sizes.G * sizes.V ? sizes.B * sizes.S : sizes.G * sizes.V;
}
cudaError_t launch_document_rows_number(const int64_t* document_ids, const bool* document_mask,
                                        const int64_t* group_index, DistinctSizes sizes, GroupedIds groups,
                                        cudaStream_t stream);
// Documents of which more than these tokens need scratch: cells [blocks, V] for each number that is kept per distinct id.
constexpr int64_t kShortDocument = 2048;
int64_t scratch_blocks(const DistinctSizes& sizes);
// The distinct ids of each document. scratch: cells [2, scratch_blocks, V].
cudaError_t launch_document_rows_places(const int64_t* document_ids, const bool* document_mask,
                                        const int64_t* group_index, DistinctSizes sizes, GroupedIds groups,
                                        int32_t* scratch, int64_t* ids, int32_t* slots, int32_t* counts,
                                        int64_t* lengths, cudaStream_t stream);
template <typename Row, typename Sum>
cudaError_t launch_document_rows_gather(const Row* table, int64_t table_stride, const int64_t* rows, int64_t n,
                                        int64_t V, int64_t D, Row* block, int64_t block_stride, Sum* inverse_norms,
                                        cudaStream_t stream);

// similarity_topk, all of it. Groups of M queries share the distinct rows of their documents; M from queries_per_group.
struct PairInputs {
  const int64_t* document_ids;  // [B, S]
  const bool* document_mask;    // [B, S]
  const int64_t* query_index;   // [B]
};
template <typename Row>
struct SimilarityInputs {
  const Row* query_embeds;  // [Q, T, D]
  const bool* query_mask;   // [Q, T]
  const Row* table;         // [V, D]
  int64_t table_stride, D, T, K;
  bool cosine;
};
template <typename Sum>
struct SimilarityScratch {
  Sum* query_scales;       // [Q, T]: 1 / norm
  Sum* row_scales;         // [rows]
  Sum* best;               // [rows, M]: the similarity of a row with each query of its group
  int32_t* best_positions;  // [rows, M]
  int32_t* first;          // [scratch_blocks, V]
  void* keys;              // [scratch_blocks, S], 2 * sizeof(Sum) bytes each
};
template <typename Sum>
struct SimilarityResults {
  Sum* scores;               // [B, K]
  int64_t* clue_ids;         // [B, K]
  int64_t* query_positions;  // [B, K]
  Sum* inverse_norms;        // [B, K]
};
// clues of a document with more than kShortDocument tokens: they are sorted in shared memory
constexpr int64_t kMostOfLongDocument = 4096;
int64_t queries_per_group(int64_t Q, int64_t T, bool is_double);
template <typename Row, typename Sum>
cudaError_t launch_similarity_topk(PairInputs pairs, SimilarityInputs<Row> inputs, DistinctSizes sizes,
                                   GroupedIds groups, SimilarityScratch<Sum> scratch, SimilarityResults<Sum> results,
                                   cudaStream_t stream);

// weighted_rows; weights null: 1
template <typename Row, typename Sum>
cudaError_t launch_weighted_rows(const Row* source, int64_t source_stride, int64_t N, int64_t D, const int64_t* rows,
                                 const Sum* weights, const int64_t* offsets, int64_t G, bool accumulate, Sum* out,
                                 cudaStream_t stream);

// clue_attention
struct SoftmaxSizes {
  int64_t P, n, U, R, first_slot;
};
template <typename Sum>
cudaError_t launch_clue_attention_lse(const Sum* scores, const int32_t* slots, const int32_t* counts,
                                      SoftmaxSizes sizes, Sum* lse, cudaStream_t stream);
template <typename Sum, typename Weight>
cudaError_t launch_clue_attention_weights(const Sum* scores, const int32_t* slots, const int32_t* counts,
                                          const Sum* lse, SoftmaxSizes sizes, Weight* weights, cudaStream_t stream);
template <typename Sum, typename Weight>
cudaError_t launch_clue_attention_softmax_backward(const Weight* weights, const int32_t* slots, SoftmaxSizes sizes,
                                                   Sum* grad_weights, cudaStream_t stream);
// Lists of rows of a table: end to end (offsets) or one every `stride` places (lengths); the other pointer is null.
template <typename Row>
struct GatheredRows {
  const Row* table;
  int64_t table_stride, V, D;
  const int64_t *rows, *offsets, *lengths;
  int64_t n, stride, lists;  // n: of rows
  int64_t longest;  // an upper bound
};
template <typename Row, typename Sum>
cudaError_t launch_clue_attention_products(GatheredRows<Row> gathered, const Row* dense, int64_t columns, Sum* products,
                                           cudaStream_t stream);
template <typename Row, typename Out>
cudaError_t launch_clue_attention_weighted_sums(GatheredRows<Row> gathered, const Row* weights, int64_t columns,
                                                int64_t heads, bool accumulate, Out* sums, cudaStream_t stream);

// token_log_likelihood
template <typename Sum>
struct Chunk {
  Sum* logits;                // [N, C]
  int64_t stride;             // of its rows
  const Sum* bias;            // [C] or null
  const int64_t* target_ids;  // [N]
  int64_t N, C, first;
  Sum scale, cap;
};
// Kept: the dtype in which probabilities, and gradients, replace the logits
template <typename Kept, typename Sum>
cudaError_t launch_token_log_likelihood_chunk(Chunk<Sum> chunk, Sum* running, Sum* expectation, int64_t D,
                                              cudaStream_t stream);
template <typename Kept, typename Sum>
cudaError_t launch_token_log_likelihood_chunk_backward(Chunk<Sum> chunk, const Sum* lse, const Sum* grad,
                                                       cudaStream_t stream);
template <typename Row, typename Sum>
struct Finish {
  const Sum* running;  // [3, N]
  const Row* lm_head;  // [V, D] with any strides
  int64_t word_stride, column_stride;
  const int64_t* target_ids;  // [N]
  int64_t N, V, D;
  Sum scale, cap;
  Sum *log_p, *lse;  // [N]
  Sum* expectation;  // [N, D] or null
};
template <typename Row, typename Sum>
cudaError_t launch_token_log_likelihood_finish(Finish<Row, Sum> finish, cudaStream_t stream);

}  // namespace qpeft
