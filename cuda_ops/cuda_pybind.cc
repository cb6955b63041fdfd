// The launchers as a Python module without TensorFlow, for checks and timings on any GPU machine.
//
// Arrays are objects with __cuda_array_interface__ (PyTorch, CuPy, Numba) or addresses. Of
// the former, type, size and layout are checked; of the latter nothing is known.
#ifdef TFMTSEG_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "group_norm_cuda.h"
#include "info_nce_cuda.h"

namespace py = pybind11;

namespace {

void Check(int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string("CUDA: ") +
                           cudaGetErrorString(static_cast<cudaError_t>(error)) +
                           " (error " + std::to_string(error) + ")");
}

struct Array {
  void* data = nullptr;
  bool described = false;  // else only an address, or None
  std::vector<int64_t> shape;
  std::string type;  // as in NumPy's array interface: "<f4"

  int64_t size() const {
    int64_t count = 1;
    for (const int64_t length : shape) count *= length;
    return count;
  }
};

Array Read(const py::object& object, const char* name) {
  Array array;
  if (object.is_none()) return array;
  if (py::isinstance<py::int_>(object)) {
    array.data = reinterpret_cast<void*>(object.cast<uintptr_t>());
    return array;
  }
  if (!py::hasattr(object, "__cuda_array_interface__")) {
    throw py::type_error(std::string(name) +
                         ": expected __cuda_array_interface__, an address or None");
  }
  const py::dict interface = object.attr("__cuda_array_interface__");
  array.described = true;
  array.data = reinterpret_cast<void*>(
      interface["data"].cast<py::tuple>()[0].cast<uintptr_t>());
  array.type = interface["typestr"].cast<std::string>();
  for (const py::handle length : interface["shape"].cast<py::tuple>()) {
    array.shape.push_back(length.cast<int64_t>());
  }
  if (interface.contains("strides") && !interface["strides"].is_none() && array.size() > 0) {
    const py::tuple strides = interface["strides"];
    int64_t expected = std::stoll(array.type.substr(2));
    for (size_t axis = array.shape.size(); axis-- > 0;) {
      if (array.shape[axis] != 1 && strides[axis].cast<int64_t>() != expected) {
        throw py::value_error(std::string(name) + ": must be contiguous");
      }
      expected *= array.shape[axis];
    }
  }
  return array;
}

// The address of an array of `count` elements of a type that ends in `type` ("f4", "i4", "1").
template <typename T>
T* Get(const py::object& object, const char* name, const std::string& type, int64_t count,
       bool optional = false) {
  const Array array = Read(object, name);
  if (array.data == nullptr && !optional && count > 0) {
    throw py::value_error(std::string(name) + ": is missing");
  }
  if (array.described) {
    if (array.type.size() < type.size() ||
        array.type.compare(array.type.size() - type.size(), type.size(), type) != 0) {
      throw py::type_error(std::string(name) + ": type is " + array.type + ", must be " + type);
    }
    if (array.size() != count) {
      throw py::value_error(std::string(name) + ": has " + std::to_string(array.size()) +
                            " elements, must have " + std::to_string(count));
    }
  }
  return static_cast<T*>(array.data);
}

tfmtseg::DataType TypeOf(const std::string& name) {
  if (name == "float32") return tfmtseg::DataType::kFloat32;
  if (name == "float16") return tfmtseg::DataType::kFloat16;
  if (name == "bfloat16") return tfmtseg::DataType::kBFloat16;
  throw py::value_error("dtype: is " + name + ", must be float32, float16 or bfloat16");
}

// How an array interface spells the type; it has no name for bfloat16, only its two bytes.
std::string TypeString(tfmtseg::DataType type) {
  return type == tfmtseg::DataType::kFloat32   ? "f4"
         : type == tfmtseg::DataType::kFloat16 ? "f2"
                                               : "2";
}

tfmtseg::Engine EngineOf(const std::string& name) {
  if (name == "auto") return tfmtseg::Engine::kAuto;
  if (name == "scalar") return tfmtseg::Engine::kScalar;
  if (name == "tensor_core") return tfmtseg::Engine::kTensorCore;
  if (name == "split") return tfmtseg::Engine::kSplit;
  throw py::value_error("engine: is " + name + ", must be auto, scalar, tensor_core or split");
}

