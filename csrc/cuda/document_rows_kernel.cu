// Distinct ids of groups of documents, and the gather of their table rows.
//   rows of group g = the set of ids under a True mask in its documents, ascending; inverse_norms = 1 / ||row||
//   Parallel over   mark: document positions; number: one block per group; places: one block per document;
//                   list: words of 32 ids; gather: one block per row
//   Global memory   V / 8 bytes of bits and as much of counts per group; places compares the S ids of a document with each
//                   other out of the cache (S^2 steps); gather reads each row once and writes it once
//   Precision       norms in float (double for double)
//   Deterministic   yes: the only atomics are bit-wise or, whose order does not matter
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

__global__ void mark_kernel(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                            DistinctSizes sizes, uint32_t* bits) {
  const int64_t at = global_thread();
  if (at >= sizes.B * sizes.S || !document_mask[at]) return;
  const int64_t id = document_ids[at], group = group_index[at / sizes.S];
  if (id < 0 || id >= sizes.V || group < 0 || group >= sizes.G) __trap();  // values cannot be checked earlier without a sync
  atomicOr(&bits[group * sizes.words + id / 32], 1u << (id % 32));
}

// prefix[g, w] = number of ids of group g in the words before w; row_offsets[g + 1] = number of all ids of group g
__global__ void number_kernel(const uint32_t* bits, DistinctSizes sizes, int32_t* prefix, int64_t* row_offsets) {
  const int64_t group = blockIdx.x;
  int32_t before = 0;
  for (int64_t first = 0; first < sizes.words; first += kThreads) {  // the block stays together: block_exclusive_sum waits
    const int64_t word = first + threadIdx.x;
    const int32_t ids = word < sizes.words ? __popc(bits[group * sizes.words + word]) : 0;
    int32_t total;
    const int32_t place = before + block_exclusive_sum(ids, total);
    if (word < sizes.words) prefix[group * sizes.words + word] = place;
    before += total;
  }
  if (threadIdx.x == 0) row_offsets[group + 1] = before;
}

// running sum over the groups, in place: there are few
__global__ void offsets_kernel(int64_t groups, int64_t* row_offsets) {
  if (threadIdx.x != 0) return;
  row_offsets[0] = 0;
  for (int64_t group = 0; group < groups; ++group) row_offsets[group + 1] += row_offsets[group];
}

__global__ void places_kernel(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                              DistinctSizes sizes, const uint32_t* bits, const int32_t* prefix, const int64_t* row_offsets,
                              int64_t* ids, int32_t* slots, int32_t* counts, int64_t* lengths) {
  const int64_t document = blockIdx.x, S = sizes.S, base = document * S, group = group_index[document];
  const int64_t* id_at = document_ids + base;
  const bool* mask_at = document_mask + base;
  int32_t length = 0;
  for (int64_t start = 0; start < S; start += kThreads) {
    const int64_t s = start + threadIdx.x;
    bool is_first = s < S && mask_at[s];
    int32_t count = 0;
    for (int64_t j = 0; is_first && j < S; ++j) {
      if (!mask_at[j] || id_at[j] != id_at[s]) continue;
      if (j < s) is_first = false;
      else ++count;
    }
    int32_t total;
    const int64_t place = base + length + block_exclusive_sum(is_first, total);
    if (is_first) {
      const int64_t id = id_at[s], word = group * sizes.words + id / 32;
      const uint32_t smaller = bits[word] & ((1u << (id % 32)) - 1);
      ids[place] = id;
      slots[place] = static_cast<int32_t>(row_offsets[group] + prefix[word] + __popc(smaller));
      counts[place] = count;
    }
    length += total;
  }
  for (int64_t j = length + threadIdx.x; j < S; j += kThreads) ids[base + j] = -1, slots[base + j] = -1, counts[base + j] = 0;
  if (threadIdx.x == 0) lengths[document] = length;
}

__global__ void list_kernel(DistinctSizes sizes, const uint32_t* bits, const int32_t* prefix, const int64_t* row_offsets,
                            int64_t* rows) {
  const int64_t at = global_thread();
  if (at >= sizes.G * sizes.words) return;
  const int64_t group = at / sizes.words, word = at % sizes.words;
  int64_t out = row_offsets[group] + prefix[at];
  for (uint32_t rest = bits[at]; rest != 0; rest &= rest - 1) rows[out++] = word * 32 + __ffs(rest) - 1;
}

template <typename Row, typename Sum>
__global__ void gather_kernel(const Row* table, int64_t table_stride, const int64_t* rows, int64_t V, int64_t D, Row* block,
                              int64_t block_stride, Sum* inverse_norms) {
  const int64_t i = blockIdx.x, row = rows[i];
  if (row < -1 || row >= V) __trap();
  const Row* from = table + row * table_stride;  // not read for row -1
  Row* to = block + i * block_stride;
  Sum square = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    const Row value = row < 0 ? Row(0.0f) : from[d];
    to[d] = value;
    square += static_cast<Sum>(value) * static_cast<Sum>(value);
  }
  if (!inverse_norms) return;  // the whole block leaves together
  square = block_reduce(square, Add());
  if (threadIdx.x == 0) inverse_norms[i] = square > 0 ? 1 / std::sqrt(square) : square;  // a zero row 0, a NaN stays
}

}  // namespace

cudaError_t launch_document_rows_number(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                                        DistinctSizes sizes, uint32_t* bits, int32_t* prefix, int64_t* row_offsets,
                                        cudaStream_t stream) {
  cudaError_t status = launch(mark_kernel, blocks_for(sizes.B * sizes.S), stream, document_ids, document_mask, group_index,
                              sizes, bits);
  if (status == cudaSuccess) status = launch(number_kernel, sizes.G, stream, bits, sizes, prefix, row_offsets);
  if (status == cudaSuccess) status = launch(offsets_kernel, 1, stream, sizes.G, row_offsets);
  return status;
}

cudaError_t launch_document_rows_places(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                                        DistinctSizes sizes, const uint32_t* bits, const int32_t* prefix,
                                        const int64_t* row_offsets, int64_t* ids, int32_t* slots, int32_t* counts,
                                        int64_t* lengths, cudaStream_t stream) {
  return launch(places_kernel, sizes.B, stream, document_ids, document_mask, group_index, sizes, bits, prefix, row_offsets,
                ids, slots, counts, lengths);
}

cudaError_t launch_document_rows_list(DistinctSizes sizes, const uint32_t* bits, const int32_t* prefix,
                                      const int64_t* row_offsets, int64_t* rows, cudaStream_t stream) {
  return launch(list_kernel, blocks_for(sizes.G * sizes.words), stream, sizes, bits, prefix, row_offsets, rows);
}

template <typename Row, typename Sum>
cudaError_t launch_document_rows_gather(const Row* table, int64_t table_stride, const int64_t* rows, int64_t n, int64_t V,
                                        int64_t D, Row* block, int64_t block_stride, Sum* inverse_norms,
                                        cudaStream_t stream) {
  return launch(gather_kernel<Row, Sum>, n, stream, table, table_stride, rows, V, D, block, block_stride, inverse_norms);
}

#define INSTANTIATE(Row, Sum)                                                                                              \
  template cudaError_t launch_document_rows_gather(const Row*, int64_t, const int64_t*, int64_t, int64_t, int64_t, Row*, \
                                                   int64_t, Sum*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
