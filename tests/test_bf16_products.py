"""bfloat16 points multiplied as they are, by instructions that only some processors have: each that is here."""

import pytest
import torch
from conftest import BF16_ISAS

import kdkernels as kd
from kdkernels.ops.projection_alignment.reference import eager_losses
from kdkernels.testing.compare import poisoned_memory

pytestmark = [pytest.mark.native, pytest.mark.parametrize("isa", BF16_ISAS, indirect=True)]
NAMES = ("student", "student_proj", "teacher_proj")


def draw(N, d_s, d_t, D, seed=0, two_sided=True):
    """student, teacher, student_proj, teacher_proj, with both signs."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((N, d_s), (N, d_t if two_sided else D), (D, d_s), (D, d_t))
    s, t, W_s, W_t = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    return s, t, W_s, W_t if two_sided else None


def outcome(loss, operands, weights=None):
    """The loss, and the gradients of all but the teacher."""
    leaves = [None if x is None else x.detach().requires_grad_(i != 1) for i, x in enumerate(operands)]
    total = loss(*leaves)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [total.detach(), *torch.autograd.grad(total, wanted)]


def ours(operands, **options):
    def loss(*operands):
        return kd.projection_alignment_loss(*operands, backend="native", method="direct", **options)

    with poisoned_memory():
        return outcome(loss, operands)


def eager(operands, metric="cosine"):
    return outcome(lambda s, t, W_s, W_t: eager_losses(s, t, W_s, W_t, metric=metric).mean(), operands)


# past, at and before the edges of tiles (16 lines, 32 k), of pairs of them, and of the blocks of k
SIZES = (
    (1, 2, 3, 4),
    (3, 5, 2, 7),
    (16, 32, 32, 16),
    (33, 31, 63, 65),
    (32, 64, 32, 32),
    (70, 545, 33, 95),
    (530, 40, 24, 50),
)


@pytest.mark.parametrize("metric", ("cosine", "mse", "angular"))
@pytest.mark.parametrize("two_sided", (True, False))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_error_against_float64_is_at_most_eagers(sizes, two_sided, metric, isa):
    operands = draw(*sizes, two_sided=two_sided)
    exact = eager([None if x is None else x.double() for x in operands], metric)
    for found, plain, target in zip(ours(operands, metric=metric), eager(operands, metric), exact, strict=True):
        room = 2 * torch.finfo(torch.bfloat16).eps * target.norm()
        assert found.isfinite().all()
        assert (found - target).norm() <= 1.1 * (plain - target).norm() + 0.1 * room


def test_points_that_do_not_count_are_not_there(isa):
    operands, weights = draw(75, 40, 33, 50), torch.arange(75) % 3 != 1
    found = ours(operands, weights=weights)
    s, t, *rest = operands
    fewer = ours((s[weights], t[weights], *rest))
    torch.testing.assert_close(found[0], fewer[0])
    torch.testing.assert_close(found[1][weights], fewer[1])
    assert not found[1][~weights].any()
    poisoned = [x.masked_fill(~weights[:, None], torch.nan) for x in (s, t)]
    assert all(map(torch.equal, ours((*poisoned, *rest), weights=weights), found))


def test_any_strides(isa):
    s, t, W_s, W_t = operands = draw(70, 40, 33, 50)
    expected = ours(operands)
    transposed = [x.T.contiguous().T for x in operands]
    apart = [torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0] for x in operands]
    for other in (transposed, apart, [s, t, W_s.T.contiguous().T, W_t]):
        for a, b in zip(ours(other), expected, strict=True):
            assert torch.equal(a, b)


def test_the_same_bits_for_any_number_of_threads(isa):
    operands = draw(700, 96, 80, 130)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(operands))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_what_is_not_finite_stays_where_it_is(isa):
    s, t, W_s, W_t = draw(40, 33, 20, 70)
    s[7, 3], s[9, 4] = torch.nan, torch.inf
    losses = kd.projection_alignment_loss(s, t, W_s, W_t, reduction="none", method="direct", backend="native")
    assert losses[[7, 9]].isnan().all()
    kept = [i for i in range(40) if i not in (7, 9)]
    assert losses[kept].isfinite().all()


def test_it_is_these_products_that_run(isa):
    """They round what is differentiated to bfloat16, which float32's do not: other bits, and no fewer correct ones."""
    from kdkernels import _native

    operands = draw(64, 64, 64, 64)
    here = ours(operands)
    module = _native.module()
    module.select_isa("avx512")
    try:
        wide = ours(operands)
    finally:
        module.select_isa(isa)
    assert torch.equal(here[0], wide[0]) or (here[0] - wide[0]).abs() < 1e-6
    assert not torch.equal(here[2], wide[2])
