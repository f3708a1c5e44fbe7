// A warp's instructions one by one, for test_cuda_warp.py: they must follow the PTX manual before a kernel relies on them.
#include "replica.h"

#include "../../../csrc/cuda/glue.h"
#include "../../../csrc/cuda/ptx.cuh"

namespace qpeft {
namespace {

// c [16, 8] += a [16, 16] b [16, 8] by one warp: copies that must be waited for, ldmatrix, mma.
template <typename Half>
void product_kernel(const Half* a, const Half* b, float* c, bool wait) {
  auto* a_tile = reinterpret_cast<Half*>(block_memory());  // [16, 16]
  Half* b_tile = a_tile + 256;                             // [16, 8]
  const int lane = threadIdx.x;
  cp_async_16(a_tile + lane * 8, a + lane * 8, 16);
  cp_async_commit();
  if (lane < 16) cp_async_16(b_tile + lane * 8, b + lane * 8, 16);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  else cp_async_wait<1>();  // wrong: the second group may still be under way
  __syncthreads();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, a_tile + (lane % 16) * 16 + lane / 16 * 8);  // matrices: rows 0-7 and 8-15 of columns 0-7, then of 8-15
  ldmatrix_x4_trans(y, b_tile + (lane % 16) * 8);             // b has k as its rows; two of the four are used
  float sums[4];
  const int row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sums[i] = c[(row + i / 2 * 8) * 8 + column + i % 2];
  mma_16816<Half>(sums, x[0], x[1], x[2], x[3], y[0], y[1]);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

void warp_product(const Tensor a, const Tensor b, Tensor c, bool wait) {
  dispatch_table<__half, __nv_bfloat16>("product", a.scalar_type(), [&](auto tag, auto) {
    using Half = decltype(tag);
    if constexpr (sizeof(Half) == 2) {
      cudaLaunchConfig_t config = {};
      config.blockDim = dim3(32);
      config.dynamicSmemBytes = (256 + 128) * sizeof(Half);
      check_cuda("product", cudaLaunchKernelEx(&config, product_kernel<Half>, const_data<Half>(a), const_data<Half>(b),
                                               data<float>(c), wait));
    }
  });
}

// One thing wrong each: 0 nothing, 1 lanes at different calls, 2 a lane that left, 3 a thread that left before a barrier,
// 4 a write past shared memory. out [32]: what unwritten shared memory holds.
void misuse_kernel(int64_t what, float* out) {
  __shared__ float cell[32];
  const unsigned lane = threadIdx.x;
  out[lane] = cell[lane];
  if (what == 1) lane < 16 ? static_cast<void>(__shfl_xor_sync(~0u, lane, 1)) : __syncwarp();
  if (what == 2 && lane != 5) __syncwarp();
  if (what == 3 && lane != 5) __syncthreads();
  if (what == 4) block_memory()[64 + lane] = 0;
  cell[lane] = 1;
}

void misuse(int64_t what, Tensor out) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 64;
  check_cuda("misuse", cudaLaunchKernelEx(&config, misuse_kernel, what, data<float>(out)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(qpeft_ext, m) {
  m.def("warp_product(Tensor a, Tensor b, Tensor(a!) c, bool wait) -> ()");
  m.def("warp_misuse(int what, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("warp_product", TORCH_BOX(&warp_product));
  m.impl("warp_misuse", TORCH_BOX(&misuse));
}

}  // namespace
}  // namespace qpeft
