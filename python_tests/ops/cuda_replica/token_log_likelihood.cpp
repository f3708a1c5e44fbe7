#include "replica.h"

#include "../../../csrc/cuda/token_log_likelihood_kernel.cu"

#include "../../../csrc/cuda/token_log_likelihood.cpp"
