"""Operands as torch may hand them over: signs and zeros that are nowhere in memory, nothing where memory should be."""

import gc

import pytest
import torch

import kdkernels as kd
from kdkernels import _native, gemm

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))


def negative(*shape, seed=0):
    """Minus the numbers that lie in memory."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.view_as_complex(torch.randn(*shape, 2, generator=draw)).conj().imag
    assert x.is_neg()
    return x


# ---- signs and zeros that torch keeps beside a tensor


@native_only
@pytest.mark.parametrize("method", ("direct", "gram"))
@pytest.mark.parametrize("which", range(7))
def test_alignment_of_negative_views(which, method):
    operands = [negative(9, 5), negative(9, 6, seed=1), negative(8, 5, seed=2), negative(8, 6, seed=3)]
    operands += [negative(8, seed=4), negative(8, seed=5), negative(9, seed=6)]
    operands = [x if i == which else x.resolve_neg() for i, x in enumerate(operands)]
    names = ("student", "teacher", "student_proj", "teacher_proj")
    rest = {"student_bias": operands[4], "teacher_bias": operands[5], "weights": operands[6]}
    found = {}
    for backend in ("reference", "native"):
        leaves = [x.detach().requires_grad_() for x in operands[:4]]
        how = {} if backend == "reference" else {"method": method}
        losses = kd.projection_alignment_loss(
            **dict(zip(names, leaves, strict=True)), **rest, metric="mse", reduction="none", backend=backend, **how
        )
        found[backend] = (losses, *torch.autograd.grad(losses, leaves, negative(9, seed=7)))
    for a, b in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@native_only
def test_zeros_without_memory():
    zeros = torch._efficientzerotensor((3, 5, 4))
    assert not kd.svdvals(zeros).any() and not kd.svd(zeros).S.any()
    points = torch._efficientzerotensor((40, 30))
    loss = kd.projection_alignment_loss(points, torch.ones(40, 30), metric="mse", backend="native")
    assert loss == 1
    B, C = torch._efficientzerotensor((6, 2)), torch.ones(2, 6)
    assert not kd.hankel_singular_values(torch.full((6,), 0.5), B, C).any()
    steps, ones = torch._efficientzerotensor((2, 3, 4)), torch.ones(4)
    assert torch.equal(kd.linear_recurrence(ones, steps, ones, backend="native"), torch.ones(2, 3, 4))
    still = torch._efficientzerotensor((4,)).requires_grad_()
    h = kd.linear_recurrence(still, torch.ones(2, 3, 4), still, backend="native")
    assert torch.equal(h, torch.ones(2, 3, 4)) and torch.equal(torch.autograd.grad(h.sum(), still)[0], 4 * ones)


@native_only
def test_conjugates_and_negative_views_of_decompositions():
    x = torch.randn(3, 5, 4, dtype=torch.complex64).mH
    torch.testing.assert_close(kd.svdvals(x), torch.linalg.svdvals(x))
    y = negative(3, 5, 4)
    torch.testing.assert_close(kd.svdvals(y), torch.linalg.svdvals(y))


@native_only
@pytest.mark.parametrize("which", range(4))
def test_a_recurrence_of_negative_and_conjugate_views(which):
    views = [negative(5), negative(2, 4, 5, seed=1), negative(2, 5, seed=2), negative(2, 4, 5, seed=3)]
    draws = [torch.randn(x.shape, dtype=torch.complex64).conj() for x in views]
    for operands in (views, draws):
        found = {}
        for backend in ("reference", "native"):
            tensors = [x if i == which else x.resolve_neg().resolve_conj() for i, x in enumerate(operands)]
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            h = kd.linear_recurrence(*leaves, backend=backend)
            found[backend] = (h, *torch.autograd.grad(h, leaves, tensors[3]))
        for a, b in zip(found["native"], found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- nothing in memory


@native_only
@pytest.mark.parametrize("where", ("meta", "taken away"))
def test_what_lies_in_no_memory_is_refused(where):
    def lost(*shape):
        x = torch.zeros(shape, device="meta" if where == "meta" else "cpu")
        if where != "meta":
            x.untyped_storage().resize_(0)
        return x

    module = _native.module()
    with pytest.raises(ValueError, match="data is null"):
        module.fingerprint(lost(300, 300), 1)
    with pytest.raises(ValueError, match="data is null"):
        module.svd(lost(2, 30, 30), True, True, 1)
    given = [torch.ones(1, 30), torch.ones(2, 30, 30), torch.ones(2, 30), torch.ones(2, 30, 30)]
    for k in range(4):
        operands = [lost(*x.shape) if i == k else x for i, x in enumerate(given)]
        with pytest.raises(ValueError, match="data is null"):
            module.linear_recurrence(*operands, False, 1)
    if where != "meta":
        W, A, B = torch.ones(4, 40), torch.ones(2, 40), torch.ones(4, 2)
        with pytest.raises(ValueError, match="data is null"):
            kd.lora_linear(lost(50, 40), W, A, B, backend="native")
        with pytest.raises(ValueError, match="data is null"):
            kd.projection_alignment_loss(lost(50, 40), torch.ones(50, 40), backend="native")


@native_only
def test_the_default_device_is_not_where_scratch_memory_goes():
    operands = [torch.randn(shape) for shape in ((500, 16), (500, 24), (400, 16), (400, 24))]
    expected = kd.projection_alignment_loss(*operands, method="gram")
    kd.projection_alignment_loss(*operands, method="gram")  # keeps what it knows of this teacher batch
    with torch.device("meta"):
        for _ in range(3):
            torch.testing.assert_close(kd.projection_alignment_loss(*operands, method="gram"), expected)


@native_only
def test_what_is_no_tensor_is_refused():
    class Pretender:
        dtype, shape = torch.float32, (2, "a")

        def stride(self):
            return (1, 1)

        def data_ptr(self):
            return 64

    for wrong in (Pretender(), 3, "x", object()):
        with pytest.raises((TypeError, ValueError)):
            _native.module().fingerprint(wrong, 1)
    x, W, A = torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, 4)
    with pytest.raises(TypeError, match=r"an operand is no torch\.Tensor"):
        _native.module().lora_linear_forward([x, W, A, 3, None], [1.0, 0.0], [], True, 1)


# ---- no points, no features


@pytest.mark.parametrize("metric", ("cosine", "mse", "angular"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", ((0, 3, 4, 5), (5, 0, 4, 6), (5, 4, 0, 6), (5, 4, 3, 0), (5, 0, 0, 6), (0, 0, 0, 0)))
@native_only
def test_sizes_of_zero(sizes, dtype, reduction, metric):
    N, d_s, d_t, D = sizes
    results = []
    for backend in ("reference", "native"):
        draw = torch.Generator().manual_seed(1)
        shapes = ((N, d_s), (N, d_t), (D, d_s), (D, d_t))
        leaves = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
        room = [torch.full((n, 8), 7e7) for n in range(1, 40)]  # what uninitialised memory may hold
        del room
        loss = kd.projection_alignment_loss(*leaves, metric=metric, reduction=reduction, backend=backend)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    if D == 0 and metric == "mse" and N > 0:
        return  # a mean over nothing
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


# ---- layers with adapters, where the vendor multiplies


@native_only
@pytest.mark.parametrize("who", ("own", "vendor"))
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_a_backward_under_another_autocast(who, p, monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", who)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((16, 12), (3, 12), (10, 3))]
    W = torch.randn(10, 12)
    grads = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        y = kd.lora_linear(leaves[0], W, *leaves[1:], dropout_p=p, backend="native")
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("who", ("own", "vendor"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_in_an_adapter_stay_infinities(backend, who, monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", who)
    x, W = torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()
    A = torch.tensor([[1.0, 0, 0]]).bfloat16()
    y = kd.lora_linear(x, W, A, torch.tensor([[torch.inf], [1.0]]).bfloat16(), backend=backend)
    assert torch.equal(y, torch.tensor([[torch.inf, 1.0]] * 2).bfloat16())
    large = kd.lora_linear(x, W, torch.tensor([[3.4e38, 0, 0]]), torch.tensor([[1e-38], [0.0]]), backend=backend)
    torch.testing.assert_close(large[:, 0].float(), torch.full((2,), 3.4), rtol=1e-2, atol=0)


@native_only
def test_second_derivatives_are_refused_wherever_they_would_be_lost():
    x, W = torch.randn(9, 6), torch.randn(7, 6)
    A, B = torch.randn(3, 6, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(kd.lora_linear(x, W, A, B, backend="native").sum(), B, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.sum(), A)
    y = kd.lora_linear(x.requires_grad_(), W, A.detach(), B, backend="native")  # A frozen: x is not kept
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(y.sum(), B, create_graph=True)


# ---- batches of gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_gradients_of_a_mean(backend):
    x = torch.randn(8, 5, requires_grad=True)
    loss = kd.projection_alignment_loss(x, torch.ones(8, 5), metric="mse", backend=backend)
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    scales = torch.tensor([1.0, -2.0, 0.5])
    (found,) = torch.autograd.grad(loss, x, scales, is_grads_batched=True)
    torch.testing.assert_close(found, scales[:, None, None] * one)


@native_only
def test_batches_of_gradients_of_singular_values_are_refused():
    B = torch.randn(4, 2, requires_grad=True)
    sigma = kd.hankel_singular_values(torch.full((4,), 0.5), B, torch.randn(2, 4), backend="native")
    with pytest.raises(RuntimeError, match="takes no batches of gradients"):
        torch.autograd.grad(sigma, B, torch.eye(4), is_grads_batched=True)


# ---- layers with adapters, whatever their leading dimensions and scalings


@pytest.mark.parametrize("who", ("own", "vendor"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (7,), (2, 3), (2, 1, 3), (0, 3)))
def test_autocast_of_any_leading_dimensions(leading, backend, who, monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", who)
    draw = torch.Generator().manual_seed(0)
    x, W, A, B, b = (torch.randn(s, generator=draw) for s in ((*leading, 6), (5, 6), (2, 6), (5, 2), (5,)))
    leaves = [t.requires_grad_() for t in (x, A, B)]
    with torch.autocast("cpu", torch.bfloat16):
        y = kd.lora_linear(x, W, A, B, bias=b, backend=backend)
        (grouped, _) = kd.lora_linear_group(x, [kd.LoRA(W, A, B, b), kd.LoRA(W, A, B)], backend=backend)
        expected = torch.nn.functional.linear(x, W, b)
    assert y.dtype is grouped.dtype is expected.dtype is torch.bfloat16 and y.shape == expected.shape
    exact = x.double() @ W.double().T + b + x.double() @ A.double().T @ B.double().T
    torch.testing.assert_close(y.double(), exact, rtol=3e-2, atol=1e-1)
    torch.testing.assert_close(grouped, y)
    assert all(g.dtype is torch.float32 for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("who", ("own", "vendor"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaling_of_zero_loses_no_nan(backend, who, monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", who)
    x, W, A, B = torch.ones(2, 3), torch.zeros(2, 3), torch.full((1, 3), torch.nan), torch.ones(2, 1)
    assert kd.lora_linear(x, W, A, B, scaling=0.0, backend=backend).isnan().all()


@native_only
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_gradients_of_zeros_without_memory(p, which, monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", "own")
    shapes = ((6, 4), (5, 4), (2, 4), (5, 2))
    leaves = [torch._efficientzerotensor(s) if i == which else torch.ones(s) for i, s in enumerate(shapes)]
    dense = [x.clone() if i != which else torch.zeros(x.shape) for i, x in enumerate(leaves)]
    found = []
    for tensors in (leaves, dense):
        torch.manual_seed(0)
        tensors = [x.requires_grad_() for x in tensors]
        y = kd.lora_linear(*tensors, dropout_p=p, backend="native")
        found.append((y, *torch.autograd.grad(y.sum(), tensors)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- options that are no strings


def test_options_that_are_arrays_are_named():
    numpy = pytest.importorskip("numpy")
    wrong, x = numpy.array(["auto", "native"]), torch.ones(3, 3)
    for name, call in (
        ("backend", lambda: kd.svdvals(x, backend=wrong)),
        ("backend", lambda: kd.lora_linear(x, x, x, x, backend=wrong)),
        ("backend", lambda: kd.linear_recurrence(x[0], x, backend=wrong)),
        ("metric", lambda: kd.projection_alignment_loss(x, x, metric=wrong)),
        ("reduction", lambda: kd.projection_alignment_loss(x, x, reduction=wrong)),
    ):
        with pytest.raises(ValueError, match=f"{name} is array"):
            call()
    weights = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"weights has dtype torch\.quint8"):
        kd.projection_alignment_loss(x, x, weights=weights)


# ---- teachers in inference mode, as their passes are often run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("points", (7, 5000))
@pytest.mark.parametrize("op", ("alignment", "alignment, weights", "distillation", "distillation, labels, weights"))
def test_a_teacher_may_be_made_in_inference_mode(op, points, reduction, backend):
    """With its head or projection. What it holds later is its own affair."""

    def draw(seed, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def losses(student, W, teacher, W_t, weights):
        options = {"reduction": reduction, "backend": backend}
        if "labels" in op:
            options |= {"labels": torch.arange(points) % 11, "alpha": 0.5}
        if "weights" in op:
            options["weights"] = weights
        if "alignment" in op:
            return kd.projection_alignment_loss(student, teacher, W, W_t, **options)
        return kd.linear_distillation_loss(student, W, teacher, W_t, **options)

    student, W = draw(0, points, 4).requires_grad_(), draw(1, 11, 4).requires_grad_()
    plain = draw(2, points, 6), draw(3, 11, 6), draw(4, points)
    with torch.inference_mode():
        made = [x.clone() for x in plain]
    assert all(x.is_inference() for x in made)
    expected = torch.autograd.grad(losses(student, W, *plain).sum(), (student, W))
    found = losses(student, W, *made).sum()
    with torch.inference_mode():
        made[0].zero_()
    for _ in range(2):
        grads = torch.autograd.grad(found, (student, W), retain_graph=True)
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x, y)


@native_only
@pytest.mark.parametrize("op", ("alignment", "distillation"))
def test_a_graph_of_the_graph_is_freed(op):
    """Backward with create_graph, call after call: nothing of them stays."""

    def step():
        student, W = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
        if op == "alignment":
            value = kd.projection_alignment_loss(student, torch.ones(3, 6), W, torch.ones(5, 6), backend="native")
        else:
            value = kd.linear_distillation_loss(student, W, torch.ones(3, 6), torch.ones(5, 6), backend="native")
        torch.autograd.grad(value, (student, W), create_graph=True)

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    for _ in range(2):
        step()
    before = tensors()
    for _ in range(20):
        step()
    assert tensors() < before + 20, "one of each call at least"  # what other tests left may go in the meantime
