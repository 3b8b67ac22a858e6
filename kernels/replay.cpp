// What a Function of fastlora did once, done again without Python: `fastlora/replay.py` says when and why.
//
// A tape is what `kernels/tape.py` recorded: tensors to allocate, kernels to launch, the copies and products
// of torch between them. A program is a forward tape, a backward tape, and what autograd keeps from one to
// the other. Whatever differs from what was recorded is given back to Python, which has made no promise yet.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr size_t kMapBytes = 128;  // of a CUtensorMap
constexpr size_t kMaxMaps = 4096;  // kept of one operand
constexpr size_t kMaxPrograms = 4096;

// The driver's functions, found by Python; CPU tests put their own in place.
using LaunchKernel = int (*)(const void*, void*, void**, void**);
using EncodeTiled = int (*)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                            const uint32_t*, int, int, int, int);
using IsCapturing = int (*)(void*, int*);
struct Driver {
  LaunchKernel launch = nullptr;
  EncodeTiled encode = nullptr;
  IsCapturing is_capturing = nullptr;
  c10::DeviceType device = c10::DeviceType::CUDA;
} driver;

struct LaunchAttribute {  // CUlaunchAttribute
  int id, pad, value;
  char rest[60];
};
struct LaunchConfig {  // CUlaunchConfig
  uint32_t grid[3], block[3], shared;
  void* stream;
  void* attributes;
  uint32_t count;
};

void check(int code, const char* what) {
  TORCH_CHECK(code == 0, what, " failed: CUDA error ", code);
}

bool capturing(void* stream) {
  int status = 0;
  check(driver.is_capturing(stream, &status), "asking a stream whether it is being captured");
  return status != 0;
}

// Marks of `lora_one_pass`: odd here, even in Python, so that none is used twice.
int64_t next_ticket() {
  static std::atomic<int64_t> tickets{
      static_cast<int64_t>((std::random_device{}() | (uint64_t{std::random_device{}()} << 29)) >> 1 << 1 | 1)};
  return tickets.fetch_add(2);
}

struct Pointer {
  size_t value;
  int64_t bytes;  // behind the beginning of the value
  uint32_t offset;  // of the parameter
  char* of(const std::vector<Tensor>& values) const { return static_cast<char*>(values[value].data_ptr()) + bytes; }
};

// An operand that the kernel reads or writes by TMA.
struct Operand {
  Pointer at;
  int type, swizzle;
  std::vector<uint64_t> sizes, strides;  // the last dimension first, strides in bytes and without that one
  std::vector<uint32_t> box, ones;
  std::unordered_map<char*, std::array<char, kMapBytes>> maps;

  void write(char* pointer, char* to) {  // to: a multiple of 64, as a tensor map must lie
    auto found = maps.find(pointer);
    if (found == maps.end()) {
      alignas(64) std::array<char, kMapBytes> map{};
      check(driver.encode(map.data(), type, static_cast<uint32_t>(sizes.size()), pointer, sizes.data(),
                          strides.data(), box.data(), ones.data(), 0, swizzle, /*L2 promotion, 128 B*/ 2, 0),
            "a tensor map");
      if (maps.size() >= kMaxMaps) maps.clear();
      found = maps.emplace(pointer, map).first;
    }
    std::memcpy(to, found->second.data(), kMapBytes);
  }
};

struct Number {
  uint32_t offset;
  char kind;  // a format of Python's struct: f, i or q
  int source;  // a number of the call, or, from -1 downwards, a ticket
};

struct Run {
  std::vector<Tensor> values;
  const std::vector<double>& numbers;
  std::vector<int64_t> tickets;
  void* stream;
};

struct Launch {
  void* function;
  std::array<uint32_t, 3> grid;
  uint32_t threads, shared;
  bool early;  // may begin beside the kernel before it
  std::string parameters;
  std::vector<uint32_t> offsets;
  std::vector<Pointer> pointers;
  std::vector<Operand> operands;
  std::vector<Number> numbers;
  std::mutex mutex;  // of the operands' maps

  void operator()(const Run& run) {
    alignas(128) char packed[4096];
    std::memcpy(packed, parameters.data(), parameters.size());
    if (!operands.empty()) {
      std::lock_guard<std::mutex> lock(mutex);
      for (auto& operand : operands) operand.write(operand.at.of(run.values), packed + operand.at.offset);
    }
    for (const auto& pointer : pointers) {
      char* address = pointer.of(run.values);
      std::memcpy(packed + pointer.offset, &address, sizeof(address));
    }
    for (const auto& number : numbers) {
      if (number.kind == 'f') {
        const float value = static_cast<float>(run.numbers[number.source]);
        std::memcpy(packed + number.offset, &value, sizeof(value));
      } else {
        const int64_t value = run.tickets[-1 - number.source];
        std::memcpy(packed + number.offset, &value, sizeof(value));
      }
    }
    std::array<void*, 128> addresses;
    for (size_t i = 0; i < offsets.size(); i++) addresses[i] = packed + offsets[i];
    LaunchAttribute attribute{/*programmatic stream serialization*/ 6, 0, 1, {}};
    LaunchConfig config{{grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, run.stream, &attribute, early ? 1u : 0u};
    int code = driver.launch(&config, function, addresses.data(), nullptr);
    if (code == 201) {  // no context: a thread that has not used the GPU yet
      c10::impl::VirtualGuardImpl guard(driver.device);
      guard.setDevice(guard.getDevice());
      code = driver.launch(&config, function, addresses.data(), nullptr);
    }
    check(code, "launching a kernel");
  }
};

enum class Kind { Empty, View, Copy, Addmm, Mm, Zero, Randint, Sort, Launch };

struct Step {
  Kind kind;
  size_t to = 0, a = 0, b = 0;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  at::ScalarType dtype = at::kFloat;
  std::unique_ptr<Launch> launch;

