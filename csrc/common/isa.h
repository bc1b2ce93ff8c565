// One source, compiled once per instruction set; this table says which copies exist and which one runs.
#pragma once

#include <string>
#include <vector>

namespace kd {

struct Bf16Tile;
struct HankelKernels;
struct LinearDistillationKernels;
struct LinearRecurrenceKernels;
struct LoraLinearKernels;
struct LruBlockKernels;
struct ProjectionAlignmentKernels;
struct SvdKernels;

struct Isa {
  const char* name;
  bool (*supported)();
  const ProjectionAlignmentKernels* projection_alignment;
  const LoraLinearKernels* lora_linear;
  const SvdKernels* svd;
  const HankelKernels* hankel;
  const LinearDistillationKernels* linear_distillation;
  const LinearRecurrenceKernels* linear_recurrence;
  const Bf16Tile* bf16;  // products of bfloat16 numbers by instructions of their own, or null
  int bf16_rate;         // how many times faster than float32's they are, as measured
  const LruBlockKernels* lru_block;
};

// Best first. Only those this processor can run.
std::vector<const Isa*> supported_isas();

// The one in use: the best, or what the environment variable KDKERNELS_ISA or select_isa() names.
// Throws std::invalid_argument for a name that is unknown or that this processor cannot run.
const Isa& current_isa();
void select_isa(const std::string& name);

}  // namespace kd
