// What a Function of fastlora did once, done again without Python: `fastlora/replay.py` says when and why.
//
// A tape is what `kernels/tape.py` recorded: tensors to allocate, kernels to launch, the copies and products
// of torch between them. A program is a forward tape, a backward tape, and what autograd keeps from one to
// the other. Whatever differs from what was recorded is given back to Python, which has made no promise yet.

#include "tape.h"

#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr size_t kMaxPrograms = 4096;

bool aligned(const Tensor& t) {
  return (reinterpret_cast<uintptr_t>(t.data_ptr()) & 15) == 0;
}

// A dense tensor of the device and nothing else: no subclass, no lazy negation, no wrapper of a transform.
bool plain(const Tensor& t) {
  const auto keys = t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  const auto expected = driver.device == c10::DeviceType::CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  return t.layout() == at::kStrided && keys.highestPriorityTypeId() == expected && aligned(t) &&
         !torch::autograd::isFwGradDefined(t);
}

struct Layout {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;

  bool operator==(const Tensor& t) const {
    return t.defined() && t.scalar_type() == dtype && t.sizes() == sizes && t.strides() == strides && plain(t);
  }
};

std::vector<Layout> make_layouts(const py::list& list) {
  std::vector<Layout> layouts;
  for (const auto& item : list) {
    const auto t = item.cast<py::tuple>();
    layouts.push_back({t[0].cast<std::vector<int64_t>>(), t[1].cast<std::vector<int64_t>>(),
                       t[2].cast<at::ScalarType>()});
  }
  return layouts;
}

// Modes, transforms and torch.jit.trace see every operation, those of a tape as well: Python makes them one by one.
bool observed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         included.has_any(c10::DispatchKeySet(
             {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Functionalize, c10::DispatchKey::Tracer}));
}

// What else of torch's settings says which kernels run; throws where that cannot be told.
int64_t settings(bool fp32) {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() << 1 | (fp32 && context.allowTF32CuBLAS());
}

struct Program {
  std::unique_ptr<Tape> forward, backward;  // no backward where nothing gets a gradient
  std::vector<int> outputs;  // values of the forward tape, -1 where the caller gets None
  std::vector<int> saved;  // likewise; -1 where nothing is kept
  std::vector<bool> needs;  // of each tensor among the arguments, whether it gets a gradient
  std::vector<int> grads;  // values of the backward tape, for each of those tensors
  std::vector<Layout> dys, kept;  // the gradients that come in, and what was saved and is there
  py::object python;  // what runs a backward that is not as recorded
  py::object held;  // what addresses in the tapes point into

  ~Program() {
    py::gil_scoped_acquire gil;
    python = py::object();
    held = py::object();
  }
};

// What one call hands to its backward.
struct Call : torch::CustomClassHolder {
  std::shared_ptr<Program> program;
  std::vector<double> numbers;
  void* stream = nullptr;
  bool fp32 = false;
  int64_t settings = 0;
  at::TensorOptions options;
  std::optional<Run> forward;  // until it is done: the rest of it waits for autograd to save its tensors
};

variable_list backward_in_python(const Call& call, const variable_list& saved, const variable_list& dys,
                                 const std::vector<bool>& needs) {
  py::gil_scoped_acquire gil;
  try {
    py::list kept, given;
    for (const auto& t : saved) kept.append(t.defined() ? py::cast(t) : py::none());
    for (const auto& t : dys) given.append(t.defined() ? py::cast(t) : py::none());
    const auto found = call.program->python(kept, given, needs, call.numbers).cast<py::list>();
    variable_list grads;
    for (const auto& each : found) grads.push_back(each.is_none() ? Tensor() : each.cast<Tensor>());
    return grads;
  } catch (py::error_already_set& error) {  // so that autograd hands on the exception itself
    error.restore();
    python_error persistent;
    persistent.persist();
    throw persistent;
  }
}

// Those of the forward tape's values that the caller gets, without the places of None.
variable_list outputs_of(const Program& program, const std::vector<Tensor>& values) {
  variable_list outputs;
  for (const int i : program.outputs)
    if (i >= 0) outputs.push_back(values[i]);
  return outputs;
}

