"""One way to launch Triton kernels. `kernel[grid](…)` binds, types and specialises every argument anew at each call.

Triton specialises what it compiles: on a tensor's dtype and on its address being a multiple of 16, on an integer being
1, a multiple of 16, or beyond 32 bits, on constants. A `Launcher` keeps compiled kernels by a key that is finer: the
dtypes, which addresses are no multiples of 16, strides and constants as they are. What else varies from call to call
has a declared type and is not specialised on. So equal keys mean equal kernels, whatever a version of Triton makes of
them; what is not found is compiled and first launched by Triton itself, which refuses tensors that are not on a GPU.

What is found is started through `CompiledKernel.run`, which has been the same in `VERSIONS`. Elsewhere, for AMD, under
the interpreter, and while a profiler hooks launches, it is `kernel[grid](…)` as ever.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ("3.6", "3.7", "3.8", "3.9")
MOST_KEPT = 1024  # by one launcher: strides that change at every call must not fill the memory


class Launcher:
    """A kernel whose parameters are, in this order, tensors (`*_ptr`), scalars, strides and constants.

    Scalars are annotated with their type, and stand in `do_not_specialize`.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiles = isinstance(kernel, JITFunction)  # else it is interpreted
        self._direct = False
        self._driver: Any = None
        self._kept: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        if self._compiles:
            _check(kernel)

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        scalars: Sequence[float],
        strides: tuple[int, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> None:
        """Start the kernel on the current stream of the current device, which is the tensors'."""
        runtime = knobs.runtime
        if self._compiles and driver.active is not self._driver:
            self._adopt(driver.active)
        if not self._direct or _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook) or runtime.debug:
            self._by_triton(grid, (*tensors, *scalars, *strides, *constants), num_warps, num_stages)
            return
        first: Any = tensors[0]
        where = first.get_device()
        pointers: list[int | None] = []
        dtypes: list[torch.dtype | None] = []
        misaligned = []
        for x in tensors:
            if x is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                if x.get_device() != where:
                    raise ValueError(
                        f"{self.kernel.__name__}: a tensor is on {x.device}, but must be on {first.device}"
                    )
                pointer = x.data_ptr()
                pointers.append(pointer)
                dtypes.append(x.dtype)
                if pointer & 15:
                    misaligned.append(len(pointers))
        device = self._driver.get_current_device()
        key = (device, where, num_warps, num_stages, strides, constants, *misaligned, *dtypes)
        found = self._kept.get(key)
        if found is None:
            self._keep(key, grid, (*tensors, *scalars, *strides, *constants), num_warps, num_stages)
            return
        run, function, metadata, _ = found
        size = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = self._driver.get_current_stream(device)
        run(*size, stream, function, metadata, None, None, None, *pointers, *scalars, *strides, *constants)

    def _adopt(self, active: Any) -> None:
        """Handles of kernels are their driver's."""
        self._driver = active
        self._kept.clear()
        version = ".".join(triton.__version__.split(".")[:2])
        self._direct = version in VERSIONS and active.get_current_target().backend == "cuda"

    def _by_triton(self, grid: tuple[int, ...], arguments: tuple[Any, ...], num_warps: int, num_stages: int) -> None:
        self.kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages)

    def _keep(
        self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: tuple[Any, ...], num_warps: int, num_stages: int
    ) -> None:
        """Launch what is not known yet, and know it from now on."""
        compiled = self.kernel.run(*arguments, grid=grid, warmup=True, num_warps=num_warps, num_stages=num_stages)
        self._by_triton(grid, arguments, num_warps, num_stages)
        if isinstance(compiled, CompiledKernel):  # not while Triton compiles elsewhere
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            # `run` loads the kernel, so it comes first; the kernel itself must outlive its handle
            self._kept[key] = (compiled.run, compiled.function, compiled.packed_metadata, compiled)


def _check(kernel: Any) -> None:
    """That the parameters are what `Launcher` takes them for: a mistake would start the wrong kernel."""
    order = "tensor", "scalar", "stride", "constant"
    kinds = []
    for parameter in kernel.params:
        if parameter.is_constexpr:
            kinds.append("constant")
        elif parameter.name.endswith("_ptr"):
            kinds.append("tensor")
        elif parameter.do_not_specialize:
            if not parameter.annotation_type:
                raise TypeError(f"{kernel.__name__}: the scalar {parameter.name} has no type")
            kinds.append("scalar")
        else:
            kinds.append("stride")
    if kinds != sorted(kinds, key=order.index):
        raise TypeError(f"{kernel.__name__}: the order of parameters is tensors, scalars, strides, constants")


def _hooked(hook: Any) -> bool:
    """Whether anything is called at a launch: a chain that may be empty, a function, or None."""
    return bool(getattr(hook, "calls", hook))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's is also for kernels, and slower for it."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n, and 1 below."""
    return 1 << max(0, n - 1).bit_length()


def on_its_device(x: Tensor) -> Any:
    """A context for the device of `x`, in which autocast rounds nothing: dtypes were settled before."""
    return _without_autocast(x) if torch.is_autocast_enabled(x.device.type) else torch.cuda.device_of(x)


@contextmanager
def _without_autocast(x: Tensor) -> Iterator[None]:
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield
