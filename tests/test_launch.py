"""Which compiled kernel a launcher starts, and what a call takes of the host: with a driver that stands in for CUDA's.

Triton compiles and launches for real; nothing is computed. What must not change without being meant is counted exactly:
launches, and torch's operators between them.
"""

import itertools
import shutil
import types
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.linear_distillation.call import Call, Side
from kdkernels.philox import draw_states
from kdkernels.testing.lora_linear.inputs import make_inputs, ours
from kdkernels.testing.stand_in import Device, stand_in, torch_operators, triton_host_cost

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kdkernels import launch  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The stand-in."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in is compiled by gcc")
    with stand_in() as found:
        yield found


# ---- the right kernel


@triton.jit(do_not_specialize=["N", "scale"])
def copy_kernel(
    x_ptr, y_ptr, out_ptr, N: tl.int64, scale: tl.float32, stride_x, stride_out, COUNT: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x = tl.load(x_ptr + i * stride_x, mask=i < N)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, mask=i < N)
    tl.store(out_ptr + i * stride_out, (x * scale).to(out_ptr.dtype.element_ty), mask=i < N)


def calls() -> Iterator[tuple[Any, ...]]:
    """Tensors, scalars, strides and constants, over every class that Triton compiles for."""
    room = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    views = [x[offset:] for x in room.values() for offset in (0, 1)]
    for x, out in itertools.product(views, views):
        yield (x, None, out), (7, 1.0), (1, 1), (16,)
    x = views[0]
    for y in (None, x, views[1], views[2]):
        yield (x, y, x), (7, 1.0), (1, 1), (16,)
    for strides in itertools.product((1, 2, 16, 2**31 + 1, 2**31 + 16, 0, -1), (1, 3)):
        yield (x, None, x), (7, 1.0), strides, (16,)
    for N, scale in ((1, 1.0), (16, 0.0), (2**31, 2), (2**40 + 16, 0.5)):
        yield (x, None, x), (N, scale), (1, 1), (16,)
    yield (x, None, x), (7, 1.0), (1, 1), (32,)


def check_calls(module: Any, device: Device) -> None:
    """Twice through all calls, each starts the kernel that Triton's own binder chooses, once."""
    launcher = module.Launcher(copy_kernel)
    handles = set()
    for _, (tensors, scalars, strides, constants) in itertools.product(range(2), calls()):
        arguments = (*tensors, *scalars, *strides, *constants)
        expected = copy_kernel.run(*arguments, grid=(1,), warmup=True, num_warps=4, num_stages=3)
        assert expected.run is not None  # loads it
        before = device.launched()
        launcher((1,), tensors, scalars, strides, constants, 4, 3)
        assert device.launched() - before == {(expected.function, "copy_kernel"): 1}, arguments[3:]
        handles.add(expected.function)
    assert len(handles) > 25  # what is told apart


def test_the_kernel_that_triton_would_start(device: Device) -> None:
    check_calls(launch, device)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if pointer & 15:", "if pointer & 1:"),
        ("constants, *misaligned, *dtypes)", "constants, *misaligned)"),
        ("constants, *misaligned, *dtypes)", "constants, len(misaligned), *dtypes)"),
        ("strides, constants, *mis", "constants, *mis"),
        ("strides, constants, *mis", "strides, *mis"),
    ],
)
def test_a_key_that_lacks_something_starts_the_wrong_kernel(device: Device, right: str, wrong: str) -> None:
    source = Path(launch.__file__).read_text()
    assert source.count(right) == 1
    mistaken = types.ModuleType("mistaken")
    exec(compile(source.replace(right, wrong), "mistaken", "exec"), mistaken.__dict__)
    with pytest.raises(AssertionError):
        check_calls(mistaken, device)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of Triton's own launch path is a warm-up."""
    seen: list[bool] = []
    run = JITFunction.run

    def watched(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        seen.append(warmup)
        return run(self, *arguments, warmup=warmup, **options)

    monkeypatch.setattr(JITFunction, "run", watched)
    return seen


def start(launcher: Any, x: Tensor | None = None) -> None:
    x = torch.zeros(64) if x is None else x
    launcher((1,), (x, None, x), (7, 1.0), (1, 1), (16,), 4, 3)


def test_triton_binds_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, seen = launch.Launcher(copy_kernel), counted(monkeypatch)
    assert device.during(lambda: [start(launcher) for _ in range(5)]) == {"copy_kernel": 5}
    assert seen == [True, False]  # compiled, and launched for the first time


def test_a_profiler_sees_every_launch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, seen = launch.Launcher(copy_kernel), counted(monkeypatch)
    start(launcher)
    names = []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        start(launcher)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    start(launcher)
    assert names == ["copy_kernel"]
    assert seen == [True, False, False]


def test_another_triton_launches_by_itself(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "99.0.0")
    launcher, seen = launch.Launcher(copy_kernel), counted(monkeypatch)
    assert device.during(lambda: [start(launcher) for _ in range(2)]) == {"copy_kernel": 2}
    assert seen == [False, False]


def test_each_device_and_driver_has_kernels_of_its_own(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, x = launch.Launcher(copy_kernel), torch.zeros(64)

    def handle() -> int:
        before = device.launched()
        start(launcher, x)
        ((found, _),) = (device.launched() - before).elements()
        return found

    first = handle()
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 1)
    second = handle()
    monkeypatch.undo()
    assert handle() == first != second
    kept = launcher._kept
    monkeypatch.setattr(driver, "_active", type(driver.active)())
    start(launcher, x)
    assert launcher._driver is driver.active and len(kept) == 1


class Elsewhere(Tensor):
    def get_device(self) -> int:
        return 1


def test_a_tensor_of_another_device_is_refused(device: Device) -> None:
    """Triton is handed addresses, so it would not notice."""
    launcher, x = launch.Launcher(copy_kernel), torch.zeros(64)
    start(launcher, x)
    with pytest.raises(ValueError, match="copy_kernel: a tensor is on"):
        launcher((1,), (x, x.as_subclass(Elsewhere), x), (7, 1.0), (1, 1), (16,), 4, 3)


def test_ever_new_strides_do_not_fill_the_memory(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    launcher, x = launch.Launcher(copy_kernel), torch.zeros(64)
    for stride in range(1, 9):
        launcher((1,), (x, None, x), (7, 1.0), (stride, 1), (16,), 4, 3)
        assert len(launcher._kept) <= 3


def test_parameters_in_another_order_are_refused() -> None:
    @triton.jit(do_not_specialize=["N"])
    def untyped_kernel(x_ptr, N, COUNT: tl.constexpr):
        pass

    @triton.jit
    def shuffled_kernel(stride, x_ptr):
        pass

    with pytest.raises(TypeError, match="untyped_kernel: the scalar N has no type"):
        launch.Launcher(untyped_kernel)
    with pytest.raises(TypeError, match="shuffled_kernel: the order of parameters"):
        launch.Launcher(shuffled_kernel)


# ---- what a call takes


LORA = "lora_linear_{}_kernel".format
ONCE = {LORA("project"): 1, LORA("adapter"): 1, LORA("reduce"): 1, LORA("expand"): 2}  # forward and backward


@pytest.mark.parametrize("p", (0.0, 0.9))
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, ONCE),
        ({"K": 3}, ONCE | {LORA("adapter"): 3, LORA("expand"): 4}),
        ({"K": 6}, ONCE | {LORA("project"): 2, LORA("adapter"): 6, LORA("reduce"): 2, LORA("expand"): 8}),
        ({"r": 130}, {LORA("project"): 2, LORA("reduce"): 2, LORA("expand"): 2}),
        ({"N": 300}, ONCE | {LORA("sum"): 1}),
        ({"N": 300, "K": 3}, ONCE | {LORA("adapter"): 3, LORA("expand"): 4, LORA("sum"): 1}),
        ({"N": 300, "d_out": 300}, ONCE | {LORA("sum"): 2}),
    ],
)
def test_launches_of_lora_linear(device: Device, sizes: dict[str, int], expected: dict[str, int], p: float) -> None:
    needs = ("input", "lora_A", "lora_B")
    inputs = make_inputs(**{"N": 5, "d_in": 8, "d_out": 8, "r": 4} | sizes, dropout_p=p, needs=needs)
    assert device.during(lambda: ours(inputs, "triton")) == expected


VIEWS = {"t", "transpose", "as_strided", "detach", "to", "_to_copy", "view", "select", "slice", "resize_", "alias"}
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "resolve_conj"}
CPU_ONLY = {"fill_"}  # the CPU's sum starts from a zero, and these tests poison memory


def alignment(method: str, needs: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    module = import_module("kdkernels.ops.projection_alignment.triton")
    operands = [*(torch.zeros(4, 8, dtype=dtype) for _ in range(2)), *(torch.zeros(8, 8, dtype=dtype) for _ in "st")]
    grads = [torch.empty_like(x) if i in needs else torch.empty(0) for i, x in enumerate(operands)]
    arguments = ([*operands, None, None], None, "cosine", method, 1, torch.empty(()), [*grads, *[torch.empty(0)] * 2])
    return lambda: module.loss_and_gradients(*arguments)


@pytest.mark.parametrize(
    ("method", "needs", "expected"),
    [
        ("direct", (0, 2, 3), {"mm": 5, "sum": 1}),
        ("direct", (0,), {"mm": 3, "sum": 1}),
        # W to float64, G to float32, points and scaled points to float64, two gradients to float32
        ("gram", (0, 2, 3), {"mm": 8, "addmm": 3, "addmm_": 2, "sum": 1, "copy_": 12}),
        ("gram", (0,), {"mm": 6, "sum": 1, "copy_": 5}),
    ],
)
def test_operators_of_projection_alignment(
    device: Device, method: str, needs: tuple[int, ...], expected: dict[str, int]
) -> None:
    """Neither fills nor copies stand between the matmuls and the kernel of the direct method."""
    step = alignment(method, needs)
    assert device.during(step) == {f"projection_alignment_{method}_kernel": 1}
    found = torch_operators(step)
    assert {name: n for name, n in found.items() if name not in VIEWS | ALLOCATIONS | CPU_ONLY} == expected


def distillation(K: int, dtype: torch.dtype, **options: Any) -> Callable[[], None]:
    """Forward and backward in one, of hidden states and heads."""
    module = import_module("kdkernels.ops.linear_distillation.triton")
    sides = [Side(torch.zeros(4, 8, dtype=dtype), torch.zeros(32, 8, dtype=dtype), vocabulary=32) for _ in range(K + 1)]
    sides = [sides[0], *(side._replace(share=1 / K) for side in sides[1:])]
    call = Call(sides[0], sides[1:], None, None, None, "jsd", "arithmetic", 2.0, 0.5, 1.0, 1, torch.float32)._replace(
        **options
    )
    grads = [torch.empty(4, 8, dtype=dtype), torch.empty(32, 8, dtype=dtype), None, None, None]
    return lambda: module.loss_and_gradients(call, torch.empty(()), grads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("K", (1, 2, 4))
def test_operators_of_linear_distillation(device: Device, K: int, dtype: torch.dtype) -> None:
    """A product for each head and for each gradient, a kernel for each teacher, and the sum of the losses."""
    step = distillation(K, dtype)
    absorbed = {"linear_distillation_absorb_kernel": K - 1} if K > 1 else {}
    assert device.during(step) == absorbed | {"linear_distillation_diverge_kernel": 1}
    found = torch_operators(step)
    products, copies = K + 3, 0
    if dtype is torch.bfloat16:  # the CPU multiplies in float32, so each operand but the last product's is widened
        copies = 2 * (K + 2) + 1  # and the head's gradient, summed in float32, is narrowed
    left = {name: n for name, n in found.items() if name not in VIEWS | ALLOCATIONS | CPU_ONLY}
    assert left == {"mm": products, "sum": 1} | ({"copy_": copies} if copies else {})


RECURRENCE = "linear_recurrence_{}_kernel".format


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)
@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ((1, 20, 3), ("scan",), ("backward",)),  # one sequence leaves one sum
        ((2, 20, 3), ("scan",), ("backward", "sum")),
        ((2, 300, 3), ("ends", "scan"), ("ends", "backward", "sum")),
        ((1500, 1, 3), ("scan",), ("backward", "sum", "sum")),  # more rows than a program sums
    ],
)
def test_operators_of_linear_recurrence(
    device: Device, sizes: tuple[int, int, int], forward: tuple[str, ...], backward: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Room and views stand between the launches, nothing else."""
    module = import_module("kdkernels.ops.linear_recurrence.triton")
    x, Lambda, start = (torch.zeros(shape, dtype=dtype) for shape in (sizes, (1, 3), (sizes[0], 3)))
    steps: list[tuple[tuple[str, ...], Callable[[], Any]]] = [
        (forward, lambda: module.forward(Lambda, x, start, False)),
        (backward, lambda: module.backward(x, Lambda, x, None, False, [True, True, False])),
    ]
    for expected, step in steps:
        assert device.during(step) == Counter(map(RECURRENCE, expected))
        found = torch_operators(step)
        assert not found.keys() - (VIEWS | ALLOCATIONS | CPU_ONLY | {"view_as_real", "resolve_neg"}), found


def test_states_are_drawn_by_one_operator(device: Device) -> None:
    """With the bits of torch.randint, as before."""
    torch.manual_seed(3)
    expected = torch.randint(-(2**63), 2**63 - 1, (3, 2))
    torch.manual_seed(3)
    assert torch.equal(draw_states(3, torch.device("cpu")), expected)
    found = torch_operators(lambda: draw_states(3, torch.device("cpu")))
    assert found - Counter(["fill_"]) == {"empty": 1, "random_": 1}  # these tests poison memory


def test_the_cost_of_a_step_is_measured(device: Device) -> None:
    cost = triton_host_cost(alignment("direct", (0,)), reps=3)
    assert cost.launches == 1 and 0 < cost.seconds < 1


# ---- in a CUDA graph


def captured(step: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """A graph of a step, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and warms cuBLAS up
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("K", (1, 3))
def test_gpu_graph_draws_masks_anew(K: int) -> None:
    """With x = A = B = 1 and W = 0, output and gradient are the mask itself: the same one within a replay."""
    d = 32
    eye, W = torch.eye(d, device="cuda"), torch.zeros(d, d, device="cuda")
    x = torch.ones(300, d, device="cuda", requires_grad=True)
    layers = [kd.LoRA(W, eye.clone().requires_grad_(), eye, dropout_p=0.5) for _ in range(K)]
    ones = [torch.ones(300, d, device="cuda") for _ in range(K)]

    def step() -> list[Tensor]:
        outputs = kd.lora_linear_group(x, layers, backend="triton")
        grads = torch.autograd.grad(outputs, [x, *(layer.lora_A for layer in layers)], ones)
        return [*outputs, *grads]

    graph, (*found,) = captured(step)
    masks = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        outputs, dX, grads = found[:K], found[K], found[K + 1 :]
        assert all(bool(((y == 0) | (y == 2)).all()) for y in outputs)
        assert torch.equal(sum(outputs), dX)
        for y, dA in zip(outputs, grads, strict=True):
            torch.testing.assert_close(dA, y.sum(0).expand(d, d))
        masks.append(torch.stack(outputs))
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gpu_graph_of_an_adapter_without_dropout(dtype: torch.dtype) -> None:
    inputs = make_inputs(N=300, d_in=64, d_out=96, r=8, dtype=dtype, device="cuda")
    (layer,) = inputs.layers
    leaves = [x.detach().clone().requires_grad_() for x in (inputs.input, layer.lora_A, layer.lora_B)]
    dY = torch.randn(300, 96, device="cuda").to(dtype)

    def step() -> list[Tensor]:
        x, A, B = leaves
        y = kd.lora_linear(x, layer.weight, A, B, bias=layer.bias, scaling=0.5, backend="triton")
        return [y, *torch.autograd.grad(y, leaves, dY)]

    check_replays(step, leaves)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("method", "dtype"), [("direct", torch.float32), ("direct", torch.bfloat16), ("gram", torch.float32)], ids=str
)
def test_gpu_graph_of_projection_alignment(method: str, dtype: torch.dtype) -> None:
    shapes = ((300, 24), (300, 40), (64, 24), (64, 40))
    leaves = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]

    def step() -> list[Tensor]:
        loss = kd.projection_alignment_loss(*leaves, method=method, backend="triton")
        return [loss, *torch.autograd.grad(loss, leaves)]

    check_replays(step, leaves)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gpu_graph_of_linear_distillation(dtype: torch.dtype) -> None:
    shapes = ((300, 24), (500, 24), (300, 40), (500, 40), (300, 500))
    leaves = [torch.randn(shape, device="cuda").to(dtype).requires_grad_(i < 2) for i, shape in enumerate(shapes)]
    labels = torch.arange(300, device="cuda")

    def step() -> list[Tensor]:
        x, W, first, W_first, second = leaves
        loss = kd.linear_distillation_loss(
            x, W, [first, second], [W_first, None], labels=labels, alpha=0.5, backend="triton"
        )
        return [loss, *torch.autograd.grad(loss, [x, W])]

    check_replays(step, leaves)


def check_replays(step: Callable[[], list[Tensor]], leaves: list[Tensor]) -> None:
    """A replay on other numbers gives what the step gives on them."""
    graph, found = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in found]
        for a, b in zip(replayed, step(), strict=True):
            torch.testing.assert_close(a, b)
