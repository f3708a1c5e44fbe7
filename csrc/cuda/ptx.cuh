// Instructions that CUDA C++ has no function for, one small function each, all of sm_80. Fragment layouts: PTX manual,
// "Warp-level matrix instructions". With g = lane / 4 and c = lane % 4, a register holds two halves (first one low):
//   mma.m16n8k16   a0 = A[g, 2c..]  a1 = A[g + 8, 2c..]  a2 = A[g, 2c + 8..]  a3 = A[g + 8, 2c + 8..]   (rows x k)
//                  b0 = B[2c.., g]  b1 = B[2c + 8.., g]                                                 (k x columns)
//                  c0, c1 = C[g, 2c], C[g, 2c + 1]   c2, c3 = C[g + 8, 2c], C[g + 8, 2c + 1]            (rows x columns)
//   ldmatrix.x4    lane 8 i + r brings the address of row r (8 halves) of matrix i; register i = M_i[g, 2c..], .trans: M_i[2c.., g]
// python_tests/ops/cuda_replica stands in for this file where kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef QPEFT_CUDA_REPLICA
#include <ptx_emulation.h>
#else

namespace qpeft {

// The block's dynamic shared memory: a launch says how much.
__device__ inline char* block_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both aligned to 16, without registers, while this thread goes on: the first
// `bytes` are read (none: any address will do), the rest becomes zero. They are there for this thread after the wait, for
// others after a barrier too.
__device__ inline void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the groups that this thread committed are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b with sums in float.
template <typename Half>
__device__ inline void mma_16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1);
template <>
__device__ inline void mma_16816<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_16816<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The two halves of a register.
template <typename Half>
__device__ inline float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<__half>(uint32_t word) {
  const __half2 pair = *reinterpret_cast<const __half2*>(&word);
  return __half22float2(pair);
}
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}

}  // namespace qpeft
#endif
