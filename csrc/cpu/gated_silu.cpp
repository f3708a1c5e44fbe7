// silu(gate) * up, the middle of the feed-forward of Llama, Qwen, Mistral and others, and its gradient.
//   Parallel over   rows
//   Memory traffic  two rows read, one written; for the gradient three and two
//   Precision       float32; of bfloat16, silu and product are rounded, as torch rounds them; a gradient is rounded once
//   Deterministic   yes; a row does not depend on the others
#include "cpu/common.h"
#include "cpu/layer_checks.h"
#include "cpu/layer_kernels.h"

namespace qpeft {
namespace {

int64_t grain(int64_t D) { return (1 << 15) / (D + 1) + 1; }

Tensor forward(Tensor gate, Tensor up) {
  constexpr auto op = "gated_silu";
  make_contiguous({&gate, &up});
  check_gated_silu(op, gate, up);
  const int64_t N = gate.size(0), D = gate.size(1);
  Tensor out = torch::stable::new_empty(gate, {N, D});
  dispatch_row(gate.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(N, grain(D), [&](int64_t begin, int64_t end) {
      layer_kernels<T>().gated_silu(const_data<T>(gate), const_data<T>(up), begin, end, D, data<T>(out));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor gate, Tensor up) {
  constexpr auto op = "gated_silu_backward";
  make_contiguous({&grad, &gate, &up});
  check_gated_silu(op, gate, up);
  const int64_t N = gate.size(0), D = gate.size(1);
  expect(op, "grad", grad, {N, D}, gate.scalar_type());
  Tensor grad_gate = torch::stable::new_empty(gate, {N, D}), grad_up = torch::stable::new_empty(gate, {N, D});
  dispatch_row(gate.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(N, grain(D), [&](int64_t begin, int64_t end) {
      layer_kernels<T>().gated_silu_backward(const_data<T>(grad), const_data<T>(gate), const_data<T>(up), begin, end, D,
                                             data<T>(grad_gate), data<T>(grad_up));
    });
  });
  return {grad_gate, grad_up};
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("gated_silu", TORCH_BOX(&forward));
  m.impl("gated_silu_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qpeft
