#include "cpu/instructions.h"

#include <cctype>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qpeft {

Cap instructions_cap() {  // as oneDNN reads it: the older name too, in any case, and what it does not know is no limit
  std::string name;
  for (const char* variable : {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"})
    if (const char* given = std::getenv(variable); name.empty() && given) name = given;
  for (char& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  const auto has = [&](const char* part) { return name.find(part) != name.npos; };
  if (has("amx")) return Cap::kAmx;
  if (has("avx512") || has("avx10")) return Cap::kAvx512;
  return has("avx") || has("sse") ? Cap::kAvx2 : Cap::kAmx;
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
