// The CUDA side of qpeft_ext as a library for CPU tensors: torch.ops.qpeft_cuda_replica.*. The sources are the shipped ones,
// glue and kernels; cuda_runtime.h of this folder runs them. test_cuda_kernels.py compares them with the CPU kernels.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_runtime.h"

#define QPEFT_CUDA_REPLICA
#define qpeft_ext qpeft_cuda_replica  // the name under which everything below registers itself
#define CUDA CPU                      // and the tensors it takes

#include "../../../csrc/ops.cpp"
// kernels before glue: explicit instantiations must see the definitions first
#include "../../../csrc/cuda/clue_attention_kernel.cu"
#include "../../../csrc/cuda/document_rows_kernel.cu"
#include "../../../csrc/cuda/similarity_topk_kernel.cu"
#include "../../../csrc/cuda/token_log_likelihood_kernel.cu"

#include "../../../csrc/cuda/clue_attention.cpp"
#include "../../../csrc/cuda/document_rows.cpp"
#include "../../../csrc/cuda/similarity_topk.cpp"
#include "../../../csrc/cuda/token_log_likelihood.cpp"
