// The checks of rms_norm.cpp, gated_silu.cpp and rotary.cpp, as those of checks.h.
#pragma once
#include "checks.h"

namespace qpeft {

inline void expect_float32_or_bfloat16(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op, ": ", name,
                  " has the wrong dtype, it must be float32 or bfloat16");
}

inline void check_rms_norm(const char* op, const Tensor& x, const Tensor& weight) {
  expect_float32_or_bfloat16(op, "x", x);
  expect(op, "x", x, {-1, -1}, x.scalar_type(), true);
  expect(op, "weight", weight, {x.size(1)}, x.scalar_type());
}

inline void check_gated_silu(const char* op, const Tensor& gate, const Tensor& up) {
  expect_float32_or_bfloat16(op, "gate", gate);
  expect(op, "gate", gate, {-1, -1}, gate.scalar_type());
  expect(op, "up", up, {gate.size(0), gate.size(1)}, gate.scalar_type());
}

inline void check_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  constexpr auto op = "rotary";
  expect_float32_or_bfloat16(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0 && (x.numel() == 0 || x.stride(3) == 1), op,
                  ": x must be [B, H, L, D] with an even D and last stride 1");
  STD_TORCH_CHECK(cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == x.size(0)), op, ": cos must be [B or 1, L, D]");
  for (const Tensor* table : {&cos, &sin})
    expect(op, table == &cos ? "cos" : "sin", *table, {cos.size(0), x.size(2), x.size(3)}, x.scalar_type());
}

}  // namespace qpeft
