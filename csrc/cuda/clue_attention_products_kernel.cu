// Products of gathered rows: scores of distinct ids, and gradients of the weights of attention (tile.cuh).
//   products[u, r] = table[rows[u]] . dense[l, r] for u in list l
#include "launchers.h"
#include "tile.cuh"

namespace qpeft {

template <typename Row, typename Sum>
cudaError_t launch_clue_attention_products(GatheredRows<Row> gathered, const Row* dense, int64_t columns, Sum* products,
                                           cudaStream_t stream) {
  const RowLists lists{gathered.rows,  gathered.offsets, gathered.lengths, gathered.stride,
                       gathered.lists, gathered.longest, gathered.n};
  const Table<Row> table{gathered.table, gathered.table_stride, gathered.V, gathered.D};
  const Dense<Row> by{dense, gathered.D, gathered.lists * columns, columns};
  const StoreProducts<Sum> store{products, columns};
  // A third of n rows or so exist, the rest is room. Where they give fewer wide tiles than there are multiprocessors, smaller ones.
  const int64_t wide_tiles = blocks_for(gathered.n, WideTile::kRows) * blocks_for(columns, WideTile::kColumns);
  if (columns > MiddleTile::kColumns && wide_tiles < resident_blocks(INT_MAX, 4) && gathered.D <= INT_MAX / 2)
    return launch_tiles<MiddleTile>(lists, table, by, store, stream);
  return launch_multiply_rows(lists, table, by, store, stream);
}

#define INSTANTIATE(Row, Sum) \
  template cudaError_t launch_clue_attention_products(GatheredRows<Row>, const Row*, int64_t, Sum*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
