// Similarity of distinct document tokens to a query, and the k best of each document.
//   best[u, m] = max over tokens t of query m of <table[rows[u]], q[m, t]> / (||row|| ||q||), rounded; then the k best of each
//   document by (-best, first position)
//   Parallel over   begin: one block per query token; mark, number, list: document_rows; rows: tiles of distinct rows times the
//                   tokens of a group of queries (tile.cuh); select: one block per document
//   Global memory   each distinct row of a group once, with its norm and the maximum over T in the same pass; 8 bytes for each
//                   (row, query); select reads the ids of a document twice and one score for each distinct one
//   Precision       float (double for double)
//   Deterministic   yes: a total order, keys that differ; the only atomics are on integers
//   Six launches, nothing waits for the device. A query without tokens and a NaN trap.
//   Measured, H100, bf16, D 4096, T 16 (benchmarks/results): one query of 100 documents 52 us (5,200 rows are 43 MB, 14 us of
//   memory), 4 queries of 8 shared documents 63 us, 32 queries of 100 documents 477 us; launches included, in a CUDA graph.
#include "distinct.cuh"
#include "launchers.h"
#include "tile.cuh"

namespace qpeft {
namespace {

// Prepares what the other kernels use: bits that are zero, 1 / norm of the query tokens.
template <typename Row, typename Sum>
__global__ void begin_kernel(SimilarityInputs<Row> inputs, DistinctSizes sizes, uint32_t* bits, Sum* query_scales) {
  const int64_t token = blockIdx.x, query = token / inputs.T, words = sizes.G * sizes.words;
  for (int64_t word = global_thread(); word < words; word += static_cast<int64_t>(gridDim.x) * kThreads) bits[word] = 0;
  if (token % inputs.T == 0) {
    int32_t any = 0;
    for (int64_t t = threadIdx.x; t < inputs.T; t += kThreads) any |= inputs.query_mask[query * inputs.T + t];
    if (block_reduce(any, Max()) == 0) __trap();  // the whole block
  }
  if (!inputs.cosine || !inputs.query_mask[token]) return;  // a masked token may be NaN, and its norm is not used
  const Row* embed = inputs.query_embeds + token * inputs.D;
  Sum square = 0;
#pragma unroll 8
  for (int64_t d = threadIdx.x; d < inputs.D; d += kThreads)
    square += static_cast<Sum>(embed[d]) * static_cast<Sum>(embed[d]);
  square = block_reduce(square, Add());
  if (threadIdx.x == 0) query_scales[token] = square > 0 ? 1 / std::sqrt(square) : square;  // zero: 0, a NaN stays
}

// Finds the best token of each query in a tile of products [rows, M * T] (tile.cuh). With more tokens than one tile has
// columns M is 1, a thread keeps one row, and its best so far is carried from tile to tile.
template <typename Sum>
struct BestTokens {
  static constexpr bool kRowSquares = true, kSequential = true;
  SimilarityScratch<Sum> scratch;
  const bool* query_mask;
  int T, M;
  bool cosine;
  Candidate<Sum> carried = {};

  __device__ void operator()(const RowTile& tile, const Sum* c, int stride, const Sum* squares) {
    const int queries = M == 1 ? 1 : tile.columns / T, tokens = M == 1 ? tile.columns : T;
    for (int at = threadIdx.x; at < tile.rows * queries; at += kThreads) {
      const int row = at % tile.rows, m = at / tile.rows;
      const int64_t first_token = (static_cast<int64_t>(tile.list) * M + m) * T + tile.column;
      Candidate<Sum> winner = tile.column == 0 ? Candidate<Sum>{-INFINITY, INT32_MAX} : carried;
      int t = row % tokens;  // lanes begin at different tokens, and so in different banks; the order does not matter
      for (int step = 0; step < tokens; ++step) {
        if (query_mask[first_token + t]) {
          const Sum product = c[row * stride + m * T + t];
          const Candidate<Sum> candidate{cosine ? product * scratch.query_scales[first_token + t] : product,
                                         tile.column + t};
          if (candidate.before(winner)) winner = candidate;
        }
        if (++t == tokens) t = 0;
      }
      carried = winner;
      if (M == 1 && tile.column + tile.columns < T) continue;
      const int64_t u = tile.first + row;
      const Sum square = squares[row], scale = square > 0 ? 1 / std::sqrt(square) : square;
      // norms are positive, so the maximum may be taken before the product
      scratch.best[u * M + m] = round_score(cosine ? winner.score * scale : winner.score);
      scratch.best_positions[u * M + m] = winner.position;
      if (m == 0) scratch.row_scales[u] = cosine ? scale : Sum(1);
    }
  }
};

// ---- select: a candidate as one integer, the better one larger; no two of a document are equal -------------------------

template <typename Sum>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = uint64_t;
  using Bits = uint32_t;
};
template <>
struct KeyOf<double> {
  using Type = unsigned __int128;
  using Bits = uint64_t;
};
template <typename Sum>
using Key = typename KeyOf<Sum>::Type;

template <typename Sum>
__device__ Key<Sum> make_key(Sum score, int64_t position) {
  using Bits = typename KeyOf<Sum>::Bits;
  constexpr Bits kSign = Bits(1) << (sizeof(Bits) * 8 - 1);
  if (score != score) __trap();  // NaN in the table or the query
  if (score == 0) score = 0;  // -0 and 0 are a tie
  Bits bits;
  memcpy(&bits, &score, sizeof(bits));
  bits = (bits & kSign) != 0 ? ~bits : bits | kSign;
  return static_cast<Key<Sum>>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(position));
}
template <typename Sum>
__device__ int64_t position_of(Key<Sum> key) {
  return 0xFFFFFFFFu - static_cast<uint32_t>(key);
}

