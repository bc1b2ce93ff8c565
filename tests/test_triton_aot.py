"""Every Triton kernel, compiled for the GPUs we support without having one, held to a budget of registers and memory.

The operators themselves are run on CPU tensors, with a driver that names a GPU it does not have and with launches that
stop after compiling. So what is compiled is what is launched: the same tiles, the same specialisation of arguments.
Another operator joins with a function of its launches in `LAUNCHES`; one that does not fails `test_all_kernels`.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch

import kdkernels.ops
from kdkernels.ops.linear_distillation.call import Call, Side

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = 128  # a thread: two blocks of 256 threads, or four of 128, live on a multiprocessor at once
SHARED = 48 * 2**10  # bytes a block: what every device gives without asking
MATMULS = ("lora_linear_",)  # kernels that begin so hold a tile of sums in registers: two blocks live at once
MATMUL_REGISTERS, MATMUL_SHARED = 255, 96 * 2**10
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def projection_alignment() -> None:
    """Both kernels over tiles, metrics, dtypes, sides and needs."""
    module = import_module("kdkernels.ops.projection_alignment.triton")

    def launch(
        method: str,
        metric: str,
        D: int,
        d_s: int | None = None,
        d_t: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        weights: bool = False,
        needs: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    ) -> None:
        N = 5
        student, teacher = torch.zeros(N, d_s or D, dtype=dtype), torch.zeros(N, d_t or D, dtype=dtype)
        if d_t is None:
            teacher = teacher.T.contiguous().T  # strides that are not 1
        projections = [None if d is None else torch.zeros(D, d, dtype=dtype) for d in (d_s, d_t)]
        biases = [torch.zeros(D, dtype=dtype) if bias and d is not None else None for d in (d_s, d_t)]
        operands = (student, teacher, *projections, *biases)
        w = torch.ones(N) if weights else None
        if not needs:
            return module.losses(operands, w, metric, method, torch.empty(N))
        grads = [
            torch.empty(0) if x is None or i not in needs else torch.empty(x.shape, dtype=x.dtype)
            for i, x in enumerate(operands)
        ]
        module.loss_and_gradients(operands, w, metric, method, 1, torch.empty(()), grads)

    bf16, fp16 = torch.bfloat16, torch.float16
    launch("direct", "cosine", 4096, 8, 8, bias=True, weights=True)
    launch("direct", "angular", 1280, 8, 8, dtype=bf16, bias=True)
    launch("direct", "mse", 130, 8, 8)
    launch("direct", "cosine", 768, 8, dtype=fp16, weights=True)
    launch("direct", "angular", 64, 8, 8, needs=())
    launch("direct", "angular", 16384)
    launch("gram", "cosine", 16, 768, 1280)
    launch("gram", "cosine", 130, 64, 96, bias=True, weights=True)
    launch("gram", "cosine", 64, 48, 40, needs=(0, 1))
    launch("gram", "cosine", 8, 4096, 2048, bias=True, weights=True)
    launch("gram", "cosine", 64, 8, 8, needs=())


def lora_linear() -> None:
    """All kernels over tiles, dtypes, adapters in float32 beside them, masks, siblings and a shared base."""
    module = import_module("kdkernels.ops.lora_linear.triton")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def launch(
        d_in: int, d_out: int, r: int, dtype: torch.dtype, adapter: torch.dtype, p: float = 0.0, K: int = 1
    ) -> None:
        tensors: list[Any] = [torch.zeros(5, d_in, dtype=dtype)]
        for k in range(K):
            tensors += [torch.zeros(d_out, d_in, dtype=dtype), torch.zeros(r, d_in, dtype=adapter)]
            tensors += [torch.zeros(d_out, r, dtype=adapter), torch.zeros(d_out, dtype=dtype) if k == 0 else None]
        options = (tensors, [1.0, p] * K, torch.zeros(K, 2, dtype=torch.int64) if p else None)
        found = module.forward(*options)
        module.backward(*options, found[K:], found[:K], [x is not None for x in tensors])

    for dtype, adapter in ((fp32, fp32), (bf16, fp32)):
        launch(64, 4096, 16, dtype, adapter)  # narrow enough for the fused matmul
        launch(1024, 130, 256, dtype, adapter, p=0.1)
    launch(4096, 64, 16, fp16, fp16, p=0.1)
    launch(768, 96, 8, bf16, bf16, p=0.1, K=3)


def linear_distillation() -> None:
    """Both kernels over divergences, mixtures, dtypes, given logits, vocabularies and everything a head may have."""
    module = import_module("kdkernels.ops.linear_distillation.triton")
    bf16, fp16 = torch.bfloat16, torch.float16

    def launch(
        divergence: str, V: int, K: int = 1, mixture: str = "arithmetic", *, dtype: torch.dtype = torch.float32,
        heads: bool = True, full: bool = False, temperature: float = 2.0, alpha: float = 1.0, needs: bool = True,
    ) -> None:  # fmt: skip
        """`full`: bias, softcap, excluded tokens, labels and weights."""
        N, d = 3, 8
        states, head = torch.zeros(N, d if heads else V, dtype=dtype), None
        bias = torch.zeros(V, dtype=dtype) if full and heads else None
        if heads:
            head = torch.zeros(1, d, dtype=dtype).expand(V, d)
        student = Side(states, head, bias, softcap=30.0 * full, vocabulary=V)
        teachers = [student._replace(share=1 / K)] * K
        weights = torch.ones(N) if full else None
        labels = torch.zeros(N, dtype=torch.int64) if full or alpha < 1 else None
        excluded = torch.zeros(V) if full else None
        call = Call(
            student, teachers, excluded, labels, weights, divergence, mixture, temperature, 0.5, alpha, 1, torch.float32
        )
        if not needs:
            return module.losses(call, torch.empty(N))
        grads = [torch.empty_like(states), None, None, None, None]
        module.loss_and_gradients(call, torch.empty(()), grads)

    launch("forward_kl", 128256, dtype=bf16)
    launch("forward_kl", 128256, heads=False, dtype=bf16)
    launch("forward_kl", 51865, 2, full=True, alpha=0.5)  # an odd vocabulary
    launch("reverse_kl", 51865, heads=False)
    launch("reverse_kl", 1000, 2, "geometric", full=True, dtype=fp16)
    launch("jsd", 128256, 3, full=True, alpha=0.5, dtype=bf16)
    launch("jsd", 500, temperature=1.0, alpha=0.5, needs=False)
    launch("tvd", 32000, 2, "geometric", dtype=fp16, alpha=0.5)
    launch("tvd", 1)
    launch("forward_kl", 4096, alpha=0.0)


def linear_recurrence() -> None:
    """All kernels over dtypes, one chunk and several, Λ for all and for each, with and without all that may be None."""
    module = import_module("kdkernels.ops.linear_recurrence.triton")

    def launch(dtype: torch.dtype, T: int, *, own: bool, initial: bool, reverse: bool, needs: tuple[bool, ...]) -> None:
        Lambda, x = torch.zeros(2 if own else 1, 8, dtype=dtype), torch.zeros(2, T, 8, dtype=dtype)
        start = x[:, 0].clone() if initial else None
        module.forward(Lambda, x, start, reverse)
        module.backward(x, Lambda, x, start, reverse, needs)

    everything = (True, True, True)
    launch(torch.complex64, 300, own=False, initial=True, reverse=False, needs=everything)
    launch(torch.complex64, 20, own=True, initial=False, reverse=True, needs=(True, True, False))
    launch(torch.float32, 300, own=True, initial=True, reverse=True, needs=everything)
    launch(torch.complex128, 300, own=False, initial=True, reverse=True, needs=everything)
    launch(torch.float64, 20, own=False, initial=False, reverse=False, needs=(False, True, False))


LAUNCHES: dict[str, Callable[[], None]] = {
    "projection_alignment": projection_alignment,
    "lora_linear": lora_linear,
    "linear_distillation": linear_distillation,
    "linear_recurrence": linear_recurrence,
}


@dataclass
class ImaginaryDriver:
    """What Triton asks of a driver before it launches: a device (here the target itself), a stream, a target."""

    target: Any

    def get_current_device(self) -> Any:
        return self.target

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """All kernels that `LAUNCHES` would start on one target."""
    kernels: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[id(kernel)] = kernel

    with pytest.MonkeyPatch.context() as patch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        patch.setattr(driver, "_active", ImaginaryDriver(TARGETS[request.param]))
        patch.setattr(JITFunction, "run", compile_only)
        for launches in LAUNCHES.values():
            launches()
    yield list(kernels.values())


def test_all_kernels(compiled: list[Any]) -> None:
    """Nothing named `*_kernel` is launched by nobody."""
    defined = set()
    for info in walk_packages(kdkernels.ops.__path__, "kdkernels.ops."):
        if info.name.endswith((".triton", ".kernels")):
            names = vars(import_module(info.name)).items()
            defined |= {name for name, x in names if isinstance(x, JITFunction) and name.endswith("_kernel")}
    assert defined
    assert {kernel.name for kernel in compiled} == defined


def test_budget(compiled: list[Any], tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    report = []
    for kernel in compiled:
        used = amd_resources(kernel) if kernel.metadata.target.backend == "hip" else nvidia_resources(kernel, tmp_path)
        used["shared"] = kernel.metadata.shared
        report.append((kernel.name, {k: v for k, v in kernel.src.constants.items() if v is not None}, used))
    record_property("resources", report)
    over = [
        entry
        for entry in report
        if entry[2]["spills"] != 0
        or entry[2]["registers"] > (MATMUL_REGISTERS if entry[0].startswith(MATMULS) else REGISTERS)
        or entry[2]["shared"] > (MATMUL_SHARED if entry[0].startswith(MATMULS) else SHARED)
    ]
    assert not over


def nvidia_resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes of local memory, which is where spills go: as cuobjdump reads them in the cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def amd_resources(kernel: Any) -> dict[str, int]:
    """Vector registers a lane, those spilled, and bytes of scratch memory: as the assembler's metadata states them.

    Scalar registers are spilled to lanes of vector registers; if they were to memory, it would show as scratch.
    """
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"])}
    return {"registers": usage["vgpr_count"], "spills": usage["vgpr_spill_count"] + usage["private_segment_fixed_size"]}
