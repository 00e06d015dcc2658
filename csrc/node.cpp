// lora_linear for kinds of calls that Python has decided on: forward, and its autograd node, without Python.
//
// Python (fusedlora/node.py) says once for a kind of call which function its launch calls and with what: a row of
// 8-byte slots, most of them filled, and holes for what a call brings. A call that is of no known kind, or that anybody
// but a kernel has a say in, is left to Python. No CUDA header is needed: what is asked of CUDA comes as addresses.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// What a hole takes; fusedlora/recipe.py has the same names in the same order.
enum Source : int64_t {
  X, DY, W, A, B, BIAS, S, Y, DX, DA, DB,
  WORKSPACE, WORDS, SCRATCH, STREAM, SCALING, SCALING32, SEED,
  SOURCES, TENSORS = WORKSPACE
};

struct Hole {
  int64_t slot, source, offset;  // offset: added to an address
};

// Bytes of workspace or scratch that a stream keeps for its next launches, as in fusedlora/memory.py.
constexpr int64_t MOST_KEPT = 4 << 20;

// CUlaunchAttribute and CUlaunchConfig of the driver's cuLaunchKernelEx.
struct LaunchAttribute {
  int id, padding;
  alignas(8) char value[64];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct Hooks {
  int (*current_stream)(int32_t device, void** stream);
  int (*is_capturing)(void* stream, int* status);
  int (*launch_kernel)(const LaunchConfig* config, void* function, void** params, void** extra);
  PyObject* taken;  // dict that is told which backends a call took
  PyObject* draw;   // a dropout's seed, as a tensor, for x, the rate and the backend
  PyObject* sees_content;  // of saved tensors: whether this pack hook may look into them
} hooks;

// The stream that the next launch is put on, or nothing where it is being captured: that is Python's. The question is
// CUDA's runtime's, which also gives a thread that has not used the device yet its context.
bool find_stream(at::Device device, void*& stream) {
  int status = 0;
  return hooks.current_stream(device.index(), &stream) == 0 && hooks.is_capturing(stream, &status) == 0 && status == 0;
}

uint64_t address(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<uint64_t>(tensor.const_data_ptr()) : 0;
}

// What launches on one stream share, since none overlaps the next. Words are zero between them.
struct StreamMemory {
  Tensor words, workspace, scratch;
};

struct Launch;
StreamMemory memory_of(at::Device device, void* stream, const Launch& launch);

struct Launch {
  uint64_t function = 0;             // 0: Python has not told yet
  unsigned programs = 0, threads = 0, shared = 0;  // of a kernel; without programs a function of the CUDA library
  int early = 0;  // whether it may begin while the launch before it ends
  const char* (*problem)() = nullptr;  // of that library: what went wrong
  std::vector<uint64_t> slots;
  std::vector<Hole> holes;
  int64_t work_size = 0, num_words = 0, scratch_size = 0;
  std::optional<c10::SafePyObject> keeps;   // the function alive
  std::optional<c10::SafePyObject> watchers;  // of Triton's launches, who are to see them: a tuple of hooks

  bool watched() const {  // needs the GIL
    if (!watchers) return false;
    PyObject* chains = watchers->ptr(getPyInterpreter());
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(chains); ++i) {
      auto calls = THPObjectPtr(PyObject_GetAttrString(PyTuple_GET_ITEM(chains, i), "calls"));
      if (!calls || PyObject_IsTrue(calls) != 0) {
        PyErr_Clear();
        return true;
      }
    }
    return false;
  }

