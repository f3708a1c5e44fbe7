// What an LM's layers compute between their products (rms_norm.cpp, gated_silu.cpp, rotary.cpp): one set of kernels for each set of
// instructions.
#pragma once
#include <cstdint>

namespace qpeft {

// Of [B, H, L, D], whose last one is 1
struct HeadStrides {
  int64_t batch, head, token;
};

// T: float, or uint16_t for bfloat16. Rows begin .. end of [N, D], contiguous where no stride is given.
template <typename T>
struct LayerKernels {
  // out = weight * round(x * scale), scale = 1 / sqrt(mean of x^2 + eps), kept for the gradient
  void (*rms_norm)(const T* x, int64_t stride, const T* weight, float eps, int64_t begin, int64_t end, int64_t D,
                   T* out, float* scale);
  // The gradient of sum(out * grad) with respect to x, as if nothing were rounded
  void (*rms_norm_backward)(const T* grad, const T* x, int64_t stride, const T* weight, const float* scale,
                            int64_t begin, int64_t end, int64_t D, T* grad_x);
  // out = round(silu(gate)) * up
  void (*gated_silu)(const T* gate, const T* up, int64_t begin, int64_t end, int64_t D, T* out);
  void (*gated_silu_backward)(const T* grad, const T* gate, const T* up, int64_t begin, int64_t end, int64_t D,
                              T* grad_gate, T* grad_up);
  // Tokens begin .. end of one row of the batch, H heads of width D; cos and sin [L, D]
  void (*rotary)(const T* x, HeadStrides from, const T* cos, const T* sin, int64_t H, int64_t begin, int64_t end,
                 int64_t D, bool inverse, T* out, HeadStrides to);
};

// The fastest that this processor may run
template <typename T>
const LayerKernels<T>& layer_kernels();

extern const LayerKernels<uint16_t> kAvx512Bf16LayerKernels;

}  // namespace qpeft
