// csrc/cuda/tile.cuh without an operator, for test_cuda_tile.py: every shape, both kinds of row lists, squares and sequential columns.
#include "replica.h"

#include "../../../csrc/cuda/glue.h"
#include "../../../csrc/cuda/tile.cuh"

namespace qpeft {
namespace {

// out[i, j] = c[i, j] / (1 + squares[i]), counted up by the column tiles that came before
template <typename Sum>
struct DivideBySquares {
  static constexpr bool kRowSquares = true, kSequential = true;
  Sum* out;
  int64_t out_stride;
  int tiles_before = 0;

  void operator()(const RowTile& tile, Sum* c, int stride, const Sum* squares) {
    tiles_before = tile.column == 0 ? 0 : tiles_before + 1;
    for (int at = threadIdx.x; at < tile.rows * tile.columns; at += kThreads) {
      const int i = at / tile.columns, j = at % tile.columns;
      out[(tile.first + i) * out_stride + tile.column + j] = c[i * stride + j] / (1 + squares[i]) + tiles_before;
    }
  }
};

void product(const Tensor table, const Tensor rows, const Tensor offsets, const Tensor dense, int64_t columns, int64_t D, bool end_to_end,
             bool squares, Tensor out) {
  const int64_t L = end_to_end ? offsets.size(0) - 1 : offsets.size(0);
  const RowLists lists{const_data<int64_t>(rows), end_to_end ? const_data<int64_t>(offsets) : nullptr,
                       const_data<int64_t>(offsets), L == 0 ? 0 : rows.size(0) / L, L, rows.size(0), rows.size(0)};
  dispatch_table<__half, __nv_bfloat16>("product", table.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    const Table<Row> from{const_data<Row>(table), table.stride(0), table.size(0), D};
    const Dense<Row> by{const_data<Row>(dense), dense.stride(0), dense.size(0), columns};
    check_cuda("product", squares ? launch_multiply_rows(lists, from, by, DivideBySquares<Sum>{data<Sum>(out), out.stride(0)}, nullptr)
                                  : launch_multiply_rows(lists, from, by, StoreProducts<Sum>{data<Sum>(out), out.stride(0)}, nullptr));
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(qpeft_ext, m) {
  m.def("tile_product(Tensor table, Tensor rows, Tensor offsets, Tensor dense, int columns, int D, bool end_to_end, "
        "bool squares, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) { m.impl("tile_product", TORCH_BOX(&product)); }

}  // namespace
}  // namespace qpeft