  void run(at::Device device, void* stream, const std::array<const Tensor*, TENSORS>& tensors, double scaling,
           uint64_t seed) const {
    const StreamMemory memory = memory_of(device, stream, *this);  // held until the launch is made
    std::array<uint64_t, SOURCES> values{};
    for (int source = 0; source < TENSORS; ++source) values[source] = tensors[source] ? address(*tensors[source]) : 0;
    values[WORKSPACE] = address(memory.workspace);
    values[WORDS] = address(memory.words);
    values[SCRATCH] = address(memory.scratch);
    values[STREAM] = reinterpret_cast<uint64_t>(stream);
    const float scaling32 = float(scaling);
    std::memcpy(&values[SCALING], &scaling, sizeof(scaling));
    std::memcpy(&values[SCALING32], &scaling32, sizeof(scaling32));
    values[SEED] = seed;
    c10::SmallVector<uint64_t, 64> filled(slots.begin(), slots.end());
    for (const Hole& hole : holes) filled[hole.slot] = values[hole.source] + hole.offset;
    if (programs == 0) {
      const int status = reinterpret_cast<int (*)(const void*, int64_t*)>(function)(filled.data(), nullptr);
      if (status != 0) throw std::runtime_error(std::string("the CUDA kernels could not be launched: ") + problem());
      return;
    }
    c10::SmallVector<void*, 64> params;
    for (uint64_t& slot : filled) params.push_back(&slot);
    LaunchAttribute attribute{PROGRAMMATIC_STREAM_SERIALIZATION, 0, {}};
    const int allowed = 1;
    std::memcpy(attribute.value, &allowed, sizeof(allowed));
    const LaunchConfig config{{programs, 1, 1}, {threads, 1, 1}, shared, stream, &attribute, early ? 1u : 0u};
    const int status = hooks.launch_kernel(&config, reinterpret_cast<void*>(function), params.data(), nullptr);
    if (status != 0) throw std::runtime_error("cuLaunchKernelEx: error " + std::to_string(status));
  }
};

// `kept` where that is enough, else new memory, which is kept from then on unless it is large.
Tensor take(Tensor& kept, int64_t size, at::Device device) {
  if (size == 0 || (kept.defined() && kept.numel() >= size)) return kept;
  const Tensor made = at::empty({size}, at::TensorOptions(at::kByte).device(device));
  if (size <= MOST_KEPT) kept = made;
  return made;
}

StreamMemory memory_of(at::Device device, void* stream, const Launch& launch) {
  static std::mutex mutex;
  static auto& streams = *new std::map<std::pair<at::DeviceIndex, void*>, StreamMemory>;  // CUDA ends before it would
  std::lock_guard<std::mutex> lock(mutex);
  StreamMemory& memory = streams[{device.index(), stream}];
  if (launch.num_words > 0 && (!memory.words.defined() || memory.words.numel() < launch.num_words)) {
    memory.words = at::zeros({std::max<int64_t>(launch.num_words, 1024)}, at::TensorOptions(at::kInt).device(device));
  }
  return {memory.words, take(memory.workspace, launch.work_size, device),
          take(memory.scratch, launch.scratch_size, device)};
}

struct Made {
  at::DimVector sizes;
  at::ScalarType dtype;

  Made(at::IntArrayRef sizes, at::ScalarType dtype) : sizes(sizes.begin(), sizes.end()), dtype(dtype) {}
  explicit Made(const Tensor& tensor) : Made(tensor.sizes(), tensor.scalar_type()) {}
};

// One kind of call. Its launches are told one by one, once Python has made them.
struct Call {
  std::array<Made, 5> made;  // x, weight, lora_A, lora_B and S
  double dropout_p;
  at::ScalarType adapter_dtype;
  std::string backend;
  Launch forward[2];  // [1] gives S
  Launch backward;    // of all three gradients
  c10::SafePyObject key_backend;
  PyObject *forward_name, *backward_name;  // of their backends; never let go, a pending call may still read them
  c10::SafePyObject fill_s;                // computes S alone; false where it no longer can
  bool backward_by_op;                     // no kernels take the backward
  bool deterministic;                      // torch.use_deterministic_algorithms, which turns tuned tables off
};

int tell(PyObject* used, PyObject* backward) {
  const int failed = PyDict_SetItemString(hooks.taken, "last_used", used);
  return failed ? failed : PyDict_SetItemString(hooks.taken, "last_backward", backward);
}

// The same from a thread without the GIL: the main thread does it before it runs on, once for many calls.
void tell_later(PyObject* backward) {
  static std::atomic<PyObject*> latest;
  static std::atomic<bool> pending;
  latest = backward;
  const auto told = [](void*) {
    pending = false;
    return tell(latest, latest);
  };
  if (!pending.exchange(true) && Py_AddPendingCall(told, nullptr) != 0) pending = false;
}

