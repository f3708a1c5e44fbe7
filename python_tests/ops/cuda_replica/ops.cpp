#include "replica.h"

#include "../../../csrc/ops.cpp"
