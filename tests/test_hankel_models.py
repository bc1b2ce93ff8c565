"""What is asked for by name: explanations, backends and options of the operators on state-space models."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import kdkernels as kd
from kdkernels.backend import TABLE
from kdkernels.ops.hankel.native import LARGEST
from kdkernels.ops.hankel.systems import rounded
from kdkernels.testing.hankel import checks
from kdkernels.testing.hankel.inputs import make_systems
from kdkernels.testing.hankel.models import OPS

SYSTEM = make_systems("LRU", 3, 16, 2)


def test_validate_holds_every_operator_to_its_budget():
    seen = set()
    for check in checks(quick=True):
        if check.op in OPS and check.device == "cpu":
            assert all(deviation.ok for deviation in check.run()), check
            seen.add((check.op, check.method))
    assert {("era", "fft"), ("hankel_svd", "dense"), ("balanced_truncation", "lapack")} <= seen


@pytest.mark.native
def test_explanations_price_what_would_run():
    values = kd.explain(kd.hankel_singular_values, *SYSTEM)
    short, long = (kd.explain(kd.hankel_singular_values, *SYSTEM, horizon=L) for L in (2, 2**40))
    truncation = kd.explain(kd.balanced_truncation, *SYSTEM, rank=4)
    assert [x.method for x in (values, short, truncation)] == ["jacobi"] * 3
    assert short.costs[0].flops < long.costs[0].flops
    assert truncation.costs[0].flops > values.costs[0].flops
    assert kd.explain(kd.balanced_truncation, *SYSTEM, rank=4, backend="reference").method == "lapack"
    many = kd.explain(kd.hankel_singular_values, *(torch.cat([x, x]) for x in SYSTEM))
    assert many.costs[0].flops == 2 * values.costs[0].flops


def test_explanations_of_realizations_say_whether_the_matrix_is_formed():
    assert kd.explain(kd.era, torch.ones(21, 2, 2), 3).method == "dense"
    large = kd.explain(kd.hankel_svd, torch.ones(4001, 2, 2), 3)
    assert large.method == "fft"
    dense, fft = large.costs
    assert dense.why_not and dense.bytes > 20 * fft.bytes
    with pytest.raises(ValueError, match="rank is 99"):
        kd.explain(kd.era, torch.ones(21, 2, 2), 99)
    with pytest.raises(ValueError, match="rank is 3, but must be at most 2"):
        kd.explain(kd.era, torch.ones(5, 1, 2), 3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'backend'"):
        kd.explain(kd.era, torch.ones(5, 1, 2), 2, backend="native")


def test_no_systems_are_explained_too():
    for op in ("gramian_factors", "hankel_singular_values", "hankel_energy"):
        assert all(cost.flops == 0 for cost in kd.explain(op, [], [], []).costs)
    assert kd.balanced_truncation([], [], [], rank=1) == []


def test_backends_of_truncation():
    assert {row.backend for row in TABLE if row.op == "balanced_truncation"} == {"native", "reference"}
    found = [kd.balanced_truncation(*SYSTEM, rank=5, backend=name) for name in ("auto", "reference")]
    torch.testing.assert_close(found[0].singular_values, found[1].singular_values)
    with pytest.raises(ValueError, match="no such implementation"):
        kd.balanced_truncation(*SYSTEM, rank=5, backend="triton")


@pytest.mark.parametrize("number", (np.float32(0.25), np.int64(0), Fraction(1, 4), 0, 0.25))
def test_numbers_of_any_kind_are_tolerances(number):
    plain = kd.balanced_truncation(*SYSTEM, tolerance=float(number))
    assert kd.balanced_truncation(*SYSTEM, tolerance=number).rank == plain.rank
    assert kd.gramian_factors(*SYSTEM).ranks(number)[0].shape == (3,)


def test_ranks_where_traces_overflow():
    Lambda, B, C = (x.to(torch.complex64) for x in SYSTEM)
    assert kd.gramian_factors(Lambda, 1e30 * B, C).ranks(0.5)[0].tolist() == [16] * 3


def test_ranks_of_what_is_not_finite():
    Lambda, B, C = (x.clone() for x in SYSTEM)
    B[1, 2, 0] = torch.nan
    assert kd.gramian_factors(Lambda, B, C).ranks(1.0)[0].tolist() == [0, 16, 0]


@pytest.mark.native
@pytest.mark.parametrize("op", (kd.hankel_singular_values, kd.gramian_factors))
def test_forward_derivatives_are_refused_rather_than_lost(op):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(SYSTEM.B, SYSTEM.B.clone())
        with pytest.raises(RuntimeError, match=f"{op.__name__} has no forward-mode derivative on this backend"):
            op(SYSTEM.Lambda, dual, SYSTEM.C)
        sigma = kd.hankel_singular_values(SYSTEM.Lambda, dual, SYSTEM.C, backend="reference")
        torch.testing.assert_close(forward_ad.unpack_dual(sigma).tangent, forward_ad.unpack_dual(sigma).primal)


@pytest.mark.parametrize("op", (kd.hankel_svd, kd.era))
def test_realizations_have_no_forward_derivative(op):
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{op.__name__} has no forward-mode derivative$"):
        op(forward_ad.make_dual(torch.ones(5, 1, 1), torch.ones(5, 1, 1)), 1)


def test_padding_moves_no_system_across_the_end_of_native():
    for n in range(1, LARGEST + 1):
        assert n <= rounded(n) <= LARGEST


def test_a_horizon_beyond_an_int_is_named():
    with pytest.raises(ValueError, match=r"horizon is 1000000000000000000000, but must be at most 2\*\*63 - 1"):
        kd.hankel_singular_values(*SYSTEM, horizon=10**21)
    torch.testing.assert_close(
        kd.hankel_singular_values(*SYSTEM, horizon=2**63 - 1), kd.hankel_singular_values(*SYSTEM)
    )


@pytest.mark.native
def test_the_plot_of_errors_can_be_drawn_again(tmp_path, python, environment):
    script = Path(__file__).parent.parent / "benchmarks" / "hankel_accuracy.py"
    printed = python(environment, script, "--order", 4, "--out", tmp_path / "folder", check=True).stdout
    assert (tmp_path / "folder" / "hankel_accuracy.png").stat().st_size > 10_000
    ours = [line for line in printed.splitlines() if "kdkernels" in line]
    assert len(ours) == 6 and all("4 of 4 within 10 %" in line for line in ours), printed
