// First line of every file here: the CUDA side of qpeft_ext as a library for CPU tensors, torch.ops.qpeft_cuda_replica.*.
// The sources are the shipped ones, glue and kernels; cuda_runtime.h of this folder runs them.
// In each file kernels come before glue: explicit instantiations must see the definitions first.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_runtime.h"

#define QPEFT_CUDA_REPLICA
#define qpeft_ext qpeft_cuda_replica  // the name under which everything below registers itself
#define CUDA CPU                      // and the tensors it takes
