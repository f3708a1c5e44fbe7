// One chunk of the vocabulary into the running log-sum-exp of each row, and the gradient of a chunk.
//   u = scale x + bias, z = cap tanh(u / cap);   log p = z[target] - logsumexp z
//   Parallel over   one block per row; threads stride over the words of the chunk
//   Global memory   forward reads the chunk of logits [N, C] twice and writes it once or twice; backward reads and writes once
//   Precision       float (double for double)
//   Deterministic   yes: one fixed tree per sum, no atomics
#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

template <typename Sum>
__device__ Sum logit(const Chunk<Sum>& chunk, Sum x, int64_t c) {
  Sum u = chunk.scale * x;
  if (chunk.bias) u += chunk.bias[c];
  return SoftCap<Sum>{chunk.cap}(u);
}

template <typename Sum>
__global__ void chunk_kernel(Chunk<Sum> chunk, Sum* running, bool keep_probabilities) {
  const int64_t row = blockIdx.x, target = chunk.target_ids[row] - chunk.first;
  Sum* z = chunk.logits + row * chunk.stride;
  Sum *max_at = running + row, *sum_at = max_at + chunk.N, *target_z = sum_at + chunk.N, *factor = target_z + chunk.N;
  const Sum max_before = *max_at;
  Sum max = max_before;
  for (int64_t c = threadIdx.x; c < chunk.C; c += kThreads) {  // each thread comes back to its own words below
    z[c] = logit(chunk, z[c], c);
    max = Max()(max, z[c]);
    if (c == target) *target_z = z[c];
  }
  max = block_reduce(max, Max());
  const bool nothing = max == -INFINITY;  // every word so far is forbidden: exp(-inf - -inf) would be NaN
  const SoftCap<Sum> cap{chunk.cap};
  Sum sum = 0;
  for (int64_t c = threadIdx.x; c < chunk.C; c += kThreads) {
    const Sum e = nothing ? Sum(0) : std::exp(z[c] - max);
    sum += e;
    if (keep_probabilities) z[c] = nothing ? Sum(0) : e * cap.slope(z[c]);
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x != 0) return;
  *factor = nothing ? Sum(1) : std::exp(max_before - max);
  *sum_at = *sum_at * *factor + sum;
  *max_at = max;
}

template <typename Sum>
__global__ void chunk_backward_kernel(Chunk<Sum> chunk, const Sum* lse, const Sum* grad) {
  const int64_t row = blockIdx.x, target = chunk.target_ids[row] - chunk.first;
  Sum* z = chunk.logits + row * chunk.stride;
  const Sum g = grad[row], row_lse = lse[row];
  const SoftCap<Sum> cap{chunk.cap};
  for (int64_t c = threadIdx.x; c < chunk.C; c += kThreads) {
    const Sum value = logit(chunk, z[c], c);
    // a row that does not count must not bring in its infinities
    z[c] = g == 0 ? Sum(0) : g * (Sum(c == target) - std::exp(value - row_lse)) * cap.slope(value);
  }
}

}  // namespace

template <typename Sum>
cudaError_t launch_token_log_likelihood_chunk(Chunk<Sum> chunk, Sum* running, bool keep_probabilities, cudaStream_t stream) {
  return launch(chunk_kernel<Sum>, chunk.C == 0 ? 0 : chunk.N, stream, chunk, running, keep_probabilities);
}

template <typename Sum>
cudaError_t launch_token_log_likelihood_chunk_backward(Chunk<Sum> chunk, const Sum* lse, const Sum* grad,
                                                       cudaStream_t stream) {
  return launch(chunk_backward_kernel<Sum>, chunk.C == 0 ? 0 : chunk.N, stream, chunk, lse, grad);
}

#define INSTANTIATE(Sum)                                                                                    \
  template cudaError_t launch_token_log_likelihood_chunk(Chunk<Sum>, Sum*, bool, cudaStream_t);             \
  template cudaError_t launch_token_log_likelihood_chunk_backward(Chunk<Sum>, const Sum*, const Sum*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace qpeft
