# ruff: noqa: E501  one row of the table is one line
"""One mistake for each kernel: (file, what it says, what it would wrongly say). `validate` must notice every one.

A text that no longer occurs exactly once fails its test: whoever changes a kernel moves its mistake along.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A wrong line in one kernel."""

    kernel: str
    file: str
    right: str
    wrong: str


TRITON = "kdkernels/ops/projection_alignment/triton.py"
ALIGNMENT = "csrc/cpu/projection_alignment.cpp"
ROWS = "csrc/cpu/alignment_rows.h"
LORA = "csrc/cpu/lora_linear.cpp"
LOW_RANK = "csrc/cpu/low_rank.h"

TRITON_KERNELS = [
    Mutation("_load", TRITON, "in_row = cols < D", "in_row = cols < D - 1"),
    Mutation("_store", TRITON, "x = tl.where(counts[:, None], x, 0.0).to(", "x = (1.01 * x).to("),
    Mutation("_weights", TRITON, "return w * scale, w != 0", "return w * scale, w > 0"),
    Mutation("_inverse_norm", TRITON, "1.0 / tl.sqrt_rn(square))", "1.001 / tl.sqrt_rn(square))"),
    Mutation("_loss_and_slope", TRITON, "loss = tl.where(negative, 2.0 - h, h)", "loss = h"),
    Mutation("projection_alignment_direct_kernel", TRITON, "slope = 2.0 * w / D", "slope = w / D"),
    Mutation("projection_alignment_gram_kernel", TRITON, "by_b = -slope * scale_s * scale_t", "by_b = -slope * scale_s * scale_s"),
]  # fmt: skip

NATIVE_KERNELS = [
    Mutation("direct", ALIGNMENT, "sides[x].bias_sum[j] += sides[x].z[i * D + j];", "sides[x].bias_sum[j] = sides[x].z[i * D + j];"),
    Mutation("point_gradient", ALIGNMENT, "static_cast<T>(g.mixed * s + g.own_t * t)", "static_cast<T>(g.mixed * s + g.own_s * t)"),
    Mutation("factor", ALIGNMENT, "gemm(threads, d_s, d_t, p.D, W_s.transposed(), W_t, G + d_s, K);", "gemm(threads, d_s, d_t, p.D - 1, W_s.transposed(), W_t, G + d_s, K);"),
    Mutation("Moments", ALIGNMENT, "scale_[1][i] = static_cast<T>(g.own_t);", "scale_[1][i] = static_cast<T>(g.own_s);"),
    Mutation("gram", ALIGNMENT, "const double tail = grams.tails_known ? tails[begin + i] : dot(t + d_s, t + d_s, d_t);", "const double tail = grams.tails_known ? tails[begin + i] : dot(t + d_s, t + d_s, d_t - 1);"),
    Mutation("cosine_point", ROWS, "const double slope = clamped ? 0 : 1 / __builtin_sqrt((1 - cos) * (1 + cos));", "const double slope = 1 / __builtin_sqrt(1 + cos * cos);"),
    Mutation("sum", ROWS, "for (; i < n; ++i) total += term(i);", ""),
    Mutation("dot", ROWS, "return static_cast<double>(x[i]) * static_cast<double>(y[i]);", "return static_cast<double>(x[i]) * static_cast<double>(x[i]);"),
    Mutation("squared_distance", ROWS, "return difference * difference;", "return -difference * difference;"),
    Mutation("Points", ROWS, "weights_ ? scale_ * weights_[index_[i] * stride_] : scale_;", "weights_ ? scale_ * weights_[i * stride_] : scale_;"),
    Mutation("RowReader", ROWS, "points_.row(begin + i) * view_.row_stride", "(begin + i) * view_.row_stride"),
    Mutation("gemm", "csrc/cpu/gemm.h", "return band.kind == Band::lower ? k0 <= max<int64_t>(j - band.offset, 0) : k0 == 0;", "return true;"),
    Mutation("cholesky", "csrc/cpu/cholesky.h", "row[j] -= factor * above[j];", "row[j] += factor * above[j];"),
    Mutation("project", LOW_RANK, "out[(i + q) * r + s * cols + c] = scale * sums[q * cols + c];", "out[(i + q) * r + s * cols + c] = sums[q * cols + c];"),
    Mutation("OuterSum", LOW_RANK, "started_ || i > begin);", "started_ || i >= begin);"),
    Mutation("Dropout", "csrc/cpu/dropout.h", "return word >= limit ? scale * x : T{};", "return word >= limit ? x : T{};"),
    Mutation("forward", LORA, "const Term<T> own = low_rank(member, row, scaling);", "const Term<T> own = low_rank(layer, row, scaling);"),
    Mutation("add_dropped", LORA, "dropout.apply(begin + i + q, 0, d, row, dropped);", "dropout.apply(i + q + 1, 0, d, row, dropped);"),
    Mutation("differentiate_input", LORA, "if (call.base_done || leader(call, k, same) < k) continue;", "if (call.base_done) continue;"),
]  # fmt: skip
