#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace selfforcing {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows this one.
bool machine_has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && machine_has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa choose_isa() {
  const char* wanted = std::getenv("SELFFORCING_CPU_ISA");
  for (Isa isa : kIsasBestFirst) {
    if (wanted != nullptr && *wanted != '\0') {
      if (std::string(wanted) != isa_name(isa)) continue;
      if (machine_has(isa)) return isa;
      throw std::runtime_error(std::string("SELFFORCING_CPU_ISA is ") + wanted + ", which this machine lacks");
    }
    if (machine_has(isa)) return isa;
  }
  throw std::runtime_error(std::string("SELFFORCING_CPU_ISA is '") + wanted +
                           "', but must be one of baseline, avx2, avx512, avx512_bf16");
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace selfforcing