bool aligned(const Tensor& tensor) {
  return tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

constexpr auto PLAIN = c10::DispatchKeySet(
    {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
     c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA, c10::DispatchKey::ADInplaceOrView});

// Whether its operations run plain kernels of the device: no subclass that dispatches, no lazy negation, no transform.
bool plain(const Tensor& tensor) { return (tensor.key_set().raw_repr() & ~PLAIN.raw_repr()) == 0; }

// Whether this thread's operations do, no mode and no tracer, and autograd is not passed by.
bool plain_thread() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const bool differentiates = (local.excluded_ & c10::autograd_dispatch_keyset).empty();
  return (local.included_ - c10::default_included_set).empty() &&
         (differentiates || c10::InferenceMode::is_enabled());
}

using Key = c10::SmallVector<int64_t, 32>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037ULL;
    for (const int64_t part : key) {
      hash = (hash ^ uint64_t(part)) * 0x9E3779B97F4A7C15ULL;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

struct Given {
  Tensor x, weight, lora_A, lora_B, bias;
  double dropout_p;
  PyObject* backend;
};

// All that the checks, the choice of a backend and the launches depend on; false where they depend on more.
bool make_key(const Given& given, Key& key) {
  const Tensor& x = given.x;
  if (!plain_thread()) return false;
  for (const Tensor* tensor : {&x, &given.weight, &given.lora_A, &given.lora_B, &given.bias}) {
    if (!tensor->defined()) continue;
    if (!plain(*tensor) || tensor->device() != x.device() || !aligned(*tensor)) return false;
    key.push_back(int64_t(tensor->scalar_type()));
    key.push_back(tensor->dim());
    key.append(tensor->sizes().begin(), tensor->sizes().end());
  }
  const auto kind = x.device().type();
  const bool autocast = at::autocast::is_autocast_enabled(kind);
  int64_t rate;
  std::memcpy(&rate, &given.dropout_p, sizeof(rate));
  key.append({int64_t(kind), int64_t(x.device().index()), given.bias.defined(),
              autocast ? int64_t(at::autocast::get_autocast_dtype(kind)) : -1, rate,
              int64_t(reinterpret_cast<intptr_t>(given.backend)), at::globalContext().deterministicAlgorithms()});
  return true;
}

auto& calls = *new std::unordered_map<Key, std::shared_ptr<Call>, Hash>;  // under the GIL

constexpr const char* ONCE = "lora_linear can be differentiated only once: it has no double backward";

// Nodes are held by std::shared_ptr or, since torch 2.13, by c10::intrusive_ptr.
template <typename T, typename... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, T>) {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  } else {
    // as torch deletes its own: a long chain does not recurse
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](T* node) { deleteNode(node); });
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// By the op, for gradients that no launch gives: it takes any tensors.
Gradients backward_op(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                      const Tensor& lora_B, const Tensor& s, const Tensor& seed, double scaling, double dropout_p,
                      at::ScalarType adapter_dtype, const std::string& backend) {
  using Optional = const std::optional<Tensor>&;
  using Op = Gradients(const Tensor&, Optional, Optional, const Tensor&, const Tensor&, Optional, Optional, Optional,
                       double, double, at::ScalarType, bool, bool, bool, std::string_view);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fusedlora::backward", "").typed<Op>();
  const auto flat = [](const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); };
  auto [dx, dA, dB] = op.call(flat(dy), flat(x), weight, lora_A, lora_B, s,
                              seed.defined() ? std::optional<Tensor>(seed) : std::nullopt, std::nullopt, scaling,
                              dropout_p, adapter_dtype, true, true, true, backend);
  return {dx.view_as(x), dA, dB};
}

double kept_scaling(const Call& call, double scaling) { return scaling / (1.0 - call.dropout_p); }

