// Root-mean-square norm of bfloat16 rows: kernels in a file of their own, which bfloat16_rms_norm.cpp calls where they may run.
#pragma once
#include <cstdint>

namespace qpeft {

// For rows begin .. end of x [N, D]: out = weight * round(x * scale), scale = 1 / sqrt(mean of x^2 + eps), kept for the gradient.
void rms_norm_rows(const uint16_t* x, int64_t x_stride, const uint16_t* weight, float eps, int64_t begin, int64_t end,
                   int64_t D, uint16_t* out, float* scale);

// Gradient of sum(out * grad) with respect to x, as if nothing were rounded.
void rms_norm_rows_backward(const uint16_t* grad, const uint16_t* x, int64_t x_stride, const uint16_t* weight,
                            const float* scale, int64_t begin, int64_t end, int64_t D, uint16_t* grad_x);

}  // namespace qpeft