  void operator()(Run& run, const at::TensorOptions& options) {
    auto& values = run.values;
    switch (kind) {
      case Kind::Empty:
        values[to] = at::empty_strided(sizes, strides, options.dtype(dtype));
        return;
      case Kind::View:
        values[to] = values[a].as_strided(sizes, strides, values[a].storage_offset() + offset);
        return;
      case Kind::Copy:
        values[to].copy_(values[a]);
        return;
      case Kind::Addmm:
        values[to].addmm_(values[a], values[b]);
        return;
      case Kind::Mm: {  // torch has it since 2.8 alone
        using Mm = Tensor(const Tensor&, const Tensor&, at::ScalarType);
        static const auto mm = c10::Dispatcher::singleton().findSchemaOrThrow("aten::mm", "dtype").typed<Mm>();
        values[to] = mm.call(values[a], values[b], dtype);
        return;
      }
      case Kind::Zero:
        values[to].zero_();
        return;
      case Kind::Randint:
        values[to].random_(0, offset);
        return;
      case Kind::Sort:
        std::tie(values[to], values[b]) = at::sort(values[a], /*stable=*/std::optional<bool>(true), /*dim=*/-1, /*descending=*/false);
        return;
      case Kind::Launch:
        (*launch)(run);
        return;
    }
  }
};

struct Tape {
  size_t size = 0;  // of the values, inputs first
  int tickets = 0;
  std::vector<Step> steps;

  std::vector<Tensor> run(variable_list inputs, const std::vector<double>& numbers, void* stream,
                          const at::TensorOptions& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    Run run{std::move(inputs), numbers, {}, stream};
    run.values.resize(size);
    for (int i = 0; i < tickets; i++) run.tickets.push_back(next_ticket());
    for (auto& step : steps) step(run, options);
    return std::move(run.values);
  }
};

Step make_step(const py::tuple& t) {
  const auto name = t[0].cast<std::string>();
  Step step{};
  if (name == "empty") {
    step.kind = Kind::Empty;
    step.to = t[1].cast<size_t>();
    step.sizes = t[2].cast<std::vector<int64_t>>();
    step.strides = t[3].cast<std::vector<int64_t>>();
    step.dtype = t[4].cast<at::ScalarType>();
  } else if (name == "view") {
    step.kind = Kind::View;
    step.to = t[1].cast<size_t>();
    step.a = t[2].cast<size_t>();
    step.sizes = t[3].cast<std::vector<int64_t>>();
    step.strides = t[4].cast<std::vector<int64_t>>();
    step.offset = t[5].cast<int64_t>();
  } else if (name == "copy") {
    step.kind = Kind::Copy;
    step.to = t[1].cast<size_t>();
    step.a = t[2].cast<size_t>();
  } else if (name == "addmm") {
    step.kind = Kind::Addmm;
    step.to = t[1].cast<size_t>();
    step.a = t[2].cast<size_t>();
    step.b = t[3].cast<size_t>();
  } else if (name == "mm") {
    step.kind = Kind::Mm;
    step.to = t[1].cast<size_t>();
    step.a = t[2].cast<size_t>();
    step.b = t[3].cast<size_t>();
    step.dtype = t[4].cast<at::ScalarType>();
  } else if (name == "zero") {
    step.kind = Kind::Zero;
    step.to = t[1].cast<size_t>();
  } else if (name == "randint") {
    step.kind = Kind::Randint;
    step.to = t[1].cast<size_t>();
    step.offset = t[2].cast<int64_t>();
  } else if (name == "sort") {
    step.kind = Kind::Sort;
    step.to = t[1].cast<size_t>();
    step.b = t[2].cast<size_t>();
    step.a = t[3].cast<size_t>();
  } else {
    TORCH_CHECK(name == "launch", "no such step: ", name);
    step.kind = Kind::Launch;
    step.launch = std::make_unique<Launch>();
    auto& launch = *step.launch;
    launch.function = reinterpret_cast<void*>(t[1].cast<uintptr_t>());
    launch.grid = t[2].cast<std::array<uint32_t, 3>>();
    launch.threads = t[3].cast<uint32_t>();
    launch.shared = t[4].cast<uint32_t>();
    launch.early = t[5].cast<bool>();
    launch.parameters = t[6].cast<std::string>();
    launch.offsets = t[7].cast<std::vector<uint32_t>>();
    TORCH_CHECK(launch.parameters.size() <= 4096 && launch.offsets.size() <= 128, "a kernel of too many parameters");
    for (const auto& each : t[8].cast<std::vector<std::tuple<size_t, int64_t, uint32_t>>>())
      launch.pointers.push_back({std::get<0>(each), std::get<1>(each), std::get<2>(each)});
    for (const auto& item : t[9].cast<py::list>()) {
      const auto o = item.cast<py::tuple>();
      Operand operand{};
      operand.at = {o[0].cast<size_t>(), o[1].cast<int64_t>(), o[2].cast<uint32_t>()};
      operand.type = o[3].cast<int>();
      operand.swizzle = o[4].cast<int>();
      operand.sizes = o[5].cast<std::vector<uint64_t>>();
      operand.strides = o[6].cast<std::vector<uint64_t>>();
      operand.box = o[7].cast<std::vector<uint32_t>>();
      operand.ones.assign(operand.box.size(), 1);
      launch.operands.push_back(std::move(operand));
    }
    for (const auto& each : t[10].cast<std::vector<std::tuple<uint32_t, std::string, int>>>())
      launch.numbers.push_back({std::get<0>(each), std::get<1>(each)[0], std::get<2>(each)});
  }
  return step;
}

std::unique_ptr<Tape> make_tape(const py::tuple& t) {
  auto tape = std::make_unique<Tape>();
  tape->size = t[0].cast<size_t>();
  tape->tickets = t[1].cast<int>();
  for (const auto& step : t[2].cast<py::list>()) tape->steps.push_back(make_step(step.cast<py::tuple>()));
  return tape;
}

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

// Modes and transforms see every operation, those of a tape as well: Python makes them one by one.
bool observed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         included.has_any(c10::DispatchKeySet(
             {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Functionalize}));
}