CUstream_st* Stream(uintptr_t stream) { return reinterpret_cast<CUstream_st*>(stream); }

void* Workspace(const py::object& object, size_t size) {
  const Array array = Read(object, "workspace");
  if (array.described &&
      array.size() * std::stoll(array.type.substr(2)) < static_cast<int64_t>(size)) {
    throw py::value_error("workspace: must have " + std::to_string(size) + " bytes");
  }
  return array.data;
}

// One problem: sizes, options and inputs. Outputs are given to its methods.
class InfoNce {
 public:
  InfoNce(const std::string& dtype, int64_t n, int64_t m, int64_t d, float temperature,
          const std::string& engine, const py::object& queries, const py::object& keys,
          const py::object& positives, const py::object& query_ids, const py::object& key_ids,
          const py::object& key_mask)
      // Alive as long as their addresses are in use.
      : inputs_(py::make_tuple(queries, keys, positives, query_ids, key_ids, key_mask)) {
    arguments_.type = TypeOf(dtype);
    arguments_.n = n;
    arguments_.m = m;
    arguments_.d = d;
    arguments_.temperature = temperature;
    arguments_.engine = EngineOf(engine);
    rows_type_ = TypeString(arguments_.type);
    arguments_.queries = Get<void>(queries, "queries", rows_type_, n * d);
    arguments_.keys = Get<void>(keys, "keys", rows_type_, m * d);
    arguments_.positives = Get<int32_t>(positives, "positives", "i4", n);
    arguments_.query_ids = Get<int32_t>(query_ids, "query_ids", "i4", n, true);
    arguments_.key_ids = Get<int32_t>(key_ids, "key_ids", "i4", m, true);
    arguments_.key_mask = Get<bool>(key_mask, "key_mask", "1", m, true);
  }

  size_t WorkspaceSize(bool with_gradients) const {
    return tfmtseg::InfoNceWorkspaceSize(arguments_, with_gradients);
  }

  void Forward(const py::object& loss, const py::object& log_sum_exp,
               const py::object& positive_similarity, const py::object& workspace,
               uintptr_t stream) const {
    const size_t size = WorkspaceSize(false);
    Check(tfmtseg::InfoNceForward(Stream(stream), arguments_, Row(loss, "loss"),
                                  Row(log_sum_exp, "log_sum_exp"),
                                  Row(positive_similarity, "positive_similarity"),
                                  Workspace(workspace, size), size));
  }

  void Backward(const py::object& row_gradients, const py::object& log_sum_exp,
                const py::object& positive_similarity, const py::object& grad_queries,
                const py::object& grad_keys, const py::object& grad_temperature,
                const py::object& workspace, uintptr_t stream) const {
    const size_t size = WorkspaceSize(true);
    Check(tfmtseg::InfoNceBackward(Stream(stream), arguments_, Row(row_gradients, "row_gradients"),
                                   Row(log_sum_exp, "log_sum_exp"),
                                   Row(positive_similarity, "positive_similarity"),
                                   Rows(grad_queries, "grad_queries", arguments_.n),
                                   Rows(grad_keys, "grad_keys", arguments_.m),
                                   Get<float>(grad_temperature, "grad_temperature", "f4", 1, true),
                                   Workspace(workspace, size), size));
  }

  void ForwardBackward(const py::object& row_weights, const py::object& loss,
                       const py::object& grad_queries, const py::object& grad_keys,
                       const py::object& grad_temperature, const py::object& workspace,
                       uintptr_t stream) const {
    const size_t size = WorkspaceSize(true);
    Check(tfmtseg::InfoNceForwardBackward(
        Stream(stream), arguments_, Row(row_weights, "row_weights"), Row(loss, "loss"), nullptr,
        nullptr, Rows(grad_queries, "grad_queries", arguments_.n),
        Rows(grad_keys, "grad_keys", arguments_.m),
        Get<float>(grad_temperature, "grad_temperature", "f4", 1, true),
        Workspace(workspace, size), size));
  }

