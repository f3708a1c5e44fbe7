// Device code for sets of ids: where an id lies in the numbered set of its group, and the first positions of a document's ids.
#pragma once
#include "block.cuh"
#include "launchers.h"

namespace qpeft {

// The place of an id among the rows of all groups, ascending inside a group.
__device__ inline int64_t slot_of(GroupedIds groups, int64_t words, int64_t group, int64_t id) {
  const int64_t word = group * words + id / 32;
  const uint32_t smaller = groups.bits[word] & ((1u << (id % 32)) - 1);
  return groups.row_offsets[group] + groups.prefix[word] + __popc(smaller);
}

// One cell for each distinct id of a document: a hash table in shared memory, or, for long documents, one cell for each id of
// the table in global memory. Which cell an id gets may depend on the order of threads, what stands there does not.
struct Cells {
  static constexpr int32_t kEmpty = -1, kNowhere = 0x7F7F7F7F;  // the latter by cudaMemset
  int32_t* ids;  // of a hash table [size], size a power of two; null: cell = id
  int32_t* first;  // the smallest position of the id
  int32_t* counts;  // how often it occurs; null: not wanted
  int32_t size;

  __device__ int32_t find(int32_t id) const {
    if (!ids) return id;
    int32_t cell = static_cast<int32_t>(static_cast<uint32_t>(id) * 2654435769u >> 7) & (size - 1);
    for (;;) {
      const int32_t there = atomicCAS(&ids[cell], kEmpty, id);
      if (there == kEmpty || there == id) return cell;
      cell = (cell + 1) & (size - 1);
    }
  }
  __device__ void clear(int32_t cell) const {
    if (ids) ids[cell] = kEmpty;
    first[cell] = kNowhere;
    if (counts) counts[cell] = 0;
  }
};

// For documents of S tokens: at most half full.
inline int32_t hash_size(int64_t S) {
  int32_t size = 64;
  while (size < 2 * S) size *= 2;
  return size;
}

// f(place, position, cell) for the first position of each distinct id that counts, places in the order of positions. Returns
// how many there are. All threads of the block call. Cells in global memory are clear before and after.
template <typename F>
__device__ int32_t for_each_distinct(const int64_t* ids, const bool* mask, int64_t S, Cells cells, F f) {
  __syncthreads();  // the cells of an earlier document have been read
  if (cells.ids) {
    for (int32_t cell = threadIdx.x; cell < cells.size; cell += kThreads) cells.clear(cell);
    __syncthreads();
  }
  for (int64_t s = threadIdx.x; s < S; s += kThreads) {
    if (!mask[s]) continue;
    const int32_t cell = cells.find(static_cast<int32_t>(ids[s]));
    atomicMin(&cells.first[cell], static_cast<int32_t>(s));
    if (cells.counts) atomicAdd(&cells.counts[cell], 1);
  }
  __syncthreads();
  int32_t length = 0;
  for (int64_t start = 0; start < S; start += kThreads) {  // the block stays together: block_exclusive_sum waits
    const int64_t s = start + threadIdx.x;
    const int32_t cell = s < S && mask[s] ? cells.find(static_cast<int32_t>(ids[s])) : -1;
    const bool is_first = cell >= 0 && cells.first[cell] == s;
    int32_t total;
    const int32_t place = length + block_exclusive_sum(is_first, total);
    if (is_first) f(place, s, cell);
    length += total;
  }
  __syncthreads();
  if (!cells.ids)
    for (int64_t s = threadIdx.x; s < S; s += kThreads)
      if (mask[s]) cells.clear(static_cast<int32_t>(ids[s]));
  return length;
}

}  // namespace qpeft