struct Program {
  std::unique_ptr<Tape> forward, backward;
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
  at::TensorOptions options;
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

struct Replay : public torch::autograd::Function<Replay> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const c10::intrusive_ptr<Call>& call,
                               const variable_list* arguments) {
    auto& program = *call->program;
    auto values = program.forward->run(*arguments, call->numbers, call->stream, call->options);
    variable_list kept, outputs;
    for (const int i : program.saved) kept.push_back(i < 0 ? Tensor() : values[i]);
    ctx->save_for_backward(std::move(kept));
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    for (const int i : program.outputs)
      if (i >= 0) outputs.push_back(values[i]);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list dys) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    auto& program = *call->program;
    auto inputs = ctx->get_saved_variables();
    bool as_recorded = !at::GradMode::is_enabled() && !observed() && !capturing(call->stream);
    std::vector<bool> needs(program.needs.size());
    for (size_t i = 0; i < needs.size(); i++) {
      needs[i] = program.needs[i] && ctx->needs_input_grad(i);
      as_recorded &= needs[i] == program.needs[i];
    }
    for (size_t i = 0; i < dys.size(); i++) as_recorded = as_recorded && program.dys[i] == dys[i];
    auto layout = program.kept.begin();
    for (const auto& t : inputs)  // hooks of saved tensors may have brought others
      if (t.defined()) as_recorded = as_recorded && *layout++ == t;
    variable_list grads(needs.size() + 2);  // what stands behind the tensors has none
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
    key.push_back('i');
    put(key, PyLong_AsLongLong(object));
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
py::object replay(int64_t function, const py::tuple& arguments, int64_t live, uintptr_t stream, bool learn) {
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
  bool may_round = false;
  try {
    for (const auto& t : tensors)
      may_round = may_round || (t.scalar_type() == at::kFloat && at::globalContext().allowTF32CuBLAS());
  } catch (const c10::Error&) {  // it was set by torch's newer names, which the older one may not be mixed with
    return py::none();
  }
  put(key, device.index() << 3 | with_grad << 2 | at::globalContext().deterministicAlgorithms() << 1 | may_round);
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
    bool differentiable = false;
    for (const bool need : program.needs) differentiable |= need;
    if (differentiable) {
      outputs = Replay::apply(at::TensorList(tensors), call, &tensors);
    } else {
      auto values = program.forward->run(tensors, call->numbers, call->stream, call->options);
      for (const int i : program.outputs)
        if (i >= 0) outputs.push_back(values[i]);
    }
  }
  py::tuple result(program.outputs.size());
  size_t next = 0;
  for (size_t i = 0; i < program.outputs.size(); i++)
    result[i] = program.outputs[i] < 0 ? py::object(py::none()) : py::cast(outputs[next++]);
  return result;
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

void configure(uintptr_t launch, uintptr_t encode, uintptr_t is_capturing, const std::string& device) {
  driver = {reinterpret_cast<LaunchKernel>(launch), reinterpret_cast<EncodeTiled>(encode),
            reinterpret_cast<IsCapturing>(is_capturing), c10::Device(device).type()};
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
