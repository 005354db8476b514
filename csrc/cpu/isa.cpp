// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "forward.h"
#include "target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pfa::cpu {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // a name that not every compiler's __builtin_cpu_supports knows
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

#if defined(PFA_EMULATE_AMX)
bool has_amx() { return has_avx512(); }
#else
// Linux hands the tile registers to a process that asks; threads started before inherit the grant.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBf16 | kTile | kInt8;
  return (edx & kAll) == kAll && tiles_granted();
}
#endif
#else
bool has_amx() { return false; }
bool has_avx2() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512() { return false; }
#endif

bool always() { return true; }

constexpr Isa kIsas[] = {
    // best first
    {"amx", has_amx, amx_kernel},
    {"avx512", has_avx512, avx512_kernel},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_kernel},
    {"avx2", has_avx2, avx2_kernel},
    {"portable", always, portable_kernel},
};

const Isa& best_isa() {
  for (const Isa& isa : kIsas) {
    if (isa.supported()) return isa;
  }
  return kIsas[std::size(kIsas) - 1];
}

}  // namespace

const Isa& select_isa() {
  const char* wanted = std::getenv("PFA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    static const Isa& best = best_isa();
    return best;
  }
  std::string names;
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, wanted) == 0) {
      if (isa.supported()) return isa;
      throw std::runtime_error(
          "PFA_CPU_ISA must name an instruction set of this processor, which lacks " +
          std::string(wanted) + "; the best it has is " + best_isa().name);
    }
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::runtime_error("PFA_CPU_ISA must be one of " + names + ", got " + wanted);
}

std::string isa() { return select_isa().name; }

std::string isas() {
  std::string text;
  for (const Isa& isa : kIsas) {
    text += (text.empty() ? "" : ";") + std::string(isa.name) + (isa.supported() ? " 1" : " 0");
  }
  return text;
}

}  // namespace pfa::cpu
