// Gathered rows times a dense matrix, in tiles:   c[i, j] = sum over d of table[rows[i], d] * dense[j, d]
//
// A kernel here does L such products at once: list l of rows with its own `columns` rows of `dense`.
//   RowLists   which rows of the table: lists end to end (offsets [L + 1], as document_rows_distinct leaves them on the
//              device) or one every `stride` places (lengths [L]). Their lengths are read on the device: nothing waits for it.
//   Dense      list l takes dense rows l * columns .. l * columns + columns - 1, as far as there are any.
//   Epilogue   what is done with a tile: operator()(const RowTile&, Sum* c, int stride, const Sum* squares), called by all
//              threads. c[i * stride + j] are the products, in shared memory. StoreProducts below is the plainest one.
//                kRowSquares  squares[i] is the sum of the squares of row i of the table: its norm costs no second pass
//                kSequential  one block takes all column tiles of its rows in order (the object keeps its members between
//                             them); otherwise they are spread over blocks
//
//   Parallel over   tiles of rows (and columns), blocks of 8 warps that stay for several tiles; position in the list runs
//                   slowest: rows are ascending, so lists that share rows read them at about the same time, out of L2
//   Global memory   each row once per (list, column tile), 16 bytes a thread, kStages deep by cp.async; dense once per row tile
//   Shared memory   a stage holds kDepth bytes of each row, in sub-tiles of 64 bytes a row: 8 lanes of a 16-byte access meet
//                   two whole rows, so there are no bank conflicts; odd sub-tiles swap neighbouring rows, which lets the
//                   8 lanes that write 128 bytes of one row miss each other too
//   Registers       see warp_sums.cuh
//   Precision       float (double for double); partial sums of warps along d are added in fixed order
//   Deterministic   yes, no atomics
#pragma once
#include "block.cuh"
#include "warp_sums.cuh"

namespace qpeft {

struct RowLists {
  const int64_t* rows;  // ids, in [0, V)
  const int64_t* offsets;  // [L + 1] or null
  const int64_t* lengths;  // [L] where offsets are null
  int64_t stride, L;
  int64_t longest;  // no list is longer; bounds the grid, so the host's guess may be large
  int64_t n;  // of rows

  __device__ int64_t begin(int64_t list) const { return offsets ? offsets[list] : list * stride; }
  __device__ int64_t count(int64_t list) const { return offsets ? offsets[list + 1] - offsets[list] : lengths[list]; }
};

template <typename Row>
struct Table {
  const Row* data;
  int64_t stride, V, D;
};

template <typename Row>
struct Dense {
  const Row* data;
  int64_t stride;
  int64_t rows;  // in all
  int64_t columns;  // of each list
};

struct RowTile {
  int64_t first;  // of its rows: a place in RowLists::rows
  int list, column;  // column: the first, among those of the list
  int rows, columns;
};

// kWarpsM x kWarpsN x kWarpsK warps; a warp has kRows / kWarpsM rows, kColumns / kWarpsN columns and every kWarpsK-th
// sub-tile of a stage. All take 96 KB (and 2 KB): two blocks on a multiprocessor of 227 KB, one where there are 99.
template <int kRows_, int kColumns_, int kDepth_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kStageBytes = (kRows + kColumns) * kDepth, kBytes = kStages * kStageBytes;
  static constexpr int kSteps = kDepth / 64 / kWarpsK;  // sub-tiles of a stage for one warp
  static constexpr int kM = kRows / kWarpsM / 16, kN = kColumns / kWarpsN / 8;  // 16 x 8 pieces of a warp
  // of c: eight rows of a fragment lie in different banks
  static constexpr int kStride = kColumns + 8;
  static_assert(kWarpsM * kWarpsN * kWarpsK * 32 == kThreads && kSteps >= 1 && kM >= 1 && kN >= 1);
};
using NarrowTile = TileShape<32, 16, 512, 1, 1, 8, 4>;  // one query: bound by memory, many small tiles of rows
using MiddleTile = TileShape<64, 64, 256, 2, 2, 2, 3>;
using WideTile = TileShape<128, 128, 128, 4, 2, 1, 3>;  // several queries side by side, heads times tokens

