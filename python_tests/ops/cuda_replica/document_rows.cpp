#include "replica.h"

#include "../../../csrc/cuda/document_rows_kernel.cu"

#include "../../../csrc/cuda/document_rows.cpp"
