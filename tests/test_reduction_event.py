"""The benchmark of one reduction: it runs, and both methods reduce to the same ranks and the same error."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reduction_event.py"


def test_the_benchmark_runs(tmp_path, python, environment):
    path = tmp_path / "folder" / "times.json"
    sizes = ("--states", "24", "--features", "6", "--blocks", "2", "--runs", "2", "--tolerance", "0.05")
    command = (SCRIPT, *sizes, "--json", path)
    done = python(environment, *command)
    assert done.returncode == 0, done.stderr
    assert "kd.nn.truncate" in done.stdout and "CompreSSM, complex128" in done.stdout
    results = json.loads(path.read_text())["results"]
    ours, _, peer = results.values()
    assert len(ours["seconds"]) == 2 and ours["states"] == peer["states"] and max(ours["states"]) < 24
    assert abs(ours["error"] - peer["error"]) < 1e-3 * peer["error"]
    wrong = python(environment, *command, "--runs", 0)
    assert wrong.returncode == 2 and "--runs must be at least 1" in wrong.stderr
