// Which of this processor's instructions the kernels may use.
#pragma once
#include <cstdint>

namespace qpeft {

enum class Cap { kAvx2, kAvx512, kAmx };

// The most that ONEDNN_MAX_CPU_ISA allows, the variable that limits torch's products: with it a machine runs what older ones do.
Cap instructions_cap();

// Has this processor tiles (AMX) for this type of numbers, and does the system let this process use them? feature: a bit of EDX
// of leaf 7 of CPUID.
bool may_use_tiles(unsigned feature);
constexpr unsigned kTilesOfBFloat16 = 1u << 22, kTilesOfInt8 = 1u << 25;

}  // namespace qpeft
