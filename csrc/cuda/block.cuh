// The launcher and the reductions over the threads of one block, for every kernel file. No torch here.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "../math.h"

namespace qpeft {

constexpr int kThreads = 256;  // every kernel runs with blocks of this size

// The dtype of sums: double stays, everything else is float.
template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Launches a kernel: an empty grid is no work, the status is returned, nothing waits. shared_bytes: of block_memory().
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_memory(void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes, cudaStream_t stream,
                               Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > (32 << 10)) {  // every kernel may use 48 KiB without asking, its static memory included
    const auto bytes = static_cast<int>(shared_bytes);
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  return launch_with_memory(kernel, blocks, 0, stream, arguments...);
}

// Blocks that stay until all items are done, `each` per multiprocessor: where the number of items is known on the device only.
inline int64_t resident_blocks(int64_t most_items, int64_t each) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return std::min(most_items, each * multiprocessors);
}

inline int64_t blocks_for(int64_t items, int64_t items_per_block = kThreads) {
  return (items + items_per_block - 1) / items_per_block;
}

// The number of this thread in the whole grid: kernels that give each thread one item.
__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// combine(a, b) over one value of each thread, in a fixed tree: the same result in every run. combine must be associative;
// all threads of the block must call. With kColumns > 1 thread t belongs to column t % kColumns, and each gets its column's.
template <int kColumns = 1, typename Value, typename Combine>
__device__ Value block_reduce(Value value, Combine combine) {
  __shared__ Value cells[kThreads];
  __syncthreads();  // the cells of an earlier call have been read
  cells[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half >= kColumns; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) cells[threadIdx.x] = combine(cells[threadIdx.x], cells[threadIdx.x + half]);
  }
  __syncthreads();
  return cells[threadIdx.x % kColumns];
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Sum of the values of all threads before this one; `total` is the sum of all. All threads of the block must call.
__device__ inline int32_t block_exclusive_sum(int32_t value, int32_t& total) {
  __shared__ int32_t of_warps[kThreads / 32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = value;  // of the lanes up to this one
  for (unsigned step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();  // the sums of an earlier call have been read
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (unsigned w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before + sum - value;
}

}  // namespace qpeft
