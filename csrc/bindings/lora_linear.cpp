#include "kdkernels/lora_linear.h"

#include <array>
#include <utility>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "philox.h"

namespace kd {
namespace {

using Views = std::vector<MaybeView>;

const View& given(const char* name, const MaybeView& view) {
  if (!view) throw py::value_error(std::string(name) + " is missing");
  return *view;
}

// A call whose layers know their operands. `layers` is (weight, bias, lora_A, lora_B, projected) of each.
LoraLinear make_call(const View& input, const std::vector<Views>& operands, const std::vector<double>& scalings,
                     const std::vector<double>& dropout_p, const std::vector<std::pair<uint64_t, uint64_t>>& states,
                     const std::string& accumulate, std::vector<LoraLayer>& layers) {
  const size_t K = operands.size();
  if (scalings.size() != K || dropout_p.size() != K || states.size() != K)
    throw py::value_error("every layer needs its scaling, dropout_p and state");
  const DType accumulator = accumulate == "float64" ? DType::float64 : DType::float32;
  layers.resize(K);
  for (size_t k = 0; k < K; ++k) {
    if (operands[k].size() != 5) throw py::value_error("a layer has five operands");
    LoraLayer& layer = layers[k];
    layer.weight = given("weight", operands[k][0]);
    layer.bias = or_absent(operands[k][1]);
    layer.lora_A = given("lora_A", operands[k][2]);
    layer.lora_B = given("lora_B", operands[k][3]);
    layer.projected = given("projected", operands[k][4]);
    const int64_t d_out = layer.weight.rows, r = layer.lora_A.rows;
    check_shape("weight", layer.weight, d_out, input.cols);
    check_shape("bias", layer.bias, d_out, 1);
    check_shape("lora_A", layer.lora_A, r, input.cols);
    check_shape("lora_B", layer.lora_B, d_out, r);
    check_shape("projected", layer.projected, input.rows, r);
    check_dtype("projected", layer.projected, accumulator);
    if (layer.projected.row_stride != r) throw py::value_error("projected must be contiguous");
    if (!(dropout_p[k] >= 0 && dropout_p[k] < 1)) throw py::value_error("dropout_p must be at least 0 and below 1");
    layer.scaling = scalings[k];
    layer.dropout_p = dropout_p[k];
    layer.seed = states[k].first;
    layer.offset = states[k].second;
  }
  LoraLinear call;
  call.input = input;
  call.layers = layers.data();
  call.count = static_cast<int64_t>(K);
  call.accumulate = accumulator;
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
      [](const View& input, const std::vector<Views>& operands, const std::vector<double>& scalings,
         const std::vector<double>& dropout_p, const std::vector<std::pair<uint64_t, uint64_t>>& states,
         const std::string& accumulate, const Views& outputs, int threads) {
        check_threads(threads);
        std::vector<LoraLayer> layers;
        const LoraLinear call = make_call(input, operands, scalings, dropout_p, states, accumulate, layers);
        if (outputs.size() != layers.size()) throw py::value_error("every layer needs its output");
        for (size_t k = 0; k < layers.size(); ++k) {
          layers[k].output = or_absent(outputs[k]);
          check_shape("output", layers[k].output, input.rows, layers[k].weight.rows);
        }
        const auto& kernels = *current_isa().lora_linear;
        py::gil_scoped_release release;
        kernels.forward(call, threads);
      },
      py::arg("input"), py::arg("operands"), py::arg("scalings"), py::arg("dropout_p"), py::arg("states"),
      py::arg("accumulate"), py::arg("outputs"), py::arg("threads"));

  m.def(
      "lora_linear_backward",
      [](const View& input, const std::vector<Views>& operands, const std::vector<double>& scalings,
         const std::vector<double>& dropout_p, const std::vector<std::pair<uint64_t, uint64_t>>& states,
         const std::string& accumulate, bool base_done, const Views& grad_outputs, const MaybeView& grad_input,
         const std::vector<Views>& grads, int threads) {
        check_threads(threads);
        std::vector<LoraLayer> layers;
        LoraLinear call = make_call(input, operands, scalings, dropout_p, states, accumulate, layers);
        if (grad_outputs.size() != layers.size() || grads.size() != layers.size())
          throw py::value_error("every layer needs its gradients");
        call.base_done = base_done;
        call.grad_input = or_absent(grad_input);
        check_shape("grad_input", call.grad_input, input.rows, input.cols);
        for (size_t k = 0; k < layers.size(); ++k) {
          LoraLayer& layer = layers[k];
          if (grads[k].size() != 4) throw py::value_error("a layer has four gradients");
          layer.grad_output = given("grad_output", grad_outputs[k]);
          layer.grad_weight = or_absent(grads[k][0]);
          layer.grad_bias = or_absent(grads[k][1]);
          layer.grad_A = or_absent(grads[k][2]);
          layer.grad_B = or_absent(grads[k][3]);
          check_shape("grad_output", layer.grad_output, input.rows, layer.weight.rows);
          check_shape("grad_weight", layer.grad_weight, layer.weight.rows, layer.weight.cols);
          check_shape("grad_bias", layer.grad_bias, layer.weight.rows, 1);
          check_shape("grad_A", layer.grad_A, layer.lora_A.rows, layer.lora_A.cols);
          check_shape("grad_B", layer.grad_B, layer.lora_B.rows, layer.lora_B.cols);
        }
        const auto& kernels = *current_isa().lora_linear;
        py::gil_scoped_release release;
        kernels.backward(call, threads);
      },
      py::arg("input"), py::arg("operands"), py::arg("scalings"), py::arg("dropout_p"), py::arg("states"),
      py::arg("accumulate"), py::arg("base_done"), py::arg("grad_outputs"), py::arg("grad_input"), py::arg("grads"),
      py::arg("threads"));
}

}  // namespace kd
