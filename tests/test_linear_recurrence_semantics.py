"""What `linear_recurrence` makes of any memory, shape, dtype and value, and its errors."""

import pytest
import torch
from layouts import sliced, transposed
from recurrences import BACKENDS, DTYPES, all_equal, loop, native_only, normal, operands, results

import kdkernels as kd

# ---- memory


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter_and_nothing_is_written_to(dtype):
    tensors, arriving = operands(dtype, own=True), normal(3, 7, 5, dtype=dtype)
    expected = results(tensors, arriving, backend="native")
    layouts = (transposed, sliced, lambda x: x.conj().resolve_conj().conj(), lambda x: x.neg()._neg_view())
    for layout in layouts:
        views = [layout(x.detach()) for x in (*tensors, arriving)]
        before = [x.clone() for x in views]
        assert all_equal(results([x.requires_grad_() for x in views[:3]], views[3], backend="native"), expected)
        assert all_equal(views, before)
    assert layouts[3](arriving).is_neg() and layouts[2](arriving).is_conj() is dtype.is_complex


@native_only
def test_expanded_tensors():
    Lambda, input, initial = operands(grad=False)
    for views in (
        [Lambda[:1].expand(5), input[:1].expand(3, 7, 5), initial[:1, :1].expand(3, 5)],
        [Lambda, input[:, :1, :1].expand(3, 7, 5), initial],
    ):
        h = results([x.requires_grad_() for x in views], torch.ones((), dtype=input.dtype).expand(3, 7, 5))
        dense = [x.detach().clone().requires_grad_() for x in views]
        assert all_equal(h, results(dense, torch.ones(3, 7, 5, dtype=input.dtype)))


