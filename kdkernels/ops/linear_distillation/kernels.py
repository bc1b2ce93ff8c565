"""The kernels of linear distillation on GPUs, and what launches each; triton.py says what they are for.

One program has one row. What is summed over a row is summed by each lane over its columns, then over lanes. Sums of
exponentials run online: relative to the largest number a lane has met so far, so that a row is read once for both.
Comparisons are written so that NaN stays NaN.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from kdkernels.launch import Launcher

_NONE = tl.constexpr(float("-inf"))  # the logarithm of 0
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # less than any finite number met later; −∞ − −∞ were NaN


@triton.jit
def _log_one_plus(x):
    """log(1 + x) for 0 ≤ x ≤ 1: 2 artanh(x/(2 + x))."""
    s = x / (2.0 + x)
    z = s * s
    p = 0.20012495758583793 + z * (0.13979620045078694 + z * 0.14092666981096375)
    return 2.0 * s * (1.0000000039815105 + z * (0.3333315658736154 + z * p))


@triton.jit
def _log_add(a, b):
    """log(eᵃ + eᵇ)."""
    high, low = tl.where(a < b, b, a), tl.where(a < b, a, b)
    return tl.where(high == _NONE, low, high + _log_one_plus(tl.exp(low - high)))


@triton.jit
def _tanh(x):
    """By a polynomial near 0, where the quotient would lose digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -0.05376870464879051 + z * (0.020753628715212403 + z * -0.0058521684667727555)
    near = x * (0.999999997510991 + z * (-0.3333328325734218 + z * (0.13331688959437107 + z * p)))
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(x_ptr, bias_ptr, cols, stride, stride_bias, scale, softcap, V, READABLE, CAPPED: tl.constexpr):
    """(BLOCK_V,) of a row of raw logits -> logits; −∞ beyond the last column."""
    x = tl.load(x_ptr + cols.to(tl.int64) * stride, mask=cols < READABLE, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < V, other=0.0).to(tl.float32)
    x *= scale
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return tl.where(cols < V, x, _NONE)


@triton.jit
def _shared(x, excluded_ptr, cols, V):
    """−∞ where a token is not common to all."""
    if excluded_ptr is not None:
        x = tl.where(tl.load(excluded_ptr + cols, mask=cols < V, other=0.0) == 0, x, _NONE)
    return x


@triton.jit
def _add_exponential(top, total, x, factor):
    """Of each lane: the largest x so far, and Σ exp((x − top) · factor)."""
    distance = (x - top) * factor
    e = tl.exp(-tl.abs(distance))
    return tl.where(x > top, x, top), tl.where(x > top, total * e + 1.0, total + e)


@triton.jit
def _add_apart(apart, tops_p, sums_p, a, target_factor, tops_q, b, factor):
    """Of each lane: Σ e^a (a − b), a and b less the largest so far and times their factors."""
    up_p = (a - tops_p) * target_factor
    up_q = (b - tops_q) * factor
    e = tl.exp(-tl.abs(up_p))
    kept = tl.where(a > tops_p, e, 1.0)  # of what was summed
    moved = tl.where(b > tops_q, up_q, 0.0) - tl.where(a > tops_p, up_p, 0.0)
    apart = tl.where(kept * sums_p == 0, 0.0, kept * (apart + sums_p * moved))
    new = tl.where(a > tops_p, 1.0, e)
    difference = tl.where(a > tops_p, 0.0, up_p) - tl.where(b > tops_q, 0.0, up_q)
    return apart + tl.where(new == 0, 0.0, new * difference)


@triton.jit
def _over_lanes(tops, totals, factor):
    """The largest x of a row, and Σ exp((x − top) · factor)."""
    top = tl.max(tops, 0)
    return top, tl.sum(totals * tl.exp((tops - top) * factor), 0)


