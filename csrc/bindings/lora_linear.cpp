#include "kdkernels/lora_linear.h"

#include <array>
#include <utility>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "philox.h"

namespace kd {
namespace {

using Views = std::vector<View>;

// A call whose layers know their operands, as kdkernels/ops/lora_linear/call.py packs them: `tensors` is the input,
// then weight, lora_A, lora_B and bias of each layer, `numbers` scaling and dropout_p of each.
LoraLinear make_call(const Views& tensors, const std::vector<double>& numbers,
                     const std::vector<std::pair<int64_t, int64_t>>& states, const Views& projected,
                     std::vector<LoraLayer>& layers) {
  const size_t K = projected.size();
  if (tensors.size() != 1 + 4 * K || numbers.size() != 2 * K || (!states.empty() && states.size() != K))
    throw py::value_error("every layer needs its operands, numbers and state");
  LoraLinear call;
  call.input = tensors[0];
  check_given("input", call.input);
  call.accumulate = K && projected[0].dtype == DType::float64 ? DType::float64 : DType::float32;
  layers.resize(K);
  for (size_t k = 0; k < K; ++k) {
    LoraLayer& layer = layers[k];
    const View* operands = &tensors[1 + 4 * k];
    layer.weight = operands[0];
    layer.lora_A = operands[1];
    layer.lora_B = operands[2];
    layer.bias = operands[3];
    layer.projected = projected[k];
    check_given("weight", layer.weight);
    check_given("lora_A", layer.lora_A);
    check_given("lora_B", layer.lora_B);
    check_given("projected", layer.projected);
    const int64_t d_out = layer.weight.rows, r = layer.lora_A.rows;
    check_shape("weight", layer.weight, d_out, call.input.cols);
    check_shape("bias", layer.bias, d_out, 1);
    check_shape("lora_A", layer.lora_A, r, call.input.cols);
    check_shape("lora_B", layer.lora_B, d_out, r);
    check_shape("projected", layer.projected, call.input.rows, r);
    check_dtype("projected", layer.projected, call.accumulate);
    if (layer.projected.row_stride != r) throw py::value_error("projected must be contiguous");
    layer.scaling = numbers[2 * k];
    layer.dropout_p = numbers[2 * k + 1];
    if (!(layer.dropout_p >= 0 && layer.dropout_p < 1))
      throw py::value_error("dropout_p must be at least 0 and below 1");
    if (layer.dropout_p > 0 && states.empty()) throw py::value_error("every mask needs its state");
    if (!states.empty()) {
      layer.seed = static_cast<uint64_t>(states[k].first);
      layer.offset = static_cast<uint64_t>(states[k].second);
    }
  }
  call.layers = layers.data();
  call.count = static_cast<int64_t>(K);
  return call;
}

}  // namespace

void bind_lora_linear(py::module_& m) {
  m.def(
      "philox4x32",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        const PhiloxBlock block = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::vector<uint32_t>(block.words, block.words + 4);
      },
      py::arg("counter"), py::arg("key"));

  m.def(
      "lora_linear_forward",
      [](const Views& tensors, const std::vector<double>& numbers,
         const std::vector<std::pair<int64_t, int64_t>>& states, const Views& projected, const Views& outputs,
         int threads) {
        check_threads(threads);
        std::vector<LoraLayer> layers;
        const LoraLinear call = make_call(tensors, numbers, states, projected, layers);
        if (outputs.size() != layers.size()) throw py::value_error("every layer needs its output");
        for (size_t k = 0; k < layers.size(); ++k) {
          layers[k].output = outputs[k];
          check_shape("output", layers[k].output, call.input.rows, layers[k].weight.rows);
        }
        const auto& kernels = *current_isa().lora_linear;
        py::gil_scoped_release release;
        kernels.forward(call, threads);
      },
      "Without outputs: `projected` alone.", py::arg("tensors"), py::arg("numbers"), py::arg("states"),
      py::arg("projected"), py::arg("outputs"), py::arg("threads"));

  m.def(
      "lora_linear_backward",
      [](const Views& tensors, const std::vector<double>& numbers,
         const std::vector<std::pair<int64_t, int64_t>>& states, const Views& projected, const Views& grad_outputs,
         const Views& grads, bool base_done, int threads) {
        check_threads(threads);
        std::vector<LoraLayer> layers;
        LoraLinear call = make_call(tensors, numbers, states, projected, layers);
        if (grad_outputs.size() != layers.size() || grads.size() != tensors.size())
          throw py::value_error("every layer needs its gradients");
        call.base_done = base_done;
        call.grad_input = grads[0];
        check_shape("grad_input", call.grad_input, call.input.rows, call.input.cols);
        for (size_t k = 0; k < layers.size(); ++k) {
          LoraLayer& layer = layers[k];
          const View* room = &grads[1 + 4 * k];
          layer.grad_output = grad_outputs[k];
          layer.grad_weight = room[0];
          layer.grad_A = room[1];
          layer.grad_B = room[2];
          layer.grad_bias = room[3];
          check_given("grad_output", layer.grad_output);
          check_shape("grad_output", layer.grad_output, call.input.rows, layer.weight.rows);
          check_shape("grad_weight", layer.grad_weight, layer.weight.rows, layer.weight.cols);
          check_shape("grad_bias", layer.grad_bias, layer.weight.rows, 1);
          check_shape("grad_A", layer.grad_A, layer.lora_A.rows, layer.lora_A.cols);
          check_shape("grad_B", layer.grad_B, layer.lora_B.rows, layer.lora_B.cols);
        }
        const auto& kernels = *current_isa().lora_linear;
        py::gil_scoped_release release;
        kernels.backward(call, threads);
      },
      "`grads` has room in the order of `tensors`, where a gradient is wanted.", py::arg("tensors"), py::arg("numbers"),
      py::arg("states"), py::arg("projected"), py::arg("grad_outputs"), py::arg("grads"), py::arg("base_done"),
      py::arg("threads"));
}

}  // namespace kd
