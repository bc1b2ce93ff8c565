#include "kdkernels/projection_alignment.h"

#include <array>

#include "bindings.h"
#include "isa.h"

namespace kd {
namespace {

using Six = std::array<MaybeView, 6>;  // student, teacher, student_proj, teacher_proj, student_bias, teacher_bias

Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::cosine;
  if (name == "mse") return Metric::mse;
  if (name == "angular") return Metric::angular;
  throw py::value_error("metric is '" + name + "', but must be cosine, mse or angular");
}

Alignment make_alignment(const Six& operands, const Six& gradients, const MaybeView& weights, const MaybeView& losses,
                         const MaybeView& total, const std::string& metric, const std::string& accumulate) {
  static constexpr const char* names[] = {"student",      "teacher",      "student_proj",
                                          "teacher_proj", "student_bias", "teacher_bias"};
  Alignment p;
  p.metric = parse_metric(metric);
  p.accumulate = accumulate == "float64" ? DType::float64 : DType::float32;
  for (int x = 0; x < 2; ++x) {
    p.sides[x] = {or_absent(operands[x]),  or_absent(operands[2 + x]),  or_absent(operands[4 + x]),
                  or_absent(gradients[x]), or_absent(gradients[2 + x]), or_absent(gradients[4 + x])};
    if (!p.sides[x].points) throw py::value_error(std::string(names[x]) + " is missing");
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
  p.weights = or_absent(weights);
  p.losses = or_absent(losses);
  p.total = or_absent(total);
  check_shape("weights", p.weights, p.N, 1);
  check_dtype("weights", p.weights, p.accumulate);
  check_shape("losses", p.losses, p.N, 1);
  check_shape("total", p.total, 1, 1);
  return p;
}

Grams make_grams(const Alignment& p, const View& matrix, const MaybeView& teacher_norms, bool norms_known) {
  const int64_t K = (p.sides[0].proj ? p.sides[0].proj.cols : 0) + (p.sides[1].proj ? p.sides[1].proj.cols : 0);
  check_shape("matrix", matrix, K, K);
  check_dtype("matrix", matrix, p.accumulate);
  for (const AlignmentSide& side : p.sides)
    if (side.bias) throw py::value_error("a bias must be one more input column here");
  Grams grams{matrix, or_absent(teacher_norms), norms_known};
  check_shape("teacher_norms", grams.teacher_norms, p.N, 1);
  check_dtype("teacher_norms", grams.teacher_norms, DType::float64);
  return grams;
}

}  // namespace

void bind_projection_alignment(py::module_& m) {
  m.def(
      "projection_alignment_direct",
      [](const Six& operands, const Six& gradients, const MaybeView& weights, const MaybeView& losses,
         const MaybeView& total, const std::string& metric, const std::string& accumulate, int threads) {
        check_threads(threads);
        const Alignment p = make_alignment(operands, gradients, weights, losses, total, metric, accumulate);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        kernels.direct(p, threads);
      },
      py::arg("operands"), py::arg("gradients"), py::arg("weights"), py::arg("losses"), py::arg("total"),
      py::arg("metric"), py::arg("accumulate"), py::arg("threads"));

  m.def(
      "projection_alignment_gram_matrix",
      [](const Six& operands, const View& matrix, const std::string& accumulate, int threads) {
        check_threads(threads);
        const Alignment p = make_alignment(operands, {}, {}, {}, {}, "cosine", accumulate);
        const Grams grams = make_grams(p, matrix, {}, false);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        kernels.gram_matrix(p, grams, threads);
      },
      py::arg("operands"), py::arg("matrix"), py::arg("accumulate"), py::arg("threads"));

  m.def(
      "projection_alignment_factor",
      [](const View& matrix, int threads) {
        check_threads(threads);
        check_shape("matrix", matrix, matrix.rows, matrix.rows);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        return kernels.factor({matrix, {}, false}, threads);
      },
      py::arg("matrix"), py::arg("threads"));

  m.def(
      "projection_alignment_gram",
      [](const Six& operands, const Six& gradients, const MaybeView& weights, const MaybeView& losses,
         const MaybeView& total, const std::string& metric, const std::string& accumulate, const View& matrix,
         const MaybeView& teacher_norms, bool norms_known, int threads) {
        check_threads(threads);
        const Alignment p = make_alignment(operands, gradients, weights, losses, total, metric, accumulate);
        const Grams grams = make_grams(p, matrix, teacher_norms, norms_known);
        const auto& kernels = *current_isa().projection_alignment;
        py::gil_scoped_release release;
        (p.metric == Metric::mse ? kernels.isometric : kernels.gram)(p, grams, threads);
      },
      py::arg("operands"), py::arg("gradients"), py::arg("weights"), py::arg("losses"), py::arg("total"),
      py::arg("metric"), py::arg("accumulate"), py::arg("matrix"), py::arg("teacher_norms"), py::arg("norms_known"),
      py::arg("threads"));
}

}  // namespace kd
