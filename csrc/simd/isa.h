// Which instruction set the CPU kernels use. Every file named cpu_kernels.cpp is compiled once per instruction set,
// with SELFFORCING_ISA set to one of the names below: its functions live in namespace selfforcing::SELFFORCING_ISA, and
// the baseline file beside it (cpu.cpp) calls the one that active_isa() names. So one wheel runs on every x86-64.
#pragma once
#include <cstdint>

namespace selfforcing {

enum class Isa : int32_t {
  baseline = 0,     // x86-64 or, on other architectures, plain C++
  avx2 = 1,         // AVX2, FMA, F16C
  avx512 = 2,       // AVX-512 F, BW, DQ, VL
  avx512_bf16 = 3,  // the same and AVX512-BF16
};

constexpr Isa kIsasBestFirst[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::baseline};

// Whether this machine can run it.
bool machine_has(Isa isa);

// The best instruction set that this machine has and this build contains, or the one that SELFFORCING_CPU_ISA names
// (read once). Throws std::runtime_error when that names an unknown set or one the machine lacks.
Isa active_isa();

const char* isa_name(Isa isa);

}  // namespace selfforcing

// Calls NAME(...) of the active instruction set's namespace.
#if defined(__x86_64__)
#define SELFFORCING_DISPATCH(NAME, ...)                                          \
  switch (::selfforcing::active_isa()) {                                         \
    case ::selfforcing::Isa::avx512_bf16: return avx512_bf16::NAME(__VA_ARGS__); \
    case ::selfforcing::Isa::avx512: return avx512::NAME(__VA_ARGS__);           \
    case ::selfforcing::Isa::avx2: return avx2::NAME(__VA_ARGS__);               \
    default: return baseline::NAME(__VA_ARGS__);                                 \
  }
#define SELFFORCING_DECLARE_ISA(DECLARATION) \
  namespace baseline {                       \
  DECLARATION;                               \
  }                                          \
  namespace avx2 {                           \
  DECLARATION;                               \
  }                                          \
  namespace avx512 {                         \
  DECLARATION;                               \
  }                                          \
  namespace avx512_bf16 {                    \
  DECLARATION;                               \
  }
#else
#define SELFFORCING_DISPATCH(NAME, ...) return baseline::NAME(__VA_ARGS__)
#define SELFFORCING_DECLARE_ISA(DECLARATION) \
  namespace baseline {                       \
  DECLARATION;                               \
  }
#endif
