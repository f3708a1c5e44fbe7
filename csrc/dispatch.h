// From a tensor to C++: its dtype as a type, its memory as a pointer, for the kernels of both devices.
#pragma once
#include <algorithm>
#include <limits>

#include "checks.h"

namespace qpeft {

// The numbers of a tensor, to be written or only read; null for a tensor that is not given.
template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

// Calls f with a value of the dtype of sums: float or double (checks.h admitted nothing else).
template <typename F>
void dispatch_sum(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double)
    f(double{});
  else
    f(float{});
}

// Calls f with a value of the type that rows of float32 or bfloat16 (its bits) are read as; nothing else is admitted.
template <typename F>
void dispatch_row(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::BFloat16)
    f(uint16_t{});
  else
    f(float{});
}

// A soft cap in the dtype of sums, in which 0 means none. One that would round to 0 is the smallest number instead (all logits
// are then 0, the limit), and one that would round to infinity is none, the limit too.
template <typename Sum>
Sum cap_or_none(std::optional<double> soft_cap) {
  if (!soft_cap || *soft_cap > static_cast<double>(std::numeric_limits<Sum>::max())) return 0;
  return std::max(static_cast<Sum>(*soft_cap), std::numeric_limits<Sum>::min());
}

// Calls f(table value, sum value) for the dtypes that a table may have; the device says what its 16-bit types are called.
template <typename Half, typename BFloat16, typename F>
void dispatch_table(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::BFloat16:
      return f(BFloat16{}, float{});
    case ScalarType::Half:
      return f(Half{}, float{});
    default:
      STD_TORCH_CHECK(false, op, ": the table must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace qpeft
