// Products of gathered rows: scores of distinct ids, and gradients of the weights of attention (tile.cuh).
//   products[u, r] = table[rows[u]] . dense[l, r] for u in list l
#include "launchers.h"
#include "tile.cuh"

namespace qpeft {

template <typename Row, typename Sum>
cudaError_t launch_clue_attention_products(GatheredRows<Row> gathered, const Row* dense, int64_t columns, Sum* products,
                                           cudaStream_t stream) {
  const RowLists lists{gathered.rows,   gathered.offsets, gathered.lengths,
                       gathered.stride, gathered.lists,   gathered.longest};
  const Table<Row> table{gathered.table, gathered.table_stride, gathered.V, gathered.D};
  const Dense<Row> by{dense, gathered.D, gathered.lists * columns, columns};
  return launch_multiply_rows(lists, table, by, StoreProducts<Sum>{products, columns}, stream);
}

#define INSTANTIATE(Row, Sum)                                                                                         \
  template cudaError_t launch_clue_attention_products(GatheredRows<Row>, const Row*, int64_t, Sum*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
