#include <stdexcept>

#include "bf16_tile.h"
#include "bindings.h"
#include "isa.h"

namespace kd {
namespace {

char view_of_nothing;

struct Number {
  DType dtype;
  bool is_complex;
};

Number number_of(py::handle dtype) {
  struct Known {
    PyObject* dtype;
    Number number;
  };
  static const std::vector<Known> known = [] {
    const py::module_ torch = py::module_::import("torch");
    auto named = [&](const char* name) { return py::object(torch.attr(name)).release().ptr(); };  // never collected
    return std::vector<Known>{{named("float32"), {DType::float32, false}},
                              {named("float64"), {DType::float64, false}},
                              {named("bfloat16"), {DType::bfloat16, false}},
                              {named("complex64"), {DType::float32, true}},
                              {named("complex128"), {DType::float64, true}}};
  }();
  for (const Known& one : known)
    if (one.dtype == dtype.ptr()) return one.number;
  throw py::type_error("dtype is " + std::string(py::str(dtype)) +
                       ", but must be float32, float64, bfloat16, complex64 or complex128");
}

// A tensor's attributes, by names that are made once: a call reads dozens of them.
struct Name {
  PyObject* interned;
  explicit Name(const char* name) : interned(PyUnicode_InternFromString(name)) {}
  py::object of(py::handle tensor) const { return checked(PyObject_GetAttr(tensor.ptr(), interned)); }
  py::object call(py::handle tensor) const { return checked(PyObject_CallMethodNoArgs(tensor.ptr(), interned)); }
  static py::object checked(PyObject* found) {
    if (!found && PyErr_ExceptionMatches(PyExc_AttributeError)) {
      PyErr_Clear();
      throw py::type_error("an operand is no torch.Tensor");
    }
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
};

struct Names {
  Name dtype{"dtype"}, shape{"shape"}, stride{"stride"}, data_ptr{"data_ptr"}, is_contiguous{"is_contiguous"};
  Name is_neg{"is_neg"}, resolve_neg{"resolve_neg"}, is_zerotensor{"_is_zerotensor"}, new_empty{"new_empty"};
};

const Names& names() {
  static const Names made;
  return made;
}

// The integers of a torch.Size, or of strides.
struct Integers {
  py::object tuple;
  explicit Integers(py::object of) : tuple(std::move(of)) {
    if (!PyTuple_Check(tuple.ptr())) throw py::type_error("the arguments must be tensors");
  }
  int64_t size() const { return PyTuple_GET_SIZE(tuple.ptr()); }
  int64_t operator[](int64_t i) const {
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
};

// An empty tensor has no address, yet it was given: any address that is not null says so. One that should have an
// address and has none lies in no memory: on the meta device, or its storage was taken away.
void* address_of(py::handle tensor, int64_t count) {
  void* data = PyLong_AsVoidPtr(names().data_ptr.call(tensor).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!data && count > 0) throw py::value_error("data is null: the tensor lies in no memory");
  return data ? data : &view_of_nothing;
}

}  // namespace

View view_of(py::handle tensor) {
  if (tensor.is_none()) return {};
  const Number number = number_of(names().dtype.of(tensor));
  const Integers shape(names().shape.of(tensor)), strides(names().stride.call(tensor));
  if (number.is_complex || shape.size() > 2)
    throw py::type_error("a view is of a real tensor of at most two dimensions");
  View view{nullptr, number.dtype, 1, 1, 1, 1};
  if (shape.size() > 0) view.rows = shape[0], view.row_stride = strides[0];
  if (shape.size() > 1) view.cols = shape[1], view.col_stride = strides[1];
  view.data = address_of(tensor, view.rows * view.cols);
  return view;
}

Batch batch_of(py::handle tensor) {
  if (tensor.is_none()) return {};
  const Number number = number_of(names().dtype.of(tensor));
  const Integers shape(names().shape.of(tensor));
  if (shape.size() < 2 || shape.size() > 3)
    throw py::type_error("a batch is of vectors or matrices: two or three dimensions");
  if (!names().is_contiguous.call(tensor).cast<bool>()) throw py::value_error("a batch must be contiguous");
  Batch batch;
  batch.rows = shape[1];
  batch.cols = shape.size() > 2 ? shape[2] : 1;
  batch.is_complex = number.is_complex;
  const int64_t numbers = batch.rows * batch.cols * (number.is_complex ? 2 : 1);
  batch.matrices = {address_of(tensor, shape[0] * numbers), number.dtype, shape[0], numbers, numbers, 1};
  return batch;
}

Held hold(py::handle tensor) {
  if (tensor.is_none()) return {py::none(), {}};
  auto held = py::reinterpret_borrow<py::object>(tensor);
  if (names().is_zerotensor.call(held).ptr() == Py_True)
    held = py::module_::import("torch").attr("zeros_like")(held);
  else if (names().is_neg.call(held).ptr() == Py_True)
    held = names().resolve_neg.call(held);
  const View view = view_of(held);
  return {std::move(held), view};
}

py::object new_tensor(py::handle like, std::initializer_list<int64_t> sizes, const char* dtype) {
  static const py::handle options = py::make_tuple("dtype").release();
  PyObject* arguments[8] = {like.ptr()};
  std::vector<py::object> held;
  for (const int64_t size : sizes) held.push_back(py::int_(size));
  if (dtype) held.push_back(py::module_::import("torch").attr(dtype));
  for (size_t i = 0; i < held.size(); ++i) arguments[1 + i] = held[i].ptr();
  return Name::checked(PyObject_VectorcallMethod(names().new_empty.interned, arguments, 1 + sizes.size(),
                                                 dtype ? options.ptr() : nullptr));
}

void check_given(const char* name, const View& view) {
  if (!view) throw py::value_error(std::string(name) + " is missing");
}

void check_shape(const char* name, const View& view, int64_t rows, int64_t cols) {
  if (!view || (view.rows == rows && view.cols == cols)) return;
  throw py::value_error(std::string(name) + " is " + std::to_string(view.rows) + " x " + std::to_string(view.cols) +
                        ", but must be " + std::to_string(rows) + " x " + std::to_string(cols));
}

void check_dtype(const char* name, const View& view, DType dtype) {
  if (view && view.dtype != dtype) throw py::type_error(std::string(name) + " has the wrong dtype");
}

void check_batch(const char* name, const Batch& batch, const Batch& like, int64_t rows, int64_t cols, bool is_complex) {
  if (!batch) return;
  const auto size = [](int64_t count, int64_t rows, int64_t cols) {
    return std::to_string(count) + " of " + std::to_string(rows) + " x " + std::to_string(cols);
  };
  const int64_t count = batch.matrices.rows, wanted = like.matrices.rows;
  if (count != wanted || batch.rows != rows || batch.cols != cols)
    throw py::value_error(std::string(name) + " is " + size(count, batch.rows, batch.cols) + ", but must be " +
                          size(wanted, rows, cols));
  if (batch.is_complex != is_complex) throw py::type_error(std::string(name) + " has the wrong dtype");
  check_dtype(name, batch.matrices, like.matrices.dtype);
  if (batch.matrices.dtype == DType::bfloat16)
    throw py::type_error(std::string(name) + " is bfloat16, but must be float32 or float64");
}

void check_threads(int threads) {
  if (threads < 1) throw py::value_error("threads is " + std::to_string(threads) + ", but must be at least 1");
}

void bind_common(py::module_& m) {
  m.def("isa", [] { return current_isa().name; }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa* isa : supported_isas()) names.emplace_back(isa->name);
        return names;
      },
      "The instruction sets that this build has and this processor runs, best first.");
  m.def(
      "processor",
      [] {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_is("intel")) return "intel";
        if (__builtin_cpu_is("amd")) return "amd";
#endif
        return "other";
      },
      "Who made the processor: intel, amd or other.");
  m.def(
      "bf16_rate",
      [] {
        try {
          return current_isa().bf16_rate;
        } catch (const std::invalid_argument&) {  // the call that is planned will say so
          return 1;
        }
      },
      "How many times faster bfloat16 numbers are multiplied than float32's, by the instruction set in use.");
  m.def(
      "multiplies_bfloat16",
      [] {
#if defined(__x86_64__)
        return amx_supported() || avx512_bf16_supported();
#else
        return true;
#endif
      },
      "Whether the processor has instructions for it, as far as is known here.");
  m.def("select_isa", &select_isa, py::arg("name"), "Use this instruction set from now on.");
}

}  // namespace kd
