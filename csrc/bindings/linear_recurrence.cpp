#include "kdkernels/linear_recurrence.h"

#include "bindings.h"
#include "isa.h"
#include "memory.h"

namespace kd {
namespace {

LinearRecurrence call_of(const Batch& Lambda, const Batch& states, const Batch& initial, bool reverse) {
  check_given("states", states.matrices);
  check_given("Lambda", Lambda.matrices);
  const int64_t n = states.cols, T = states.rows;
  check_batch("states", states, states, T, n, states.is_complex);
  Batch one = states;
  one.matrices.rows = 1;
  check_batch("Lambda", Lambda, Lambda.matrices.rows == 1 ? one : states, n, 1, states.is_complex);
  check_batch("initial", initial, states, n, 1, states.is_complex);
  return {Lambda.matrices, initial.matrices, states.matrices, T, n, states.is_complex, reverse};
}

void check_like(const char* name, const Batch& batch, const Batch& states) {
  check_given(name, batch.matrices);
  check_batch(name, batch, states, states.rows, states.cols, states.is_complex);
}

// Large outputs are fresh memory, whose first touch in small pages would cost more than the recurrence.
void expect_output(const View& view) {
  if (view) expect_whole(view.data, static_cast<size_t>(view.rows * view.cols * size_of(view.dtype)));
}

}  // namespace

void bind_linear_recurrence(py::module_& m) {
  m.def(
      "linear_recurrence",
      [](const Batch& Lambda, const Batch& input, const Batch& initial, const Batch& states, bool reverse,
         int threads) {
        check_threads(threads);
        const LinearRecurrence call = call_of(Lambda, states, initial, reverse);
        check_like("input", input, states);
        const auto& kernels = *current_isa().linear_recurrence;
        py::gil_scoped_release release;
        expect_output(call.states);
        kernels.forward(call, input.matrices, threads);
      },
      "Fill `states`, which may be `input` itself.", py::arg("Lambda"), py::arg("input"), py::arg("initial"),
      py::arg("states"), py::arg("reverse"), py::arg("threads"));
  m.def(
      "linear_recurrence_backward",
      [](const Batch& grad, const Batch& Lambda, const Batch& states, const Batch& initial, const Batch& grad_input,
         const Batch& grad_Lambda, const Batch& grad_initial, bool reverse, int threads) {
        check_threads(threads);
        const LinearRecurrence call = call_of(Lambda, states, initial, reverse);
        check_like("grad", grad, states);
        check_like("grad_input", grad_input, states);
        check_batch("grad_Lambda", grad_Lambda, Lambda, Lambda.rows, 1, Lambda.is_complex);
        check_batch("grad_initial", grad_initial, states, states.cols, 1, states.is_complex);
        const LinearRecurrenceGradients to{grad_input.matrices, grad_Lambda.matrices, grad_initial.matrices};
        const auto& kernels = *current_isa().linear_recurrence;
        py::gil_scoped_release release;
        expect_output(to.input);
        kernels.backward(call, grad.matrices, to, threads);
      },
      "Fill the gradients that are given; `grad_input` may be `grad` itself.", py::arg("grad"), py::arg("Lambda"),
      py::arg("states"), py::arg("initial"), py::arg("grad_input"), py::arg("grad_Lambda"), py::arg("grad_initial"),
      py::arg("reverse"), py::arg("threads"));
}

}  // namespace kd
