#include "kdkernels/lora_linear.h"

#include <array>
#include <utility>
#include <vector>

#include "bindings.h"
#include "isa.h"
#include "philox.h"

namespace kd {
namespace {

using States = std::vector<std::pair<int64_t, int64_t>>;  // seed and offset of each mask, or none

// A call, as kdkernels/ops/lora_linear/call.py packs it: `tensors` is the input, then weight, lora_A, lora_B and bias
// of each layer, `numbers` scaling and dropout_p of each.
class Call {
 public:
  Call(const py::list& tensors, const std::vector<double>& numbers, const States& states) {
    const size_t K = numbers.size() / 2;
    if (tensors.size() != 1 + 4 * K || numbers.size() != 2 * K || (!states.empty() && states.size() != K))
      throw py::value_error("every layer needs its operands, numbers and state");
    for (const py::handle tensor : tensors) operands.push_back(hold(tensor));
    linear.input = operands[0].view;
    check_given("input", linear.input);
    layers.resize(K);
    for (size_t k = 0; k < K; ++k) {
      LoraLayer& layer = layers[k];
      const Held* own = &operands[1 + 4 * k];
      layer.weight = own[0].view;
      layer.lora_A = own[1].view;
      layer.lora_B = own[2].view;
      layer.bias = own[3].view;
      check_given("weight", layer.weight);
      check_given("lora_A", layer.lora_A);
      check_given("lora_B", layer.lora_B);
      const int64_t d_out = layer.weight.rows, r = layer.lora_A.rows;
      if (layer.bias.rows == 0) layer.bias = {};  // how torch.library passes one that is absent
      check_shape("weight", layer.weight, d_out, linear.input.cols);
      check_shape("bias", layer.bias, d_out, 1);
      check_shape("lora_A", layer.lora_A, r, linear.input.cols);
      check_shape("lora_B", layer.lora_B, d_out, r);
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
    linear.accumulate = linear.input.dtype == DType::float64 ? DType::float64 : DType::float32;
    linear.layers = layers.data();
    linear.count = static_cast<int64_t>(K);
  }

  void set_projected(size_t k, const View& view) {
    LoraLayer& layer = layers[k];
    check_given("projected", view);
    check_shape("projected", view, linear.input.rows, layer.lora_A.rows);
    check_dtype("projected", view, linear.accumulate);
    if ((view.row_stride != view.cols && view.rows > 1) || (view.col_stride != 1 && view.cols > 1))
      throw py::value_error("projected must be contiguous");
    layer.projected = view;
  }

  LoraLinear linear;
  std::vector<LoraLayer> layers;
  std::vector<Held> operands;
};

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
      [](const py::list& tensors, const std::vector<double>& numbers, const States& states, bool finished,
         int threads) {
        check_threads(threads);
        Call call(tensors, numbers, states);
        const py::handle input = tensors[0];
        const size_t K = call.layers.size();
        const int64_t N = call.linear.input.rows;
        const char* narrow = call.linear.input.dtype == DType::bfloat16 ? "float32" : nullptr;
        py::list results(2 * K);
        for (size_t k = 0; k < K; ++k) {
          results[k] = new_tensor(input, {N, call.layers[k].weight.rows});
          results[K + k] = new_tensor(input, {N, call.layers[k].lora_A.rows}, narrow);
          if (finished) call.layers[k].output = view_of(results[k]);
          call.set_projected(k, view_of(results[K + k]));
        }
        {
          const auto& kernels = *current_isa().lora_linear;
          py::gil_scoped_release release;
          kernels.forward(call.linear, threads);
        }
        return results;
      },
      "Y (N, d_out) of each layer, then S (N, r). Unless `finished`, Y holds nothing yet.", py::arg("tensors"),
      py::arg("numbers"), py::arg("states"), py::arg("finished"), py::arg("threads"));

  m.def(
      "lora_linear_backward",
      [](const py::list& tensors, const std::vector<double>& numbers, const States& states,
         const std::vector<View>& projected, const py::list& grad_outputs, py::list grads, bool base_done,
         int threads) {
        check_threads(threads);
        Call call(tensors, numbers, states);
        const size_t K = call.layers.size();
        if (projected.size() != K || grad_outputs.size() != K || grads.size() != tensors.size())
          throw py::value_error("every layer needs its gradients");
        std::vector<Held> held;  // what arrives
        std::vector<View> rooms(grads.size());
        for (size_t i = 0; i < grads.size(); ++i) {
          if (grads[i].ptr() == Py_True) {
            const Held& like = call.operands[i];
            check_given("what a gradient is wanted of", like.view);
            const bool is_bias = i > 0 && i % 4 == 0;
            grads[i] = is_bias ? new_tensor(like.tensor, {like.view.rows})
                               : new_tensor(like.tensor, {like.view.rows, like.view.cols});
          }
          rooms[i] = view_of(grads[i]);
        }
        call.linear.base_done = base_done;
        call.linear.grad_input = rooms[0];
        check_shape("grad_input", rooms[0], call.linear.input.rows, call.linear.input.cols);
        for (size_t k = 0; k < K; ++k) {
          LoraLayer& layer = call.layers[k];
          call.set_projected(k, projected[k]);
          held.push_back(hold(grad_outputs[k]));
          layer.grad_output = held.back().view;
          layer.grad_weight = base_done ? View{} : rooms[1 + 4 * k];
          layer.grad_A = rooms[2 + 4 * k];
          layer.grad_B = rooms[3 + 4 * k];
          layer.grad_bias = rooms[4 + 4 * k];
          check_given("grad_output", layer.grad_output);
          check_shape("grad_output", layer.grad_output, call.linear.input.rows, layer.weight.rows);
          check_shape("grad_weight", layer.grad_weight, layer.weight.rows, layer.weight.cols);
          check_shape("grad_bias", layer.grad_bias, layer.weight.rows, 1);
          check_shape("grad_A", layer.grad_A, layer.lora_A.rows, layer.lora_A.cols);
          check_shape("grad_B", layer.grad_B, layer.lora_B.rows, layer.lora_B.cols);
        }
        {
          const auto& kernels = *current_isa().lora_linear;
          py::gil_scoped_release release;
          kernels.backward(call.linear, threads);
        }
        return grads;
      },
      "`grads`, in the order of `tensors`: None where no gradient is wanted, else room for it, or True to have it "
      "made. "
      "With `base_done` the base layers' part is there already.",
      py::arg("tensors"), py::arg("numbers"), py::arg("states"), py::arg("projected"), py::arg("grad_outputs"),
      py::arg("grads"), py::arg("base_done"), py::arg("threads"));
}

}  // namespace kd
