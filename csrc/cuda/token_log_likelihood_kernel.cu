// Adds a chunk of the vocabulary to the running log-sum-exp of each row; the end after the last chunk; a chunk's gradient.
//   u = scale x + bias, z = cap tanh(u / cap);   log p = z[target] - logsumexp z
//   Parallel over   one block per row; a thread takes 16 bytes of the row at a time
//   Global memory   chunk: reads the logits [N, C] once; where probabilities are kept, once more (out of the cache) and
//                   writes them over the logits in the dtype of the next GEMM; rows whose maximum grew: their sums [D] too
//   Precision       float (double for double)
//   Deterministic   yes: each thread its own words, one fixed tree per row, no atomics
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.cuh"
#include "launchers.h"

namespace qpeft {
namespace {

template <typename Sum>
constexpr int kWide = 16 / sizeof(Sum);  // words of one load
// of a thread before it computes: enough in flight to hide the memory's latency
constexpr int kLoads = 4;
template <typename Sum>
constexpr int kStep = kThreads * kWide<Sum> * kLoads;  // words that a block takes between two barriers

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <typename T, int kCount>
__device__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T, kCount>) == 0;
}

// Words c, c + 1, ... of the row: one load where the row allows it. Words after the last are -inf.
template <typename Sum>
__device__ Pack<Sum, kWide<Sum>> load_logits(const Chunk<Sum>& chunk, const Sum* x, bool wide, int64_t c) {
  using Words = Pack<Sum, kWide<Sum>>;
  if (wide && c + kWide<Sum> <= chunk.C) return *reinterpret_cast<const Words*>(x + c);
  Words words;
  for (int i = 0; i < kWide<Sum>; ++i) words.value[i] = c + i < chunk.C ? x[c + i] : Sum(-INFINITY);
  return words;
}

template <typename Kept, int kCount>
__device__ void store(Kept* row, bool wide, int64_t c, int64_t C, const Pack<Kept, kCount>& words) {
  if (wide && c + kCount <= C) {
    *reinterpret_cast<Pack<Kept, kCount>*>(row + c) = words;
    return;
  }
  for (int i = 0; i < kCount; ++i)
    if (c + i < C) row[c + i] = words.value[i];
}

template <typename Sum>
__device__ Sum logit(const Chunk<Sum>& chunk, Sum x, int64_t c) {  // z; -inf after the last word
  if (c >= chunk.C) return -INFINITY;
  Sum u = chunk.scale * x;
  if (chunk.bias) u += chunk.bias[c];
  return SoftCap<Sum>{chunk.cap}(u);
}

// Replaces word c of the row by kept(z, c), in the dtype Kept, at the beginning of the same row's memory: a word may land
// where another thread's logit was. So the block reads a step, waits, and writes it: no write reaches a later step's words.
template <typename Kept, typename Sum, typename F>
__device__ void replace_row(const Chunk<Sum>& chunk, Sum* x, F kept) {
  constexpr int kCount = kWide<Sum>;
  auto* row = reinterpret_cast<Kept*>(x);
  const bool wide = aligned<Sum, kCount>(x);
  for (int64_t begin = 0; begin < chunk.C; begin += kStep<Sum>) {
    Pack<Kept, kCount> words[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t c = begin + (load * kThreads + threadIdx.x) * kCount;
      if (c >= chunk.C) continue;
      const Pack<Sum, kCount> logits = load_logits(chunk, x, wide, c);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        words[load].value[i] = static_cast<Kept>(kept(logit(chunk, logits.value[i], c + i), c + i));
    }
    if (sizeof(Kept) != sizeof(Sum)) __syncthreads();
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t c = begin + (load * kThreads + threadIdx.x) * kCount;
      if (c < chunk.C) store(row, wide, c, chunk.C, words[load]);
    }
  }
}

template <typename Sum>
__device__ void scale_row(Sum* row, int64_t D, Sum factor) {
  using Values = Pack<Sum, kWide<Sum>>;
  const int64_t packs = aligned<Sum, kWide<Sum>>(row) ? D / kWide<Sum> : 0;
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
    Values values = reinterpret_cast<Values*>(row)[p];
    for (Sum& value : values.value) value *= factor;
    reinterpret_cast<Values*>(row)[p] = values;
  }
  for (int64_t d = packs * kWide<Sum> + threadIdx.x; d < D; d += kThreads) row[d] *= factor;
}

template <typename Sum>
struct Merge {
  __device__ LogSumExp<Sum> operator()(LogSumExp<Sum> a, LogSumExp<Sum> b) const {
    a.merge(b);
    return a;
  }
};

