// The Python module: registers, nothing more.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kdkernels. Private: use the operators of the kdkernels package.";
  kd::bind_common(m);
  kd::bind_hankel(m);
  kd::bind_linear_distillation(m);
  kd::bind_linear_recurrence(m);
  kd::bind_lora_linear(m);
  kd::bind_lru_block(m);
  kd::bind_projection_alignment(m);
  kd::bind_svd(m);
#ifdef KD_CUDA_ARCHITECTURES
  kd::bind_cuda(m);
  m.attr("cuda_architectures") = KD_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";  // built without CUDA
#endif
}
