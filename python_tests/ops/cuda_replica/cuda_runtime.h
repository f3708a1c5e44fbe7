// A stand-in for CUDA that runs the kernels of csrc/cuda on a CPU, one block at a time: their own source, compiled by g++.
//
// The threads of a block are fibers (fibers.h). They take turns at __syncthreads and at the calls in which a warp acts as one (shuffles,
// and the instructions of ptx_emulation.h): there a lane leaves its registers, and the last of the 32 to come computes for all.
// Beyond the results this shows:
//   * a barrier or a warp's call that not all threads reach is an error, and so is a warp at two different calls;
//   * results that change with the order of threads and blocks (QPEFT_REPLICA_ORDER=backward) mean a race between barriers;
//   * shared memory is full of NaN (bytes 0xFF) when a block starts; it is refused beyond what every GPU has, and writing
//     past its end is an error; 16-byte loads from addresses that are not multiples of 16 crash.
// What it cannot show: speed, bank conflicts, memory ordering inside a barrier interval.
#pragma once
#include <link.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a segment of its own, which poison_shared() finds

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace replica {

// ---- shared memory ---------------------------------------------------------------------------------------------------

constexpr size_t kStaticLimit = 48 << 10, kLimit = 99 << 10;  // of a block; 99 KB: sm_86, sm_89 and sm_120
constexpr size_t kCanary = 64;
inline std::map<const void*, size_t> allowed;  // by cudaFuncSetAttribute
inline std::unique_ptr<char[]> memory{new char[kLimit + kCanary + 128]};
inline size_t memory_bytes;
inline thread_local char marker;

inline char* dynamic_memory() {
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (128 - address % 128) % 128;
}

// __shared__ variables are the thread-local segment of this library.
inline void poison_shared() {
  static char* data;
  static size_t size;
  if (!data) {
    marker = 1;  // now the segment of this thread exists
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          const auto here = reinterpret_cast<uintptr_t>(&poison_shared);
          bool mine = false;
          size_t bytes = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            mine |= header.p_type == PT_LOAD && here >= begin && here < begin + header.p_memsz;
            if (header.p_type == PT_TLS) bytes = header.p_memsz;
          }
          if (mine) data = static_cast<char*>(info->dlpi_tls_data), size = bytes;
          return mine ? 1 : 0;
        },
        nullptr);
  }
  std::memset(data, 0xFF, size);
  std::memset(dynamic_memory(), 0xFF, memory_bytes + kCanary);
}

inline bool canary_lives() {
  const char* canary = dynamic_memory() + memory_bytes;
  return std::all_of(canary, canary + kCanary, [](char byte) { return byte == static_cast<char>(0xFF); });
}

template <typename T>
T atomic(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}

}  // namespace replica

// ---- what kernels call -----------------------------------------------------------------------------------------------

inline void __syncthreads() { replica::leave(replica::State::kAtBarrier); }
inline void __threadfence() {}

[[noreturn]] inline void __trap() {
  replica::failure = "trap";
  replica::leave(replica::State::kDone);
  std::abort();  // never resumed
}

// All 32 lanes must call; `mask` must name all of them.
inline void __syncwarp(unsigned = ~0u) { replica::whole_warp<char, char>(0, [](const char*, char*) {}); }

namespace replica {
template <typename T>
T shuffle(T value, unsigned from) {
  struct In { T value; unsigned from; };
  return whole_warp<In, T>({value, from}, [](const In* in, T* out) {
    for (unsigned lane = 0; lane < 32; ++lane) out[lane] = in[in[lane].from % 32].value;
  });
}
}  // namespace replica
template <typename T>
T __shfl_sync(unsigned, T value, int from) { return replica::shuffle(value, from); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) { return replica::shuffle(value, threadIdx.x % 32 ^ bits); }
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return replica::shuffle(value, lane < by ? lane : lane - by);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return replica::shuffle(value, lane + by > 31 ? lane : lane + by);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return replica::whole_warp<int, unsigned>(predicate, [](const int* in, unsigned* out) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (in[lane] != 0 ? 1u : 0u) << lane;
    std::fill(out, out + 32, bits);
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

// integers only: the order of floating-point atomics would show in the result
inline unsigned atomicOr(unsigned* address, unsigned value) { return replica::atomic(address, *address | value); }
inline int atomicAdd(int* address, int value) { return replica::atomic(address, *address + value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return replica::atomic(address, *address + value); }
inline int atomicMin(int* address, int value) { return replica::atomic(address, std::min(*address, value)); }
inline int atomicMax(int* address, int value) { return replica::atomic(address, std::max(*address, value)); }
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return replica::atomic(address, *address == expected ? value : *address);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- what launchers call ---------------------------------------------------------------------------------------------

inline const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorLaunchFailure && replica::failure) return replica::failure;
  if (status == cudaErrorInvalidValue) return "more shared memory than was asked for or exists";
  return status == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // few multiprocessors: blocks that stay for several tiles come to their second one
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int byte, size_t size, cudaStream_t) {
  std::memset(data, byte, size);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > replica::kLimit) return cudaErrorInvalidValue;
  replica::allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  const auto allowed = replica::allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = allowed == replica::allowed.end() ? replica::kStaticLimit : allowed->second;
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  const char* order = std::getenv("QPEFT_REPLICA_ORDER");
  const bool backward = order && std::strcmp(order, "backward") == 0;
  replica::failure = nullptr;
  replica::memory_bytes = config->dynamicSmemBytes;
  replica::body = [=] { kernel(arguments...); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  for (unsigned i = 0; i < config->gridDim.x && !replica::failure; ++i) {
    blockIdx.x = backward ? config->gridDim.x - 1 - i : i;
    replica::poison_shared();
    replica::run_threads(config->blockDim.x, backward);
    if (!replica::failure && !replica::canary_lives()) replica::failure = "a block wrote past its shared memory";
  }
  return replica::failure ? cudaErrorLaunchFailure : cudaSuccess;
}
