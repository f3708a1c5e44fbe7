// Softmax of attention scores over the distinct tokens of each document, and its backward.
//   lse[p, r] = log sum_j counts[p, j] exp(s[slot(p, j), r]);   weights[p, j, r] = counts[p, j] exp(s - lse)
//   ds = weights * (grad_weights - sum of weights * grad_weights)
//   Parallel over   blocks of one document x 32 columns, eight threads a column
//   Global memory   lse reads the scores of a document twice, weights once (L2: rows are shared by documents); backward reads
//                   weights and grad_weights twice and writes once
//   Precision       float (double for double); weights are rounded to the table's dtype as they are written
//   Deterministic   yes: each sum has one fixed order, no atomics
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

constexpr int kColumns = 32;  // a warp reads one line of 128 bytes

// The part of one thread: column r of document p, tokens stripe, stripe + kStripes, ...
struct Part {
  static constexpr int kStripes = kThreads / kColumns;
  int64_t p, r;
  int stripe;

  __device__ explicit Part(int64_t R) {
    const int64_t tiles = (R + kColumns - 1) / kColumns;
    p = blockIdx.x / tiles;
    r = blockIdx.x % tiles * kColumns + threadIdx.x % kColumns;
    stripe = threadIdx.x / kColumns;
  }
};

// The row of `scores` that holds token (p, j), -1: padding.
__device__ inline int64_t row_of(const int32_t* slots, SoftmaxSizes sizes, int64_t p, int64_t j) {
  const int32_t slot = slots[p * sizes.n + j];
  return slot < 0 ? -1 : place_in(slot, sizes.first_slot, sizes.U);
}

template <typename Sum>
__global__ void lse_kernel(const Sum* scores, const int32_t* slots, const int32_t* counts, SoftmaxSizes sizes,
                           Sum* lse) {
  const Part part(sizes.R);
  // threads beyond the last column only keep the barriers matched
  const int64_t R = sizes.R, end = part.r < R ? sizes.n : 0;
  Sum max = -INFINITY;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    if (row >= 0) max = Max()(max, scores[row * R + part.r]);
  }
  max = block_reduce<kColumns>(max, Max());
  Sum sum = 0;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    if (row >= 0) sum += static_cast<Sum>(counts[part.p * sizes.n + j]) * std::exp(scores[row * R + part.r] - max);
  }
  sum = block_reduce<kColumns>(sum, Add());
  if (part.stripe == 0 && part.r < R) lse[part.p * R + part.r] = max + std::log(sum);  // no token: -inf
}

template <typename Sum, typename Weight>
__global__ void weights_kernel(const Sum* scores, const int32_t* slots, const int32_t* counts, const Sum* lse,
                               SoftmaxSizes sizes, Weight* weights) {
  const Part part(sizes.R);
  const int64_t R = sizes.R;
  if (part.r >= R) return;
  const Sum total = lse[part.p * R + part.r];
  const auto weight = [&](int64_t j) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    return row < 0 ? Sum(0)
                   : static_cast<Sum>(counts[part.p * sizes.n + j]) * std::exp(scores[row * R + part.r] - total);
  };
  Sum sum = 1;  // what weights add up to, but for the rounding of a large lse
  if (is_large(total)) {
    sum = 0;
    for (int64_t j = 0; j < sizes.n; ++j) sum += weight(j);
    if (sum == 0) sum = 1;  // no token
  }
  for (int64_t j = part.stripe; j < sizes.n; j += Part::kStripes)
    weights[(part.p * sizes.n + j) * R + part.r] = static_cast<Weight>(weight(j) / sum);
}

template <typename Sum, typename Weight>
__global__ void softmax_backward_kernel(const Weight* weights, const int32_t* slots, SoftmaxSizes sizes,
                                        Sum* grad_weights) {
  const Part part(sizes.R);
  const int64_t R = sizes.R, end = part.r < R ? sizes.n : 0;
  const auto there = [&](int64_t j) { return slots[part.p * sizes.n + j] >= 0; };
  Sum dot = 0;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t at = (part.p * sizes.n + j) * R + part.r;
    if (there(j)) dot += static_cast<Sum>(weights[at]) * grad_weights[at];
  }
  dot = block_reduce<kColumns>(dot, Add());
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t at = (part.p * sizes.n + j) * R + part.r;
    grad_weights[at] = there(j) ? static_cast<Sum>(weights[at]) * (grad_weights[at] - dot) : Sum(0);
  }
}

int64_t tiles(SoftmaxSizes sizes) { return sizes.P * blocks_for(sizes.R, kColumns); }

}  // namespace

template <typename Sum>
cudaError_t launch_clue_attention_lse(const Sum* scores, const int32_t* slots, const int32_t* counts,
                                      SoftmaxSizes sizes, Sum* lse, cudaStream_t stream) {
  return launch(lse_kernel<Sum>, tiles(sizes), stream, scores, slots, counts, sizes, lse);
}

template <typename Sum, typename Weight>
cudaError_t launch_clue_attention_weights(const Sum* scores, const int32_t* slots, const int32_t* counts,
                                          const Sum* lse, SoftmaxSizes sizes, Weight* weights, cudaStream_t stream) {
  return launch(weights_kernel<Sum, Weight>, tiles(sizes), stream, scores, slots, counts, lse, sizes, weights);
}

template <typename Sum, typename Weight>
cudaError_t launch_clue_attention_softmax_backward(const Weight* weights, const int32_t* slots, SoftmaxSizes sizes,
                                                   Sum* grad_weights, cudaStream_t stream) {
  return launch(softmax_backward_kernel<Sum, Weight>, tiles(sizes), stream, weights, slots, sizes, grad_weights);
}

#define INSTANTIATE(Sum)                                                                                         \
  template cudaError_t launch_clue_attention_lse(const Sum*, const int32_t*, const int32_t*, SoftmaxSizes, Sum*, \
                                                 cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

#define INSTANTIATE(Sum, Weight)                                                                                 \
  template cudaError_t launch_clue_attention_weights(const Sum*, const int32_t*, const int32_t*, const Sum*,     \
                                                     SoftmaxSizes, Weight*, cudaStream_t);                       \
  template cudaError_t launch_clue_attention_softmax_backward(const Weight*, const int32_t*, SoftmaxSizes, Sum*, \
                                                              cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(float, __half)
INSTANTIATE(float, __nv_bfloat16)
#undef INSTANTIATE

}  // namespace qpeft