std::string listed(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::string described(const Tensor& tensor, const char* name) {
  return std::string(c10::toString(tensor.scalar_type())) + " " + name + " of shape " + listed(tensor.sizes());
}

uint64_t number(const Tensor& seed) { return seed.defined() ? uint64_t(*seed.const_data_ptr<int64_t>()) : 0; }

// x, lora_A and lora_B require gradients; saves what lora_linear's Python Function would.
struct LoRALinearBackward : Node {
  std::shared_ptr<Call> call;
  double scaling;
  SavedVariable x_, weight_, lora_A_, lora_B_, s_, seed_;

  std::string name() const override { return "LoRALinearBackward"; }

  std::array<SavedVariable*, 6> saved() { return {&x_, &weight_, &lora_A_, &lora_B_, &s_, &seed_}; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* tensor : saved()) tensor->reset_data();
  }

  // For compiled autograd, which knows no gradient yet when it asks: its graph gets a call of `traced`.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* tensor : {&x_, &weight_, &lora_A_, &lora_B_, &s_, &seed_}) args.collect(*tensor, false);
    args.collect(scaling);
    args.collect(call->dropout_p);
    args.collect(call->adapter_dtype);
    args.collect(call->backend);
  }

  // As torch's own nodes (CppNode in its custom_function.h).
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    PackedArgs packed;
    for (SavedVariable* tensor : saved()) {
      swap.before(*tensor);
      packed.pack(tensor->unpack());
    }
    packed.pack(scaling);
    packed.pack(call->dropout_p);
    packed.pack(call->adapter_dtype);
    packed.pack(call->backend);
    std::vector<at::TypePtr> schema;
    for (const c10::IValue& value : packed.vec()) {
      schema.push_back(value.isTensor() ? at::TensorType::get() : value.type());
    }
    const auto& compiler = getPyCompilerInterface();
    const auto bound = compiler->bind_function(swap.get_py_compiler(), name(), traced, schema,
                                               /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto outputs =
        IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(get_input_metadata(next_edges()));
    variable_list made =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", bound, grads, packed.vec(), outputs);
    for (SavedVariable* tensor : saved()) swap.after(*tensor);
    return made;
  }

  // `apply` by the op, of what `apply_with_saved` has packed.
  static variable_list traced(const variable_list& grads, const std::vector<c10::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    std::array<Tensor, 6> tensors;
    for (Tensor& tensor : tensors) tensor = packed.unpack<Tensor>();
    const auto& [x, weight, lora_A, lora_B, s, seed] = tensors;
    const auto scaling = packed.unpack<double>(), dropout_p = packed.unpack<double>();
    const auto adapter_dtype = packed.unpack<at::ScalarType>();
    const auto backend = packed.unpack<std::string>();
    Tensor dy = grads[0];
    if (!dy.defined()) {
      c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
      shape.back() = weight.sym_size(0);
      dy = x.new_zeros_symint(shape);
    }
    auto [dx, dA, dB] =
        backward_op(dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, adapter_dtype, backend);
    return {std::move(dx), std::move(dA), std::move(dB)};
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor x = x_.unpack(), weight = weight_.unpack(), lora_A = lora_A_.unpack(), lora_B = lora_B_.unpack();
    const Tensor s = s_.unpack(), seed = seed_.unpack();
    const Tensor dy = grads[0].defined() ? grads[0] : input_metadata(0).zeros_like();
    const bool differentiable = at::GradMode::is_enabled();
    Gradients gradients;
    {
      at::NoGradGuard no_grad;
      gradients = compute(dy, x, weight, lora_A, lora_B, s, seed);
    }
    auto [dx, dA, dB] = std::move(gradients);
    variable_list made{std::move(dx), std::move(dA), std::move(dB)};
    if (differentiable) {
      auto once = make_node<torch::autograd::Error>(
          std::string(ONCE), torch::autograd::collect_next_edges(dy, x, weight, lora_A, lora_B));
      for (Tensor& gradient : made) torch::autograd::set_history(gradient, once);
    }
    return made;
  }

  Gradients compute(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                    const Tensor& lora_B, const Tensor& s, const Tensor& seed) const {
    const c10::OptionalDeviceGuard guard(x.device());
    bool simple = plain_thread() && (!seed.defined() || (plain(seed) && seed.is_cpu()));
    for (const Tensor* tensor : {&dy, &x, &weight, &lora_A, &lora_B, &s}) {
      simple = simple && plain(*tensor) && tensor->device() == x.device() && aligned(*tensor);
    }
    void* stream = nullptr;
    // the launch goes by the tuned tables, or by none, as forward did
    const bool changed = call->deterministic != at::globalContext().deterministicAlgorithms();
    if (call->backward_by_op || changed || !simple || !find_stream(x.device(), stream)) {
      return backward_op(dy, x, weight, lora_A, lora_B, s, seed, scaling, call->dropout_p, call->adapter_dtype,
                         call->backend);
    }
    const Tensor* saved[] = {&x, &weight, &lora_A, &lora_B, &s};
    const char* names[] = {"x", "weight", "lora_A", "lora_B", "S"};
    for (int i = 0; i < 5; ++i) {  // hooks of saved tensors and owners of parameters may have changed them
      const Made& made = call->made[i];
      if (saved[i]->sizes() != at::IntArrayRef(made.sizes) || saved[i]->scalar_type() != made.dtype) {
        throw std::runtime_error(std::string("lora_linear's backward got a ") + described(*saved[i], names[i]) +
                                 ", where its forward had a " + c10::toString(made.dtype) + " one of shape " +
                                 listed(made.sizes));
      }
    }
    const Tensor dx = at::empty(x.sizes(), x.options()), dA = at::empty(lora_A.sizes(), lora_A.options()),
                 dB = at::empty(lora_B.sizes(), lora_B.options());
    std::array<const Tensor*, TENSORS> tensors{};
    tensors[X] = &x, tensors[DY] = &dy, tensors[W] = &weight, tensors[A] = &lora_A, tensors[B] = &lora_B;
    tensors[S] = &s, tensors[DX] = &dx, tensors[DA] = &dA, tensors[DB] = &dB;
    call->backward.run(x.device(), stream, tensors, kept_scaling(*call, scaling), number(seed));
    tell_later(call->backward_name);
    return {dx, dA, dB};
  }
};

