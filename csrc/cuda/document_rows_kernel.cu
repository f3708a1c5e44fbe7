// Distinct ids of groups of documents, and the gather of their table rows.
//   rows of group g = the set of ids under a True mask in its documents, ascending; inverse_norms = 1 / ||row||
//   Parallel over   mark: document positions; number: one block per group; list: words of 32 ids; places: one block per
//                   document; gather: one block per row
//   Global memory   V / 8 bytes of bits and as much of counts per group; the ids of a document are read twice (cache);
//                   gather reads each row once and writes it once
//   Precision       norms in float (double for double)
//   Deterministic   yes: all atomics are on integers, and what they leave does not depend on their order
//   Nothing here waits for the device: sizes that depend on the data stay there.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "distinct.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace qpeft {
namespace {

__global__ void mark_kernel(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                            DistinctSizes sizes, uint32_t* bits) {
  const int64_t at = global_thread();
  if (at >= sizes.B * sizes.S || !document_mask[at]) return;
  const int64_t id = document_ids[at], index = group_index[at / sizes.S];
  if (id < 0 || id >= sizes.V || index < 0 || index >= sizes.Q) __trap();  // values cannot be checked without a sync
  atomicOr(&bits[index / sizes.M * sizes.words + id / 32], 1u << (id % 32));
}

// Each thread takes neighbouring words, so that one sum over the block is enough.
__global__ void number_kernel(DistinctSizes sizes, GroupedIds groups) {
  const int64_t group = blockIdx.x, each = (sizes.words + kThreads - 1) / kThreads, first = threadIdx.x * each;
  const int64_t last = first + each < sizes.words ? first + each : sizes.words;
  const uint32_t* bits = groups.bits + group * sizes.words;
  int32_t ids = 0, total;
  for (int64_t word = first; word < last; ++word) ids += __popc(bits[word]);
  int32_t before = block_exclusive_sum(ids, total);
  for (int64_t word = first; word < last; ++word) {
    groups.prefix[group * sizes.words + word] = before;
    before += __popc(bits[word]);
  }
  if (threadIdx.x == 0) groups.sizes[group] = total;
}

// One block for kThreads words of a group; it also sums up the groups before it, which saves a launch.
__global__ void list_kernel(DistinctSizes sizes, GroupedIds groups, int64_t parts) {
  const int64_t group = blockIdx.x / parts, word = blockIdx.x % parts * kThreads + threadIdx.x;
  int64_t before = 0;
  for (int64_t g = threadIdx.x; g < group; g += kThreads) before += groups.sizes[g];
  before = block_reduce(before, Add());
  if (threadIdx.x == 0 && blockIdx.x % parts == 0) {
    groups.row_offsets[group] = before;
    if (group == sizes.G - 1) groups.row_offsets[sizes.G] = before + groups.sizes[group];
  }
  if (word >= sizes.words) return;
  const int64_t at = group * sizes.words + word;
  int64_t out = before + groups.prefix[at];
  for (uint32_t rest = groups.bits[at]; rest != 0; rest &= rest - 1) groups.rows[out++] = word * 32 + __ffs(rest) - 1;
}

__global__ void places_kernel(const int64_t* document_ids, const bool* document_mask, const int64_t* group_index,
                              DistinctSizes sizes, GroupedIds groups, Cells cells, int64_t* ids, int32_t* slots,
                              int32_t* counts, int64_t* lengths) {
  if (cells.size > 0) {
    cells.ids = reinterpret_cast<int32_t*>(block_memory());
    cells.first = cells.ids + cells.size, cells.counts = cells.first + cells.size;
  } else {
    cells.first += blockIdx.x * sizes.V, cells.counts += blockIdx.x * sizes.V;
  }
  for (int64_t document = blockIdx.x; document < sizes.B; document += gridDim.x) {
    const int64_t base = document * sizes.S, group = group_index[document] / sizes.M;
    const int32_t length = for_each_distinct(
        document_ids + base, document_mask + base, sizes.S, cells, [&](int32_t place, int64_t s, int32_t cell) {
          const int64_t id = document_ids[base + s];
          ids[base + place] = id;
          slots[base + place] = static_cast<int32_t>(slot_of(groups, sizes.words, group, id));
          counts[base + place] = cells.counts[cell];
        });
    for (int64_t at = base + length + threadIdx.x; at < base + sizes.S; at += kThreads)
      ids[at] = -1, slots[at] = -1, counts[at] = 0;
    if (threadIdx.x == 0) lengths[document] = length;
  }
}

template <typename Row, typename Sum>
__global__ void gather_kernel(const Row* table, int64_t table_stride, const int64_t* rows, int64_t V, int64_t D,
                              Row* block, int64_t block_stride, Sum* inverse_norms) {
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

cudaError_t launch_document_rows_number(const int64_t* document_ids, const bool* document_mask,
                                        const int64_t* group_index, DistinctSizes sizes, GroupedIds groups,
                                        cudaStream_t stream) {
  if (sizes.G == 0) return cudaMemsetAsync(groups.row_offsets, 0, sizeof(int64_t), stream);
  cudaError_t status = launch(mark_kernel, blocks_for(sizes.B * sizes.S), stream, document_ids, document_mask,
                              group_index, sizes, groups.bits);
  if (status == cudaSuccess) status = launch(number_kernel, sizes.G, stream, sizes, groups);
  const int64_t parts = std::max<int64_t>(blocks_for(sizes.words), 1);
  if (status == cudaSuccess) status = launch(list_kernel, sizes.G * parts, stream, sizes, groups, parts);
  return status;
}

int64_t scratch_blocks(const DistinctSizes& sizes) {
  return sizes.S <= kShortDocument ? 0 : resident_blocks(sizes.B, 1);
}

cudaError_t launch_document_rows_places(const int64_t* document_ids, const bool* document_mask,
                                        const int64_t* group_index, DistinctSizes sizes, GroupedIds groups,
                                        int32_t* scratch, int64_t* ids, int32_t* slots, int32_t* counts,
                                        int64_t* lengths, cudaStream_t stream) {
  const int64_t blocks = scratch_blocks(sizes);
  if (blocks == 0) {
    const Cells cells{nullptr, nullptr, nullptr, hash_size(sizes.S)};
    return launch_with_memory(places_kernel, sizes.B, 3 * cells.size * sizeof(int32_t), stream, document_ids,
                              document_mask, group_index, sizes, groups, cells, ids, slots, counts, lengths);
  }
  const Cells cells{nullptr, scratch, scratch + blocks * sizes.V, 0};
  const size_t bytes = blocks * sizes.V * sizeof(int32_t);
  cudaError_t status = cudaMemsetAsync(cells.first, Cells::kNowhere & 0xFF, bytes, stream);
  if (status == cudaSuccess) status = cudaMemsetAsync(cells.counts, 0, bytes, stream);
  if (status != cudaSuccess) return status;
  return launch(places_kernel, blocks, stream, document_ids, document_mask, group_index, sizes, groups, cells, ids,
                slots, counts, lengths);
}

template <typename Row, typename Sum>
cudaError_t launch_document_rows_gather(const Row* table, int64_t table_stride, const int64_t* rows, int64_t n,
                                        int64_t V, int64_t D, Row* block, int64_t block_stride, Sum* inverse_norms,
                                        cudaStream_t stream) {
  return launch(gather_kernel<Row, Sum>, n, stream, table, table_stride, rows, V, D, block, block_stride,
                inverse_norms);
}

#define INSTANTIATE(Row, Sum)                                                                                      \
  template cudaError_t launch_document_rows_gather(const Row*, int64_t, const int64_t*, int64_t, int64_t, int64_t, \
                                                   Row*, int64_t, Sum*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
