"""The CUDA kernels, compiled for the CPU by csrc/cuda/host.h: results, sanitizers, and that host.h itself notices.

Every CUDA thread is a host thread, so systems are small and few. GPUs are asked elsewhere (tests marked `gpu`).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdkernels.testing.hankel.inputs import FAMILIES, make_systems, reference_values

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=all", "thread": "-fsanitize=thread"}
# Not -O0: g++ would pass structs by value without telling TSan that it reads them.
FLAGS = "-std=c++20 -Og -g1 -Wall -Wextra -Werror -ffp-contract=off -pthread"
BUDGET = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative, of every singular value
DECADES = {torch.float32: 1e-30, torch.float64: 1e-200}  # what the format can hold beside the largest value

if sys.platform != "linux" or shutil.which("g++") is None:
    pytest.skip("needs g++ and its sanitizers", allow_module_level=True)

Run = Callable[..., bytes]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """The driver of the kernels and the kernels that are wrong on purpose, under each sanitizer."""
    folder = tmp_path_factory.mktemp("cuda_host")
    sources = {"driver": ["tests/cuda/driver.cpp", "csrc/cuda/svd.cu", "csrc/cuda/hankel.cu"]}
    sources["misuse"] = ["tests/cuda/misuse.cu"]
    includes = ["-Icsrc/include", "-Icsrc/common", "-Icsrc/cuda"]
    running = {}
    for name, files in sources.items():
        for sanitizer, flags in SANITIZERS.items():
            program = folder / f"{name}_{sanitizer}"
            command = ["g++", *FLAGS.split(), *flags.split(), *includes, "-x", "c++", *files, "-o", program]
            running[name, sanitizer] = program, subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for _, process in running.values():
        assert process.wait() == 0, process.stderr.read()
    return {key: program for key, (program, _) in running.items()}


def execute(program: Path, *arguments: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A sanitizer's finding is exit code 66."""
    settings = {"ASAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "exitcode=66", "TSAN_OPTIONS": "exitcode=66"}
    command = [str(x) for x in (program, *arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=100, env=os.environ | settings)


@pytest.fixture(params=SANITIZERS)
def run(request, programs) -> Run:
    return driver(programs["driver", request.param])


@pytest.fixture
def run_checked(programs) -> Run:
    """Under AddressSanitizer and UBSan alone, which is faster."""
    return driver(programs["driver", "address"])


def driver(program: Path) -> Run:
    def run(op: str, tensors: list[Tensor], shared_limit: int, *sizes: int) -> bytes:
        real = tensors[0].abs().dtype
        data = b"".join(x.contiguous().resolve_conj().numpy().tobytes() for x in tensors)
        what = (str(real).removeprefix("torch."), int(tensors[0].is_complex()), shared_limit)
        result = execute(program, op, *what, *sizes, data=data)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    return run


def split(data: bytes, *parts: tuple[torch.dtype, tuple[int, ...]]) -> list[Tensor]:
    found = []
    for dtype, shape in parts:
        size = int(np.prod(shape)) * dtype.itemsize
        found.append(torch.frombuffer(bytearray(data[:size]), dtype=dtype).reshape(shape))
        data = data[size:]
    assert not data
    return found


def svd(run: Run, A: Tensor, shared_limit: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) after checking that S alone is the same."""
    N, rows, n = A.shape
    real = A.abs().dtype
    data = run("svd", [A], shared_limit, N, rows, n, 1)
    S, U, V = split(data, (real, (N, n)), (A.dtype, (N, rows, n)), (A.dtype, (N, n, n)))
    (alone,) = split(run("svd", [A], shared_limit, N, rows, n, 0), (real, (N, n)))
    assert torch.equal(alone.nan_to_num(), S.nan_to_num())
    return U, S, V


def hankel(run: Run, Lambda: Tensor, B: Tensor, C: Tensor, shared_limit: int = 0) -> list[Tensor]:
    """values, L_c, L_o, their residuals, T, W: after checking that values alone are the same."""
    (N, n), m, p = Lambda.shape, B.shape[-1], C.shape[-2]
    real, dtype = Lambda.abs().dtype, Lambda.dtype
    square, line = (dtype, (N, n, n)), (real, (N, n + 1))
    data = run("hankel", [Lambda, B, C], shared_limit, N, n, m, p, 1)
    results = split(data, (real, (N, n)), square, square, line, line, square, square)
    (alone,) = split(run("hankel", [Lambda, B, C], shared_limit, N, n, m, p, 0), (real, (N, n)))
    assert torch.equal(alone.nan_to_num(), results[0].nan_to_num())
    return results


def dtype_of(real: torch.dtype, is_complex: bool) -> torch.dtype:
    return real.to_complex() if is_complex else real


# ---- Hankel singular values


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hankel_singular_value(family, m, run_checked):
    narrow = make_systems(family, 1, 16, m)
    narrow = narrow.to(dtype_of(torch.float32, narrow.Lambda.is_complex()))
    exact = reference_values(*(x[0] for x in narrow))
    for real in (torch.float32, torch.float64):
        x = narrow.to(dtype_of(real, narrow.Lambda.is_complex()))
        data = run_checked("hankel", list(x), 0, 1, 16, m, m, 0)
        (values,) = split(data, (real, (1, 16)))
        held = exact > exact[0] * DECADES[real]
        error = ((values[0].double() - exact).abs() / exact)[held].max()
        assert error <= BUDGET[real], f"{real}: {error:.1e}"
        assert values.isfinite().all()


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("n", "m", "p", "shared_limit"), [(1, 1, 1, 0), (5, 2, 3, 0), (5, 9, 1, 0), (6, 3, 2, 512)])
def test_factors_residuals_and_projectors(n, m, p, shared_limit, is_complex, run):
    dtype = dtype_of(torch.float64, is_complex)
    Lambda, B, C = make_systems("LRU" if is_complex else "real", 2, n, m, p, dtype=dtype)
    values, L_c, L_o, r_c, r_o, T, W = hankel(run, Lambda, B, C, shared_limit)
    decay = 1 - Lambda[:, :, None] * Lambda[:, None].conj()
    P, Q = B @ B.mH / decay, C.mH @ C / decay.conj()
    for gramian, L, residual in ((P, L_c, r_c), (Q, L_o, r_o)):
        torch.testing.assert_close(L @ L.mH, gramian)
        left = gramian.diagonal(0, 1, 2).sum(1).real[:, None] - (L.abs() ** 2).sum(1).cumsum(1)
        torch.testing.assert_close(residual[:, 1:], left, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(residual[:, 0], gramian.diagonal(0, 1, 2).sum(1).real)
    torch.testing.assert_close(W.mH @ T, torch.eye(n, dtype=dtype).expand(2, n, n), atol=1e-9, rtol=0)
    torch.testing.assert_close(T * values[:, None] @ T.mH, P)
    torch.testing.assert_close(W * values[:, None] @ W.mH, Q)


def test_a_system_without_values_stays_alone(run_checked):
    Lambda, B, C = make_systems("LRU", 6, 5, 2, dtype=torch.complex64)
    clean = hankel(run_checked, Lambda, B, C)
    Lambda, B, C = Lambda.clone(), B.clone(), C.clone()
    Lambda[0, 1], Lambda[1, 2], B[2, 0, 0], C[3, 1, 1] = 1.5, torch.nan, torch.inf, torch.nan
    for found, expected in zip(hankel(run_checked, Lambda, B, C), clean, strict=True):
        assert found[:4].isnan().all()
        assert torch.equal(found[4:], expected[4:])


def test_unreachable_states(run_checked):
    Lambda, B, C = make_systems("real", 3, 6, 2)
    B[0], B[1, 2:], C[1, :, :3], B[2, 1:3] = 0, 0, 0, 0
    values, L_c, _, r_c, _, T, W = hankel(run_checked, Lambda, B, C)
    assert (values[0] == 0).all() and (values[1] == 0).all()
    assert (values[2] > 0).tolist() == [True] * 4 + [False] * 2
    assert (L_c[2, :, 4:] == 0).all() and (r_c[2, 4:] == 0).all()
    for projector in (T, W):
        assert projector.isfinite().all() and (projector[2, :, 4:] == 0).all()


# ---- SVD


def check_svd(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> None:
    real, wide = S.dtype, torch.float64.to_complex() if A.is_complex() else torch.float64
    tolerance = 8 * torch.finfo(real).eps
    size = A.abs().amax().clamp_min(torch.finfo(real).tiny).double()
    A, U, S, V = A.to(wide) / size, U.to(wide), S.double() / size, V.to(wide)
    exact = torch.linalg.svdvals(A)
    identity = torch.eye(A.shape[-1], dtype=wide)
    scale = exact.max().clamp_min(1)
    assert (S.diff() <= 0).all() and (S >= 0).all()
    assert (S - exact).abs().max() <= tolerance * scale
    assert ((U * S[:, None]) @ V.mH - A).abs().max() <= tolerance * scale
    assert (U.mH @ U - identity).abs().max() <= tolerance
    assert (V.mH @ V - identity).abs().max() <= tolerance


def matrices(case: str, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    if case == "rank 2":
        return normal(2, 7, 2) @ normal(2, 2, 5)
    if case == "zero":
        return torch.zeros(1, 4, 3, dtype=dtype)
    if case == "equal and zero columns":
        A = normal(3, 6, 6)
        A[:, :, 2], A[:, :, 4] = 0, A[:, :, 1]
        return A
    if case == "ones":
        return torch.ones(1, 8, 8, dtype=dtype)
    if case in ("huge", "tiny"):
        return normal(1, 5, 5) * torch.finfo(dtype).max ** (0.95 if case == "huge" else -0.95)
    return normal(*map(int, case.split("x")))


CASES = ["5x16x16", "2x1x1", "2x3x2", "2x30x5", "1x9x9", "rank 2", "zero", "equal and zero columns", "ones", "huge"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("case", [*CASES, "tiny"])
def test_svd(case, dtype, run_checked):
    A = matrices(case, dtype)
    check_svd(A, *svd(run_checked, A))


@pytest.mark.parametrize(("case", "shared_limit"), [("3x4x4", 0), ("6x9x6", 600), ("1x18x18", 0), ("2x7x5", 4000)])
def test_svd_has_no_races(case, shared_limit, run):
    """A warp each; in global memory, and one more than a block has teams; a block each; fewer teams than fit."""
    A = matrices(case, torch.complex64)
    check_svd(A, *svd(run, A, shared_limit))


def test_a_matrix_without_values_stays_alone(run_checked):
    A = matrices("4x6x4", torch.float32)
    clean = svd(run_checked, A)
    A[1, 5, 3], A[2, 0, 0] = torch.nan, torch.inf
    for found, expected in zip(svd(run_checked, A), clean, strict=True):
        assert found[1:3].isnan().all()
        assert torch.equal(found[[0, 3]], expected[[0, 3]])


# ---- host.h


def misuse(programs: dict[tuple[str, str], Path], sanitizer: str, kernel: str) -> subprocess.CompletedProcess[bytes]:
    return execute(programs["misuse", sanitizer], kernel)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_right_kernels_pass(sanitizer, programs):
    result = misuse(programs, sanitizer, "right")
    assert result.returncode == 0 and result.stdout.split() == [b"%d" % (63 - i) for i in range(64)]
    result = misuse(programs, sanitizer, "collectives")
    assert result.returncode == 0 and result.stdout.split() == [b"64"] * 64


@pytest.mark.parametrize("kernel", ["no_barrier", "shuffle_for_barrier"])
def test_a_missing_barrier_is_a_race(kernel, programs):
    result = misuse(programs, "thread", kernel)
    assert result.returncode == 66 and b"data race" in result.stderr
    assert f"in {kernel} ".encode() in result.stderr or f"{kernel} tests/cuda".encode() in result.stderr


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("divergent_barrier", ["__syncthreads", "the end of the kernel"]),
        ("early_exit", ["__shfl_xor_sync", "the end of the kernel"]),
        ("other_operation", ["__shfl_xor_sync", "__ballot_sync"]),
        ("other_mask", ["with mask", "000000ff", "ffffffff"]),
    ],
)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_threads_that_disagree_end_the_program(kernel, what, sanitizer, programs):
    result = misuse(programs, sanitizer, kernel)
    assert result.returncode != 0 and b"threads disagree in block 0" in result.stderr
    assert all(name.encode() in result.stderr for name in what)


def test_memory_nobody_wrote_is_nan_and_memory_beyond_is_noticed(programs):
    assert set(misuse(programs, "address", "unwritten").stdout.split()) <= {b"nan", b"-nan"}
    result = misuse(programs, "address", "beyond")
    assert result.returncode == 66 and b"heap-buffer-overflow" in result.stderr
