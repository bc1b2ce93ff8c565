"""What a call costs the host where there is no GPU: Triton compiles and launches for real, into a driver that is none.

`libcuda.so.1` is replaced by forty lines of C that count launches. Above it everything is what runs on a GPU: torch's
allocations, our Python, Triton's launch path and its C launcher; pointers are those of CPU tensors, and nothing reads
them. What is missing is the time of the true cuLaunchKernelEx, of cuBLAS's launches and of CUDA's allocator. Nothing is
computed: outputs hold what their memory held. Matmuls and other torch operators do run, on the CPU: keep tensors small.
"""

import ctypes
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ARCHITECTURE = 90
MOST_FUNCTIONS = 4096

SOURCE = r"""
#include <cuda.h>
#define MOST %d
static char names[MOST][128];
static long long launches[MOST], functions;

const char *stand_in_name(int i) { return names[i]; }
long long stand_in_launches(int i) { return launches[i]; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (++functions >= MOST) return CUDA_ERROR_OUT_OF_MEMORY;
  for (int i = 0; i < 127 && name[i]; i++) names[functions][i] = name[i];
  *function = (CUfunction)functions;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  launches[(long long)f]++;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448;  // of an H100: the shared memory a block may have; nothing else is looked at
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stand-in"; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
"""


class Cost(NamedTuple):
    """Of one call."""

    seconds: float
    launches: int  # of Triton kernels


class Device:
    """What was launched since the driver was put in place."""

    def __init__(self, library: ctypes.CDLL, folder: tempfile.TemporaryDirectory[str]) -> None:
        library.stand_in_name.restype = ctypes.c_char_p
        library.stand_in_launches.restype = ctypes.c_longlong
        self._library, self.folder = library, folder

    def launched(self) -> Counter[tuple[int, str]]:
        """How often each compiled kernel was launched, by its handle (`CompiledKernel.function`) and its name."""
        found: Counter[tuple[int, str]] = Counter()
        for handle in range(1, MOST_FUNCTIONS):
            if not (name := self._library.stand_in_name(handle)):
                break
            found[handle, name.decode()] = self._library.stand_in_launches(handle)
        return +found

    def during(self, step: Callable[[], Any]) -> Counter[str]:
        """The launches of one step by the kernels' names."""
        before = self.launched()
        step()
        found: Counter[str] = Counter()
        for (_, name), count in (self.launched() - before).items():
            found[name] += count
        return found


@contextmanager
def stand_in() -> Iterator[Device]:
    """The driver in place of Triton's."""
    from triton import knobs
    from triton.runtime import driver

    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU: measure on it")
    active = driver._active
    with knobs.nvidia.scope():
        device, imaginary = _made()
        knobs.nvidia.libcuda_path = device.folder.name  # Triton's launchers are linked when they are first needed
        driver.set_active(imaginary)
        try:
            yield device
        finally:
            driver._active = active


@cache
def _made() -> tuple[Device, Any]:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    temporary = tempfile.TemporaryDirectory(prefix="kdkernels-stand-in-")
    folder = Path(temporary.name)
    (folder / "libcuda.c").write_text(SOURCE % MOST_FUNCTIONS)
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run(["gcc", *options, "-o", folder / "libcuda.so.1", folder / "libcuda.c"], check=True)
    # whoever asks for a library of this name from now on is given this one
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)

    class Imaginary(CudaDriver):
        """One GPU, one stream."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: divmod(ARCHITECTURE, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    return Device(library, temporary), Imaginary()


def triton_host_cost(step: Callable[[], Any], reps: int = 200) -> Cost:
    """Median seconds of a step on this thread's processor, after calls that compile, and its launches of kernels.

    Time in which another process has the processor does not count.
    """
    with stand_in() as device:
        for _ in range(5):
            step()
        launches = device.during(step).total()
        times = []
        for _ in range(reps):
            start = time.thread_time()
            step()
            times.append(time.thread_time() - start)
    return Cost(median(times), launches)


def torch_operators(step: Callable[[], Any]) -> Counter[str]:
    """The names of torch's operators that one step calls, allocations (`empty`) and views included."""
    from torch.profiler import ProfilerActivity, profile

    with stand_in(), profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return Counter(e.name.removeprefix("aten::") for e in seen.events() if e.name.startswith("aten::"))