 private:
  float* Row(const py::object& object, const char* name) const {
    return Get<float>(object, name, "f4", arguments_.n);
  }

  void* Rows(const py::object& object, const char* name, int64_t count) const {
    return Get<void>(object, name, rows_type_, count * arguments_.d, true);
  }

  py::tuple inputs_;
  tfmtseg::InfoNceArguments arguments_ = {};
  std::string rows_type_;
};

// A batch of volumes: sizes and inputs. Outputs are given to its methods.
class GroupNorm {
 public:
  GroupNorm(const std::string& dtype, int64_t n, int64_t voxels, int64_t channels, int64_t groups,
            const py::object& x, const py::object& gamma, const py::object& beta)
      // Alive as long as their addresses are in use.
      : inputs_(py::make_tuple(x, gamma, beta)) {
    arguments_.type = TypeOf(dtype);
    arguments_.n = n;
    arguments_.voxels = voxels;
    arguments_.channels = channels;
    arguments_.groups = groups;
    volumes_type_ = TypeString(arguments_.type);
    arguments_.x = Volumes(x, "x");
    arguments_.gamma = Get<float>(gamma, "gamma", "f4", channels);
    arguments_.beta = Get<float>(beta, "beta", "f4", channels);
  }

  size_t WorkspaceSize() const { return tfmtseg::GroupNormWorkspaceSize(arguments_); }

  void Forward(float epsilon, const py::object& y, const py::object& mean, const py::object& rstd,
               const py::object& workspace, uintptr_t stream) const {
    const size_t size = WorkspaceSize();
    Check(tfmtseg::GroupNormReluForward(Stream(stream), arguments_, epsilon, Volumes(y, "y"),
                                        Statistics(mean, "mean"), Statistics(rstd, "rstd"),
                                        Workspace(workspace, size), size));
  }

  void Backward(const py::object& upstream, const py::object& mean, const py::object& rstd,
                const py::object& grad_x, const py::object& grad_gamma,
                const py::object& grad_beta, const py::object& workspace,
                uintptr_t stream) const {
    const size_t size = WorkspaceSize();
    const int64_t channels = arguments_.channels;
    Check(tfmtseg::GroupNormReluBackward(
        Stream(stream), arguments_, Volumes(upstream, "upstream"), Statistics(mean, "mean"),
        Statistics(rstd, "rstd"), Volumes(grad_x, "grad_x"),
        Get<float>(grad_gamma, "grad_gamma", "f4", channels),
        Get<float>(grad_beta, "grad_beta", "f4", channels), Workspace(workspace, size), size));
  }

 private:
  void* Volumes(const py::object& object, const char* name) const {
    return Get<void>(object, name, volumes_type_,
                     arguments_.n * arguments_.voxels * arguments_.channels);
  }

  float* Statistics(const py::object& object, const char* name) const {
    return Get<float>(object, name, "f4", arguments_.n * arguments_.groups);
  }

  py::tuple inputs_;
  tfmtseg::GroupNormArguments arguments_ = {};
  std::string volumes_type_;
};

py::dict Device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    throw std::runtime_error(
        std::string("no CUDA device: ") +
        (error != cudaSuccess ? cudaGetErrorString(error) : "none is visible"));
  }
  int device = 0;
  Check(cudaGetDevice(&device));
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, device));
  int driver = 0;
  Check(cudaDriverGetVersion(&driver));
  py::dict result;
  result["name"] = std::string(properties.name);
  result["compute_capability"] = py::make_tuple(properties.major, properties.minor);
  result["multiprocessors"] = properties.multiProcessorCount;
  result["driver_version"] = driver;
  result["runtime_version"] = CUDART_VERSION;
  return result;
}

}  // namespace