// keys [size] into descending order; size a power of two. All threads call, after a barrier.
template <typename K>
__device__ void sort_descending(K* keys, int size) {
  for (int width = 2; width <= size; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      for (int at = threadIdx.x; at < size / 2; at += kThreads) {
        const int low = at / step * (2 * step) + at % step, high = low + step;
        const K a = keys[low], b = keys[high];
        if ((a < b) == ((low & width) == 0)) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
}

// The k-th largest of n different keys, digit by digit from the top; 1 <= k <= n. All threads call, after a barrier.
template <typename K>
__device__ K select_largest(const K* keys, int n, int k) {
  constexpr int kDigits = 256;
  static_assert(kDigits == kThreads);
  __shared__ int counts[kDigits];
  __shared__ int digit, before;
  K prefix = 0, known = 0;
  for (int shift = sizeof(K) * 8 - 8; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int at = threadIdx.x; at < n; at += kThreads)
      if ((keys[at] & known) == prefix) atomicAdd(&counts[static_cast<int>(keys[at] >> shift) & (kDigits - 1)], 1);
    __syncthreads();
    const int mine = counts[kDigits - 1 - threadIdx.x];  // larger digits first
    int total;
    const int larger = block_exclusive_sum(mine, total);
    if (larger < k && k <= larger + mine) digit = kDigits - 1 - threadIdx.x, before = larger;
    __syncthreads();
    prefix |= static_cast<K>(digit) << shift;
    known |= static_cast<K>(kDigits - 1) << shift;
    k -= before;
    __syncthreads();  // digit and before have been read
  }
  return prefix;
}

// sort_size: keys in shared memory, enough for all tokens of a short document, or for the clues of a long one, whose other
// keys stay in scratch.
template <typename Sum>
__global__ void select_kernel(PairInputs pairs, DistinctSizes sizes, GroupedIds groups, SimilarityScratch<Sum> scratch,
                              int k, int sort_size, int hash_size, SimilarityResults<Sum> results) {
  __shared__ int chosen;
  const int64_t S = sizes.S, M = sizes.M;
  auto* sorted = reinterpret_cast<Key<Sum>*>(block_memory());
  Cells cells{nullptr, scratch.first + blockIdx.x * sizes.V, nullptr, hash_size};
  Key<Sum>* keys = sorted;
  if (hash_size > 0) {
    cells.ids = reinterpret_cast<int32_t*>(sorted + sort_size);
    cells.first = cells.ids + hash_size;
  } else {
    keys = static_cast<Key<Sum>*>(scratch.keys) + blockIdx.x * S;
  }
  for (int64_t pair = blockIdx.x; pair < sizes.B; pair += gridDim.x) {
    const int64_t *ids = pairs.document_ids + pair * S, query = pairs.query_index[pair], group = query / M,
                  m = query % M;
    const auto slot = [&](int64_t position) { return slot_of(groups, sizes.words, group, ids[position]); };
    const int n =
        for_each_distinct(ids, pairs.document_mask + pair * S, S, cells, [&](int32_t place, int64_t position, int32_t) {
          keys[place] = make_key(scratch.best[slot(position) * M + m], position);
        });
    if (threadIdx.x == 0) chosen = 0;
    __syncthreads();
    int found = n;
    if (keys != sorted) {
      found = n < sort_size ? n : sort_size;
      const Key<Sum> least = found == 0 ? 0 : select_largest(keys, n, found);
      for (int at = threadIdx.x; at < n; at += kThreads)
        if (keys[at] >= least) sorted[atomicAdd(&chosen, 1)] = keys[at];
    }
    int size = 1;
    while (size < found) size *= 2;
    for (int at = found + threadIdx.x; at < size; at += kThreads) sorted[at] = 0;  // smaller than every key
    __syncthreads();
    sort_descending(sorted, size);
    for (int c = threadIdx.x; c < k; c += kThreads) {
      const int64_t out = pair * k + c;
      if (c >= found) {
        results.scores[out] = -INFINITY, results.clue_ids[out] = -1, results.query_positions[out] = -1;
        results.inverse_norms[out] = 0;
        continue;
      }
      const int64_t position = position_of<Sum>(sorted[c]), u = slot(position);
      results.scores[out] = scratch.best[u * M + m];
      results.clue_ids[out] = ids[position];
      results.query_positions[out] = scratch.best_positions[u * M + m];
      results.inverse_norms[out] = scratch.row_scales[u];
    }
    __syncthreads();  // the keys have been read
  }
}

template <typename Sum>
cudaError_t launch_select(PairInputs pairs, DistinctSizes sizes, GroupedIds groups, SimilarityScratch<Sum> scratch,
                          int64_t k, SimilarityResults<Sum> results, cudaStream_t stream) {
  const int64_t long_blocks = scratch_blocks(sizes);
  int sort_size = 1;
  while (sort_size < (long_blocks == 0 ? sizes.S : std::min(k, sizes.S))) sort_size *= 2;
  const int hash = long_blocks == 0 ? hash_size(sizes.S) : 0;
  if (long_blocks > 0) {
    const size_t bytes = long_blocks * sizes.V * sizeof(int32_t);
    const cudaError_t status = cudaMemsetAsync(scratch.first, Cells::kNowhere & 0xFF, bytes, stream);
    if (status != cudaSuccess) return status;
  }
  return launch_with_memory(select_kernel<Sum>, long_blocks == 0 ? sizes.B : long_blocks,
                            sort_size * sizeof(Key<Sum>) + 2 * hash * sizeof(int32_t), stream, pairs, sizes, groups,
                            scratch, k, sort_size, hash, results);
}

}  // namespace