@native_only
def test_strides_of_dimensions_of_one():
    room = normal(60)
    for shape, strides in (
        ((2, 5, 1), (5, 1, 7)),
        ((1, 5, 2), (3, 2, 1)),
        ((3, 1, 2), (2, 5, 1)),
        ((1, 1, 1), (4, 4, 4)),
    ):
        x, Lambda = room.as_strided(shape, strides), room[: shape[-1]]
        torch.testing.assert_close(kd.linear_recurrence(Lambda, x, backend="native"), loop(Lambda, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_states_are_memory_of_their_own(backend):
    for T in (1, 4):
        Lambda, input, initial = (x[:, :T] if x.dim() == 3 else x for x in operands(grad=False))
        before = [x.clone() for x in (Lambda, input, initial)]
        for start in ([], [initial]):
            kd.linear_recurrence(Lambda, input, *start, backend=backend).fill_(torch.nan)
            assert all_equal([Lambda, input, initial], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (0,), (2,), (2, 0), (2, 1, 3)))
@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize(("T", "n"), ((4, 3), (0, 3), (4, 0), (0, 0), (1, 1)))
def test_shapes(T, n, own, leading, backend):
    for initial in (False, True):
        shapes = [(*leading, n) if own else (n,), (*leading, T, n)] + [(*leading, n)] * initial
        tensors = [normal(*shape).requires_grad_() for shape in shapes]
        for reverse in (False, True):
            h, *grads = results(tensors, reverse=reverse, backend=backend)
            assert h.shape == (*leading, T, n) and h.dtype is torch.complex128
            assert [g.shape for g in grads] == [x.shape for x in tensors]
            if T > 0:
                torch.testing.assert_close(h, loop(*tensors, reverse=reverse))
            else:
                assert not any(g.any() for g in grads)
            if T == 1 and not initial:
                assert torch.equal(h, tensors[1]) and not grads[0].any()


# ---- dtypes and values


PAIRS = (
    (torch.float32, torch.complex64, torch.complex64),
    (torch.complex64, torch.float32, torch.complex64),
    (torch.complex64, torch.float64, torch.complex128),
    (torch.float64, torch.float32, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.complex64, torch.complex64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float16, torch.float32),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("of_Lambda", "of_input", "of_states"), PAIRS, ids=str)
def test_dtypes_are_promoted_and_halves_rounded_once(of_Lambda, of_input, of_states, backend):
    kinds = (of_Lambda, of_input, of_input)
    wide = [torch.complex128 if kind.is_complex else torch.float64 for kind in kinds]
    tensors = [
        (normal(*shape, dtype=w) / 2).to(kind).requires_grad_()
        for shape, w, kind in zip(((3,), (2, 40, 3), (2, 3)), wide, kinds, strict=True)
    ]
    computed = torch.float32 if of_states.itemsize == 2 else of_states
    expected = results([x.detach().to(computed).requires_grad_() for x in tensors], backend=backend)
    h = kd.linear_recurrence(*tensors, backend=backend)
    assert h.dtype is of_states and torch.equal(h, expected[0].to(of_states))
    for x, grad in zip(tensors, torch.autograd.grad(h.abs().sum(), tensors), strict=True):
        assert grad.dtype is x.dtype and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_goes_forward_in_time_in_its_own_state(backend, dtype, value, reverse):
    Lambda, input, initial = operands(dtype, grad=False, n=21)
    clean = kd.linear_recurrence(Lambda, input, initial, reverse=reverse, backend=backend)
    input[1, 3, 20] = value
    found = kd.linear_recurrence(Lambda, input, initial, reverse=reverse, backend=backend)
    reached = torch.zeros(input.shape, dtype=torch.bool)
    reached[1, : 4 if reverse else None, 20][0 if reverse else 3 :] = True
    assert not found[reached].isfinite().any() and torch.equal(found[~reached], clean[~reached])
    initial[2, 0] = value
    found = kd.linear_recurrence(Lambda, input, initial, reverse=reverse, backend=backend)
    reached[2, :, 0] = True
    assert not found[reached].isfinite().any() and torch.equal(found[~reached], clean[~reached])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_is_not_finite_go_backward_in_time(backend, dtype):
    tensors, arriving = operands(dtype, n=9), normal(3, 7, 9, dtype=dtype)
    clean = results(tensors, arriving, backend=backend)
    arriving[1, 3, 8] = torch.nan
    found = results(tensors, arriving, backend=backend)
    for k, reached in ((1, (8,)), (2, (1, slice(4), 8)), (3, (1, 8))):
        mask = torch.zeros(found[k].shape, dtype=torch.bool)
        mask[reached] = True
        assert found[k][mask].isnan().all() and torch.equal(found[k][~mask], clean[k][~mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_does_not_see_lambda(backend, dtype):
    Lambda, input = operands(dtype, initial=False)
    wild = torch.full_like(Lambda, torch.inf).requires_grad_()
    h, _, grad = results([wild, input], backend=backend)
    assert torch.equal(h[:, 0], input[:, 0]) and not h[:, 1:].isfinite().any()
    assert not h[:, 1:].isfinite().any() and grad[:, -1].isfinite().all()


# ---- errors


A, U, S = torch.ones(5), torch.ones(2, 3, 7, 5), torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"input": torch.ones(5)}, ValueError, r"input has shape \(5\), but must be \(\.\.\., T, n\)"),
        ({"Lambda": torch.ones(())}, ValueError, r"Lambda has shape \(\), but must be \(\.\.\., n\)"),
        ({"Lambda": torch.ones(4)}, ValueError, r"Lambda has shape \(4\).*n = 5, as in input"),
        ({"initial_state": torch.ones(2, 3, 1)}, ValueError, r"initial_state has shape \(2, 3, 1\).*n = 5"),
        (
            {"Lambda": torch.ones(2, 5)},
            ValueError,
            r"Lambda has leading dimensions \(2\).*must broadcast with \(2, 3\)",
        ),
        (
            {"Lambda": torch.ones(4, 2, 3, 5)},
            ValueError,
            r"Lambda has leading dimensions \(4, 2, 3\).*input's \(2, 3\)",
        ),
        ({"Lambda": torch.ones(1, 2, 3, 5)}, ValueError, r"Lambda has leading dimensions \(1, 2, 3\)"),
        ({"initial_state": torch.ones(4, 2, 3, 5)}, ValueError, r"initial_state has leading dimensions \(4, 2, 3\)"),
        ({"initial_state": torch.ones(4, 5)}, ValueError, r"initial_state has leading dimensions \(4\)"),
        ({"Lambda": torch.ones(5, device="meta")}, ValueError, "Lambda is on meta, but input is on cpu"),
        ({"initial_state": torch.ones(5, device="meta")}, ValueError, "initial_state is on meta"),
        (
            {"Lambda": torch.ones(5, dtype=torch.int64)},
            TypeError,
            r"Lambda has dtype torch\.int64, but must have one of",
        ),
        ({"input": U.int()}, TypeError, r"input has dtype torch\.int32"),
        ({"initial_state": S.bool()}, TypeError, r"initial_state has dtype torch\.bool"),
        ({"Lambda": None}, TypeError, "Lambda is NoneType, but must be a torch.Tensor"),
        ({"Lambda": 0.5}, TypeError, "Lambda is float"),
        ({"input": [1.0]}, TypeError, "input is list"),
        ({"initial_state": 0}, TypeError, "initial_state is int"),
        ({"input": U.to_sparse()}, TypeError, "input has layout torch.sparse_coo"),
        ({"reverse": 1}, TypeError, "reverse is int, but must be a bool"),
        ({"reverse": None}, TypeError, "reverse is NoneType"),
        ({"reverse": torch.tensor(True)}, TypeError, "reverse is Tensor"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', but must be one of"),
        ({"backend": "triton"}, ValueError, "backend='triton'.*linear_recurrence"),
    ),
)
def test_wrong_arguments_are_named(change, error, message):
    for _ in range(2):  # what raised is not remembered as what fits
        with pytest.raises(error, match=message):
            kd.linear_recurrence(**({"Lambda": A, "input": U, "initial_state": S} | change))


def test_leading_dimensions_may_not_grow_the_input():
    with pytest.raises(ValueError, match=r"Lambda has leading dimensions \(3\), which must broadcast to input's \(1\)"):
        kd.linear_recurrence(torch.ones(3, 5), torch.ones(1, 7, 5))


def test_meta_tensors_have_a_shape_alone():
    h = kd.linear_recurrence(A.to("meta"), U.to("meta"), S.to("meta").cfloat())
    assert (h.device.type, h.shape, h.dtype) == ("meta", U.shape, torch.complex64)


@native_only
def test_explain_says_what_would_run():
    explanation = kd.explain(kd.linear_recurrence, A.cfloat(), U)
    assert (explanation.backend, explanation.method) == ("native", "scan")
    (cost,) = explanation.costs
    assert (cost.flops, cost.bytes) == (8 * U.numel(), 16 * U.numel())
    assert kd.explain(kd.linear_recurrence, A.bfloat16(), U.bfloat16(), S).costs[0].flops == 2 * U.numel()
    assert kd.explain(kd.linear_recurrence, A, U, backend="reference").backend == "reference"
    with kd.use_backend("reference"):
        assert kd.explain("linear_recurrence", A, U, reverse=True).backend == "reference"
    with pytest.raises(ValueError, match=r"Lambda has shape \(4\)"):
        kd.explain(kd.linear_recurrence, A[:4], U)
