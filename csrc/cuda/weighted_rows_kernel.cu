// Sums of weighted rows by segments: the backward of a gather, without atomics, written or added to out.
//   out[g, :] = sum over e in offsets[g] .. offsets[g + 1] of weights[e] * source[rows[e], :]
//   Parallel over   (segment, 32 chunks of 16 bytes of a row); the eight warps of a block share the entries of the segment
//   Global memory   each row that is named once, by 16 bytes a lane where rows are aligned; out is written once
//   Precision       float (double for double)
//   Deterministic   yes: entries in order within a warp, then the warps in order
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

template <typename Row, typename Sum>
__global__ void weighted_rows_kernel(const Row* source, int64_t stride, int64_t N, int64_t D, bool aligned,
                                     const int64_t* rows, const Sum* weights, const int64_t* offsets, int64_t parts,
                                     bool accumulate, Sum* out) {
  constexpr int kElements = 16 / sizeof(Row), kWarps = kThreads / 32;
  struct alignas(16) Chunk {
    Row x[kElements];
  };
  __shared__ Sum of_warps[kWarps][32 * kElements];
  const int64_t segment = blockIdx.x / parts, begin = offsets[segment], end = offsets[segment + 1];
  if (accumulate && begin >= end) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = blockIdx.x % parts * (32 * kElements), d = first + lane * kElements;
  const int there = d >= D ? 0 : static_cast<int>(D - d < kElements ? D - d : kElements);
  Sum sum[kElements] = {};
#pragma unroll 4
  for (int64_t e = begin + warp; e < end; e += kWarps) {
    const int64_t row = rows[e];
    if (row < 0 || row >= N) __trap();
    const Row* from = source + row * stride + d;
    const Sum weight = weights ? weights[e] : Sum(1);
    if (aligned && there == kElements) {
      const Chunk chunk = *reinterpret_cast<const Chunk*>(from);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[i] += weight * static_cast<Sum>(chunk.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (i < there) sum[i] += weight * static_cast<Sum>(from[i]);
    }
  }
#pragma unroll
  // neighbouring lanes in neighbouring banks
  for (int i = 0; i < kElements; ++i) of_warps[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  for (int at = threadIdx.x; at < 32 * kElements && first + at < D; at += kThreads) {
    Sum total = accumulate ? out[segment * D + first + at] : Sum(0);
    for (int w = 0; w < kWarps; ++w) total += of_warps[w][at % kElements * 32 + at / kElements];
    out[segment * D + first + at] = total;
  }
}

}  // namespace

template <typename Row, typename Sum>
cudaError_t launch_weighted_rows(const Row* source, int64_t source_stride, int64_t N, int64_t D, const int64_t* rows,
                                 const Sum* weights, const int64_t* offsets, int64_t G, bool accumulate, Sum* out,
                                 cudaStream_t stream) {
  const int64_t parts = blocks_for(D, 32 * (16 / sizeof(Row)));
  const bool aligned = reinterpret_cast<uintptr_t>(source) % 16 == 0 && source_stride * sizeof(Row) % 16 == 0;
  return launch(weighted_rows_kernel<Row, Sum>, G * parts, stream, source, source_stride, N, D, aligned, rows, weights,
                offsets, parts, accumulate, out);
}

#define INSTANTIATE(Row, Sum)                                                                                  \
  template cudaError_t launch_weighted_rows(const Row*, int64_t, int64_t, int64_t, const int64_t*, const Sum*, \
                                            const int64_t*, int64_t, bool, Sum*, cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