// Brings elements d .. of the rows of an operand into a stage, zeros where there are none: one chunk of 16 bytes of several
// rows for each thread. begins [kRows]: where the rows begin, null if there is none.
template <typename Shape, int kRows, typename Row>
__device__ void load_stage(char* stage, const Row* const* begins, int d, int D, bool aligned) {
  constexpr int kChunks = Shape::kDepth / 16, kTogether = kThreads / kChunks, kElements = 16 / sizeof(Row);
  static_assert(kRows % kTogether == 0);
  const int chunk = threadIdx.x % kChunks, sub_tile = chunk / 4, first_row = threadIdx.x / kChunks;
  d += chunk * kElements;
  const int there = d < D ? (D - d < kElements ? D - d : kElements) : 0;
  char* to = stage + sub_tile * (kRows * 64) + (first_row ^ (sub_tile & 1)) * 64 + chunk % 4 * 16;
  static_assert(kTogether % 2 == 0);  // so that the rows of one thread are swapped alike
  if (aligned) {
#pragma unroll
    for (int row = 0; row < kRows; row += kTogether) {
      const Row* from = begins[first_row + row];
      cp_async_16(to + row * 64, from + d, from ? there * static_cast<int>(sizeof(Row)) : 0);
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; row < kRows; row += kTogether) {
    const Row* from = begins[first_row + row];
    for (int e = 0; e < kElements; ++e)
      reinterpret_cast<Row*>(to + row * 64)[e] = from && e < there ? from[d + e] : Row(0.0f);
  }
}

// Computes one tile into shared memory: c [kRows, kStride], then the squares of the rows. All threads call. begins: where the rows
// of the table begin [kRows], then the dense ones [kColumns].
template <typename Shape, bool kRowSquares, typename Row>
__device__ const SumOf<Row>* multiply_tile(const Row* const* begins, int D, bool aligned, SumOf<Row>* c) {
  using Sum = SumOf<Row>;
  constexpr int kElements = Shape::kDepth / sizeof(Row);  // of a row in a stage
  const int stages = (D + kElements - 1) / kElements;
  const int warp = threadIdx.x / 32, warp_m = warp % Shape::kWarpsM, warp_n = warp / Shape::kWarpsM % Shape::kWarpsN,
            warp_k = warp / (Shape::kWarpsM * Shape::kWarpsN);
  constexpr int kWarpRows = Shape::kM * 16, kWarpColumns = Shape::kN * 8;
  char* memory = block_memory();
  {
    const auto load = [&](int stage) {
      char* to = memory + stage % Shape::kStages * Shape::kStageBytes;
      if (stage < stages) {
        load_stage<Shape, Shape::kRows>(to, begins, stage * kElements, D, aligned);
        load_stage<Shape, Shape::kColumns>(to + Shape::kRows * Shape::kDepth, begins + Shape::kRows, stage * kElements,
                                           D, aligned);
      }
      cp_async_commit();  // also where there is nothing to load, so that the count of the wait is right
    };
    WarpSums<Row, Shape::kM, Shape::kN> sums;
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) load(stage);
#pragma unroll 1  // several at once would not fit into the registers
    for (int stage = 0; stage < stages; ++stage) {
      cp_async_wait<Shape::kStages - 2>();
      __syncthreads();  // the stage is there for all, and the one before it has been used by all
      load(stage + Shape::kStages - 1);
      const char* a = memory + stage % Shape::kStages * Shape::kStageBytes;
      const char* b = a + Shape::kRows * Shape::kDepth;
      // warps side by side hold the same rows: they take turns with the squares
      const bool with_squares = kRowSquares && stage % Shape::kWarpsN == warp_n;
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        const int sub_tile = step * Shape::kWarpsK + warp_k;
        sums.add(a + (sub_tile * Shape::kRows + warp_m * kWarpRows) * 64,
                 b + (sub_tile * Shape::kColumns + warp_n * kWarpColumns) * 64, sub_tile & 1, with_squares);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // c lies where the stages were

    Sum* mine = c + warp_k * (Shape::kRows * Shape::kStride);
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
      for (int n = 0; n < Shape::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mine[(warp_m * kWarpRows + m * 16 + sums.row(i)) * Shape::kStride + warp_n * kWarpColumns + n * 8 +
               sums.column(i)] = sums.c[m][n][i];
    if constexpr (kRowSquares) {
      Sum* squares =
          c + Shape::kWarpsK * Shape::kRows * Shape::kStride + (warp_k * Shape::kWarpsN + warp_n) * Shape::kRows;
#pragma unroll
      for (int m = 0; m < Shape::kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Sum square = sums.squares[m][i];
          square += __shfl_xor_sync(~0u, square, 1);
          square += __shfl_xor_sync(~0u, square, 2);
          if (threadIdx.x % 4 == 0) squares[warp_m * kWarpRows + m * 16 + sums.row(2 * i)] = square;
        }
    }
  }
  __syncthreads();
  Sum* squares = c + Shape::kWarpsK * Shape::kRows * Shape::kStride;
  if constexpr (Shape::kWarpsK > 1) {
    for (int at = threadIdx.x; at < Shape::kRows * Shape::kColumns; at += kThreads) {
      Sum* cell = c + at / Shape::kColumns * Shape::kStride + at % Shape::kColumns;
      Sum sum = *cell;
      for (int k = 1; k < Shape::kWarpsK; ++k) sum += cell[k * Shape::kRows * Shape::kStride];
      *cell = sum;
    }
  }
  constexpr int kParts = Shape::kWarpsN * Shape::kWarpsK;
  if constexpr (kRowSquares && kParts > 1) {
    if (threadIdx.x < Shape::kRows)
      for (int part = 1; part < kParts; ++part) squares[threadIdx.x] += squares[part * Shape::kRows + threadIdx.x];
  }
  __syncthreads();
  return squares;
}

// Two blocks on a multiprocessor where their shared memory fits (sm_90, sm_100); 32-bit sums by FMA want more registers.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
template <typename Row>
constexpr int kBlocksAtOnce = sizeof(Row) == 2 ? 2 : 1;
#else
template <typename Row>
constexpr int kBlocksAtOnce = 1;
#endif

// Finds tile number `at` (tile.rows == 0: its list is shorter), and where its rows begin. All threads call.
template <typename Shape, typename Row>
__device__ void begin_tile(int at, int column, RowLists lists, Table<Row> table, Dense<Row> dense, RowTile& tile,
                           const Row** begins) {
  const int list = at % static_cast<int>(lists.L);
  const int64_t skipped = static_cast<int64_t>(at / static_cast<int>(lists.L)) * Shape::kRows;
  const int64_t rows = lists.count(list) - skipped, first = lists.begin(list) + skipped;
  const int64_t first_column = list * dense.columns + column, end = list * dense.columns + dense.columns;
  const int64_t columns = (end < dense.rows ? end : dense.rows) - first_column;
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    if (i < rows && (first < 0 || first + i >= lists.n)) __trap();
    const int64_t id = i < rows ? lists.rows[first + i] : 0;
    if (i < rows && (id < 0 || id >= table.V)) __trap();
    begins[i] = i < rows ? table.data + id * table.stride : nullptr;
  }
  for (int j = threadIdx.x; j < Shape::kColumns; j += kThreads)
    begins[Shape::kRows + j] = j < columns ? dense.data + (first_column + j) * dense.stride : nullptr;
  if (threadIdx.x == 0) {
    tile.first = first, tile.list = list, tile.column = column;
    tile.rows = rows <= 0 ? 0 : static_cast<int>(rows < Shape::kRows ? rows : Shape::kRows);
    tile.columns = columns <= 0 ? 0 : static_cast<int>(columns < Shape::kColumns ? columns : Shape::kColumns);
  }
  __syncthreads();
}

// `aligned`: all rows of both operands begin at multiples of 16 bytes.
template <typename Shape, typename Row, typename Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Row>)
    multiply_rows_kernel(RowLists lists, Table<Row> table, Dense<Row> dense, bool aligned, Epilogue epilogue) {
  using Sum = SumOf<Row>;
  static_assert(Shape::kWarpsK * Shape::kRows * (Shape::kStride + Shape::kWarpsN) * sizeof(Sum) <= Shape::kBytes);
  __shared__ RowTile tile;  // what only the ends of a tile need leaves the registers to its sums
  __shared__ int row_tiles;
  if (threadIdx.x < 32) {
    int64_t longest = 0;
    for (int64_t list = threadIdx.x; list < lists.L; list += 32) longest = Max()(longest, lists.count(list));
    for (int bits = 1; bits < 32; bits *= 2) longest = Max()(longest, __shfl_xor_sync(~0u, longest, bits));
    if (threadIdx.x == 0) row_tiles = static_cast<int>((longest + Shape::kRows - 1) / Shape::kRows * lists.L);
  }
  __syncthreads();
  Sum* c = reinterpret_cast<Sum*>(block_memory());
  const Row** begins = reinterpret_cast<const Row**>(block_memory() + Shape::kBytes);
  const auto column_tiles = [&] { return static_cast<int>((dense.columns + Shape::kColumns - 1) / Shape::kColumns); };
  for (int at = blockIdx.x; at < row_tiles * (Epilogue::kSequential ? 1 : column_tiles()); at += gridDim.x) {
    int column_tile = Epilogue::kSequential ? 0 : at % column_tiles();
    do {
      begin_tile<Shape>(Epilogue::kSequential ? at : at / column_tiles(), column_tile * Shape::kColumns, lists, table,
                        dense, tile, begins);
      if (tile.rows > 0 && tile.columns > 0) {  // for the whole block
        const int D = static_cast<int>(table.D);
        const Sum* squares = multiply_tile<Shape, Epilogue::kRowSquares>(begins, D, aligned, c);
        epilogue(tile, c, Shape::kStride, squares);
      }
      __syncthreads();  // c, begins and tile have been read
    } while (Epilogue::kSequential && ++column_tile < column_tiles());
  }
}

