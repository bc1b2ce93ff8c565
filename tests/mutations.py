# ruff: noqa: E501  one row of the table is one line
"""One mistake for each kernel: (file, what it says, what it would wrongly say). `validate` must notice every one.

Where the cases that come first do not show it, the mistake names one that does, and the others are not run before it.

A text that no longer occurs exactly once fails its test: whoever changes a kernel moves its mistake along.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A wrong line in one kernel."""

    kernel: str
    file: str
    right: str
    wrong: str
    case: str = "*"

    @property
    def ops(self) -> tuple[str, ...]:
        """The operators that the file belongs to; empty: all."""
        return OPS.get(self.file, ())


TRITON = "kdkernels/ops/projection_alignment/kernels.py"
ALIGNMENT = "csrc/cpu/projection_alignment.cpp"
ROWS = "csrc/cpu/alignment_rows.h"
CHOLESKY = "csrc/cpu/cholesky.h"
DISTILLATION = "csrc/cpu/linear_distillation.cpp"
AT_ONCE = "csrc/bindings/linear_distillation.cpp"
DISTILLATION_TRITON = "kdkernels/ops/linear_distillation/kernels.py"
VECTOR_MATH = "csrc/cpu/vector_math.h"
LORA = "csrc/cpu/lora_linear.cpp"
LOW_RANK = "csrc/cpu/low_rank.h"
DROPOUT = "csrc/cpu/dropout.h"
LORA_TRITON = "kdkernels/ops/lora_linear/kernels.py"
LANES = "csrc/cpu/lanes.h"
GENERATOR = "csrc/cpu/generator.h"
HOUSEHOLDER = "csrc/cpu/householder.h"
JACOBI = "csrc/cpu/jacobi.h"
SPECTRUM = "csrc/cpu/spectrum.h"
SVD = "csrc/cpu/svd.cpp"
HANKEL = "csrc/cpu/hankel.cpp"
RECURRENCE = "csrc/cpu/linear_recurrence.cpp"
LRU_BLOCK = "csrc/cpu/lru_block.cpp"
RECURRENCE_TRITON = "kdkernels/ops/linear_recurrence/kernels.py"
PARTIAL = "csrc/cpu/partial.h"

OPS = dict.fromkeys((TRITON, ALIGNMENT, ROWS, CHOLESKY), ("projection_alignment_loss",))
OPS |= dict.fromkeys((DISTILLATION, AT_ONCE, VECTOR_MATH, DISTILLATION_TRITON), ("linear_distillation_loss",))
OPS |= dict.fromkeys((LORA, LOW_RANK, DROPOUT, LORA_TRITON), ("lora_linear",))
OPS |= dict.fromkeys((HOUSEHOLDER, JACOBI, SPECTRUM, SVD), ("svd", "svdvals"))
OPS |= dict.fromkeys((LANES, GENERATOR, HANKEL), ("gramian_factors", "hankel_singular_values"))
OPS |= dict.fromkeys((RECURRENCE, LRU_BLOCK, PARTIAL, RECURRENCE_TRITON), ("linear_recurrence",))

