// Enough of CUDA to run the kernels of csrc/cuda on a CPU, one block at a time: their own source, compiled by g++.
//
// The threads of a block are fibers that take turns at __syncthreads. What this shows beside the results: a barrier that not
// all threads reach is an error, and results that change with the order of the threads (QPEFT_REPLICA_ORDER=backward) mean
// a race between two barriers. What it cannot show: speed, warps, memory ordering inside a barrier interval.
#pragma once
#include <ucontext.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned size) : x(size) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx;

namespace replica {

enum class State { kRunning, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr size_t kStack = 64 << 10;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline const char* failure = nullptr;

inline void leave(State state) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  body();
  leave(State::kDone);
}

inline void run_block(unsigned threads, bool backward) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = State::kRunning;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned done = 0; done < threads && !failure;) {  // each round brings every thread to its next barrier, or its end
    done = 0;
    for (unsigned i = 0; i < threads && !failure; ++i) {
      threadIdx.x = backward ? threads - 1 - i : i;
      swapcontext(&scheduler, &fibers[threadIdx.x].context);
      done += fibers[threadIdx.x].state == State::kDone;
    }
    if (done != 0 && done != threads && !failure) failure = "some threads left, others wait at a barrier";
  }
}

}  // namespace replica

inline void __syncthreads() { replica::leave(replica::State::kWaiting); }

[[noreturn]] inline void __trap() {
  replica::failure = "trap";
  replica::leave(replica::State::kDone);
  std::abort();  // never resumed
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorLaunchFailure && replica::failure) return replica::failure;
  return status == cudaSuccess ? "no error" : "invalid configuration argument";
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  const char* order = std::getenv("QPEFT_REPLICA_ORDER");
  const bool backward = order && std::strcmp(order, "backward") == 0;
  replica::failure = nullptr;
  replica::body = [=] { kernel(arguments...); };
  for (unsigned i = 0; i < config->gridDim.x && !replica::failure; ++i) {
    blockIdx.x = backward ? config->gridDim.x - 1 - i : i;
    replica::run_block(config->blockDim.x, backward);
  }
  return replica::failure ? cudaErrorLaunchFailure : cudaSuccess;
}