@triton.jit
def _softmax_of_row(
    x_ptr, bias_ptr, excluded_ptr, stride, stride_bias, scale, softcap, factor,
    V: tl.constexpr, READABLE: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest logit of a row, and Σ exp((logit − top) · factor)."""
    tops = tl.full((BLOCK_V,), _LOWEST, tl.float32)
    totals = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _logits(x_ptr, bias_ptr, cols, stride, stride_bias, scale, softcap, V, READABLE, CAPPED)
        tops, totals = _add_exponential(tops, totals, _shared(x, excluded_ptr, cols, V), factor)
    return _over_lanes(tops, totals, factor)


@triton.jit
def _target(
    teacher_ptr, bias_ptr, excluded_ptr, mixture_ptr, cols, stride, stride_bias, scale, softcap, top, total, factor,
    offset, V, READ_T, READ_M, MIXTURE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_V,): a teacher's logits, or its part of a mixture and what is there of the teachers before it.

    arithmetic: log π + log softmax(x/T), where the factor is 1/T and the offset log π; geometric: π x/T, π/T and 0.
    """
    x = _logits(teacher_ptr, bias_ptr, cols, stride, stride_bias, scale, softcap, V, READ_T, CAPPED)
    x = _shared(x, excluded_ptr, cols, V)
    if MIXTURE == "arithmetic":
        x = (x - top) * factor + (offset - tl.log(total))
        if mixture_ptr is not None:
            x = _log_add(tl.load(mixture_ptr + cols, mask=cols < READ_M, other=_NONE), x)
    elif MIXTURE == "geometric":
        x *= factor
        if mixture_ptr is not None:
            x += tl.load(mixture_ptr + cols, mask=cols < READ_M, other=_NONE)
    return x


@triton.jit
def _element(log_p, log_q, beta, log_beta, log_rest, DIVERGENCE: tl.constexpr):
    """A token's part of the divergence, q, and the part's derivative by q, but for what is the same of all tokens."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == "reverse_kl":
        slope = tl.where(q == 0, 0.0, log_q - log_p)
        loss = q * slope
    elif DIVERGENCE == "jsd":
        log_m = _log_add(log_p + log_beta, log_q + log_rest)
        slope = tl.where(q == 0, 0.0, (1.0 - beta) * (log_q - log_m))
        loss = tl.where(p == 0, 0.0, beta * p * (log_p - log_m)) + q * slope
    else:
        difference = q - p
        loss = 0.5 * tl.abs(difference)
        slope = tl.where(difference < 0, -0.5, tl.where(difference > 0, 0.5, difference))
    return loss, q, slope


@triton.jit(do_not_specialize=["scale", "softcap", "factor", "offset"])
def linear_distillation_absorb_kernel(
    teacher_ptr,  # (n, V) raw logits, any strides
    mixture_ptr,  # (n, V), adjacent columns
    bias_ptr, excluded_ptr,  # (V,) or None
    scale: tl.float32, softcap: tl.float32, factor: tl.float32, offset: tl.float32,  # as in `_target`
    stride_tn, stride_tv, stride_mn, stride_bias,
    V: tl.constexpr, READ_T: tl.constexpr, READ_M: tl.constexpr, MIXTURE: tl.constexpr, FIRST: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    teacher_ptr += row * stride_tn
    mixture_ptr += row * stride_mn
    top, total = 0.0, 1.0
    if MIXTURE == "arithmetic":
        top, total = _softmax_of_row(
            teacher_ptr, bias_ptr, excluded_ptr, stride_tv, stride_bias, scale, softcap, factor, V, READ_T, CAPPED,
            BLOCK_V,
        )  # fmt: skip
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _target(
            teacher_ptr, bias_ptr, excluded_ptr, None if FIRST else mixture_ptr, cols, stride_tv, stride_bias, scale,
            softcap, top, total, factor, offset, V, READ_T, READ_M, MIXTURE, CAPPED,
        )  # fmt: skip
        tl.store(mixture_ptr + cols, x, mask=cols < READ_M)


NUMBERS = (
    "scale_s", "softcap_s", "scale_t", "softcap_t", "factor", "target_factor", "mixture_factor", "mixture_offset",
    "beta", "log_beta", "log_rest", "loss_weight", "soft_weight", "hard_weight",
)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def linear_distillation_diverge_kernel(
    student_ptr, teacher_ptr,  # (n, V) raw logits, any strides
    mixture_ptr,  # (n, V) of the teachers before, adjacent columns; or None
    gradient_ptr,  # (n, V), adjacent columns, or None; may be the student's logits
    bias_s_ptr, bias_t_ptr, excluded_ptr,  # (V,) or None
    labels_ptr, weights_ptr,  # (n,) or None
    losses_ptr,  # (n,)
    scale_s: tl.float32, softcap_s: tl.float32, scale_t: tl.float32, softcap_t: tl.float32,
    factor: tl.float32, target_factor: tl.float32,  # of logits less the largest: 1/T, and of the target
    mixture_factor: tl.float32, mixture_offset: tl.float32,  # as in `_target`
    beta: tl.float32, log_beta: tl.float32, log_rest: tl.float32,  # β, log β, log(1 − β)
    loss_weight: tl.float32, soft_weight: tl.float32, hard_weight: tl.float32,  # α T², α T, 1 − α over the divisor
    stride_sn, stride_sv, stride_tn, stride_tv, stride_mn, stride_gn, stride_bias_s, stride_bias_t, stride_labels,
    stride_weights,
    V: tl.constexpr, READ_S: tl.constexpr, READ_T: tl.constexpr, READ_M: tl.constexpr, WRITE: tl.constexpr,
    DIVERGENCE: tl.constexpr, MIXTURE: tl.constexpr,  # MIXTURE: "none" of one teacher
    SOFT: tl.constexpr, HARD: tl.constexpr, OWN: tl.constexpr,  # OWN: the labels' softmax is not that of the divergence
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row * stride_weights).to(tl.float32)
    if gradient_ptr is not None:
        gradient_ptr += row * stride_gn
    if weight == 0:  # whatever the point holds
        tl.store(losses_ptr + row, 0.0)
        if gradient_ptr is not None:
            for start in range(0, V, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                nothing = tl.full((BLOCK_V,), 0.0, gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + cols, nothing, mask=cols < WRITE)
        return

    student_ptr += row * stride_sn
    teacher_ptr += row * stride_tn
    if mixture_ptr is not None:
        mixture_ptr += row * stride_mn
    label, labelled = 0, 0.0
    if HARD:
        given = tl.load(labels_ptr + row * stride_labels)
        known = (given >= 0) & (given < V)
        label = tl.where(known, given, 0).to(tl.int32)
        hard_weight = tl.where(known, hard_weight, float("nan"))
        # read here: sums over the row's lanes stand between it and whoever overwrites the logits
        labelled = _logits(
            student_ptr, bias_s_ptr, label, stride_sv, stride_bias_s, scale_s, softcap_s, V, READ_S, CAPPED_S
        )
    top_t, total_t = 0.0, 1.0
    if MIXTURE == "arithmetic":
        top_t, total_t = _softmax_of_row(
            teacher_ptr, bias_t_ptr, excluded_ptr, stride_tv, stride_bias_t, scale_t, softcap_t, mixture_factor, V,
            READ_T, CAPPED_T, BLOCK_V,
        )  # fmt: skip

    # the softmaxes, and of the forward KL divergence Σ e^a (a − b), a and b less their largest
    tops_q = tl.full((BLOCK_V,), _LOWEST, tl.float32)
    tops_p = tl.full((BLOCK_V,), _LOWEST, tl.float32)
    tops_y = tl.full((BLOCK_V,), _LOWEST, tl.float32)
    sums_q = tl.full((BLOCK_V,), 0.0, tl.float32)
    sums_p = tl.full((BLOCK_V,), 0.0, tl.float32)
    sums_y = tl.full((BLOCK_V,), 0.0, tl.float32)
    apart = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        y = _logits(student_ptr, bias_s_ptr, cols, stride_sv, stride_bias_s, scale_s, softcap_s, V, READ_S, CAPPED_S)
        if OWN:
            tops_y, sums_y = _add_exponential(tops_y, sums_y, y, 1.0)
        if SOFT:
            b = _shared(y, excluded_ptr, cols, V)
            a = _target(
                teacher_ptr, bias_t_ptr, excluded_ptr, mixture_ptr, cols, stride_tv, stride_bias_t, scale_t, softcap_t,
                top_t, total_t, mixture_factor, mixture_offset, V, READ_T, READ_M, MIXTURE, CAPPED_T,
            )  # fmt: skip
            if DIVERGENCE == "forward_kl":
                apart = _add_apart(apart, tops_p, sums_p, a, target_factor, tops_q, b, factor)
            tops_q, sums_q = _add_exponential(tops_q, sums_q, b, factor)
            tops_p, sums_p = _add_exponential(tops_p, sums_p, a, target_factor)

    loss, mean = 0.0, 0.0  # mean = Σ q · slope
    top_q, log_q, top_p, log_p, top_y, log_y = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if SOFT:
        top_q, total_q = _over_lanes(tops_q, sums_q, factor)
        top_p, total_p = _over_lanes(tops_p, sums_p, target_factor)
        log_q, log_p = tl.log(total_q), tl.log(total_p)
        if DIVERGENCE == "forward_kl":
            share = tl.exp((tops_p - top_p) * target_factor)
            moved = (tops_p - top_p) * target_factor - (tops_q - top_q) * factor
            apart = tl.where(share * sums_p == 0, 0.0, share * (apart + sums_p * moved))
            divergence = tl.sum(apart, 0) / total_p - log_p + log_q
        if MIXTURE == "arithmetic":
            top_p, log_p = 0.0, 0.0  # probabilities already
        if DIVERGENCE != "forward_kl":
            found = tl.full((BLOCK_V,), 0.0, tl.float32)
            slopes = tl.full((BLOCK_V,), 0.0, tl.float32)
            qs = tl.full((BLOCK_V,), 0.0, tl.float32)
            for start in range(0, V, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                b = _logits(
                    student_ptr, bias_s_ptr, cols, stride_sv, stride_bias_s, scale_s, softcap_s, V, READ_S, CAPPED_S
                )
                b = _shared(b, excluded_ptr, cols, V)
                a = _target(
                    teacher_ptr, bias_t_ptr, excluded_ptr, mixture_ptr, cols, stride_tv, stride_bias_t, scale_t,
                    softcap_t, top_t, total_t, mixture_factor, mixture_offset, V, READ_T, READ_M, MIXTURE, CAPPED_T,
                )  # fmt: skip
                part, q, slope = _element(
                    (a - top_p) * target_factor - log_p, (b - top_q) * factor - log_q, beta, log_beta, log_rest,
                    DIVERGENCE,
                )  # fmt: skip
                found += part
                slopes += q * slope
                qs += q
            divergence = tl.sum(found, 0)
            mean = tl.sum(slopes, 0) / tl.sum(qs, 0)  # so that gradients sum to 0 as if q summed to 1
        loss += loss_weight * divergence
    if HARD:
        if OWN:
            top_y, total_y = _over_lanes(tops_y, sums_y, 1.0)
            log_y = tl.log(total_y)
        else:
            top_y, log_y = top_q, log_q
        loss += hard_weight * (log_y - (labelled - top_y))
    tl.store(losses_ptr + row, weight * loss)

    if gradient_ptr is not None:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            y = _logits(
                student_ptr, bias_s_ptr, cols, stride_sv, stride_bias_s, scale_s, softcap_s, V, READ_S, CAPPED_S
            )
            gradient = tl.full((BLOCK_V,), 0.0, tl.float32)
            if SOFT:
                b = _shared(y, excluded_ptr, cols, V)
                a = _target(
                    teacher_ptr, bias_t_ptr, excluded_ptr, mixture_ptr, cols, stride_tv, stride_bias_t, scale_t,
                    softcap_t, top_t, total_t, mixture_factor, mixture_offset, V, READ_T, READ_M, MIXTURE, CAPPED_T,
                )  # fmt: skip
                a, b = (a - top_p) * target_factor - log_p, (b - top_q) * factor - log_q
                if DIVERGENCE == "forward_kl":
                    gradient += weight * soft_weight * (tl.exp(b) - tl.exp(a))
                else:
                    _, q, slope = _element(a, b, beta, log_beta, log_rest, DIVERGENCE)
                    gradient += weight * soft_weight * (q * (slope - mean))
            if HARD:
                one = tl.where(cols == label, 1.0, 0.0)
                gradient += weight * hard_weight * (tl.exp(y - top_y - log_y) - one)
            if CAPPED_S:
                u = y / softcap_s
                gradient *= (1.0 - u) * (1.0 + u)
            # products may read what lies beyond V, and weigh it by 0
            gradient = tl.where(cols < V, gradient * scale_s, 0.0)
            tl.store(gradient_ptr + cols, gradient.to(gradient_ptr.dtype.element_ty), mask=cols < WRITE)


absorb = Launcher(linear_distillation_absorb_kernel)
diverge = Launcher(linear_distillation_diverge_kernel)
