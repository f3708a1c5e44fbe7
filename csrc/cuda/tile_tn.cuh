// Gathered product, weights^T * rows: the tile of one block and how it is filled. The contraction runs over tokens.
//   sums[column, d] = sum over tokens of weights[token, column] * table[rows[token], d]
// A stage is kTokens tokens: their weights [kTokens, kColumns] and their rows [kTokens, kWidth], in chunks of 16 bytes. Stages
// are filled by cp.async, kStages - 1 ahead of the arithmetic. bf16 and fp16 go through the tensor cores, float and double
// through registers; float is never rounded to anything shorter.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "ptx.cuh"

namespace qpeft {

// N numbers that lie side by side, 16 bytes or a multiple of it.
template <typename T, int N>
struct alignas(16) Numbers {
  T x[N];
};

// The product of one stage, and where each thread keeps its sums. Registers of one thread: 4 x 4.
template <typename Row>
struct TileTN {
  static constexpr int kColumns = 64, kWidth = 64, kTokens = 16, kStages = 4;
  using Sum = Row;
  Sum sums[4][4] = {};

  // Where a chunk of 16 bytes of a token lies.
  __device__ static int place(int token, int chunk) {
    return token * (kWidth * static_cast<int>(sizeof(Row)) / 16) + chunk;
  }

  __device__ void add(const Row* weights, const Row* rows) {
    const int column = threadIdx.x / 16 * 4, d = threadIdx.x % 16 * 4;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const auto w = *reinterpret_cast<const Numbers<Row, 4>*>(weights + token * kColumns + column);
      const auto x = *reinterpret_cast<const Numbers<Row, 4>*>(rows + token * kWidth + d);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += w.x[i] * x.x[j];
    }
  }

  // store(column, d, numbers) for all sums of this thread; `numbers` are of consecutive d.
  template <typename Out, typename Store>
  __device__ void finish(Store store) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Numbers<Out, 4> numbers;
#pragma unroll
      for (int j = 0; j < 4; ++j) numbers.x[j] = sums[i][j];
      store(static_cast<int>(threadIdx.x / 16 * 4 + i), static_cast<int>(threadIdx.x % 16 * 4), numbers);
    }
  }
};

// Eight warps, 2 x 4, each 64 columns x 32 numbers of the rows: 4 x 4 products of m16n8k16. Both operands have the tokens as
// their slow dimension, so both come through ldmatrix.trans.
template <typename Half>
struct TensorTileTN {
  static constexpr int kColumns = 128, kWidth = 128, kTokens = 32, kStages = 4;
  using Sum = float;
  Sum sums[4][4][4] = {};  // [16 columns, 8 numbers]: as ptx.cuh has it

  // The eight rows that one ldmatrix reads lie in eight different groups of banks: tokens are rotated against each other.
  __device__ static int place(int token, int chunk) { return token * (kWidth / 8) + (chunk ^ token % 8); }
  __device__ static int first_column() { return threadIdx.x / 128 * 64; }
  __device__ static int first_d() { return threadIdx.x / 32 % 4 * 32; }

  __device__ void add(const Half* weights, const Half* rows) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int token = 0; token < kTokens; token += 16) {
      uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // matrices: tokens 0-7 and 8-15 of eight numbers, then of the next eight
        const int chunk = (first_d() + 16 * j) / 8 + matrix / 2;
        ldmatrix_x4_trans(b[j], rows + 8 * place(token + matrix % 2 * 8 + row, chunk));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // matrices: columns 0-7 and 8-15 of tokens 0-7, then of tokens 8-15
        uint32_t a[4];
        const int chunk = (first_column() + 16 * i) / 8 + matrix % 2;
        ldmatrix_x4_trans(a, weights + 8 * place(token + matrix / 2 * 8 + row, chunk));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma_16816<Half>(sums[i][j], a[0], a[1], a[2], a[3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  template <typename Out, typename Store>
  __device__ void finish(Store store) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // lane / 4 is row `half` of the two that a lane has a part of
        const int column = first_column() + 16 * i + 8 * half + lane / 4;
        if constexpr (sizeof(Out) == 2) {  // the four lanes of a row exchange their parts: 16 bytes each
          uint32_t parts[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) parts[j] = pack<Out>(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
          store(column, first_d() + lane % 4 * 8, transpose_four<Out>(parts));
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            store(column, first_d() + 8 * j + lane % 4 * 2, Pair<Out>{sums[i][j][2 * half], sums[i][j][2 * half + 1]});
        }
      }
  }

 private:
  template <typename Out>
  struct alignas(2 * sizeof(Out)) Pair {
    Out x[2];
  };

  template <typename Out>
  __device__ static uint32_t pack(float low, float high) {
    const Out pair[2] = {static_cast<Out>(low), static_cast<Out>(high)};
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return bits;
  }

  // Lane c of four has part c of four chunks, chunk j in parts[j]; it gets the whole of chunk c.
  template <typename Out>
  __device__ static Numbers<Out, 8> transpose_four(const uint32_t (&parts)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    uint32_t low[2], high[2];  // of chunks 0 and 1, or 2 and 3: the part of the lower and of the upper pair of lanes
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t other = __shfl_xor_sync(~0u, upper ? parts[j] : parts[j + 2], 2);
      low[j] = upper ? other : parts[j];
      high[j] = upper ? parts[j + 2] : other;
    }
    const uint32_t other_low = __shfl_xor_sync(~0u, odd ? low[0] : low[1], 1);
    const uint32_t other_high = __shfl_xor_sync(~0u, odd ? high[0] : high[1], 1);
    const uint32_t whole[4] = {odd ? other_low : low[0], odd ? low[1] : other_low, odd ? other_high : high[0],
                               odd ? high[1] : other_high};
    Numbers<Out, 8> chunk;
    memcpy(&chunk, whole, 16);
    return chunk;
  }
};
template <>
struct TileTN<__half> : TensorTileTN<__half> {};
template <>
struct TileTN<__nv_bfloat16> : TensorTileTN<__nv_bfloat16> {};

