#include "kdkernels/lru_block.h"

#include "bindings.h"
#include "isa.h"

namespace kd {
namespace {

// Absent, or contiguous, of this size and of the dtype of `like`.
void check(const char* name, const View& view, const View& like, int64_t rows, int64_t cols) {
  if (!view) return;
  check_shape(name, view, rows, cols);
  check_dtype(name, view, like.dtype);
  const bool lies = (cols < 2 || view.col_stride == 1) && (rows < 2 || view.row_stride == cols);
  if (!lies && rows * cols > 0) throw py::value_error(std::string(name) + " must be contiguous");
}

void check_rows(const char* name, const View& view) {
  check_given(name, view);
  if (view.dtype == DType::bfloat16)
    throw py::type_error(std::string(name) + " is bfloat16, but must be float32 or float64");
  check(name, view, view, view.rows, view.cols);
}

// A vector of H numbers, as one row.
View row_of(const char* name, View view, const View& like, int64_t H) {
  if (!view) return view;
  if (view.cols == 1 && view.col_stride == 1) view = {view.data, view.dtype, 1, view.rows, H, view.row_stride};
  check(name, view, like, 1, H);
  return view;
}

GatedMix mix_of(const View& y, const View& u, const View& D, const View& value, const View& value_bias,
                const View& gate, const View& gate_bias, const View& inner, const View& outer, int64_t steps) {
  check_rows("y", y);
  const int64_t rows = y.rows, H = y.cols;
  check_given("u", u);
  check("u", u, y, rows, H);
  const auto given_row = [&](const char* name, const View& view) {
    check_given(name, view);
    return row_of(name, view, y, H);
  };
  for (const auto& [name, view] : {std::pair{"value", value}, std::pair{"gate", gate}}) {
    check_given(name, view);
    check(name, view, y, H, H);
  }
  if (steps < 0 || (steps == 0 ? rows != 0 : rows % steps != 0))
    throw py::value_error("steps is " + std::to_string(steps) + ", which does not divide " + std::to_string(rows) +
                          " rows");
  for (const auto& [name, view] : {std::pair{"inner", inner}, std::pair{"outer", outer}})
    if (rows) check(name, view, y, rows / steps, H);
  return {y,
          u,
          given_row("D", D),
          value,
          given_row("value_bias", value_bias),
          gate,
          given_row("gate_bias", gate_bias),
          inner,
          outer,
          steps};
}

}  // namespace

void bind_lru_block(py::module_& m) {
  m.def(
      "narrow_norm",
      [](const View& input, const View& weight, const View& bias, double eps, const View& out, int threads) {
        check_threads(threads);
        check_rows("input", input);
        check_given("weight", weight);
        check_given("bias", bias);
        check_given("out", out);
        check("out", out, input, input.rows, input.cols);
        const NarrowNorm call{input, row_of("weight", weight, input, input.cols),
                              row_of("bias", bias, input, input.cols), eps};
        const auto& kernels = *current_isa().lru_block;
        py::gil_scoped_release release;
        kernels.norm(call, out, threads);
      },
      "Fill `out`.", py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "narrow_norm_backward",
      [](const View& grad, const View& input, const View& weight, double eps, const View& grad_input,
         const View& grad_weight, const View& grad_bias, int threads) {
        check_threads(threads);
        check_rows("input", input);
        const int64_t H = input.cols;
        check_given("grad", grad);
        check_given("weight", weight);
        check("grad", grad, input, input.rows, H);
        check("grad_input", grad_input, input, input.rows, H);
        const NarrowNorm call{input, row_of("weight", weight, input, H), {}, eps};
        const NarrowNormGradients to{grad_input, row_of("grad_weight", grad_weight, input, H),
                                     row_of("grad_bias", grad_bias, input, H)};
        const auto& kernels = *current_isa().lru_block;
        py::gil_scoped_release release;
        kernels.norm_backward(call, grad, to, threads);
      },
      "Fill the gradients that are given.", py::arg("grad"), py::arg("input"), py::arg("weight"), py::arg("eps"),
      py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"));
  m.def(
      "gated_mix",
      [](const View& x, const View& y, const View& u, const View& D, const View& value, const View& value_bias,
         const View& gate, const View& gate_bias, const View& inner, const View& outer, int64_t steps, const View& out,
         int threads) {
        check_threads(threads);
        const GatedMix call = mix_of(y, u, D, value, value_bias, gate, gate_bias, inner, outer, steps);
        for (const auto& [name, view] : {std::pair{"x", x}, std::pair{"out", out}}) {
          check_given(name, view);
          check(name, view, y, y.rows, y.cols);
        }
        const auto& kernels = *current_isa().lru_block;
        py::gil_scoped_release release;
        kernels.mix(call, x, out, threads);
      },
      "Fill `out`.", py::arg("x"), py::arg("y"), py::arg("u"), py::arg("D"), py::arg("value"), py::arg("value_bias"),
      py::arg("gate"), py::arg("gate_bias"), py::arg("inner"), py::arg("outer"), py::arg("steps"), py::arg("out"),
      py::arg("threads"));
  m.def(
      "gated_mix_backward",
      [](const View& grad, const View& y, const View& u, const View& D, const View& value, const View& value_bias,
         const View& gate, const View& gate_bias, const View& inner, const View& outer, int64_t steps,
         const std::vector<View>& gradients, int threads) {
        check_threads(threads);
        const GatedMix call = mix_of(y, u, D, value, value_bias, gate, gate_bias, inner, outer, steps);
        const int64_t rows = y.rows, H = y.cols;
        check_given("grad", grad);
        check("grad", grad, y, rows, H);
        if (gradients.size() != 7)
          throw py::value_error("gradients has " + std::to_string(gradients.size()) + " members, but must have 7");
        const auto& g = gradients;
        const GatedMixGradients to{g[0],
                                   g[1],
                                   row_of("grad_D", g[2], y, H),
                                   g[3],
                                   row_of("grad_value_bias", g[4], y, H),
                                   g[5],
                                   row_of("grad_gate_bias", g[6], y, H)};
        check("grad_y", to.y, y, rows, H);
        check("grad_u", to.u, y, rows, H);
        check("grad_value", to.value, y, H, H);
        check("grad_gate", to.gate, y, H, H);
        const auto& kernels = *current_isa().lru_block;
        py::gil_scoped_release release;
        kernels.mix_backward(call, grad, to, threads);
      },
      "Fill the gradients that are given: of y, u, D, value and its bias, gate and its bias.", py::arg("grad"),
      py::arg("y"), py::arg("u"), py::arg("D"), py::arg("value"), py::arg("value_bias"), py::arg("gate"),
      py::arg("gate_bias"), py::arg("inner"), py::arg("outer"), py::arg("steps"), py::arg("gradients"),
      py::arg("threads"));
}

}  // namespace kd