// As many queries as the widest tile has columns for, spread evenly over the groups: they share each row that is read.
int64_t queries_per_group(int64_t Q, int64_t T, bool is_double) {
  const int64_t columns = is_double ? MiddleTile::kColumns : WideTile::kColumns;
  const int64_t most = std::max<int64_t>(std::min(Q, columns / T), 1), groups = blocks_for(Q, most);
  return std::max<int64_t>(blocks_for(Q, std::max<int64_t>(groups, 1)), 1);
}

template <typename Row, typename Sum>
cudaError_t launch_similarity_topk(PairInputs pairs, SimilarityInputs<Row> inputs, DistinctSizes sizes,
                                   GroupedIds groups, SimilarityScratch<Sum> scratch, SimilarityResults<Sum> results,
                                   cudaStream_t stream) {
  cudaError_t status =
      launch(begin_kernel<Row, Sum>, sizes.Q * inputs.T, stream, inputs, sizes, groups.bits, scratch.query_scales);
  if (status == cudaSuccess)
    status =
        launch_document_rows_number(pairs.document_ids, pairs.document_mask, pairs.query_index, sizes, groups, stream);
  const RowLists lists{groups.rows,     groups.row_offsets, nullptr, 0, sizes.G, std::min(sizes.B * sizes.S, sizes.V),
                       most_rows(sizes)};
  const Table<Row> table{inputs.table, inputs.table_stride, sizes.V, inputs.D};
  const Dense<Row> queries{inputs.query_embeds, inputs.D, sizes.Q * inputs.T, sizes.M * inputs.T};
  const BestTokens<Sum> best_tokens{scratch, inputs.query_mask, static_cast<int>(inputs.T), static_cast<int>(sizes.M),
                                    inputs.cosine};
  if (status == cudaSuccess) status = launch_multiply_rows(lists, table, queries, best_tokens, stream);
  if (status == cudaSuccess) status = launch_select(pairs, sizes, groups, scratch, inputs.K, results, stream);
  return status;
}

#define INSTANTIATE(Row, Sum)                                                                               \
  template cudaError_t launch_similarity_topk(PairInputs, SimilarityInputs<Row>, DistinctSizes, GroupedIds, \
                                              SimilarityScratch<Sum>, SimilarityResults<Sum>, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