// One operand of one tile: kTokens tokens, of each the same `width` numbers, at `at + row * stride`.
template <typename Row>
struct TileSource {
  const Row* at;
  int64_t stride;
  int width;  // numbers before the end of the row, more or fewer than the tile has
  bool aligned;  // 16 bytes at a time

  // One chunk of a token; row -1: zeros.
  __device__ void load(Row* to, int64_t row, int first) const {
    constexpr int kChunk = 16 / sizeof(Row);
    const Row* from = at + row * stride + first;
    if (aligned) {
      const bool there = row >= 0 && first < width;
      cp_async_16(to, there ? from : at, there ? 16 : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk; ++i) to[i] = row >= 0 && first + i < width ? from[i] : Row(0.0f);
    }
  }
};

// Adds up tokens begin ... end - 1 of the lists: places of their rows, and of their weights.
template <typename Row>
__device__ void add_gathered(TileTN<Row>& tile, TileSource<Row> weights, TileSource<Row> table, const int64_t* rows,
                             int64_t V, int64_t begin, int64_t end) {
  using Tile = TileTN<Row>;
  constexpr int kTokens = Tile::kTokens, kStages = Tile::kStages, kChunk = 16 / sizeof(Row);
  // tokens that the threads load at once
  constexpr int kChunks = Tile::kWidth / kChunk, kTogether = kThreads / kChunks;
  constexpr int kLoads = kTokens / kTogether;
  constexpr int kStage = kTokens * (Tile::kColumns + Tile::kWidth);
  static_assert(Tile::kColumns == Tile::kWidth && kLoads * kTogether == kTokens);
  Row* const stages = reinterpret_cast<Row*>(block_memory());

  rows += begin, weights.at += begin * weights.stride;
  const int count = static_cast<int>(end - begin);
  const int own_token = threadIdx.x / kChunks, own_chunk = threadIdx.x % kChunks;
  int32_t ids[kLoads];  // of the stage that is loaded next: read one stage ahead, since addresses wait for them
  const auto read_ids = [&](int first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = first + own_token + i * kTogether;
      const int64_t id = token < count ? rows[token] : -1;
      if (token < count && (id < 0 || id >= V)) __trap();
      ids[i] = static_cast<int32_t>(id);
    }
  };
  const auto load = [&](int step) {
    const int first = step * kTokens;
    if (first < count) {  // the same for the whole block
      Row* const stage = stages + step % kStages * kStage;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int token = own_token + i * kTogether, place = Tile::place(token, own_chunk) * kChunk;
        weights.load(stage + place, first + token < count ? first + token : -1, own_chunk * kChunk);
        table.load(stage + kTokens * Tile::kColumns + place, ids[i], own_chunk * kChunk);
      }
      read_ids(first + kTokens);
    }
    cp_async_commit();  // also where there is nothing to load, so that the count of the wait is right
  };

  read_ids(0);
  for (int step = 0; step < kStages - 1; ++step) load(step);
#pragma unroll 1
  for (int step = 0; step * kTokens < count; ++step) {
    cp_async_wait<kStages - 2>();
    // this stage is there for all threads, and the one before it, filled again now, has been used by all
    __syncthreads();
    load(step + kStages - 1);
    const Row* stage = stages + step % kStages * kStage;
    tile.add(stage, stage + kTokens * Tile::kColumns);
  }
}

template <typename Row>
constexpr int kTileTNBytes = TileTN<Row>::kStages * TileTN<Row>::kTokens *
                             (TileTN<Row>::kColumns + TileTN<Row>::kWidth) * static_cast<int>(sizeof(Row));

}  // namespace qpeft
