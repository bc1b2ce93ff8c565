"""The benchmark cases of `python -m kdkernels bench` under pytest-benchmark: `pytest benchmarks`.

The benchmarked variant is ours; before each of its rounds the others run once, timed, so all share the same minutes.
"""

import os
from statistics import median

import pytest

from kdkernels.cli.bench import verdicts
from kdkernels.testing import SUITES, workloads
from kdkernels.testing.rates import timed

ROUNDS = 5
QUICK = os.environ.get("QUICK") == "1"
WORKLOADS = [workload for op in SUITES for workload in workloads(op, QUICK)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_forward_and_backward(benchmark, workload):
    session = workload.open()
    variants = session.variants()
    judged = verdicts(session, variants)
    wrong = [(name, found) for name, deviations in judged.items() for found in deviations if not found.ok]
    assert not wrong, wrong
    ours = variants.pop("kdkernels")
    times = {name: [] for name in variants}

    def others_first():
        for name, step in variants.items():
            session.refresh()
            times[name].append(timed(step, "cpu"))
        session.refresh()

    benchmark.group = workload.name
    benchmark.extra_info["method"] = session.explain().method
    benchmark.pedantic(ours, setup=others_first, rounds=ROUNDS)
    for name, seconds in times.items():
        benchmark.extra_info[f"{name} median s"] = median(seconds)
        benchmark.extra_info[f"× {name}"] = median(seconds) / benchmark.stats.stats.median
