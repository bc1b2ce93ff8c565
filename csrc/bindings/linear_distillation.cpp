#include "kdkernels/linear_distillation.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "bindings.h"
#include "isa.h"
#include "memory.h"

namespace kd {
namespace {

using Options = std::tuple<std::string, std::string, double, double, double>;  // divergence, mixture, T, beta, alpha
using Numbers = std::tuple<double, double, double>;                            // scale, softcap, share

Divergence parse_divergence(const std::string& name) {
  if (name == "forward_kl") return Divergence::forward_kl;
  if (name == "reverse_kl") return Divergence::reverse_kl;
  if (name == "jsd") return Divergence::jsd;
  if (name == "tvd") return Divergence::tvd;
  throw py::value_error("divergence is '" + name + "', but must be forward_kl, reverse_kl, jsd or tvd");
}

LinearDistillation make(const Options& options, DType accumulate, const View& excluded, const View& mixture, int64_t n,
                        int64_t V) {
  LinearDistillation p;
  std::string divergence, kind;
  std::tie(divergence, kind, p.temperature, p.beta, p.alpha) = options;
  p.divergence = parse_divergence(divergence);
  p.geometric = kind == "geometric";
  if (accumulate == DType::bfloat16) throw py::type_error("sums are float32 or float64");
  p.accumulate = accumulate;
  p.excluded = excluded;
  p.mixture = mixture;
  check_shape("excluded", excluded, V, 1);
  check_dtype("excluded", excluded, accumulate);
  check_shape("mixture", mixture, n, V);
  check_dtype("mixture", mixture, accumulate);
  if (mixture && mixture.col_stride != 1 && V > 1) throw py::value_error("the mixture's rows must be contiguous");
  return p;
}

Logits make_logits(const char* name, const View& rows, const View& bias, const Numbers& numbers, int64_t n, int64_t V) {
  check_given(name, rows);
  check_shape(name, rows, n, V);
  check_shape("bias", bias, V, 1);
  Logits logits{rows, bias};
  std::tie(logits.scale, logits.softcap, logits.share) = numbers;
  return logits;
}

Integers64 labels_of(py::handle tensor, int64_t n, int64_t V) {
  if (tensor.is_none()) return {};
  if (!py::module_::import("torch").attr("int64").is(tensor.attr("dtype")) ||
      !tensor.attr("is_contiguous")().cast<bool>() || tensor.attr("numel")().cast<int64_t>() != n)
    throw py::value_error("labels must be int64, contiguous, and one for each row");
  const Integers64 labels{reinterpret_cast<const int64_t*>(tensor.attr("data_ptr")().cast<intptr_t>()), n};
  for (int64_t i = 0; i < n; ++i)
    if (labels.data[i] < 0 || labels.data[i] >= V)
      throw py::value_error("labels holds " + std::to_string(labels.data[i]) + ", but must be at least 0 and below " +
                            std::to_string(V));
  return labels;
}

// Room of a call that is over before anybody sees what was there.
struct Room {
  Room(DType dtype, int64_t rows, int64_t cols) {
    memory = allocate(size_t(std::max<int64_t>(rows * cols, 1) * size_of(dtype)));
    view = {memory, dtype, rows, cols, cols, 1};
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { release(memory); }
  void* memory;
  View view;
};

View transposed(const View& x) {
  return {x.data, x.dtype, x.cols, x.rows, x.col_stride, x.row_stride};
}

}  // namespace

void bind_linear_distillation(py::module_& m) {
  m.def(
      "linear_distillation_at_once",
      [](const Options& options, const py::tuple& operands, const Numbers& student_numbers,
         const Numbers& teacher_numbers, double divisor, const View& total, const View& grad_states,
         const View& grad_weight, int threads) {
        check_threads(threads);
        if (operands.size() != 6) throw py::value_error("operands are states, weight and bias, and the teacher's");
        std::array<Held, 6> held;
        for (size_t i = 0; i < held.size(); ++i) held[i] = hold(operands[i]);
        const View states = held[0].view, weight = held[1].view, bias = held[2].view, teacher_states = held[3].view,
                   teacher_weight = held[4].view, teacher_bias = held[5].view;
        check_given("states", states);
        check_given("weight", weight);
        check_given("teacher_states", teacher_states);
        check_given("teacher_weight", teacher_weight);
        check_given("total", total);
        const DType dtype = states.dtype;
        const int64_t n = states.rows, d = states.cols, V = weight.rows;
        check_shape("weight", weight, V, d);
        check_shape("teacher_states", teacher_states, n, teacher_weight.cols);
        check_shape("teacher_weight", teacher_weight, V, teacher_states.cols);
        check_shape("grad_states", grad_states, n, d);
        check_shape("grad_weight", grad_weight, V, d);
        check_shape("total", total, 1, 1);
        for (const View& view : {weight, teacher_states, teacher_weight, total, grad_states, grad_weight})
          check_dtype("an operand", view, dtype);
        const Room student(dtype, n, V), teacher(dtype, n, V), losses(dtype, n, 1);
        LinearDistillation p = make(options, dtype, {}, {}, n, V);
        if (p.alpha != 1) throw py::value_error("alpha is not 1, so labels must be given");
        p.student = make_logits("student", student.view, bias, student_numbers, n, V);
        const Logits target = make_logits("teacher", teacher.view, teacher_bias, teacher_numbers, n, V);
        double sum = 0;
        p.divisor = divisor;
        p.losses = losses.view;
        p.total = {&sum, DType::float64, 1, 1, 1, 1};
        p.gradient = grad_states || grad_weight;
        const auto& kernels = *current_isa().linear_distillation;
        py::gil_scoped_release release;
        kernels.multiply(states, transposed(weight), student.view, false, nullptr, threads);
        kernels.multiply(teacher_states, transposed(teacher_weight), teacher.view, false, nullptr, threads);
        kernels.diverge(p, target, threads);
        if (grad_states) kernels.multiply(student.view, weight, grad_states, false, nullptr, threads);
        if (grad_weight) kernels.multiply(transposed(student.view), states, grad_weight, false, nullptr, threads);
        if (dtype == DType::float64)
          *static_cast<double*>(total.data) = sum;
        else
          *static_cast<float*>(total.data) = static_cast<float>(sum);
      },
      "The sum of all losses, and gradients where there is room: of one teacher without labels, all points in one "
      "block, everything of one dtype.",
      py::arg("options"), py::arg("operands"), py::arg("student_numbers"), py::arg("teacher_numbers"),
      py::arg("divisor"), py::arg("total"), py::arg("grad_states"), py::arg("grad_weight"), py::arg("threads"));

  m.def(
      "linear_distillation_absorb",
      [](const Options& options, const View& teacher, const View& bias, const Numbers& numbers, const View& excluded,
         const View& mixture, bool first, int threads) {
        check_threads(threads);
        check_given("mixture", mixture);
        const LinearDistillation p = make(options, mixture.dtype, excluded, mixture, mixture.rows, mixture.cols);
        const Logits logits = make_logits("teacher", teacher, bias, numbers, mixture.rows, mixture.cols);
        const auto& kernels = *current_isa().linear_distillation;
        py::gil_scoped_release release;
        kernels.absorb(p, logits, first, threads);
      },
      py::arg("options"), py::arg("teacher"), py::arg("bias"), py::arg("numbers"), py::arg("excluded"),
      py::arg("mixture"), py::arg("first"), py::arg("threads"));

  m.def(
      "linear_distillation_diverge",
      [](const Options& options, const View& student, const View& student_bias, const Numbers& student_numbers,
         const View& teacher, const View& bias, const Numbers& numbers, const View& excluded, const View& mixture,
         py::handle labels, const View& weights, double divisor, const View& losses, const View& total, bool gradient,
         int threads) {
        check_threads(threads);
        check_given("student", student);
        const int64_t n = student.rows, V = student.cols;
        LinearDistillation p = make(options, student.dtype, excluded, mixture, n, V);
        if (student.col_stride != 1 && V > 1) throw py::value_error("the student's rows must be contiguous");
        p.student = make_logits("student", student, student_bias, student_numbers, n, V);
        const Logits logits = make_logits("teacher", teacher, bias, numbers, n, V);
        p.labels = labels_of(labels, n, V);
        if (p.alpha != 1 && !p.labels.data && n > 0) throw py::value_error("alpha is not 1, so labels must be given");
        p.weights = weights;
        p.divisor = divisor;
        p.losses = losses;
        p.total = total;
        p.gradient = gradient;
        check_shape("weights", weights, n, 1);
        check_dtype("weights", weights, p.accumulate);
        check_given("losses", losses);
        check_shape("losses", losses, n, 1);
        check_shape("total", total, 1, 1);
        check_dtype("total", total, DType::float64);
        const auto& kernels = *current_isa().linear_distillation;
        py::gil_scoped_release release;
        kernels.diverge(p, logits, threads);
      },
      "Losses of a block, and where `gradient` is true the gradient in the place of the student's rows.",
      py::arg("options"), py::arg("student"), py::arg("student_bias"), py::arg("student_numbers"), py::arg("teacher"),
      py::arg("bias"), py::arg("numbers"), py::arg("excluded"), py::arg("mixture"), py::arg("labels"),
      py::arg("weights"), py::arg("divisor"), py::arg("losses"), py::arg("total"), py::arg("gradient"),
      py::arg("threads"));

  m.def(
      "multiply",
      [](const View& A, const View& B, const View& C, bool accumulate, bool rounds, int threads) {
        check_threads(threads);
        check_given("A", A);
        check_given("B", B);
        check_given("C", C);
        check_shape("B", B, A.cols, B.cols);
        check_shape("C", C, A.rows, B.cols);
        if (C.dtype == DType::bfloat16) throw py::type_error("C is bfloat16, but sums are float32 or float64");
        if (C.col_stride != 1 && C.cols > 1) throw py::value_error("the rows of C must be contiguous");
        if (rounds && (A.dtype == DType::float64 || B.dtype == DType::float64 || C.dtype == DType::float64))
          throw py::type_error("float64 is not rounded to bfloat16");
        const Isa& isa = current_isa();
        py::gil_scoped_release release;
        isa.linear_distillation->multiply(A, B, C, accumulate, rounds ? isa.bf16 : nullptr, threads);
      },
      "C = A B, or C += A B. What `rounds` is multiplied as bfloat16 where the processor does that faster.",
      py::arg("A"), py::arg("B"), py::arg("C"), py::arg("accumulate"), py::arg("rounds"), py::arg("threads"));
}

}  // namespace kd