PYBIND11_MODULE(tfmtseg_cuda, module) {
  module.doc() = "The ops on CUDA without TensorFlow; see info_nce_cuda.h and group_norm_cuda.h.";
  module.def("device", &Device, "What the current device is. RuntimeError if there is none.");
  py::class_<InfoNce>(module, "InfoNce")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, float, const std::string&,
                    const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&, const py::object&>(),
           py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("m"), py::arg("d"),
           py::arg("temperature"), py::arg("engine") = "auto", py::arg("queries"),
           py::arg("keys"), py::arg("positives"), py::arg("query_ids") = py::none(),
           py::arg("key_ids") = py::none(), py::arg("key_mask") = py::none())
      .def("workspace_size", &InfoNce::WorkspaceSize, py::arg("with_gradients"))
      .def("forward", &InfoNce::Forward, py::kw_only(), py::arg("loss"), py::arg("log_sum_exp"),
           py::arg("positive_similarity"), py::arg("workspace"), py::arg("stream") = 0)
      .def("backward", &InfoNce::Backward, py::kw_only(), py::arg("row_gradients"),
           py::arg("log_sum_exp"), py::arg("positive_similarity"), py::arg("grad_queries"),
           py::arg("grad_keys"), py::arg("grad_temperature"), py::arg("workspace"),
           py::arg("stream") = 0)
      .def("forward_backward", &InfoNce::ForwardBackward, py::kw_only(), py::arg("row_weights"),
           py::arg("loss"), py::arg("grad_queries"), py::arg("grad_keys"),
           py::arg("grad_temperature"), py::arg("workspace"), py::arg("stream") = 0);
  py::class_<GroupNorm>(module, "GroupNorm")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, int64_t, const py::object&,
                    const py::object&, const py::object&>(),
           py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("voxels"), py::arg("channels"),
           py::arg("groups"), py::arg("x"), py::arg("gamma"), py::arg("beta"))
      .def("workspace_size", &GroupNorm::WorkspaceSize)
      .def("forward", &GroupNorm::Forward, py::kw_only(), py::arg("epsilon"), py::arg("y"),
           py::arg("mean"), py::arg("rstd"), py::arg("workspace"), py::arg("stream") = 0)
      .def("backward", &GroupNorm::Backward, py::kw_only(), py::arg("upstream"), py::arg("mean"),
           py::arg("rstd"), py::arg("grad_x"), py::arg("grad_gamma"), py::arg("grad_beta"),
           py::arg("workspace"), py::arg("stream") = 0);
  module.def(
      "normalize_rows",
      [](const std::string& dtype, int64_t n, int64_t d, float epsilon, const py::object& rows,
         const py::object& normalized, const py::object& inverse_norms, uintptr_t stream) {
        const tfmtseg::DataType type = TypeOf(dtype);
        const std::string spelled = TypeString(type);
        Check(tfmtseg::NormalizeRows(reinterpret_cast<CUstream_st*>(stream), type,
                                     Get<void>(rows, "rows", spelled, n * d), n, d, epsilon,
                                     Get<void>(normalized, "normalized", spelled, n * d),
                                     Get<float>(inverse_norms, "inverse_norms", "f4", n)));
      },
      py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("epsilon"),
      py::arg("rows"), py::arg("normalized"), py::arg("inverse_norms"), py::arg("stream") = 0);
  module.def(
      "normalize_rows_backward",
      [](const std::string& dtype, int64_t n, int64_t d, float epsilon, const py::object& rows,
         const py::object& inverse_norms, const py::object& grad_normalized,
         const py::object& grad_rows, uintptr_t stream) {
        const tfmtseg::DataType type = TypeOf(dtype);
        const std::string spelled = TypeString(type);
        Check(tfmtseg::NormalizeRowsBackward(
            reinterpret_cast<CUstream_st*>(stream), type,
            Get<void>(rows, "rows", spelled, n * d),
            Get<float>(inverse_norms, "inverse_norms", "f4", n),
            Get<void>(grad_normalized, "grad_normalized", spelled, n * d), n, d, epsilon,
            Get<void>(grad_rows, "grad_rows", spelled, n * d)));
      },
      py::kw_only(), py::arg("dtype"), py::arg("n"), py::arg("d"), py::arg("epsilon"),
      py::arg("rows"), py::arg("inverse_norms"), py::arg("grad_normalized"),
      py::arg("grad_rows"), py::arg("stream") = 0);
}
