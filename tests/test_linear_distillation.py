"""`linear_distillation_loss` on every backend that runs on a CPU, against float64 and against what it promises."""

import pytest
import torch
from conftest import BF16_ISAS, ISAS

import kdkernels as kd
from kdkernels.ops.linear_distillation import schema
from kdkernels.ops.linear_distillation.call import pack
from kdkernels.ops.linear_distillation.reference import DIVERGENCES
from kdkernels.testing.compare import errors, relative_error
from kdkernels.testing.linear_distillation.checks import CASES, QUICK, applies, compare_case, judge
from kdkernels.testing.linear_distillation.inputs import (
    TRAINED,
    call_of,
    eager,
    exact,
    head_of,
    keywords,
    make_inputs,
    ours,
    run,
)  # fmt: skip

NATIVE = pytest.param("native", marks=pytest.mark.native)
BACKENDS = ("reference", NATIVE)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

everywhere = pytest.mark.parametrize("backend", BACKENDS)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def loss(inputs, trained=None, **options):
    trained = trained or inputs.trained
    given = keywords(inputs) | options
    return kd.linear_distillation_loss(
        trained["student"], head_of(trained, inputs), inputs.teachers, inputs.heads, **given
    )


# ---- error budgets


@everywhere
@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cases_stay_within_budget(backend, divergence, dtype, case):
    if not applies(divergence, dtype, CASES[case]):
        pytest.skip("the exact loss is infinite, or the dtype cannot hold the inputs")
    deviations = compare_case({"divergence": divergence, "dtype": dtype, "device": "cpu"} | CASES[case], backend)
    assert all(d.ok for d in deviations), deviations


@pytest.mark.native
@pytest.mark.parametrize("isa", ISAS + BF16_ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_divergence
def test_every_instruction_set(isa, dtype, divergence):
    for case in QUICK:
        if applies(divergence, dtype, QUICK[case]):
            deviations = compare_case(
                {"divergence": divergence, "dtype": dtype, "device": "cpu"} | QUICK[case], "native"
            )
            assert all(d.ok for d in deviations), (case, deviations)


@pytest.mark.native
@pytest.mark.parametrize("who", ["own", "vendor"])
@pytest.mark.parametrize("case", ["three teachers", "wide"])
def test_whoever_multiplies(who, case, monkeypatch):
    monkeypatch.setattr("kdkernels.gemm.FORCED", who)
    for dtype in DTYPES:
        deviations = compare_case({"divergence": "jsd", "dtype": dtype, "device": "cpu"} | CASES[case], "native")
        assert all(d.ok for d in deviations), deviations


@everywhere
@every_divergence
def test_bfloat16_is_no_worse_than_eager(backend, divergence):
    """Logits stay float32: rounding them to bfloat16 first costs peers 4-23 % of the gradient (Liger #1432)."""
    inputs = make_inputs(60, 40, 300, 2, temperature=2.0, divergence=divergence, dtype=torch.bfloat16)
    target = exact(inputs)
    own, plain = errors(ours(inputs, backend), target), errors(eager(inputs), target)
    for name in own:
        floor = 4 * torch.finfo(torch.bfloat16).eps if name.startswith("grad") else 0
        assert own[name] <= max(plain[name], floor), name


def test_a_wrong_gradient_is_over_budget():
    inputs = make_inputs()
    outcome = ours(inputs, "reference")
    outcome.grads["student_head"][3, 4] += 0.01 * outcome.grads["student_head"].abs().max()
    assert [d.name for d in judge(inputs, outcome) if not d.ok] == ["grad student_head"]


@every_divergence
def test_the_definition_in_a_few_lines(divergence):
    inputs = make_inputs(
        plain=True, temperature=2.0, labels=True, alpha=0.3, divergence=divergence, dtype=torch.float64
    )
    h, W = inputs.trained["student"], inputs.trained["student_head"]
    y, y_t = h @ W.T, inputs.teachers[0] @ inputs.heads[0].weight.T
    q, p = (y / 2).softmax(-1), (y_t / 2).softmax(-1)
    m = (p + q) / 2
    points = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "tvd": (p - q).abs().sum(-1) / 2,
    }[divergence]
    hard = torch.nn.functional.cross_entropy(y, inputs.labels, reduction="none")
    expected = (0.3 * 4 * points + 0.7 * hard)[inputs.labels != -100].mean()
    assert relative_error(loss(inputs), expected) < 1e-12


# ---- autograd


