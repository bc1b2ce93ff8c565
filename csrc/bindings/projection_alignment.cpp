#include "kdkernels/projection_alignment.h"

#include <array>

#include "bindings.h"
#include "isa.h"

namespace kd {
namespace {

using Six = std::array<View, 6>;  // student, teacher, student_proj, teacher_proj, student_bias, teacher_bias

Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::cosine;
  if (name == "mse") return Metric::mse;
  if (name == "angular") return Metric::angular;
  throw py::value_error("metric is '" + name + "', but must be cosine, mse or angular");
}

Alignment make_alignment(const Six& operands, const Six& gradients, const View& weights, double divisor,
                         const View& losses, const View& total, const std::string& metric,
                         const std::string& accumulate) {
  static constexpr const char* names[] = {"student",      "teacher",      "student_proj",
                                          "teacher_proj", "student_bias", "teacher_bias"};
  Alignment p;
  p.metric = parse_metric(metric);
  p.accumulate = accumulate == "float64" ? DType::float64 : DType::float32;
  for (int x = 0; x < 2; ++x) {
    p.sides[x] = {operands[x], operands[2 + x], operands[4 + x], gradients[x], gradients[2 + x], gradients[4 + x]};
    check_given(names[x], p.sides[x].points);
  }
  p.N = p.sides[0].points.rows;
  p.D = p.sides[0].proj ? p.sides[0].proj.rows : p.sides[0].points.cols;
  for (int x = 0; x < 2; ++x) {
    const AlignmentSide& side = p.sides[x];
    const int64_t d = side.points.cols;
    check_shape(names[x], side.points, p.N, side.proj ? d : p.D);
    check_shape(names[2 + x], side.proj, p.D, d);
    check_shape(names[4 + x], side.bias, p.D, 1);
    check_shape("gradient of points", side.grad_points, p.N, d);
    check_shape("gradient of projection", side.grad_proj, p.D, d);
    check_shape("gradient of bias", side.grad_bias, p.D, 1);
    if (!side.proj && (side.bias || side.grad_proj || side.grad_bias))
      throw py::value_error(std::string(names[x]) + " has no projection, so it has no bias and no gradient of either");
  }
  p.weights = weights;
  p.divisor = divisor;
  p.losses = losses;
  p.total = total;
  check_shape("weights", p.weights, p.N, 1);
  check_dtype("weights", p.weights, p.accumulate);
  check_shape("losses", p.losses, p.N, 1);
  check_shape("total", p.total, 1, 1);
  return p;
}

Grams make_grams(const Alignment& p, const View& factor, const View& teacher_tails, bool tails_known,
                 const View& teacher_heads, bool heads_known) {
  for (const AlignmentSide& side : p.sides) {
    if (!side.proj) throw py::value_error("gram needs both projections");
    if (side.bias) throw py::value_error("gram takes a bias as one more input column");
  }
  const int64_t K = p.sides[0].proj.cols + p.sides[1].proj.cols;
  check_shape("factor", factor, K, K);
  check_dtype("factor", factor, p.accumulate);
  Grams grams{factor, teacher_tails, teacher_heads, tails_known, heads_known};
  check_shape("teacher_tails", grams.teacher_tails, p.N, 1);
  check_dtype("teacher_tails", grams.teacher_tails, DType::float64);
  check_shape("teacher_heads", grams.teacher_heads, p.N, p.sides[0].proj.cols);
  check_dtype("teacher_heads", grams.teacher_heads, p.accumulate);
  if (grams.teacher_tails && (p.weights || p.sides[1].grad_points))
    throw py::value_error("teacher_tails is for a teacher without gradient and points without weights");
  if ((tails_known && !grams.teacher_tails) || (heads_known && !grams.teacher_heads) ||
      (grams.teacher_heads && !tails_known))
    throw py::value_error("known tails and heads must be given, and heads go with known tails");
  return grams;
}

}  // namespace

void bind_projection_alignment(py::module_& m) {
  m.def(
      "projection_alignment_factor",
      [](const Six& operands, const View& factor, const std::string& accumulate, int threads) {
        check_threads(threads);
        const Alignment p = make_alignment(operands, {}, {}, 1, {}, {}, "cosine", accumulate);
        const Grams grams = make_grams(p, factor, {}, false, {}, false);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        return kernels.factor(p, grams, threads);
      },
      py::arg("operands"), py::arg("factor"), py::arg("accumulate"), py::arg("threads"));

  m.def(
      "fingerprint",
      [](const View& view, int threads) {
        check_threads(threads);
        if (view.col_stride != 1 && view.cols > 1) throw py::value_error("the rows must be contiguous");
        const int64_t size = size_of(view.dtype);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        return kernels.fingerprint(view.data, view.rows, view.cols * size, view.row_stride * size, threads);
      },
      py::arg("view"), py::arg("threads"));

  m.def(
      "projection_alignment",
      [](const Six& operands, const Six& gradients, const View& weights, double divisor, const View& losses,
         const View& total, const std::string& metric, const std::string& accumulate, int threads, const View& factor,
         const View& teacher_tails, bool tails_known, const View& teacher_heads, bool heads_known) {
        check_threads(threads);
        Alignment p = make_alignment(operands, gradients, weights, divisor, losses, total, metric, accumulate);
        p.bf16 = current_isa().bf16;
        const Grams grams =
            factor ? make_grams(p, factor, teacher_tails, tails_known, teacher_heads, heads_known) : Grams{};
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        factor ? kernels.gram(p, grams, threads) : kernels.direct(p, threads);
      },
      "By the direct method, or by the Gram method if its factor is given.", py::arg("operands"), py::arg("gradients"),
      py::arg("weights"), py::arg("divisor"), py::arg("losses"), py::arg("total"), py::arg("metric"),
      py::arg("accumulate"), py::arg("threads"), py::arg("factor") = py::none(), py::arg("teacher_tails") = py::none(),
      py::arg("tails_known") = false, py::arg("teacher_heads") = py::none(), py::arg("heads_known") = false);
}

}  // namespace kd