struct Replay : public torch::autograd::Function<Replay> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const c10::intrusive_ptr<Call>& call) {
    auto& program = *call->program;
    call->forward.emplace(program.forward->begin(tensors.vec(), call->numbers, call->stream, call->options));
    const auto& values = call->forward->values;
    variable_list kept;
    for (const int i : program.saved) kept.push_back(i < 0 ? Tensor() : values[i]);
    ctx->save_for_backward(std::move(kept));
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return outputs_of(program, values);
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    auto& program = *call->program;
    auto inputs = ctx->get_saved_variables();
    bool as_recorded = !at::GradMode::is_enabled() && !observed() && !capturing(call->stream);
    try {
      as_recorded = as_recorded && settings(call->fp32) == call->settings;
    } catch (const c10::Error&) {
      as_recorded = false;
    }
    std::vector<bool> needs(program.needs.size());
    for (size_t i = 0; i < needs.size(); i++) {
      needs[i] = program.needs[i] && ctx->needs_input_grad(i);
      as_recorded &= needs[i] == program.needs[i];
    }
    for (size_t i = 0; i < dys.size(); i++) as_recorded = as_recorded && program.dys[i] == dys[i];
    auto layout = program.kept.begin();
    for (const auto& t : inputs)  // hooks of saved tensors may have brought others
      if (t.defined()) as_recorded = as_recorded && *layout++ == t;
    variable_list grads(needs.size() + 1);  // the call, behind the tensors, has none
    if (as_recorded) {
      variable_list given = dys;
      given.insert(given.end(), inputs.begin(), inputs.end());
      auto values = program.backward->run(std::move(given), call->numbers, call->stream, call->options);
      for (size_t i = 0; i < needs.size(); i++)
        if (program.grads[i] >= 0) grads[i] = values[program.grads[i]];
    } else {
      auto found = backward_in_python(*call, inputs, dys, needs);
      std::move(found.begin(), found.end(), grads.begin());
    }
    return grads;
  }
};

struct Entry {
  std::shared_ptr<Program> program;
  uint64_t calls = 0;
  bool refused = false;
};
// The GIL guards it. Never destroyed, since Python's objects cannot be when Python is gone.
auto& entries = *new std::unordered_map<std::string, Entry>;

void put(std::string& key, int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Append what an argument is specialised on; say whether it can be.
bool describe(PyObject* object, std::string& key, variable_list& tensors, c10::Device& device) {
  if (object == Py_None) {
    key.push_back('N');
  } else if (THPVariable_CheckExact(object)) {
    const auto& t = THPVariable_Unpack(object);
    if (!plain(t) || (!tensors.empty() && t.device() != device)) return false;
    device = t.device();
    key.push_back(t.requires_grad() ? 'G' : 'T');
    put(key, static_cast<int64_t>(t.scalar_type()) << 32 | t.dim());
    for (const auto size : t.sizes()) put(key, size);
    for (const auto stride : t.strides()) put(key, stride);
    tensors.push_back(t);
  } else if (PyFloat_CheckExact(object)) {
    const double value = PyFloat_AS_DOUBLE(object);
    key.push_back('f');
    key.append(reinterpret_cast<const char*>(&value), sizeof(value));
  } else if (PyBool_Check(object) || PyLong_CheckExact(object)) {
    int overflow = 0;
    key.push_back('i');
    put(key, PyLong_AsLongLongAndOverflow(object, &overflow));
    if (overflow) return false;
  } else if (PyUnicode_CheckExact(object)) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (text == nullptr) throw py::error_already_set();
    key.push_back('s');
    put(key, length);
    key.append(text, length);
  } else if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
    key.push_back('(');
    put(key, PySequence_Fast_GET_SIZE(object));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); i++) {
      PyObject* item = PySequence_Fast_GET_ITEM(object, i);
      if (THPVariable_Check(item) || !describe(item, key, tensors, device)) return false;
    }
  } else {
    return false;
  }
  return true;
}

