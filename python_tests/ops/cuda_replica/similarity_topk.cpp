#include "replica.h"

#include "../../../csrc/cuda/similarity_topk_kernel.cu"

#include "../../../csrc/cuda/similarity_topk.cpp"
