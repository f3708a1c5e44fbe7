// Softmax of attention scores over the distinct tokens of each document, and its backward.
//   weights[p, j, r] = counts[p, j] exp(s[slot(p, j), r] - max) / sum;   ds = weights * (grad_weights - sum of weights * grad_weights)
//   Parallel over   blocks of one document x 32 columns, eight threads a column; the sum over documents: one thread per
//                   (distinct row, column), documents in order
//   Global memory   forward reads the scores three times (cache) and writes the weights once; backward reads weights and
//                   grad_weights twice, and places [P, U] once: which token of document p is row u
//   Precision       float (double for double)
//   Deterministic   yes: each sum has one fixed order, no atomics
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
  const int64_t row = slot - sizes.first_slot;
  return slot < 0 || row < 0 || row >= sizes.U ? -1 : row;
}

template <typename Sum>
__global__ void softmax_kernel(const Sum* scores, const int32_t* slots, const int32_t* counts, SoftmaxSizes sizes,
                               Sum* weights) {
  const Part part(sizes.R);
  const int64_t R = sizes.R, end = part.r < R ? sizes.n : 0;  // threads beyond the last column only keep the barriers matched
  Sum max = -INFINITY;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    if (row >= 0) max = Max()(max, scores[row * R + part.r]);
  }
  max = block_reduce<kColumns>(max, Max());
  const auto exponential = [&](int64_t row, int64_t j) {
    return static_cast<Sum>(counts[part.p * sizes.n + j]) * std::exp(scores[row * R + part.r] - max);
  };
  Sum sum = 0;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    if (row >= 0) sum += exponential(row, j);
  }
  sum = block_reduce<kColumns>(sum, Add());
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t row = row_of(slots, sizes, part.p, j);
    weights[(part.p * sizes.n + j) * R + part.r] = row >= 0 && sum != 0 ? exponential(row, j) / sum : Sum(0);
  }
}

// grad_weights becomes the gradient to the scores of each document; places[p, row] = j.
template <typename Sum>
__global__ void softmax_backward_kernel(const Sum* weights, Sum* grad_weights, const int32_t* slots, SoftmaxSizes sizes,
                                        int32_t* places) {
  const Part part(sizes.R);
  const int64_t R = sizes.R, end = part.r < R ? sizes.n : 0;
  Sum dot = 0;
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t at = (part.p * sizes.n + j) * R + part.r;
    dot += weights[at] * grad_weights[at];
  }
  dot = block_reduce<kColumns>(dot, Add());
  for (int64_t j = part.stripe; j < end; j += Part::kStripes) {
    const int64_t at = (part.p * sizes.n + j) * R + part.r, row = row_of(slots, sizes, part.p, j);
    grad_weights[at] = weights[at] * (grad_weights[at] - dot);
    if (part.r == 0 && row >= 0) places[part.p * sizes.U + row] = static_cast<int32_t>(j);
  }
}

template <typename Sum>
__global__ void sum_documents_kernel(const Sum* addends, SoftmaxSizes sizes, const int32_t* places, Sum* grad_scores) {
  const int64_t at = global_thread();
  if (at >= sizes.U * sizes.R) return;
  const int64_t row = at / sizes.R, r = at % sizes.R;
  Sum sum = grad_scores[at];
  for (int64_t p = 0; p < sizes.P; ++p) {
    const int64_t j = places[p * sizes.U + row];
    if (j >= 0) sum += addends[(p * sizes.n + j) * sizes.R + r];
  }
  grad_scores[at] = sum;
}

int64_t tiles(SoftmaxSizes sizes) { return sizes.P * blocks_for(sizes.R, kColumns); }

}  // namespace

template <typename Sum>
cudaError_t launch_clue_attention_softmax(const Sum* scores, const int32_t* slots, const int32_t* counts, SoftmaxSizes sizes,
                                          Sum* weights, cudaStream_t stream) {
  return launch(softmax_kernel<Sum>, tiles(sizes), stream, scores, slots, counts, sizes, weights);
}

template <typename Sum>
cudaError_t launch_clue_attention_softmax_backward(const Sum* weights, Sum* grad_weights, const int32_t* slots,
                                                   SoftmaxSizes sizes, int32_t* places, Sum* grad_scores,
                                                   cudaStream_t stream) {
  const cudaError_t status = launch(softmax_backward_kernel<Sum>, tiles(sizes), stream, weights, grad_weights, slots, sizes,
                                    places);
  if (status != cudaSuccess) return status;
  return launch(sum_documents_kernel<Sum>, blocks_for(sizes.U * sizes.R), stream, grad_weights, sizes, places, grad_scores);
}

#define INSTANTIATE(Sum)                                                                                              \
  template cudaError_t launch_clue_attention_softmax(const Sum*, const int32_t*, const int32_t*, SoftmaxSizes, Sum*, \
                                                     cudaStream_t);                                                   \
  template cudaError_t launch_clue_attention_softmax_backward(const Sum*, Sum*, const int32_t*, SoftmaxSizes, int32_t*, \
                                                              Sum*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace qpeft