template <typename Kept, typename Sum>
__global__ void chunk_kernel(Chunk<Sum> chunk, Sum* running, Sum* expectation, int64_t D) {
  constexpr int kCount = kWide<Sum>;
  const int64_t row = blockIdx.x, target = place_in(chunk.target_ids[row], chunk.first, chunk.C);
  Sum *x = chunk.logits + row * chunk.stride, *max_at = running + row, *sum_at = max_at + chunk.N;
  Sum* target_z = sum_at + chunk.N;
  const LogSumExp<Sum> before = {*max_at, *sum_at};
  const bool wide = aligned<Sum, kCount>(x);
  LogSumExp<Sum> sum = LogSumExp<Sum>::none();
  for (int64_t begin = 0; begin < chunk.C; begin += kStep<Sum>) {
    Pack<Sum, kCount> words[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load)
      words[load] = load_logits(chunk, x, wide, begin + (load * kThreads + threadIdx.x) * kCount);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t c = begin + (load * kThreads + threadIdx.x) * kCount;
      Sum* z = words[load].value;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        z[i] = logit(chunk, z[i], c + i);
        if (c + i == target) *target_z = z[i];
      }
      sum.template add<kCount>(z);
    }
  }
  sum = block_reduce(sum, Merge<Sum>());
  sum.merge(before);
  if (threadIdx.x == 0) *max_at = sum.max, *sum_at = sum.sum;
  if (!expectation) return;
  const bool nothing = sum.max == -INFINITY;  // every word so far is forbidden: exp(-inf - -inf) would be NaN
  const SoftCap<Sum> cap{chunk.cap};
  replace_row<Kept>(chunk, x, [&](Sum z, int64_t) { return nothing ? Sum(0) : std::exp(z - sum.max) * cap.slope(z); });
  if (before.max != sum.max && before.max != -INFINITY)
    scale_row(expectation + row * D, D, std::exp(before.max - sum.max));
}

template <typename Row, typename Sum>
__global__ void finish_kernel(Finish<Row, Sum> finish) {
  const int64_t row = blockIdx.x, target = finish.target_ids[row];
  if (target < 0 || target >= finish.V) __trap();
  const Sum *running = finish.running + row, sum = running[finish.N], target_z = running[2 * finish.N];
  const Sum max = *running, log_sum = std::log(sum);
  if (threadIdx.x == 0) finish.lse[row] = max + log_sum, finish.log_p[row] = log_probability(target_z, max, log_sum);
  if (!finish.expectation) return;
  const Row* word = finish.lm_head + target * finish.word_stride;
  Sum* expectation = finish.expectation + row * finish.D;
  const Sum slope = SoftCap<Sum>{finish.cap}.slope(target_z), share = 1 / sum;
  for (int64_t d = threadIdx.x; d < finish.D; d += kThreads)
    expectation[d] = finish.scale * (slope * static_cast<Sum>(word[d * finish.column_stride]) - share * expectation[d]);
}

template <typename Kept, typename Sum>
__global__ void chunk_backward_kernel(Chunk<Sum> chunk, const Sum* lse, const Sum* grad) {
  const int64_t row = blockIdx.x, target = place_in(chunk.target_ids[row], chunk.first, chunk.C);
  const Sum g = grad[row], row_lse = lse[row];
  const SoftCap<Sum> cap{chunk.cap};
  replace_row<Kept>(chunk, chunk.logits + row * chunk.stride, [&](Sum z, int64_t c) {
    // a row that does not count must not bring in its infinities
    return g == 0 ? Sum(0) : g * (Sum(c == target) - std::exp(z - row_lse)) * cap.slope(z);
  });
}

}  // namespace

template <typename Kept, typename Sum>
cudaError_t launch_token_log_likelihood_chunk(Chunk<Sum> chunk, Sum* running, Sum* expectation, int64_t D,
                                              cudaStream_t stream) {
  return launch(chunk_kernel<Kept, Sum>, chunk.C == 0 ? 0 : chunk.N, stream, chunk, running, expectation, D);
}

template <typename Row, typename Sum>
cudaError_t launch_token_log_likelihood_finish(Finish<Row, Sum> finish, cudaStream_t stream) {
  return launch(finish_kernel<Row, Sum>, finish.N, stream, finish);
}

template <typename Kept, typename Sum>
cudaError_t launch_token_log_likelihood_chunk_backward(Chunk<Sum> chunk, const Sum* lse, const Sum* grad,
                                                       cudaStream_t stream) {
  return launch(chunk_backward_kernel<Kept, Sum>, chunk.C == 0 ? 0 : chunk.N, stream, chunk, lse, grad);
}

#define INSTANTIATE(Row, Sum)                                                                                 \
  template cudaError_t launch_token_log_likelihood_chunk<Row>(Chunk<Sum>, Sum*, Sum*, int64_t, cudaStream_t); \
  template cudaError_t launch_token_log_likelihood_finish(Finish<Row, Sum>, cudaStream_t);                    \
  template cudaError_t launch_token_log_likelihood_chunk_backward<Row>(Chunk<Sum>, const Sum*, const Sum*,    \
                                                                       cudaStream_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace qpeft