// The outputs of a call that was recorded; None: Python has to run it; a bytes object: it, and then record.
// `watched`: saved tensors go through hooks, for which the forward is another.
py::object replay(int64_t function, const py::tuple& arguments, int64_t live, uintptr_t stream, bool learn,
                  bool watched) {
  HANDLE_TH_ERRORS  // that being out of memory, say, is the exception of torch's own calls
  const bool with_grad = at::GradMode::is_enabled();
  if (observed()) return py::none();
  std::string key;
  key.reserve(512);
  put(key, function);
  variable_list tensors;
  c10::Device device(driver.device, 0);
  auto call = c10::make_intrusive<Call>();
  for (size_t i = 0; i < arguments.size(); i++) {
    PyObject* object = PyTuple_GET_ITEM(arguments.ptr(), i);
    if (static_cast<int64_t>(i) == live) {
      if (!PyFloat_CheckExact(object)) return py::none();
      call->numbers.push_back(PyFloat_AS_DOUBLE(object));
    } else if (!describe(object, key, tensors, device)) {
      return py::none();
    }
  }
  if (tensors.empty()) return py::none();
  for (const auto& t : tensors) call->fp32 = call->fp32 || t.scalar_type() == at::kFloat;
  try {
    call->settings = settings(call->fp32);
  } catch (const c10::Error&) {  // it was set by torch's newer names, which the older one may not be mixed with
    return py::none();
  }
  put(key, device.index() << 4 | watched << 3 | with_grad << 2 | call->settings);
  auto found = entries.find(key);
  if (found == entries.end() || !found->second.program) {
    if (!learn) return py::none();
    if (entries.size() >= kMaxPrograms) entries.clear();
    auto& entry = entries[key];
    const auto calls = ++entry.calls;
    const bool due = !entry.refused && calls > 1 && (calls & (calls - 1)) == 0;
    // What Python does while a graph is captured is not what it does elsewhere.
    if (due && !capturing(reinterpret_cast<void*>(stream))) return py::bytes(key);
    return py::none();
  }
  const auto& entry = found->second;
  call->program = entry.program;
  call->stream = reinterpret_cast<void*>(stream);
  if (capturing(call->stream)) return py::none();
  call->options = at::TensorOptions().device(device);
  auto& program = *call->program;
  variable_list outputs;
  {
    py::gil_scoped_release free;
    if (program.backward) {
      try {
        outputs = Replay::apply(at::TensorList(tensors), call);
        program.forward->finish(*call->forward, call->options);
      } catch (...) {  // a hook of the saved tensors may end a recomputation, which has no use for the rest
        call->forward.reset();  // its values have the graph that holds the call
        throw;
      }
      call->forward.reset();
    } else {
      outputs = outputs_of(program, program.forward->run(tensors, call->numbers, call->stream, call->options));
    }
  }
  py::tuple result(program.outputs.size());
  size_t next = 0;
  for (size_t i = 0; i < program.outputs.size(); i++)
    result[i] = program.outputs[i] < 0 ? py::object(py::none()) : py::cast(outputs[next++]);
  return result;
  END_HANDLE_TH_ERRORS_PYBIND
}

void keep(const std::string& key, const py::dict& made) {
  auto& entry = entries[key];
  auto program = std::make_shared<Program>();
  program->forward = make_tape(made["forward"].cast<py::tuple>());
  if (!made["backward"].is_none()) program->backward = make_tape(made["backward"].cast<py::tuple>());
  program->outputs = made["outputs"].cast<std::vector<int>>();
  program->saved = made["saved"].cast<std::vector<int>>();
  program->needs = made["needs"].cast<std::vector<bool>>();
  program->grads = made["grads"].cast<std::vector<int>>();
  program->dys = make_layouts(made["dys"].cast<py::list>());
  program->kept = make_layouts(made["kept"].cast<py::list>());
  program->python = made["python"];
  program->held = made["held"];
  entry.program = program;
}

void configure(uintptr_t launch, uintptr_t encode, uintptr_t is_capturing, uintptr_t current_context,
               py::object make_context, const std::string& device) {
  driver = {reinterpret_cast<LaunchKernel>(launch), reinterpret_cast<EncodeTiled>(encode),
            reinterpret_cast<IsCapturing>(is_capturing), reinterpret_cast<CurrentContext>(current_context),
            std::move(make_context), c10::Device(device).type()};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("configure", &configure);
  m.def("replay", &replay);
  m.def("keep", &keep);
  m.def("refuse", [](const std::string& key) { entries[key].refused = true; });
  m.def("clear", [] { entries.clear(); });
  m.def("programs", [] {
    size_t count = 0;
    for (const auto& each : entries) count += each.second.program != nullptr;
    return count;
  });
}
