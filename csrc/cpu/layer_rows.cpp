// The kernels of layer_kernels.h for every processor, and the choice of them.
#include "cpu/layer_rows.h"

#include "cpu/instructions.h"

namespace qpeft {
namespace {

QPEFT_CLONES void rms_norm_of(const float* x, int64_t stride, const float* weight, float eps, int64_t begin,
                              int64_t end, int64_t D, float* out, float* scale) {
  rms_norm_rows(x, stride, weight, eps, begin, end, D, out, scale);
}
QPEFT_CLONES void rms_norm_backward_of(const float* grad, const float* x, int64_t stride, const float* weight,
                                       const float* scale, int64_t begin, int64_t end, int64_t D, float* grad_x) {
  rms_norm_rows_backward(grad, x, stride, weight, scale, begin, end, D, grad_x);
}
QPEFT_CLONES void gated_silu_of(const float* gate, const float* up, int64_t begin, int64_t end, int64_t D, float* out) {
  gated_silu_rows(gate, up, begin, end, D, out);
}
QPEFT_CLONES void gated_silu_backward_of(const float* grad, const float* gate, const float* up, int64_t begin,
                                         int64_t end, int64_t D, float* grad_gate, float* grad_up) {
  gated_silu_rows_backward(grad, gate, up, begin, end, D, grad_gate, grad_up);
}
QPEFT_CLONES void rotary_of(const float* x, HeadStrides from, const float* cos, const float* sin, int64_t H,
                            int64_t begin, int64_t end, int64_t D, bool inverse, float* out, HeadStrides to) {
  rotary_tokens(x, from, cos, sin, H, begin, end, D, inverse, out, to);
}

QPEFT_CLONES void rms_norm_of(const uint16_t* x, int64_t stride, const uint16_t* weight, float eps, int64_t begin,
                              int64_t end, int64_t D, uint16_t* out, float* scale) {
  rms_norm_rows(x, stride, weight, eps, begin, end, D, out, scale);
}
QPEFT_CLONES void rms_norm_backward_of(const uint16_t* grad, const uint16_t* x, int64_t stride, const uint16_t* weight,
                                       const float* scale, int64_t begin, int64_t end, int64_t D, uint16_t* grad_x) {
  rms_norm_rows_backward(grad, x, stride, weight, scale, begin, end, D, grad_x);
}
QPEFT_CLONES void gated_silu_of(const uint16_t* gate, const uint16_t* up, int64_t begin, int64_t end, int64_t D,
                                uint16_t* out) {
  gated_silu_rows(gate, up, begin, end, D, out);
}
QPEFT_CLONES void gated_silu_backward_of(const uint16_t* grad, const uint16_t* gate, const uint16_t* up, int64_t begin,
                                         int64_t end, int64_t D, uint16_t* grad_gate, uint16_t* grad_up) {
  gated_silu_rows_backward(grad, gate, up, begin, end, D, grad_gate, grad_up);
}
QPEFT_CLONES void rotary_of(const uint16_t* x, HeadStrides from, const uint16_t* cos, const uint16_t* sin, int64_t H,
                            int64_t begin, int64_t end, int64_t D, bool inverse, uint16_t* out, HeadStrides to) {
  rotary_tokens(x, from, cos, sin, H, begin, end, D, inverse, out, to);
}

template <typename T>
constexpr LayerKernels<T> kPlain = {rms_norm_of, rms_norm_backward_of, gated_silu_of, gated_silu_backward_of,
                                    rotary_of};

}  // namespace

template <>
const LayerKernels<float>& layer_kernels() {
  return kPlain<float>;
}

template <>
const LayerKernels<uint16_t>& layer_kernels() {
#if defined(__x86_64__) && defined(__gnu_linux__)
  static const bool vectors = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                              instructions_cap() != Cap::kAvx2;
  if (vectors) return kAvx512Bf16LayerKernels;
#endif
  return kPlain<uint16_t>;
}

}  // namespace qpeft
