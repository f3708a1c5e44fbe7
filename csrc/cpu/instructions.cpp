#include "cpu/instructions.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qpeft {

Cap instructions_cap() {
  const char* given = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string_view name = given ? given : "";
  if (name.empty() || name == "ALL" || name == "DEFAULT" || name.find("AMX") != name.npos) return Cap::kAmx;
  return name.find("AVX512") != name.npos || name.find("AVX10") != name.npos ? Cap::kAvx512 : Cap::kAvx2;
}

bool may_use_tiles([[maybe_unused]] unsigned feature) {
#if defined(__x86_64__) && defined(__linux__)
  // Tiles take 8 KB of the state of a thread, so a process has to ask the system for them, once.
  constexpr unsigned kTile = 1u << 24;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool there = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & feature) && (edx & kTile);
  return there && instructions_cap() == Cap::kAmx && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace qpeft
