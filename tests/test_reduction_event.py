"""The benchmark of one reduction: it runs, and both methods reduce to the same ranks and the same error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reduction_event.py"


def test_the_benchmark_runs(tmp_path, environment):
    path = tmp_path / "folder" / "times.json"
    sizes = ("--states", "24", "--features", "6", "--blocks", "2", "--runs", "2", "--tolerance", "0.05")
    command = [sys.executable, str(SCRIPT), *sizes, "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kd.nn.truncate" in done.stdout and "CompreSSM, complex128" in done.stdout
    results = json.loads(path.read_text())["results"]
    ours, _, peer = results.values()
    assert len(ours["seconds"]) == 2 and ours["states"] == peer["states"] and max(ours["states"]) < 24
    assert abs(ours["error"] - peer["error"]) < 1e-3 * peer["error"]
    wrong = subprocess.run([*command, "--runs", "0"], env=environment, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and "--runs must be at least 1" in wrong.stderr
