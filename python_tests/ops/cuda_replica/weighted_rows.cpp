#include "replica.h"

#include "../../../csrc/cuda/weighted_rows_kernel.cu"

#include "../../../csrc/cuda/weighted_rows.cpp"
