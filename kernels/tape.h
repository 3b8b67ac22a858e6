// What a tape does: `kernels/tape.py` records one, `replay.cpp` plays it.

#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
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

namespace {

constexpr size_t kMapBytes = 128;  // of a CUtensorMap
constexpr size_t kMaxMaps = 4096;  // kept of one operand

// The driver's functions, found by Python; CPU tests put their own in place.
using LaunchKernel = int (*)(const void*, void*, void**, void**);
using EncodeTiled = int (*)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                            const uint32_t*, int, int, int, int);
using IsCapturing = int (*)(void*, int*);
using CurrentContext = int (*)(void**);
struct Driver {
  LaunchKernel launch = nullptr;
  EncodeTiled encode = nullptr;
  IsCapturing is_capturing = nullptr;
  CurrentContext current_context = nullptr;
  py::object make_context;  // gives this thread one
  c10::DeviceType device = c10::DeviceType::CUDA;
};
auto& driver = *new Driver;  // never destroyed: Python is gone by then

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

// Whether a stream is; asked before anything of a tape is done. A thread that has not used the GPU yet has no
// context, and without one the driver dies of this question.
bool capturing(void* stream) {
  void* context = nullptr;
  int status = 0;
  check(driver.current_context(&context), "asking for the context of a thread");
  if (context == nullptr) {
    py::gil_scoped_acquire gil;
    driver.make_context();
  }
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
    check(driver.launch(&config, function, addresses.data(), nullptr), "launching a kernel");
  }
};

enum class Kind { Empty, View, Copy, Addmm, Mm, Linear, Zero, Randint, Sort, Launch };

struct Step {
  Kind kind;
  size_t to = 0, a = 0, b = 0, c = 0;
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
      case Kind::Mm:
        values[to] = at::mm(values[a], values[b]);
        return;
      case Kind::Linear:
        values[to] = at::addmm(values[c], values[a], values[b]);
        return;
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
  size_t saved_after = 0;  // steps that make what autograd saves; the others may come after that

  // Those steps; `finish` does the others.
  Run begin(std::vector<Tensor> inputs, const std::vector<double>& numbers, void* stream,
            const at::TensorOptions& options) {
    Run run{std::move(inputs), numbers, {}, stream};
    run.values.resize(size);
    for (int i = 0; i < tickets; i++) run.tickets.push_back(next_ticket());
    go(run, options, 0, saved_after);
    return run;
  }

  void finish(Run& run, const at::TensorOptions& options) { go(run, options, saved_after, steps.size()); }

  std::vector<Tensor> run(std::vector<Tensor> inputs, const std::vector<double>& numbers, void* stream,
                          const at::TensorOptions& options) {
    auto run = begin(std::move(inputs), numbers, stream, options);
    finish(run, options);
    return std::move(run.values);
  }

 private:
  void go(Run& run, const at::TensorOptions& options, size_t from, size_t to) {
    at::AutoDispatchBelowADInplaceOrView below;
    for (size_t i = from; i < to; i++) steps[i](run, options);
  }
};

std::unique_ptr<Launch> make_launch(const py::tuple& t) {
  auto launch = std::make_unique<Launch>();
  launch->function = reinterpret_cast<void*>(t[1].cast<uintptr_t>());
  launch->grid = t[2].cast<std::array<uint32_t, 3>>();
  launch->threads = t[3].cast<uint32_t>();
  launch->shared = t[4].cast<uint32_t>();
  launch->early = t[5].cast<bool>();
  launch->parameters = t[6].cast<std::string>();
  launch->offsets = t[7].cast<std::vector<uint32_t>>();
  TORCH_CHECK(launch->parameters.size() <= 4096 && launch->offsets.size() <= 128, "a kernel of too many parameters");
  for (const auto& each : t[8].cast<std::vector<std::tuple<size_t, int64_t, uint32_t>>>())
    launch->pointers.push_back({std::get<0>(each), std::get<1>(each), std::get<2>(each)});
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
    launch->operands.push_back(std::move(operand));
  }
  for (const auto& each : t[10].cast<std::vector<std::tuple<uint32_t, std::string, int>>>())
    launch->numbers.push_back({std::get<0>(each), std::get<1>(each)[0], std::get<2>(each)});
  return launch;
}

Step make_step(const py::tuple& t) {
  const auto name = t[0].cast<std::string>();
  const auto value = [&t](size_t i) { return t[i].cast<size_t>(); };
  const auto sizes = [&t](size_t i) { return t[i].cast<std::vector<int64_t>>(); };
  const auto dtype = [&t](size_t i) { return t[i].cast<at::ScalarType>(); };
  if (name == "empty") return {.kind = Kind::Empty, .to = value(1), .sizes = sizes(2), .strides = sizes(3), .dtype = dtype(4)};
  if (name == "view")
    return {.kind = Kind::View, .to = value(1), .a = value(2), .sizes = sizes(3), .strides = sizes(4),
            .offset = t[5].cast<int64_t>()};
  if (name == "copy") return {.kind = Kind::Copy, .to = value(1), .a = value(2)};
  if (name == "addmm") return {.kind = Kind::Addmm, .to = value(1), .a = value(2), .b = value(3)};
  if (name == "mm") return {.kind = Kind::Mm, .to = value(1), .a = value(2), .b = value(3)};
  if (name == "linear") return {.kind = Kind::Linear, .to = value(1), .a = value(3), .b = value(4), .c = value(2)};
  if (name == "zero") return {.kind = Kind::Zero, .to = value(1)};
  if (name == "randint") return {.kind = Kind::Randint, .to = value(1), .offset = t[2].cast<int64_t>()};
  if (name == "sort") return {.kind = Kind::Sort, .to = value(1), .a = value(3), .b = value(2)};
  TORCH_CHECK(name == "launch", "no such step: ", name);
  return {.kind = Kind::Launch, .launch = make_launch(t)};
}

std::unique_ptr<Tape> make_tape(const py::tuple& t) {
  auto tape = std::make_unique<Tape>();
  tape->size = t[0].cast<size_t>();
  tape->tickets = t[1].cast<int>();
  for (const auto& step : t[2].cast<py::list>()) tape->steps.push_back(make_step(step.cast<py::tuple>()));
  tape->saved_after = t[3].cast<size_t>();
  return tape;
}

}  // namespace
