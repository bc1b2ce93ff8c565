#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "bf16_tile.h"
#include "kdkernels/hankel.h"
#include "kdkernels/linear_distillation.h"
#include "kdkernels/linear_recurrence.h"
#include "kdkernels/lora_linear.h"
#include "kdkernels/lru_block.h"
#include "kdkernels/projection_alignment.h"
#include "kdkernels/svd.h"

namespace kd {

#define KD_DECLARE_ISA(isa)                                     \
  namespace isa {                                               \
  extern const HankelKernels hankel;                            \
  extern const LinearDistillationKernels linear_distillation;   \
  extern const LinearRecurrenceKernels linear_recurrence;       \
  extern const LoraLinearKernels lora_linear;                   \
  extern const LruBlockKernels lru_block;                       \
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
bool avx512_bf16_runs() {
  return avx512_supported() && avx512_bf16_supported();
}
#endif

// One instruction set's copies, and how it multiplies bfloat16 numbers.
#define KD_ISA_ROW(name, supported, isa, bf16, rate) \
  {name,                                             \
   supported,                                        \
   &isa::projection_alignment,                       \
   &isa::lora_linear,                                \
   &isa::svd,                                        \
   &isa::hankel,                                     \
   &isa::linear_distillation,                        \
   &isa::linear_recurrence,                          \
   bf16,                                             \
   rate,                                             \
   &isa::lru_block}

// bfloat16's own instructions: on an AMD processor they multiply two for a float32, on an Intel one (Emerald Rapids)
// no more than float32's do, so there they stand behind; AMX reached five times the rate of float32.
const Isa table[] = {
#ifdef KD_HAS_AVX512
    KD_ISA_ROW(
        "amx", [] { return avx512_supported() && amx_supported(); }, avx512, &amx_tile, 5),
    KD_ISA_ROW(
        "avx512_bf16", [] { return avx512_bf16_runs() && __builtin_cpu_is("amd"); }, avx512, &avx512_bf16_tile, 2),
    KD_ISA_ROW("avx512", avx512_supported, avx512, nullptr, 1),
    KD_ISA_ROW(
        "avx512_bf16", [] { return avx512_bf16_runs() && !__builtin_cpu_is("amd"); }, avx512, &avx512_bf16_tile, 1),
#endif
#ifdef KD_HAS_AVX2
    KD_ISA_ROW(
        "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2, nullptr, 1),
#endif
    KD_ISA_ROW(
        "baseline", [] { return true; }, baseline, nullptr, 1),
};
#undef KD_ISA_ROW

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
