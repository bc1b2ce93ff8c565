"""The table of backends, the choice, and a compiled module that is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import _native, backend

OP = "projection_alignment_loss"
POINTS = torch.ones(2, 3)


@pytest.fixture
def missing(monkeypatch):
    """The compiled module could not be loaded."""
    error = ImportError("libkd.so: undefined symbol")
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_error", error)
    return error


def test_every_op_ends_with_a_reference_that_runs_anywhere():
    for op in {row.op for row in backend.TABLE}:
        last = [row for row in backend.TABLE if row.op == op][-1]
        assert (last.backend, last.devices, last.why_not()) == ("reference", (), None)


def test_every_backend_of_the_table_has_a_name_and_every_op_an_explanation():
    assert {row.backend for row in backend.TABLE} <= set(backend.BACKENDS)
    assert {row.op for row in backend.TABLE} <= set(backend.EXPLAINERS)


def test_the_readme_shows_the_table():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    for row in backend.TABLE:
        devices = ", ".join(row.devices) or "any"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        assert f"| `{row.op}` | {row.backend} | {devices} | {dtypes} | yes |" in readme


@pytest.mark.native
def test_auto_takes_the_first_that_serves():
    assert backend.choose(OP, "auto", "cpu", [torch.float32]).backend == "native"
    assert backend.choose(OP, "auto", "cpu", [torch.float16]).backend == "reference"
    assert backend.choose(OP, "auto", "cpu", [torch.float32, torch.float16]).backend == "reference"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "message"),
    [
        ("triton", "cpu", torch.float32, "backend='triton' cannot serve .*: it runs on cuda, not on cpu"),
        ("native", "cpu", torch.float16, "backend='native' cannot serve .*: it does not support torch.float16 on cpu"),
        ("cublas", "cpu", torch.float32, "backend is 'cublas', but must be one of 'auto', 'reference'"),
    ],
)
@pytest.mark.native
def test_a_backend_asked_for_by_name_never_falls_back(requested, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        backend.choose(OP, requested, device, [dtype])
    with pytest.raises(ValueError, match=message):
        kd.projection_alignment_loss(POINTS.to(dtype), POINTS.to(dtype), backend=requested)


def test_use_backend_holds_within_its_block_and_nests():
    def chosen():
        return kd.explain(OP, POINTS, POINTS).backend

    before = chosen()
    with kd.use_backend("reference"):
        assert chosen() == "reference"
        with kd.use_backend("auto"):
            assert chosen() == before
        assert chosen() == "reference"
    with pytest.raises(RuntimeError, match="out"), kd.use_backend("reference"):
        raise RuntimeError("out")
    assert chosen() == before


def test_use_backend_does_not_overrule_a_name():
    with kd.use_backend("triton"):
        assert kd.explain(OP, POINTS, POINTS, backend="reference").backend == "reference"
        with pytest.raises(ValueError, match="backend='triton' cannot serve"):
            kd.projection_alignment_loss(POINTS, POINTS)


def test_use_backend_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="backend is 'gpu', but must be one of"), kd.use_backend("gpu"):
        raise AssertionError("the block must not run")


def test_explain_says_what_runs_and_why_not_another():
    explanation = kd.explain(kd.projection_alignment_loss, POINTS, POINTS, backend="reference")
    assert explanation.backend == "reference"
    assert explanation.reasons["triton"] == "it runs on cuda, not on cpu"
    assert "backend reference, method direct" in str(explanation)


def test_explain_names_the_ops_it_knows():
    with pytest.raises(ValueError, match="op is 'softmax', but must be one of 'lora_linear', 'lora_linear_group', "):
        kd.explain("softmax")


def test_a_missing_module_is_said_once_and_the_reference_runs(package_without_module, environment):
    program = (
        "import torch, kdkernels as kd; x = torch.ones(2, 3); "
        "a, b = (kd.projection_alignment_loss(x, -x) for _ in range(2)); "
        "assert a == b == kd.projection_alignment_loss(x, -x, backend='reference') == 2; "
        "assert kd.explain('projection_alignment_loss', x, x).backend == 'reference'"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(package_without_module)},
        cwd=package_without_module,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("kdkernels runs on plain PyTorch: its compiled module cannot be loaded") == 1
    assert "pip install" in run.stderr


def test_a_missing_module_asked_for_by_name_raises_its_cause(missing):
    with pytest.raises(ImportError, match="without its compiled module") as raised:
        kd.projection_alignment_loss(POINTS, POINTS, backend="native")
    assert raised.value.__cause__ is missing


def test_import_touches_neither_triton_nor_cuda(python, environment):
    program = (
        "import sys, torch; before = set(sys.modules); import kdkernels; new = set(sys.modules) - before; "
        "heavy = ('triton', 'numpy', 'rich', 'matplotlib', 'kdkernels.testing', 'kdkernels.cli', "
        "'torch._dynamo', 'torch._inductor', 'scipy', 'transformers'); "
        "bad = [m for m in new if m.startswith(heavy)]; assert not bad, bad; "
        "assert not torch.cuda.is_initialized(); assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    )
    python(environment, "-c", program, check=True)