// Python's error, which a hook has raised, out of the way until it is put back, or forgotten for another one.
class ErrorPutAside {
 public:
  ErrorPutAside() {
    pybind11::gil_scoped_acquire gil;
    PyErr_Fetch(&type_, &value_, &traceback_);
  }
  ErrorPutAside(const ErrorPutAside&) = delete;
  void put_back() {
    pybind11::gil_scoped_acquire gil;
    PyErr_Restore(type_, value_, traceback_);
    type_ = value_ = traceback_ = nullptr;
  }
  ~ErrorPutAside() {
    pybind11::gil_scoped_acquire gil;
    Py_XDECREF(type_), Py_XDECREF(value_), Py_XDECREF(traceback_);
  }

 private:
  PyObject *type_, *value_, *traceback_;
};

// S alone. False where Python, whose it is, can no longer do it.
bool s_is_filled(const Call& call, const Given& given, double scaling, const Tensor& s, const Tensor& seed) {
  pybind11::gil_scoped_acquire gil;
  const auto wrap = [](const Tensor& tensor) { return THPVariable_Wrap(tensor); };  // None where there is none
  const auto filled = THPObjectPtr(PyObject_CallFunction(
      call.fill_s.ptr(getPyInterpreter()), "(NNNNNNO)dN", wrap(given.x), wrap(given.weight), wrap(given.lora_A),
      wrap(given.lora_B), wrap(given.bias), wrap(seed), Py_None, scaling, wrap(s)));
  if (!filled) throw python_error();
  return filled.get() == Py_True;
}

// `late`: y is computed after what backward reads has been saved; where that raises S alone (fusedlora/recomputation.py).
Tensor forward(const std::shared_ptr<Call>& call, const Given& given, double scaling, const Tensor& seed, void* stream,
               bool differentiable, bool late) {
  RECORD_FUNCTION("fusedlora::linear", c10::ArrayRef<const c10::IValue>());
  const Tensor& x = given.x;
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = given.weight.size(0);
  Tensor y, s;
  const auto launch = [&] {
    at::NoGradGuard no_grad;
    y = at::empty(shape, x.options());
    std::array<const Tensor*, TENSORS> tensors{};
    tensors[X] = &x, tensors[W] = &given.weight, tensors[A] = &given.lora_A, tensors[B] = &given.lora_B;
    tensors[BIAS] = &given.bias, tensors[S] = &s, tensors[Y] = &y;
    call->forward[differentiable].run(x.device(), stream, tensors, kept_scaling(*call, scaling), number(seed));
  };
  if (differentiable) {
    at::NoGradGuard no_grad;
    s = at::empty({x.numel() / x.size(-1), given.lora_A.size(0)}, x.options().dtype(call->adapter_dtype));
  }
  if (!late) launch();
  if (differentiable) {
    auto node = make_node<LoRALinearBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, given.lora_A, given.lora_B));
    node->call = call;
    node->scaling = scaling;
    node->x_ = SavedVariable(x, false);
    node->weight_ = SavedVariable(given.weight, false);
    node->lora_A_ = SavedVariable(given.lora_A, false);
    node->lora_B_ = SavedVariable(given.lora_B, false);
    try {
      node->s_ = SavedVariable(s, false);
      if (seed.defined()) node->seed_ = SavedVariable(seed, false);
    } catch (...) {
      if (late) {
        ErrorPutAside raised;
        if (!s_is_filled(*call, given, scaling, s, seed)) launch();
        raised.put_back();
      }
      throw;
    }
    if (late) launch();
    torch::autograd::set_history(y, node);
  }
  return y;
}

