#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "bf16_tile.h"
#include "kdkernels/hankel.h"
#include "kdkernels/lora_linear.h"
#include "kdkernels/projection_alignment.h"
#include "kdkernels/svd.h"

namespace kd {

#define KD_DECLARE_ISA(isa)                                     \
  namespace isa {                                               \
  extern const HankelKernels hankel;                            \
  extern const LoraLinearKernels lora_linear;                   \
  extern const ProjectionAlignmentKernels projection_alignment; \
  extern const SvdKernels svd;                                  \
  }
#ifdef KD_HAS_AVX512
KD_DECLARE_ISA(avx512)
#endif
#ifdef KD_HAS_AVX2
KD_DECLARE_ISA(avx2)
#endif
KD_DECLARE_ISA(baseline)

namespace {

#ifdef KD_HAS_AVX512
bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

// bfloat16's own instructions: on an AMD processor they multiply two for a float32, on an Intel one (Emerald Rapids)
// no more than float32's do, so there they stand behind; AMX reached five times the rate of float32.
#ifdef KD_HAS_AVX512
constexpr Isa avx512_bf16{
    "avx512_bf16",     nullptr, &avx512::projection_alignment, &avx512::lora_linear, &avx512::svd, &avx512::hankel,
    &avx512_bf16_tile, 2};
constexpr Isa with_support(Isa isa, bool (*supported)(), int rate) {
  isa.supported = supported;
  isa.bf16_rate = rate;
  return isa;
}
#endif

const Isa table[] = {
#ifdef KD_HAS_AVX512
    {"amx", [] { return avx512_supported() && amx_supported(); }, &avx512::projection_alignment, &avx512::lora_linear,
     &avx512::svd, &avx512::hankel, &amx_tile, 5},
    with_support(
        avx512_bf16, [] { return avx512_supported() && avx512_bf16_supported() && __builtin_cpu_is("amd"); }, 2),
    {"avx512", avx512_supported, &avx512::projection_alignment, &avx512::lora_linear, &avx512::svd, &avx512::hankel,
     nullptr, 1},
    with_support(
        avx512_bf16, [] { return avx512_supported() && avx512_bf16_supported() && !__builtin_cpu_is("amd"); }, 1),
#endif
#ifdef KD_HAS_AVX2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     &avx2::projection_alignment, &avx2::lora_linear, &avx2::svd, &avx2::hankel, nullptr, 1},
#endif
    {"baseline", [] { return true; }, &baseline::projection_alignment, &baseline::lora_linear, &baseline::svd,
     &baseline::hankel, nullptr, 1},
};

const Isa& find(const std::string& what, const std::string& name) {
  std::string choices;
  for (const Isa* isa : supported_isas()) {
    if (name == isa->name) return *isa;
    choices += (choices.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument(what + " is '" + name + "', but this build on this processor has: " + choices);
}

std::atomic<const Isa*> selected{nullptr};

}  // namespace

std::vector<const Isa*> supported_isas() {
  std::vector<const Isa*> found;
  for (const Isa& isa : table)
    if (isa.supported()) found.push_back(&isa);
  return found;
}

const Isa& current_isa() {
  if (const Isa* isa = selected.load()) return *isa;
  const char* forced = std::getenv("KDKERNELS_ISA");
  const Isa& isa = forced && *forced ? find("KDKERNELS_ISA", forced) : *supported_isas().front();
  selected = &isa;
  return isa;
}

void select_isa(const std::string& name) {
  selected = &find("the instruction set", name);
}

}  // namespace kd