@everywhere
@every_divergence
@pytest.mark.parametrize("mixture", ["arithmetic", "geometric"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, divergence, mixture, reduction):
    inputs = make_inputs(
        4, 3, 6, 2, 3, divergence=divergence, mixture=mixture, reduction=reduction, temperature=1.5, labels=True,
        alpha=0.6, weights="signed", dtype=torch.float64,
    )  # fmt: skip
    names = list(inputs.trained)

    def function(*given):
        return loss(inputs, dict(zip(names, given, strict=True)), backend=backend)

    leaves = [x.clone().requires_grad_() for x in inputs.trained.values()]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0)


@every_divergence
def test_the_reference_is_differentiable_twice(divergence):
    inputs = make_inputs(3, 2, 4, 2, 2, divergence=divergence, dtype=torch.float64)
    names = list(inputs.trained)
    leaves = [x.clone().requires_grad_() for x in inputs.trained.values()]
    function = lambda *x: loss(inputs, dict(zip(names, x, strict=True)), backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.native
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_of_native_is_an_error_that_says_what_to_do(reduction):
    inputs = make_inputs(plain=True)
    student = inputs.trained["student"].requires_grad_()
    (grad,) = torch.autograd.grad(loss(inputs, backend="native", reduction=reduction).sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use backend='reference'"):
        torch.autograd.grad(grad.sum(), student)


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_requested_gradients_are_computed(backend, reduction, monkeypatch):
    """A frozen head costs no gradient."""
    asked = []
    if backend == "native":
        implementation = schema._implementation(backend)
        honest = implementation.loss_and_gradients

        def spy(call, total, grads):
            asked.append([k for k, g in enumerate(grads) if g is not None])
            return honest(call, total, grads)

        monkeypatch.setattr(implementation, "loss_and_gradients", spy)
    for wanted, places in (("student", [0, 3]), ("student_head", [1]), ("bias", [2]), ("lora_A", [3]), ("lora_B", [4])):
        outcome = ours(make_inputs(frozen=[n for n in TRAINED if n != wanted], reduction=reduction), backend)
        assert list(outcome.grads) == [wanted]
        assert not asked or asked.pop() == places


@pytest.mark.native
def test_a_graph_that_is_kept_gives_the_same_again():
    inputs = make_inputs(temperature=2.0)
    leaves = {name: x.requires_grad_() for name, x in inputs.trained.items()}
    value = loss(inputs, leaves, backend="native")
    first = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(value, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@everywhere
def test_no_gradient_flows_into_teachers(backend):
    """A head that student and teacher share has the student's gradient alone."""
    inputs = make_inputs(plain=True, d_s=17)
    W = inputs.trained["student_head"].clone().requires_grad_()
    teacher = inputs.teachers[0].clone().requires_grad_()
    student = inputs.trained["student"]
    tied = kd.linear_distillation_loss(student, W, teacher, W, backend=backend)
    found = torch.autograd.grad(tied, [W, teacher], allow_unused=True)
    assert found[1] is None
    apart = kd.linear_distillation_loss(student, W, teacher, W.detach().clone(), backend=backend)
    assert relative_error(found[0], torch.autograd.grad(apart, W)[0]) < 1e-7


# ---- torch.library, torch.compile, autocast


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments", [{}, {"K": 3, "given": "each", "vocabulary": "longer", "labels": True, "alpha": 0.5}]
)
def test_opcheck(arguments):
    inputs = make_inputs(5, 4, 12, **arguments)
    trained = {name: x.requires_grad_() for name, x in inputs.trained.items()}
    call, needs = call_of(inputs, trained)
    tensors, numbers = pack([call.student, *call.teachers])
    tensors = [
        inputs.trained["student"].new_empty(0) if x is None else x.detach().requires_grad_(x.requires_grad)
        for x in tensors
    ]
    data = ([1.0, 0.5, call.alpha, *numbers], call.excluded, call.labels, call.weights, "jsd", "arithmetic")
    torch.library.opcheck(schema.linear_distillation_points.seen, (tensors, *data, "native"))
    # the second and later outputs are gradients, which have none: see test_a_second_derivative_of_native_...
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(schema.linear_distillation.seen, (tensors, *data, needs, "native", 2), test_utils=tests)


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_as_one_graph_with_dynamic_shapes(backend, reduction):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, more in ((23, {}), (12, {}), (23, {"labels": True, "weights": "signed", "alpha": 0.5})):
        inputs = make_inputs(N, K=2, reduction=reduction, **more)
        outcome = run(inputs, lambda x, i=inputs: compiled(i, x, backend=backend))
        plain = ours(inputs, backend)
        for name, x in plain.tensors().items():
            assert relative_error(outcome.tensors()[name], x) < 1e-6, name


@pytest.mark.native
def test_compiled_by_inductor():
    torch.compiler.reset()
    inputs = make_inputs(labels=True, alpha=0.5, vocabulary="mapped", temperature=2.0)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    outcome = run(inputs, lambda x: compiled(inputs, x, backend="native"))
    wrong = [d for d in judge(inputs, outcome) if not d.ok]
    assert not wrong, wrong


@everywhere
def test_autocast_casts_as_linear_does(backend):
    inputs = make_inputs(K=2, plain=True)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = ours(inputs, backend)
    assert outcome.loss.dtype is torch.float32
    assert all(g.dtype is torch.float32 for g in outcome.grads.values())
    assert relative_error(outcome.loss, loss(inputs.to(torch.bfloat16), backend="reference")) < 1e-6


@pytest.mark.native
def test_an_adapter_stays_precise_under_autocast():
    """W + BA is never rounded to the dtype of W."""
    inputs = make_inputs(N=40)
    rounded = inputs.to(torch.bfloat16)
    precise = {name: rounded.trained[name] if "lora" not in name else x for name, x in inputs.trained.items()}
    expected = loss(rounded, {n: y.double() for n, y in precise.items()}, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(inputs, backend="native")
    assert relative_error(found, expected) < 1e-6


@everywhere
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_beside_float64(backend, autocast):
    """Products of float64 are not those of bfloat16."""
    inputs = make_inputs(given="logits", plain=True, N=40)
    student = inputs.to(None if autocast else torch.bfloat16).trained
    teacher = inputs.teachers[0].double()
    leaves = [x.requires_grad_() for x in student.values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = kd.linear_distillation_loss(*leaves, teacher, backend=backend)
    grads = torch.autograd.grad(value, leaves)
    wide = [x.detach().bfloat16().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(kd.linear_distillation_loss(*wide, teacher, backend="reference"), wide)
    assert value.dtype is torch.float64
    for g, e in zip(grads, expected, strict=True):
        assert relative_error(g, e) < 5e-3


@pytest.mark.native
def test_no_autocast_of_float64():
    inputs = make_inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(loss(inputs, backend="native"), exact(inputs).loss) < 1e-13


@pytest.mark.native
def test_the_same_bits_for_every_thread_count_and_run(monkeypatch):
    monkeypatch.setattr("kdkernels.gemm.FORCED", "own")  # the vendor promises it for itself
    inputs = make_inputs(300, 30, 900, 2, weights="mask", temperature=2.0)
    outcomes = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        outcomes.append(ours(inputs, "native").tensors())
    for outcome in outcomes[1:]:
        assert all(torch.equal(outcome[name], x) for name, x in outcomes[0].items())


@pytest.mark.native
@pytest.mark.parametrize("rows", [16, 48])
@pytest.mark.parametrize("weights", [None, "mask"])
def test_blocks_do_not_matter(rows, weights, monkeypatch):
    from kdkernels.ops.linear_distillation import native, stream

    inputs = make_inputs(150, 20, 70, 3, given="each", labels=True, alpha=0.5, weights=weights, temperature=3.0)
    whole = ours(inputs, "native")
    taken = []
    monkeypatch.setattr(stream, "_rows_per_block", lambda *_: rows)
    honest = native.Kernels.diverge
    monkeypatch.setattr(
        native.Kernels, "diverge", lambda self, call, x, *a: taken.append(len(x)) or honest(self, call, x, *a)
    )
    parts = ours(inputs, "native")
    assert len(taken) > 1 and max(taken) == rows
    for name, x in whole.tensors().items():
        assert relative_error(parts.tensors()[name], x) < 1e-6, name


@pytest.mark.native
def test_memory_does_not_grow_with_points():
    from kdkernels.ops.linear_distillation import native, stream

    few, many = (
        call_of(make_inputs(N, 4, 30000, plain=True), make_inputs(N, 4, 30000, plain=True).trained)[0]
        for N in (9, 4000)
    )
    rows = stream._rows_per_block(many, native.Kernels(many, None))
    assert rows == stream._rows_per_block(few, native.Kernels(few, None))
    assert rows * 2 * 30000 * 4 <= native.BLOCK_BYTES


@pytest.mark.native
def test_explain_shows_what_would_run():
    inputs = make_inputs(K=2, labels=True, alpha=0.5)
    found = kd.explain(
        kd.linear_distillation_loss,
        inputs.trained["student"],
        head_of(inputs.trained, inputs),
        inputs.teachers,
        inputs.heads,
    )
    assert (found.backend, found.method) == ("native", "streamed")
    assert [cost.method for cost in found.costs] == ["streamed", "eager"]
    assert found.costs[0].bytes < found.costs[1].bytes