// Whether tensors are saved by a hook that does not look into them.
bool saves_unseen() {
  const auto found = at::SavedTensorDefaultHooks::get_hooks();
  if (!found) return false;
  PyObject* pack = found->first.ptr(getPyInterpreter());
  const auto sees = THPObjectPtr(PyObject_CallFunctionObjArgs(hooks.sees_content, pack, nullptr));
  if (!sees) throw python_error();
  return sees.get() == Py_False;
}

// x, weight, lora_A, lora_B, bias, dropout_p, backend; false where these are others.
bool parse(PyObject* const* args, Given& given) {
  Tensor* tensors[] = {&given.x, &given.weight, &given.lora_A, &given.lora_B, &given.bias};
  for (int i = 0; i < 5; ++i) {
    if (i == 4 && args[i] == Py_None) continue;
    if (!THPVariable_CheckExact(args[i])) return false;  // a subclass may have a say
    *tensors[i] = THPVariable_Unpack(args[i]);
  }
  given.dropout_p = PyFloat_AsDouble(args[5]);
  given.backend = args[6];
  return !PyErr_Occurred();
}

c10::SafePyObject owned(PyObject* object) {
  Py_INCREF(object);
  return {object, getPyInterpreter()};
}

PyObject* setup(PyObject*, PyObject* args) {
  unsigned long long current_stream, is_capturing, launch_kernel;
  PyObject *taken, *draw, *sees_content;
  if (!PyArg_ParseTuple(args, "KKKOOO", &current_stream, &is_capturing, &launch_kernel, &taken, &draw, &sees_content)) {
    return nullptr;
  }
  hooks.current_stream = reinterpret_cast<decltype(hooks.current_stream)>(current_stream);
  hooks.is_capturing = reinterpret_cast<decltype(hooks.is_capturing)>(is_capturing);
  hooks.launch_kernel = reinterpret_cast<decltype(hooks.launch_kernel)>(launch_kernel);
  Py_INCREF(taken);
  Py_INCREF(draw);
  Py_INCREF(sees_content);
  Py_XSETREF(hooks.taken, taken);
  Py_XSETREF(hooks.draw, draw);
  Py_XSETREF(hooks.sees_content, sees_content);
  Py_RETURN_NONE;
}

constexpr const char* CAPSULE = "fusedlora.Call";

// add(x, weight, lora_A, lora_B, bias, dropout_p, backend, adapter_dtype, names, backward_by_op, fill_s): its Call, or
// None.
PyObject* add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 11, "add takes 11 arguments");
  Given given;
  Key key;
  if (!parse(args, given) || !make_key(given, key)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const char* backend = PyUnicode_AsUTF8(args[6]);
  PyObject *up, *down;
  if (!backend || !PyArg_ParseTuple(args[8], "UU", &up, &down)) return nullptr;
  auto& call = calls[key];  // there already where only a rate differs that is not in use
  if (!call) {
    const at::ScalarType adapter_dtype = reinterpret_cast<THPDtype*>(args[7])->scalar_type;
    const Made s({given.x.numel() / given.x.size(-1), given.lora_A.size(0)}, adapter_dtype);
    call = std::make_shared<Call>(Call{{Made(given.x), Made(given.weight), Made(given.lora_A), Made(given.lora_B), s},
                                       given.dropout_p, adapter_dtype, backend,
                                       {}, {}, owned(args[6]), Py_NewRef(up), Py_NewRef(down),
                                       owned(args[10]), args[9] == Py_True,
                                       at::globalContext().deterministicAlgorithms()});
  }
  return PyCapsule_New(new std::shared_ptr<Call>(call), CAPSULE, [](PyObject* capsule) {
    delete static_cast<std::shared_ptr<Call>*>(PyCapsule_GetPointer(capsule, CAPSULE));
  });
  END_HANDLE_TH_ERRORS
}

