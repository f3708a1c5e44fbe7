#include "replica.h"

#include "../../../csrc/cuda/clue_attention_kernel.cu"
#include "../../../csrc/cuda/clue_attention_products_kernel.cu"
#include "../../../csrc/cuda/clue_attention_sums_kernel.cu"

#include "../../../csrc/cuda/clue_attention.cpp"
