// Sums of gathered rows with the weights of attention. Lists of rows are the distinct ids of a document or of a query.
//   sums[l, r, d] = sum over u in list l of weights[u, r] * table[rows[u], d]              contexts; gradients of queries
//   Parallel over   lists x heads x tiles of 128 columns x 128 numbers of the rows (64 x 64 in float and double); the numbers
//                   run fastest, so that neighbouring blocks share their weights in L2
//   Global memory   a list's rows once per column tile, its weights once per tile of numbers; writes each sum once
//   Precision       products of bf16 or fp16 by tensor cores, of float and double by FMA (never tf32), every sum in float
//                   (double for double)
//   Deterministic   yes, no atomics; tokens in order
#include "launchers.h"
#include "tile_tn.cuh"

namespace qpeft {
namespace {

struct SumsFlags {
  bool accumulate, aligned_table, aligned_weights, aligned_sums;  // aligned: 16 bytes at a time
};

template <typename Numbers>
__device__ Numbers added(Numbers a, const Numbers& b) {
#pragma unroll
  for (unsigned k = 0; k < sizeof(a.x) / sizeof(a.x[0]); ++k) a.x[k] = a.x[k] + b.x[k];
  return a;
}

template <typename Row, typename Out>
__global__ void __launch_bounds__(kThreads, 2)
    weighted_sums_kernel(GatheredRows<Row> gathered, const Row* weights, int columns, int heads, SumsFlags flags,
                         Out* sums) {
  using Tile = TileTN<Row>;
  const int D = static_cast<int>(gathered.D), width = D / heads;  // numbers of a head
  const int d_tiles = (width + Tile::kWidth - 1) / Tile::kWidth,
            column_tiles = (columns + Tile::kColumns - 1) / Tile::kColumns;
  const int d = blockIdx.x % d_tiles * Tile::kWidth, column = blockIdx.x / d_tiles % column_tiles * Tile::kColumns;
  const int head = blockIdx.x / d_tiles / column_tiles % heads, first_d = head * width + d;
  const int64_t list = blockIdx.x / d_tiles / column_tiles / heads;

  const int64_t begin = gathered.offsets ? gathered.offsets[list] : list * gathered.stride;
  const int64_t end = gathered.offsets ? gathered.offsets[list + 1] : begin + gathered.lengths[list];
  if (begin < 0 || end > gathered.n) __trap();
  if (flags.accumulate && begin >= end) return;  // the whole block leaves together
  const TileSource<Row> from_weights{weights + head * columns + column, static_cast<int64_t>(heads) * columns,
                                     columns - column, flags.aligned_weights};
  const TileSource<Row> from_table{gathered.table + first_d, gathered.table_stride, width - d, flags.aligned_table};
  Tile tile;
  add_gathered(tile, from_weights, from_table, gathered.rows, gathered.V, begin, end);

  Out* const out = sums + (list * columns + column) * D + first_d;
  tile.template finish<Out>([&](int r, int i, auto chunk) {  // numbers i, i + 1, ... of column r
    constexpr int kCount = sizeof(chunk) / sizeof(Out);
    if (column + r >= columns) return;
    Out* const to = out + static_cast<int64_t>(r) * D + i;
    if (flags.aligned_sums && d + i + kCount <= width) {
      auto* const there = reinterpret_cast<decltype(chunk)*>(to);
      if (flags.accumulate) chunk = added(chunk, *there);
      *there = chunk;
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (d + i + k < width) to[k] = flags.accumulate ? static_cast<Out>(to[k] + chunk.x[k]) : chunk.x[k];
    }
  });
}

}  // namespace

template <typename Row, typename Out>
cudaError_t launch_clue_attention_weighted_sums(GatheredRows<Row> gathered, const Row* weights, int64_t columns,
                                                int64_t heads, bool accumulate, Out* sums, cudaStream_t stream) {
  constexpr int64_t kTogether = 16 / sizeof(Row);
  const int64_t width = gathered.D / heads;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const SumsFlags flags{accumulate,
                        aligned(gathered.table) && gathered.table_stride % kTogether == 0 && width % kTogether == 0,
                        aligned(weights) && columns % kTogether == 0, aligned(sums) && width % kTogether == 0};
  const int64_t blocks =
      gathered.lists * heads * blocks_for(columns, TileTN<Row>::kColumns) * blocks_for(width, TileTN<Row>::kWidth);
  if (columns * heads > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_with_memory(weighted_sums_kernel<Row, Out>, blocks, kTileTNBytes<Row>, stream, gathered, weights,
                            columns, heads, flags, sums);
}

#define INSTANTIATE(Row, Out)                                                                                     \
  template cudaError_t launch_clue_attention_weighted_sums(GatheredRows<Row>, const Row*, int64_t, int64_t, bool, \
                                                           Out*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, __half)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
