"""The CUDA kernels as the compiled module holds them, for every GPU it names: no spills, and a budget of registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdkernels import _native
from kdkernels.testing.hankel.inputs import make_systems

pytestmark = pytest.mark.native

ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
TYPES = {"f": 128, "d": 255, "Complex<f>": 128, "Complex<d>": 255}  # registers a thread: 512 of them a block, or 256
KERNELS = {f"{kernel} {T}" for kernel in ("svd_kernel", "hankel_kernel", "factor_kernel") for T in TYPES}


@pytest.fixture(scope="module")
def module():
    module = _native.module()
    if not module.cuda_architectures:
        pytest.skip("built without CUDA")
    return module


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.exists() else None
    return found


def test_budget(module, record_property):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    dump = subprocess.run([tool, "--dump-resource-usage", module.__file__], check=True, capture_output=True, text=True)
    found: dict[str, set[str]] = {}
    report, over = [], []
    for section in dump.stdout.split("arch = ")[1:]:
        architecture = section.split()[0]
        for name, usage in re.findall(r"Function (\S+):\s+(REG:.*)", section):
            kernel, is_complex, real = re.search(r"(svd_|hankel_|factor_)kernelI(NS_7ComplexI)?([fd])", name).groups()
            T = f"Complex<{real}>" if is_complex else real
            used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
            found.setdefault(architecture, set()).add(f"{kernel}kernel {T}")
            report.append((architecture, kernel, T, used))
            if used["REG"] > TYPES[T] or used["STACK"] or used["LOCAL"]:  # spills go to the stack
                over.append(report[-1])
    record_property("resources", report)
    assert set(module.cuda_architectures.split()) == ARCHITECTURES
    assert found == dict.fromkeys(ARCHITECTURES, KERNELS)
    assert not over


def test_there_is_ptx_for_newer_gpus(module):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    listing = subprocess.run([tool, "--list-ptx", module.__file__], check=True, capture_output=True, text=True).stdout
    assert "sm_120" in listing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_first_call_says_so(module):
    A, S = torch.zeros(2, 3, 3), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="CUDA: no device can be used: "):
        module.cuda_svd(A, S, None, None, None, 0)


def test_wrong_arguments_are_named(module):
    A, S = torch.zeros(2, 3, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="values is 2 of 2 x 1, but must be 2 of 3 x 1"):
        module.cuda_svd(A, S[:, :2].contiguous(), None, None, None, 0)
    with pytest.raises(ValueError, match="a batch must be contiguous"):
        module.cuda_svd(A, torch.zeros(3, 2).T, None, None, None, 0)
    with pytest.raises(ValueError, match="go together"):
        module.cuda_svd(A, S, A, None, None, 0)
    with pytest.raises(TypeError, match="float32 or float64"):
        module.cuda_svd(A.bfloat16(), S.bfloat16(), None, None, None, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (16, 16), (40, 33), (64, 64), (200, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_svd_on_a_gpu(rows, n, dtype, module):
    N, real = 5, dtype.to_real()
    A = torch.randn(N, rows, n, dtype=dtype, device="cuda")
    S = torch.empty(N, n, dtype=real, device="cuda")
    U, V = torch.empty_like(A), torch.empty(N, n, n, dtype=dtype, device="cuda")
    arguments = (A, S, U, V)
    stream = torch.cuda.current_stream().cuda_stream
    workspace = torch.empty(module.cuda_svd(*arguments, None, stream), dtype=torch.uint8, device="cuda")
    module.cuda_svd(*arguments, workspace.data_ptr(), stream)
    tolerance = 50 * torch.finfo(real).eps
    assert ((U * S[:, None]) @ V.mH - A).abs().max() <= tolerance * S.max()
    for basis in (U, V):
        assert (basis.mH @ basis - torch.eye(n, dtype=dtype, device="cuda")).abs().max() <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16, 33, 64, 130])
def test_hankel_on_a_gpu(n, module):
    Lambda, B, C = (x.cuda() for x in make_systems("LRU", 5, n, 3, 2, dtype=torch.complex128))
    T, W = torch.empty(2, 5, n, n, dtype=Lambda.dtype, device="cuda")
    S = torch.empty(5, n, dtype=torch.float64, device="cuda")
    arguments = (Lambda, B, C, None, None, None, None, S, T, W)
    stream = torch.cuda.current_stream().cuda_stream
    workspace = torch.empty(module.cuda_hankel(*arguments, None, stream), dtype=torch.uint8, device="cuda")
    module.cuda_hankel(*arguments, workspace.data_ptr(), stream)
    P = B @ B.mH / (1 - Lambda[:, :, None] * Lambda[:, None].conj())
    torch.testing.assert_close((T * S[:, None]) @ T.mH, P)
