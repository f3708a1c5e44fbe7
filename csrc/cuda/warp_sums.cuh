// The sums that one warp has of a tile (tile.cuh): 16 x 8 pieces of 4 values a lane. 16-bit types are multiplied by tensor
// cores, float and double by multiply-add (never tf32). `add` adds the product of a sub-tile, 64 bytes of each row: a and b
// point to the warp's first row there, `flip` says that neighbouring rows are swapped.
//
// A product does not depend on the order of d as long as both sides agree: lane (g, c) takes 16 bytes of row g at once, and
// uses them as the fragments of two mma.m16n8k16, without ldmatrix.
#pragma once
#include "ptx.cuh"

namespace qpeft {

template <typename Row, int kM, int kN>
struct WarpSums {  // 16-bit types: tensor cores
  float c[kM][kN][4] = {};
  float squares[kM][2] = {};

  static __device__ int row(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
  static __device__ int column(int i) { return threadIdx.x % 4 * 2 + i % 2; }

  __device__ void add(const char* a, const char* b, int flip, bool with_squares) {
    const int offset = ((threadIdx.x % 32 / 4) ^ flip) * 64 + threadIdx.x % 4 * 16;
    uint4 low[kM], high[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      low[m] = *reinterpret_cast<const uint4*>(a + offset + m * 1024);
      high[m] = *reinterpret_cast<const uint4*>(a + offset + m * 1024 + 512);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint4 column = *reinterpret_cast<const uint4*>(b + offset + n * 512);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_16816<Row>(c[m][n], low[m].x, high[m].x, low[m].y, high[m].y, column.x, column.y);
        mma_16816<Row>(c[m][n], low[m].z, high[m].z, low[m].w, high[m].w, column.z, column.w);
      }
    }
    if (!with_squares) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) squares[m][0] += square(low[m]), squares[m][1] += square(high[m]);
  }

  static __device__ float square(uint4 chunk) {
    const float2 x = unpack<Row>(chunk.x), y = unpack<Row>(chunk.y), z = unpack<Row>(chunk.z), w = unpack<Row>(chunk.w);
    return ((x.x * x.x + x.y * x.y) + (y.x * y.x + y.y * y.y)) + ((z.x * z.x + z.y * z.y) + (w.x * w.x + w.y * w.y));
  }
};

template <typename Real, int kM, int kN>
struct WarpSumsByFma {
  Real c[kM][kN][4] = {};
  Real squares[kM][2] = {};
  static constexpr int kElements = 16 / sizeof(Real);
  struct alignas(16) Chunk {
    Real x[kElements];
  };

  static __device__ int row(int i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
  static __device__ int column(int i) { return threadIdx.x % 4 + i % 2 * 4; }  // 0-3 and 4-7: fewer lanes share a bank

  __device__ void add(const char* a, const char* b, int flip, bool with_squares) {
    const int row_offset = ((threadIdx.x % 32 / 4) ^ flip) * 64, column_offset = ((threadIdx.x % 4) ^ flip) * 64;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      Chunk rows[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        for (int i = 0; i < 2; ++i)
          rows[m][i] = *reinterpret_cast<const Chunk*>(a + row_offset + m * 1024 + i * 512 + chunk * 16);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Chunk column = *reinterpret_cast<const Chunk*>(b + column_offset + n * 512 + j * 256 + chunk * 16);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
              for (int e = 0; e < kElements; ++e) c[m][n][i * 2 + j] += rows[m][i].x[e] * column.x[e];
        }
      if (!with_squares || chunk != static_cast<int>(threadIdx.x % 4)) continue;  // four lanes hold the same row
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < kElements; ++e) squares[m][i] += rows[m][i].x[e] * rows[m][i].x[e];
    }
  }
};
template <int kM, int kN>
struct WarpSums<float, kM, kN> : WarpSumsByFma<float, kM, kN> {};
template <int kM, int kN>
struct WarpSums<double, kM, kN> : WarpSumsByFma<double, kM, kN> {};

}  // namespace qpeft
