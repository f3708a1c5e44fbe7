// Between torch and the launchers: device, stream, errors, dtype dispatch. Included by the .cpp files of this folder only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../dispatch.h"
#include "launchers.h"

#ifndef QPEFT_CUDA_REPLICA
#include <dlfcn.h>
#endif

namespace qpeft {

inline void check_cuda(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": the CUDA kernel was not launched: ", cudaGetErrorString(status));
}

#ifndef QPEFT_CUDA_REPLICA
// torch's current stream of a device. The function lives in libtorch_cuda, which this library does not link (so that it
// also loads where torch is a CPU build); a caller of this has CUDA tensors, so libtorch_cuda is loaded.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "qpeft_ext: libtorch_cuda.so offers no current stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == AOTI_TORCH_SUCCESS, "qpeft_ext: torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// While it lives, the tensor's device is the current one; `stream` is torch's current stream there.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
};
#else  // python_tests/ops/cuda_replica: the kernels run on the CPU
struct OnDevice {
  cudaStream_t stream = nullptr;

  explicit OnDevice(const Tensor&) {}
};
#endif

}  // namespace qpeft