template <typename Shape, typename Row, typename Epilogue>
cudaError_t launch_tiles(RowLists lists, Table<Row> table, Dense<Row> dense, Epilogue epilogue, cudaStream_t stream) {
  const auto aligned = [](const Row* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(Row) % 16 == 0;
  };
  const int64_t most = blocks_for(lists.longest, Shape::kRows) * lists.L *
                       (Epilogue::kSequential ? 1 : blocks_for(dense.columns, Shape::kColumns));
  return launch_with_memory(multiply_rows_kernel<Shape, Row, Epilogue>, resident_blocks(most, 2),
                            Shape::kBytes + (Shape::kRows + Shape::kColumns) * sizeof(Row*), stream, lists, table,
                            dense, aligned(table.data, table.stride) && aligned(dense.data, dense.stride), epilogue);
}

// The shape follows from the number of columns.
template <typename Row, typename Epilogue>
cudaError_t launch_multiply_rows(RowLists lists, Table<Row> table, Dense<Row> dense, Epilogue epilogue,
                                 cudaStream_t stream) {
  if (dense.columns == 0 || table.D > INT_MAX / 2)
    return dense.columns == 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (dense.columns <= NarrowTile::kColumns) return launch_tiles<NarrowTile>(lists, table, dense, epilogue, stream);
  if constexpr (!std::is_same_v<Row, double>)  // 64 sums of double would not stay in registers
    if (dense.columns > MiddleTile::kColumns) return launch_tiles<WideTile>(lists, table, dense, epilogue, stream);
  return launch_tiles<MiddleTile>(lists, table, dense, epilogue, stream);
}

// out[place in RowLists::rows, column] = c
template <typename Sum>
struct StoreProducts {
  static constexpr bool kRowSquares = false, kSequential = false;
  Sum* out;
  int64_t out_stride;

  __device__ void operator()(const RowTile& tile, Sum* c, int stride, const Sum*) const {
    for (int at = threadIdx.x; at < tile.rows * tile.columns; at += kThreads) {
      const int i = at / tile.columns, j = at % tile.columns;
      out[(tile.first + i) * out_stride + tile.column + j] = c[i * stride + j];
    }
  }
};

}  // namespace qpeft