TRITON_KERNELS = [
    Mutation("_load", TRITON, "in_row = cols < D", "in_row = cols < D - 1"),
    Mutation("_store", TRITON, "x = tl.where(counts[:, None], x, 0.0).to(", "x = (1.01 * x).to("),
    Mutation("_weights", TRITON, "return w * scale, w != 0", "return w * scale, w > 0", "frozen teacher, signed weights"),
    Mutation("_inverse_norm", TRITON, "1.0 / tl.sqrt_rn(square))", "1.001 / tl.sqrt_rn(square))"),
    Mutation("_loss_and_slope", TRITON, "loss = tl.where(negative, 2.0 - h, h)", "loss = h"),
    Mutation("projection_alignment_direct_kernel", TRITON, "slope = 2.0 * w / D", "slope = w / D"),
    Mutation("projection_alignment_gram_kernel", TRITON, "by_b = -slope * scale_s * scale_t", "by_b = -slope * scale_s * scale_s"),
    Mutation("_tile", LORA_TRITON, "mask=(rows < row_count)[:, None] & (cols < col_count)[None, :], other", "mask=(rows < row_count)[:, None] & (cols < col_count - 1)[None, :], other"),
    Mutation("_put", LORA_TRITON, "tl.store(ptr + offsets, x.to(", "tl.store(ptr + offsets, (1.01 * x).to("),
    Mutation("_dot", LORA_TRITON, "return tl.dot(a, b, total, ", "return tl.dot(a, b, 1.01 * total, "),
    Mutation("_masked", LORA_TRITON, "tl.interleave(w0 >= least, w2 >= least), tl.interleave(w1 >= least,", "tl.interleave(w0 >= least, w1 >= least), tl.interleave(w2 >= least,"),
    Mutation("lora_linear_project_kernel", LORA_TRITON, "N, RANKS[k], totals[k] * scales[k])", "N, RANKS[k], totals[k])"),
    Mutation("lora_linear_reduce_kernel", LORA_TRITON, "m = _tile(m_ptrs[k], ranks, rows, 1, RANKS[k], RANKS[k], N)", "m = _tile(m_ptrs[k], ranks, rows, 1, RANKS[k], RANKS[k], N - 1)"),
    Mutation("lora_linear_adapter_kernel", LORA_TRITON, "s = _tile(s_ptr, rows, ranks, RANK, 1, N, RANK) * scale", "s = _tile(s_ptr, rows, ranks, RANK, 1, N, RANK)"),
    Mutation("lora_linear_expand_kernel", LORA_TRITON, "added = total + _masked(added, states_ptr, PLACES[k], thresholds[k], rows, first_col)", "added = total + _masked(added, states_ptr, PLACES[k], thresholds[k], rows, 0)", "blocks"),
    Mutation("lora_linear_sum_kernel", LORA_TRITON, "rows = step * BLOCK_N + tl.arange(0, BLOCK_N)", "rows = step * BLOCK_N + tl.arange(0, BLOCK_N) // 2 * 2"),
    Mutation("_log_one_plus", DISTILLATION_TRITON, "return 2.0 * s *", "return 2.001 * s *"),
    Mutation("_log_add", DISTILLATION_TRITON, "low, high + _log_one_plus(tl.exp(low - high))", "low, high + tl.exp(low - high)"),
    Mutation("_tanh", DISTILLATION_TRITON, "near, tl.where(x < 0, -far, far))", "near, far)", "wide"),
    Mutation("_logits", DISTILLATION_TRITON, "x *= scale", ""),
    Mutation("_shared", DISTILLATION_TRITON, "other=0.0) == 0, x, _NONE)", "other=0.0) == 0, x, x)", "mapped"),
    Mutation("_add_exponential", DISTILLATION_TRITON, "total * e + 1.0, total + e)", "total + 1.0, total + e)", "wide"),
    Mutation("_add_apart", DISTILLATION_TRITON, "kept * (apart + sums_p * moved))", "kept * apart)", "wide"),
    Mutation("_over_lanes", DISTILLATION_TRITON, "tl.sum(totals * tl.exp((tops - top) * factor), 0)", "tl.sum(totals, 0)"),
    Mutation("_softmax_of_row", DISTILLATION_TRITON, "_shared(x, excluded_ptr, cols, V), factor)", "x, factor)", "mapped"),
    Mutation("_target", DISTILLATION_TRITON, "x = (x - top) * factor + (offset - tl.log(total))", "x = (x - top) * factor + offset", "three teachers"),
    Mutation("_element", DISTILLATION_TRITON, "slope = tl.where(q == 0, 0.0, log_q - log_p)", "slope = tl.where(q == 0, 0.0, log_p - log_q)"),
    Mutation("linear_distillation_absorb_kernel", DISTILLATION_TRITON, "None if FIRST else mixture_ptr", "None", "three teachers"),
    Mutation("linear_distillation_diverge_kernel", DISTILLATION_TRITON, "gradient *= (1.0 - u) * (1.0 + u)", "gradient *= 1.0 - u"),
    Mutation("_read", RECURRENCE_TRITON, "re, im = tl.split(both)", "im, re = tl.split(both)"),
    Mutation("_write", RECURRENCE_TRITON, "both = tl.join(re, im)", "both = tl.join(re, re)"),
    Mutation("_step", RECURRENCE_TRITON, "im = u_im + a_re * x_im + a_im * x_re", "im = u_im + a_re * x_im"),
    Mutation("_factor", RECURRENCE_TRITON, "lanes % n if SHARED else lanes, mask", "lanes % n, mask", "own λ, initial state, reverse"),
    Mutation("_rows", RECURRENCE_TRITON, "+ time) * n + lanes % n, -n if", "+ time) * n + lanes * 0, -n if"),
    Mutation("_tile", RECURRENCE_TRITON, "mask & (first + k < stop), COMPLEX)\n    return", "mask & (first + k < stop - 1), COMPLEX)\n    return"),
    Mutation("_scan", RECURRENCE_TRITON, "(re != 0) | (im != 0) if CARRY", "(re == 0) | (im == 0) if CARRY", "cut in time"),
    Mutation("_before", RECURRENCE_TRITON, "count + lanes, count, mask, chunk * 0 + 1, chunk,", "count + lanes, count, mask, chunk * 0 + 1, chunk - 1,", "cut in time"),
    Mutation("linear_recurrence_ends_kernel", RECURRENCE_TRITON, "while step < length:", "while step < length - 1:", "cut in time"),
    Mutation("linear_recurrence_scan_kernel", RECURRENCE_TRITON, "there, False, COMPLEX, STEPS)", "chunk > 0, False, COMPLEX, STEPS)", "own λ, initial state, reverse"),
    Mutation("linear_recurrence_backward_kernel", RECURRENCE_TRITON, "sum_im += part_im.to(tl.float64)", "sum_im = part_im.to(tl.float64)"),
    Mutation("_against", RECURRENCE_TRITON, "im = sum_im + g_im * h_re - g_re * h_im", "im = sum_im - g_im * h_re + g_re * h_im"),
    Mutation("linear_recurrence_sum_kernel", RECURRENCE_TRITON, "row = (group * STEPS + step) * BLOCK_N + ", "row = group * STEPS * BLOCK_N + "),
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
    Mutation("cholesky", CHOLESKY, "row[j] -= factor * above[j];", "row[j] += factor * above[j];"),
    Mutation("exp_negative", VECTOR_MATH, "0.4999999203230322f", "0.5004f"),
    Mutation("log_one_plus", VECTOR_MATH, "return 2.0f * s *", "return 2.001f * s *"),
    Mutation("tanh", VECTOR_MATH, "size < 0.6f ? near : x < 0.0f ? -far : far", "size < 0.6f ? near : far"),
    Mutation("log_add", VECTOR_MATH, "log_one_plus(exp_negative(low - high))", "exp_negative(low - high)"),
    Mutation("read_logits", DISTILLATION, "if (scale != 1) v *= scale;", ""),
    Mutation("largest", DISTILLATION, "most = most < v ? v : most;", "most = v;"),
    Mutation("Part", DISTILLATION, "return x.at(j) * share + offset;", "return x.at(j) + offset;"),
    Mutation("absorb", DISTILLATION, "write(to + j, count, first ? x : mixed", "write(to + j, count, true ? x : mixed"),
    Mutation("element", DISTILLATION, "const Vector<T> slope = q == zero ? zero : log_q - log_p;", "const Vector<T> slope = q == zero ? zero : log_p - log_q;"),
    Mutation("diverge_row", DISTILLATION, "g *= (1 - u) * (1 + u);", "g *= 1 - u;"),
    Mutation("diverge", DISTILLATION, "for (int64_t i = 0; i < x.rows; ++i)\n      sum +=", "for (int64_t i = 1; i < x.rows; ++i)\n      sum +="),
    Mutation("linear_distillation_at_once", AT_ONCE, "kernels.multiply(transposed(student.view), states,", "kernels.multiply(transposed(teacher.view), states,", "close"),
    Mutation("project", LOW_RANK, "out[(i + q) * r + s * cols + c] = scale * sums[q * cols + c];", "out[(i + q) * r + s * cols + c] = sums[q * cols + c];"),
    Mutation("OuterSum", LOW_RANK, "started_ || i > begin);", "started_ || i >= begin);"),
    Mutation("Dropout", DROPOUT, "words[j] >= limit ? scale * load<T>(from + j) : T{};", "words[j] >= limit ? load<T>(from + j) : T{};"),
    Mutation("forward", LORA, "const Term<T> own = low_rank(member, row, scaling);", "const Term<T> own = low_rank(layer, row, scaling);"),
    Mutation("add_dropped", LORA, "dropout.apply(begin + i + q, 0, d, row, dropped);", "dropout.apply(i + q + 1, 0, d, row, dropped);"),
    Mutation("MaskedProduct", LORA, "call.base_done || k > 0, &A[k],", "call.base_done, &A[k],"),
    Mutation("differentiate_input", LORA, "if (call.base_done || leader(call, k, same) < k) continue;", "if (call.base_done) continue;"),
    Mutation("one_minus", LANES, "return sum + ((lost + lost_too) - (a.error + b.error));", "return sum;"),
    Mutation("Alignment", GENERATOR, "first = add_product(first * cosine[c], other, conj(sine[c]));", "first = add_product(first * cosine[c], other, sine[c]);"),
    Mutation("factor_gramian", GENERATOR, "row_i[0] = share * apart;", "row_i[0] = share * lambda[i];"),
    Mutation("factor_gramian's denominator", GENERATOR, "-apart, conj(pivot)", "-apart, pivot"),
    Mutation("residual", GENERATOR, "if (residual) residual[k] = trace;", "if (residual) residual[k] = best;"),
    Mutation("householder", HOUSEHOLDER, "v[0] = phase * (size + norm);", "v[0] = phase * norm;"),
    Mutation("apply_reflectors", HOUSEHOLDER, "B + j * stride_B + k, rows - k);", "B + j * stride_B + k, rows - k - 1);"),
    Mutation("Schedule", JACOBI, "sum <= 2 * rows - 3;", "sum <= 2 * rows - 4;"),
    Mutation("Jacobi", JACOBI, "y[i + u] = add_product(yi, B, xi);", "y[i + u] = add_product(yi, A, xi);"),
    Mutation("carry_out_twos", JACOBI, "y0[i] = add_product(y, D1, xx);", "y0[i] = add_product(y, D0, xx);"),
    Mutation("sort", SPECTRUM, "const Mask<T> wrong = a < b;", "const Mask<T> wrong = a > b;"),
    Mutation("reorder", SPECTRUM, "lane(diagonal[order[j][l]], part, l);", "lane(diagonal[j], part, l);"),
    Mutation("complete_right", SPECTRUM, "if (values[j][l] == 0) complete(j, l);", "if (values[j][l] < 0) complete(j, l);"),
    Mutation("restore", SPECTRUM, "lane(x[places[i][l]], part, l)", "lane(x[i], part, l)"),
    Mutation("decompose_group", SVD, "svd.values[k] * inverse_scale;", "svd.values[k];"),
    Mutation("inner_products", HANKEL, "const N y = held(Y[c * n + i]);", "const N y = held(Y[i]);"),
    Mutation("project", HANKEL, "const N v = V[j * stride + k] * scale[j];", "const N v = V[j * stride + k];"),
    Mutation("Systems", HANKEL, "lambda_[i] = conj(lambda_[i]);", ""),
    Mutation("exchanged", RECURRENCE, "IndexOf<float>::type{1, 0, 3, 2});", "IndexOf<float>::type{1, 0, 2, 3});"),
    Mutation("Factor", RECURRENCE, "(l % 2 == 0) == conjugate ? Lambda[l | 1]", "l % 2 != 0 ? Lambda[l | 1]"),
    Mutation("times_plus", RECURRENCE, "return is_complex ? c + im * exchanged(x) : c;", "return is_complex ? c + im * x : c;"),
    Mutation("Sum", RECURRENCE, "if (is_complex) crossed = crossed + g * exchanged(h);", "if (is_complex) crossed = g * exchanged(h);"),
    Mutation("move_to", RECURRENCE, "total[l] += double(straight[l]);", "total[l] = double(straight[l]);"),
    Mutation("read", RECURRENCE, "const T* from = row + at + v * kLanes<T>;", "const T* from = row + at + (full ? v : 0) * kLanes<T>;"),
    Mutation("write", RECURRENCE, "store_first<T>(to, x, last);", "store_first<T>(to, x, 1);"),
    Mutation("for_blocks", RECURRENCE, "if (vectors == 3) f(Block<T, 3, false>{at, last});", "if (vectors == 3) f(Block<T, 2, false>{at, last});"),
    Mutation("Factors", RECURRENCE, "{Lambda + block.at + v * kLanes<T>, block.count(v), conjugate}", "{Lambda + block.at, block.count(v), conjugate}"),
    Mutation("Share", RECURRENCE, "(call.Lambda.rows == 1 ? 0 : sequence * row) + at;", "at;"),
    Mutation("of", RECURRENCE, "static_cast<T*>(view.data) + sequence * row + at", "static_cast<T*>(view.data) + at"),
    Mutation("forward", RECURRENCE, "before = h + (t + steps - 1) * stride;", "before = h + t * stride;"),
    Mutation("run", RECURRENCE, "before ? block.read(before, v) : Vector<T>{};", "Vector<T>{};"),
    Mutation("backward", RECURRENCE, "if (start && begin == 0) reach_start(", "if (start && end == call.steps) reach_start("),
    Mutation("turn_back", RECURRENCE, "last ? Vector<T>{} : block.read(g + end * stride, v);", "Vector<T>{};"),
    Mutation("turn_back's first step", RECURRENCE, "t > 0 ? h + (t - 1) * stride : initial;", "t > 0 ? h + (t - 1) * stride : nullptr;"),
    Mutation("reach_start", RECURRENCE, "L.of[v].times_plus(block.read(g, v), Vector<T>{}));", "block.read(g, v));"),
    Mutation("for_shares", RECURRENCE, "min(N, (index + 1) * group), index);", "index * group + 1, index);"),
    Mutation("backward's total", RECURRENCE, "sum += totals[i * row + l];", "sum = totals[i * row + l];"),
    Mutation("Rows", LRU_BLOCK, "k < count * H ? from[k] : T{};", "from[k < count * H ? k : 0];"),
    Mutation("Scales", LRU_BLOCK, "square[w] += apart * apart;", "square[w] = apart * apart;"),
    Mutation("norm_gradients", LRU_BLOCK, "- mean[w] - x[j * kWide + w] * along[w]", "- mean[w]"),
    Mutation("read_mask", LRU_BLOCK, "min(rows.first + p, last) / steps * H;", "rows.first / steps * H;"),
    Mutation("prepare", LRU_BLOCK, "n.cumulative + s * n.density;", "n.cumulative;"),
    Mutation("mix_gradients", LRU_BLOCK, "share[k] = arriving * a[k] * (1 - share[k]);", "share[k] = arriving * a[k];"),
    Mutation("move_sums", LRU_BLOCK, "totals[k] += total<T>(sums[k]);", "totals[k] = total<T>(sums[k] + sums[k]);"),
    Mutation("load_first", PARTIAL, "x[l] = p[l];", "x[l] = p[0];"),
    Mutation("store_first", PARTIAL, "p[l] = x[l];", "p[l] = x[0];"),
]  # fmt: skip
