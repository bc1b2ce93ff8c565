"""`python -m kdkernels doctor | validate | bench`, as a user runs them: each in a process of its own.

Most of these processes are forks of one that has imported torch; `alone` starts Python.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter

import pytest
import torch
from conftest import BF16_ISAS, ISAS, ROOT

from kdkernels import _native, gemm
from kdkernels.__main__ import main
from kdkernels.backend import TABLE
from kdkernels.cli import bench, doctor, table
from kdkernels.cli import validate as validation
from kdkernels.ops.projection_alignment import api
from kdkernels.testing import SUITES, checks, host, names, operators, suite
from kdkernels.testing.compare import Deviation
from kdkernels.testing.memory import peak_extra_bytes
from kdkernels.testing.timing import interleave, medians

CASE = "cosine, small*"


@pytest.fixture
def kdkernels(python, environment):
    """`kdkernels(*arguments, VARIABLE=value)`."""
    return lambda *arguments, **variables: python(environment | variables, "-m", "kdkernels", *arguments)


def alone(environment, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "kdkernels", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_names_the_commands(environment):
    result = alone(environment, "--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("doctor", "validate", "bench"))


def test_every_op_of_the_table_has_a_suite():
    assert {row.op for row in TABLE} == set(SUITES)
    for op in SUITES:
        for device in ("cpu", "cuda"):
            assert list(suite(op).workloads(quick=True, device=device))
            assert len({w.name for w in suite(op).workloads(device=device)}) == len(suite(op).workloads(device=device))


def test_a_reader_that_leaves_early_is_no_error(environment):
    command = f"{sys.executable} -m kdkernels doctor --json | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "{\n"
    assert result.stderr == ""


# ---- doctor


def test_doctor_prints_and_is_healthy(kdkernels):
    result = kdkernels("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("kdkernels 0.", "torch 2.", "threads", "compiled module", "self-check: ok"):
        assert text in result.stdout


def test_doctor_json(kdkernels):
    report = json.loads(kdkernels("doctor", "--json").stdout)
    assert report["ok"] is True
    assert {"kdkernels", "python", "packages", "cpu", "threads", "cuda"} <= report["machine"].keys()
    assert report["machine"]["packages"]["torch"] == torch.__version__
    rows = {(row["device"], row["dtype"]): row["backend"] for row in report["backends"]}
    assert rows["cpu", "float16"] == "reference"
    assert {check["op"] for check in report["self_check"]} == set(SUITES)
    assert all(check["ok"] and check["error"] <= check["budget"] for check in report["self_check"])
    assert report["native"]["loaded"] == (_native.why_not() is None)


@pytest.mark.native
@pytest.mark.parametrize("isa", (*BF16_ISAS, *ISAS))
def test_doctor_says_which_instruction_set_was_forced(kdkernels, isa):
    if isa not in _native.module().isas():
        pytest.skip(f"this CPU or build has no {isa}")
    result = kdkernels("doctor", KDKERNELS_ISA=isa)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"instruction set {isa}, forced by KDKERNELS_ISA={isa}" in result.stdout


@pytest.mark.native
@pytest.mark.parametrize("who", ["vendor", "own"])
def test_doctor_says_who_multiplies(kdkernels, who):
    result = kdkernels("doctor", KDKERNELS_GEMM=who)
    assert f"float32 {who}, bfloat16 {who}, forced by KDKERNELS_GEMM" in result.stdout
    result = kdkernels("doctor", KDKERNELS_GEMM="mine")
    assert "KDKERNELS_GEMM is 'mine', but must be one of 'auto', 'vendor', 'own'" in result.stdout


@pytest.mark.native
def test_doctor_survives_an_instruction_set_that_is_not_there(kdkernels):
    result = kdkernels("doctor", KDKERNELS_ISA="sve")
    assert "sve" in result.stdout
    assert "Traceback" not in result.stderr
    assert "self-check: ok     projection_alignment_loss reference direct" in result.stdout


def test_doctor_says_how_to_mend_a_missing_module(environment, package_without_module):
    elsewhere = environment | {"PYTHONPATH": str(package_without_module)}
    result = alone(elsewhere, "doctor", cwd=package_without_module)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiled module: missing" in result.stdout
    assert "undefined symbol: _ZTV" in result.stdout
    assert "pip install ." in result.stdout
    assert "self-check: ok     projection_alignment_loss reference direct" in result.stdout
    assert result.stderr.count("RuntimeWarning") == 1  # said once, on import


def test_doctor_fails_when_the_self_check_does(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "worst", lambda _: Deviation("loss", 0.5, 1e-6))
    assert doctor.run(Namespace(json=False)) == 1
    assert "self-check: FAILED" in capsys.readouterr().out


def test_doctor_prints_what_it_could_not_find_out(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such thing")

    for section in ("machine", "native_module", "backends", "self_check"):
        monkeypatch.setattr(doctor, section, broken)
    assert doctor.run(Namespace(json=False)) == 1
    assert capsys.readouterr().out.count("RuntimeError: no such thing") == 4


# ---- validate


def test_validate_json(capsys):
    code = main(["validate", "--quick", "--backend", "reference", "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert code == 0
    assert report["ok"] is True
    assert {(r["dtype"], r["variant"]) for r in report["results"]} >= {("float32", "mse"), ("bfloat16", "angular")}
    deviation = report["results"][0]["deviations"][0]
    assert deviation.keys() == {"name", "error", "budget", "ok"}
    assert {d["name"] for d in report["results"][0]["deviations"]} >= {"loss", "grad student", "grad teacher_proj"}
    assert "lora_linear: 0 checks, 0 failed; now reference eager cpu" in printed.err  # a sign of life, said at once


def test_validate_only_some_cases(capsys):
    arguments = ["validate", "--backend", "reference", "--op", "lora_linear", "--json"]
    assert main([*arguments, "--case", "only*"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {r["case"] for r in report["results"]} == {
        f"only {x}" for x in ("the input", "lora_A", "lora_B", "the bias")
    }
    assert main([*arguments, "--case", "none"]) == 1  # nothing was validated


@pytest.mark.native
@pytest.mark.parametrize("products", ["own", "vendor"])
@pytest.mark.parametrize("isa", (*BF16_ISAS, *ISAS), indirect=True)
def test_validate_native(isa, products, monkeypatch, capsys):
    """Every path that this machine can run, whichever it would take by itself.

    In this process, so that what float64 and eager PyTorch say of a case is asked once for all paths; that a path is
    forced by KDKERNELS_ISA and KDKERNELS_GEMM, `doctor` says above.
    """
    monkeypatch.setattr(gemm, "FORCED", products)
    only = ("--op", "lora_linear") if products == "vendor" else ()
    code = main(["validate", "--backend", "native", *only])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert " 0 failed" in printed


def test_one_check_of_each_kind_comes_first():
    found = list(checks("lora_linear", quick=True))
    spread = validation.spread_out(found)
    assert Counter(map(id, spread)) == Counter(map(id, found))
    kinds = [(c.backend, c.method, c.device, c.dtype, c.variant) for c in spread]
    count = len(set(kinds))
    assert 1 < count < len(found) and len(set(kinds[:count])) == count
    for kind in set(kinds):
        own = [c.case for c, k in zip(spread, kinds, strict=True) if k == kind]
        assert own == [c.case for c in found if (c.backend, c.method, c.device, c.dtype, c.variant) == kind]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton is validated")
def test_validate_lists_what_it_could_not_validate(kdkernels):
    result = kdkernels("validate", "--quick", "--backend", "triton", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1  # nothing was validated
    assert report["not_validated"][0]["backend"] == "triton"
    assert "TRITON_INTERPRET=1" in report["not_validated"][0]["reason"]


@pytest.mark.parametrize("fault", [lambda x: x * 1.01, lambda x: x * torch.nan, lambda x: 1 / 0])
def test_validate_fails_on_a_wrong_result(monkeypatch, capsys, fault):
    suite("projection_alignment_loss")  # the oracle is bound to the definition before that is made wrong
    honest = api.reference.weighted_losses
    monkeypatch.setattr(api.reference, "weighted_losses", lambda *a, **k: fault(honest(*a, **k)))
    options = Namespace(op=None, backend="reference", quick=True, case="*", json=False, exitfirst=True)
    assert validation.run(options) == 1
    assert "FAILED" in capsys.readouterr().out


# ---- bench


def test_bench_writes_json_and_a_picture(kdkernels, tmp_path):
    paths = ["--json", str(tmp_path / "a" / "bench.json"), "--png", str(tmp_path / "bench.png")]
    result = kdkernels("bench", "--quick", "--case", CASE, "--threads", "1", *paths)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--quick: sizes too small" in result.stdout
    report = json.loads((tmp_path / "a" / "bench.json").read_text())
    assert report["machine"]["threads"] == 1
    assert report["rates"]["copy_gb_per_s"] > 0
    rows = {row["variant"]: row for row in report["results"]}
    assert set(rows) == {"eager", "torch.compile", "kdkernels"}
    for row in rows.values():
        assert row["ok"] and row["median_s"] > 0 and len(row["times_s"]) >= 3
        assert row["speedup_over_eager"] == pytest.approx(rows["eager"]["median_s"] / row["median_s"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_lists_the_cases_when_none_matches(kdkernels):
    result = kdkernels("bench", "--case", "no such case")
    assert result.returncode == 2
    assert "'no such case'" in result.stderr and "cosine, D=4096" in result.stderr


def test_no_speed_beside_a_wrong_result(monkeypatch, capsys):
    """The wrong variant loses its times; the others keep theirs."""
    from kdkernels.testing.projection_alignment.workloads import Session

    def variants(self):
        steps = honest(self)
        return {"eager": steps["eager"], "kdkernels": wrong, "torch.compile": raising}

    def wrong():
        outcome = session.variants_eager()
        outcome.grads["student"].mul_(1.01)
        return outcome

    def raising():
        raise RuntimeError("did not compile")

    honest = Session.variants
    (workload,) = (w for w in suite("projection_alignment_loss").workloads(True) if w.name.startswith("cosine, small"))
    session = workload.open()
    session.variants_eager = honest(session)["eager"]
    monkeypatch.setattr(Session, "variants", variants)
    rates = bench.Rates(1.0, {"torch.float32": 1.0})
    rows = {row.variant: row for row in bench.measure(workload, rates, "cpu", 0.01, memory=False)}
    assert [row.ok for row in rows.values()] == [True, False, False]
    assert rows["kdkernels"].median_s is None and rows["torch.compile"].median_s is None
    assert "did not compile" in rows["torch.compile"].worst_error
    assert bench.numbers(rows["kdkernels"])[0].startswith("WRONG grad student")


def test_variants_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleave(steps, lambda: calls.append("refresh"), "cpu", seconds=0, max_rounds=3)
    assert calls == ["refresh", "a", "refresh", "a", "refresh", "b", "refresh", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_peak_memory_sees_what_eager_keeps():
    """Eager keeps z_s and z_t, (N, D) each, and their gradients; what it returns is not counted."""
    op, name = "projection_alignment_loss", "cosine, D=1024, all gradients but the teacher's"
    extra = peak_extra_bytes(op, name, "eager", "cpu", quick=True)
    assert extra is not None
    assert 2 * 512 * 1024 * 4 < extra < 40 * 512 * 1024 * 4


def test_a_family_stands_for_its_operators():
    assert operators("svd") == ["svd"]
    assert operators("lora_linear") == ["lora_linear"]
    assert {"hankel_energy", "era", "balanced_truncation"} < set(operators("hankel"))
    assert all(operators(name) for name in names())


# ---- tables


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(table, "find_spec", lambda _: None)
    table.print_table("Title", ("name", "ms"), [("a", "1.50"), ("long name", "10.25")])
    assert capsys.readouterr().out.splitlines() == [
        "", "Title", "name          ms", "---------  -----", "a           1.50", "long name  10.25",
    ]  # fmt: skip


def test_what_counts_as_a_number():
    assert all(map(table.is_number, ("", "1.50", "3.2e-07", "4.10×", "98%", "-2")))
    assert not any(map(table.is_number, ("ok", "cpu", "raised", "WRONG loss: 1e-3")))


@pytest.mark.native
def test_host_overhead_has_every_operator(kdkernels, tmp_path):
    path = tmp_path / "host.json"
    result = kdkernels("host-overhead", "--rounds", "1", "--json", str(path))
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())["results"]
    assert {row["op"].removesuffix("_group") for row in rows} == set(SUITES)
    assert all(row["ours_s"] > 0 and row["plain_s"] > 0 for row in rows)
    directions = {row["direction"] for row in rows if row["op"] == "lora_linear"}
    assert directions == {"forward", "forward and backward"}


def test_host_overhead_refuses_no_rounds(kdkernels):
    result = kdkernels("host-overhead", "--rounds", "0")
    assert result.returncode != 0 and "--rounds is 0, but must be at least 1" in result.stderr


def test_what_the_host_is_compared_with_is_the_same_computation():
    for case in host.cases():
        with torch.no_grad():
            found, expected = case.ours(), case.plain()
        if case.op in ("balanced_truncation", "era") or "p=0.1" in case.name:  # up to a basis; other masks
            continue
        pairs = zip(*(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=False)
        for a, b in pairs:
            torch.testing.assert_close(a.abs(), b.abs(), msg=lambda m, case=case: f"{case.op}: {m}")


@pytest.mark.parametrize("op", SUITES)
def test_what_is_measured_on_a_gpu_is_right_on_the_cpu(op):
    """Small, through each variant that a CPU has: what cannot be run here is at least no slip of the pen."""
    for workload in suite(op).workloads(quick=True, device="cuda"):
        if workload.op != op:
            continue
        session = workload.open("cpu")
        variants = {name: step for name, step in session.variants().items() if name in ("eager", "linear", "kdkernels")}
        judged = bench.verdicts(session, variants)
        assert all(d.ok for d in judged["kdkernels"]), (workload.name, judged["kdkernels"])
        assert session.cost("kdkernels").flops > 0