// set_launch(call, which, function, programs, threads, shared, early, problem, slots, holes, sizes, keeps, watchers)
PyObject* set_launch(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *capsule, *keeps, *watchers;
  int which;
  unsigned long long function, problem;
  Launch launch;
  const char *slots, *holes;
  Py_ssize_t slots_size, holes_size;
  if (!PyArg_ParseTuple(args, "OiKIIIpKy#y#(LLL)OO", &capsule, &which, &function, &launch.programs, &launch.threads,
                        &launch.shared, &launch.early, &problem, &slots, &slots_size, &holes, &holes_size,
                        &launch.work_size, &launch.num_words, &launch.scratch_size, &keeps, &watchers)) {
    return nullptr;
  }
  auto* call = static_cast<std::shared_ptr<Call>*>(PyCapsule_GetPointer(capsule, CAPSULE));
  if (!call) return nullptr;
  launch.function = function;
  launch.problem = reinterpret_cast<const char* (*)()>(problem);
  launch.slots.resize(slots_size / sizeof(uint64_t));
  std::memcpy(launch.slots.data(), slots, launch.slots.size() * sizeof(uint64_t));
  launch.holes.resize(holes_size / sizeof(Hole));
  std::memcpy(launch.holes.data(), holes, launch.holes.size() * sizeof(Hole));
  launch.keeps.emplace(owned(keeps));
  if (watchers != Py_None) launch.watchers.emplace(owned(watchers));
  Launch& place = which == 2 ? (*call)->backward : (*call)->forward[which];
  // a node may be reading it in another thread
  if (!place.function) place = std::move(launch);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// run(x, weight, lora_A, lora_B, bias, dropout_p, backend, scaling): y, or None where Python has to take the call.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 8, "run takes 8 arguments");
  Given given;
  Key key;
  const bool is_number = PyFloat_Check(args[7]) || PyLong_Check(args[7]);
  const double scaling = is_number ? PyFloat_AsDouble(args[7]) : 0.0;
  if (!is_number || !parse(args, given) || PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const auto wants = [](const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
  bool differentiable = false;
  if (at::GradMode::is_enabled()) {
    const bool x = wants(given.x), a = wants(given.lora_A), b = wants(given.lora_B);
    differentiable = x && a && b;
    if ((x || a || b) != differentiable || wants(given.weight) || wants(given.bias)) Py_RETURN_NONE;
  }
  if (!make_key(given, key)) Py_RETURN_NONE;
  const auto found = calls.find(key);
  if (found == calls.end()) Py_RETURN_NONE;
  const std::shared_ptr<Call> call = found->second;
  const Launch& launch = call->forward[differentiable];
  if (!launch.function || launch.watched()) Py_RETURN_NONE;
  const bool no_backward = !call->backward.function || call->backward.watched();
  if (differentiable && no_backward && !call->backward_by_op) Py_RETURN_NONE;
  const c10::OptionalDeviceGuard guard(given.x.device());
  void* stream = nullptr;
  if (!find_stream(given.x.device(), stream)) Py_RETURN_NONE;
  Tensor seed;
  if (given.dropout_p > 0) {
    auto drawn = THPObjectPtr(PyObject_CallFunctionObjArgs(hooks.draw, args[0], args[5], args[6], nullptr));
    if (!drawn) return nullptr;
    TORCH_CHECK(THPVariable_Check(drawn), "the dropout's seed is no tensor");
    seed = THPVariable_Unpack(drawn);
    TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == at::kLong, "the dropout's seed is no int64 on the CPU");
  }
  const bool late = differentiable && saves_unseen();
  Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    y = forward(call, given, scaling, seed, stream, differentiable, late);
  }
  if (tell(call->forward_name, call->backward_name) != 0) return nullptr;
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

PyObject* clear(PyObject*, PyObject*) {
  calls.clear();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, nullptr},
    {"add", reinterpret_cast<PyCFunction>(add), METH_FASTCALL, nullptr},
    {"set_launch", set_launch, METH_VARARGS, nullptr},
    {"run", reinterpret_cast<PyCFunction>(run), METH_FASTCALL, nullptr},
    {"clear", clear, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fusedlora_node", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_fusedlora_node() { return PyModule_Create(&module); }
