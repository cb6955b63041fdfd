// Launchers: choose an engine, lay out the workspace, queue the kernels.
#include "info_nce_cuda.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "info_nce_rows.cuh"
#include "info_nce_scalar.cuh"
#include "info_nce_sweep.cuh"
#include "info_nce_tensor_core.cuh"

namespace tfmtseg {
namespace {

constexpr int64_t kWidestTensorCoreRow = 256;

// Tensor cores are fed by copies of 16 bytes.
bool IsAligned(const void* rows) { return reinterpret_cast<uintptr_t>(rows) % 16 == 0; }

bool IsValid(const InfoNceArguments& arguments) {
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 64;
  return arguments.n >= 0 && arguments.n <= kMostRows && arguments.m >= 0 &&
         arguments.m <= kMostRows && arguments.d >= 1 && arguments.d <= kMostRows &&
         arguments.temperature > 0.0f && std::isfinite(arguments.temperature) &&
         (arguments.query_ids == nullptr) == (arguments.key_ids == nullptr);
}

// How one engine works on one problem.
struct Plan {
  Engine engine;
  bool packs;         // rows have to be copied into another type, width or alignment
  int width;          // of a row as the engine reads it, and of a row of outputs
  size_t row_bytes;   // as the engine reads it
  int query_tiles_per_split;
  int query_splits;
  int key_tiles_per_split;
  int key_splits;
  // Offsets into the workspace, in bytes.
  size_t maxima;
  size_t sums;
  size_t outputs;
  size_t row_weights;
  size_t temperature_gradients;
  size_t packed_queries;
  size_t packed_keys;
  size_t size;
};

// Cuts the streamed rows into parts until there are enough blocks.
void SplitSweep(int64_t owners, int64_t streamed, int64_t owner_tile, int64_t streamed_tile,
                int* tiles_per_split, int* splits) {
  const int64_t owner_tiles = (owners + owner_tile - 1) / owner_tile;
  const int64_t streamed_tiles = (streamed + streamed_tile - 1) / streamed_tile;
  *tiles_per_split = 1;
  *splits = 0;
  if (owner_tiles == 0 || streamed_tiles == 0) return;
  const int64_t wanted =
      std::min(streamed_tiles, std::max<int64_t>(1, BlocksWanted() / owner_tiles));
  *tiles_per_split = static_cast<int>((streamed_tiles + wanted - 1) / wanted);
  *splits = static_cast<int>((streamed_tiles + *tiles_per_split - 1) / *tiles_per_split);
}

Plan MakePlan(const InfoNceArguments& arguments, Engine engine, bool with_gradients) {
  Plan plan = {};
  plan.engine = engine;
  int64_t streamed_tile = kScalarTile;
  if (engine == Engine::kScalar) {
    plan.width = static_cast<int>(arguments.d);
    plan.row_bytes = plan.width * sizeof(float);
    plan.packs = arguments.type != DataType::kFloat32;
  } else {
    const bool split = engine == Engine::kSplit;
    plan.width = arguments.d <= 64 ? 64 : arguments.d <= 128 ? 128 : 256;
    plan.row_bytes = plan.width * 2 * (split ? 2 : 1);
    plan.packs = split || arguments.type == DataType::kFloat32 || arguments.d != plan.width ||
                 !IsAligned(arguments.queries) || !IsAligned(arguments.keys);
    streamed_tile =
        split ? TensorCoreTile<true, 64>::kStreamed : TensorCoreTile<false, 64>::kStreamed;
  }
  static_assert(kScalarTile == kTensorCoreOwners, "SplitSweep is told one of them");
  SplitSweep(arguments.n, arguments.m, kTensorCoreOwners, streamed_tile,
             &plan.query_tiles_per_split, &plan.query_splits);
  SplitSweep(arguments.m, arguments.n, kTensorCoreOwners, streamed_tile,
             &plan.key_tiles_per_split, &plan.key_splits);

  const auto reserve = [&](size_t bytes) {
    const size_t offset = plan.size;
    plan.size += (bytes + 255) / 256 * 256;
    return offset;
  };
  reserve(sizeof(int32_t));  // the error flag
  // The two sweeps run one after the other and share their place.
  const size_t n = arguments.n;
  const size_t m = arguments.m;
  const size_t parts = with_gradients ? std::max(plan.query_splits * n, plan.key_splits * m)
                                      : plan.query_splits * n;
  plan.maxima = reserve(parts * sizeof(float));
  plan.sums = reserve(parts * sizeof(float));
  if (with_gradients) {
    plan.outputs = reserve(parts * plan.width * sizeof(float));
    plan.row_weights = reserve(n * sizeof(RowWeight));
    plan.temperature_gradients = reserve(n * sizeof(float));
  }
  if (plan.packs) {
    plan.packed_queries = reserve(n * plan.row_bytes);
    plan.packed_keys = reserve(m * plan.row_bytes);
  }
  return plan;
}

int DeviceHasTensorCores(bool* has_them) {
  int device = 0;
  int error = cudaGetDevice(&device);
  if (error) return error;
  int major = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *has_them = major >= 8;
  return error;
}

int ChooseEngine(const InfoNceArguments& arguments, Engine* engine) {
  *engine = arguments.engine;
  if (*engine == Engine::kScalar) return cudaSuccess;
  bool can = false;
  const int error = DeviceHasTensorCores(&can);
  if (error) return error;
  can = can && arguments.d <= kWidestTensorCoreRow;
  if (*engine == Engine::kAuto) {
    *engine = !can ? Engine::kScalar
              : arguments.type == DataType::kFloat32 ? Engine::kSplit
                                                     : Engine::kTensorCore;
    return cudaSuccess;
  }
  return can ? cudaSuccess : cudaErrorNotSupported;
}

template <typename Packed, bool kSplit>
int PackAs(CUstream_st* stream, DataType type, const void* rows, int count, int d, int width,
           void* packed) {
  switch (type) {
    case DataType::kFloat32:
      return PackRows<float, Packed, kSplit>(stream, rows, count, d, width, packed);
    case DataType::kFloat16:
      return PackRows<__half, Packed, kSplit>(stream, rows, count, d, width, packed);
    case DataType::kBFloat16:
      return PackRows<__nv_bfloat16, Packed, kSplit>(stream, rows, count, d, width, packed);
  }
  return cudaErrorInvalidValue;
}

int Pack(CUstream_st* stream, const InfoNceArguments& arguments, const Plan& plan,
         const void* rows, int count, void* packed) {
  const DataType type = arguments.type;
  const int d = static_cast<int>(arguments.d);
  if (plan.engine == Engine::kScalar) {
    return PackAs<float, false>(stream, type, rows, count, d, plan.width, packed);
  }
  if (plan.engine == Engine::kSplit) {
    return PackAs<__nv_bfloat16, true>(stream, type, rows, count, d, plan.width, packed);
  }
  if (type == DataType::kFloat16) {
    return PackRows<__half, __half, false>(stream, rows, count, d, plan.width, packed);
  }
  return PackAs<__nv_bfloat16, false>(stream, type, rows, count, d, plan.width, packed);
}

int RunSweep(CUstream_st* stream, const InfoNceArguments& arguments, const Plan& plan,
             const Sweep& sweep, int splits) {
  if (splits == 0) return cudaSuccess;
  switch (plan.engine) {
    case Engine::kScalar:
      return LaunchScalarSweep(stream, sweep, splits);
    case Engine::kSplit:
      return LaunchTensorCoreSweep<__nv_bfloat16, true>(stream, sweep, splits);
    default:
      return arguments.type == DataType::kFloat16
                 ? LaunchTensorCoreSweep<__half, false>(stream, sweep, splits)
                 : LaunchTensorCoreSweep<__nv_bfloat16, false>(stream, sweep, splits);
  }
}

// One call: the arguments, the plan and the workspace, laid out.
class Call {
 public:
  Call(CUstream_st* stream, const InfoNceArguments& arguments, const Plan& plan, void* workspace)
      : stream_(stream),
        arguments_(arguments),
        plan_(plan),
        workspace_(static_cast<unsigned char*>(workspace)),
        packed_queries_(plan.packs ? At<void>(plan.packed_queries) : arguments.queries),
        packed_keys_(plan.packs ? At<void>(plan.packed_keys) : arguments.keys) {
    queries_.positives = arguments.positives;
    queries_.key_mask = arguments.key_mask;
    queries_.n = static_cast<int>(arguments.n);
    queries_.m = static_cast<int>(arguments.m);
    queries_.d = static_cast<int>(arguments.d);
    queries_.inverse_temperature = 1.0f / arguments.temperature;
    queries_.scale = kLog2E / arguments.temperature;
  }

  // Clears the error flag and brings the rows into the engine's form.
  int Prepare() {
    int error = cudaMemsetAsync(error_flag(), 0, sizeof(int32_t), stream_);
    if (error || !plan_.packs) return error;
    error = Pack(stream_, arguments_, plan_, arguments_.queries, queries_.n,
                 At<void>(plan_.packed_queries));
    if (error) return error;
    return Pack(stream_, arguments_, plan_, arguments_.keys, queries_.m,
                At<void>(plan_.packed_keys));
  }

  // Queries own, keys are streamed; then everything that is known per query.
  template <typename T>
  int SweepQueries(const float* row_weights, float* loss, float* log_sum_exp,
                   float* positive_similarity, bool weights_for_keys, void* gradients,
                   float* grad_temperature) {
    if (queries_.n > 0) {
      Sweep sweep = {};
      sweep.owners = packed_queries_;
      sweep.streamed = packed_keys_;
      sweep.owner_count = queries_.n;
      sweep.streamed_count = queries_.m;
      sweep.owner_ids = arguments_.query_ids;
      sweep.streamed_ids = arguments_.key_ids;
      sweep.owner_positives = arguments_.positives;
      sweep.streamed_mask = arguments_.key_mask;
      sweep.tiles_per_split = plan_.query_tiles_per_split;
      SetOutputs(gradients != nullptr, &sweep);
      int error = RunSweep(stream_, arguments_, plan_, sweep, plan_.query_splits);
      if (error) return error;

      QueryResults<T> results = {};
      results.queries = static_cast<const T*>(arguments_.queries);
      results.keys = static_cast<const T*>(arguments_.keys);
      results.maxima = sweep.maxima;
      results.sums = sweep.sums;
      results.outputs = sweep.outputs;
      results.splits = plan_.query_splits;
      results.output_pitch = plan_.width;
      results.row_weights = row_weights;
      results.loss = loss;
      results.log_sum_exp = log_sum_exp;
      results.positive_similarity = positive_similarity;
      results.key_sweep_weights = weights_for_keys ? row_weights_for_keys() : nullptr;
      results.gradients = static_cast<T*>(gradients);
      results.temperature_gradients = grad_temperature ? temperature_gradients() : nullptr;
      error = Launch(FinishQueriesKernel<T>, RowBlocks(queries_.n), dim3(kRowThreads), 0, stream_,
                     queries_, results, error_flag());
      if (error) return error;
    }
    if (!grad_temperature) return cudaSuccess;
    return Launch(SumKernel, dim3(1), dim3(kRowThreads), 0, stream_,
                  static_cast<const float*>(temperature_gradients()), queries_.n,
                  grad_temperature);
  }

  int ComputeRowWeights(const float* row_gradients, const float* log_sum_exp,
                        const float* positive_similarity) {
    if (queries_.n == 0) return cudaSuccess;
    return Launch(RowWeightsKernel, dim3((queries_.n + kRowThreads - 1) / kRowThreads),
                  dim3(kRowThreads), 0, stream_, queries_, row_gradients, log_sum_exp,
                  positive_similarity, row_weights_for_keys(), error_flag());
  }

  // Keys own, queries are streamed.
  template <typename T>
  int SweepKeys(void* gradients) {
    if (queries_.m == 0) return cudaSuccess;
    Sweep sweep = {};
    sweep.owners = packed_keys_;
    sweep.streamed = packed_queries_;
    sweep.owner_count = queries_.m;
    sweep.streamed_count = queries_.n;
    sweep.owner_ids = arguments_.key_ids;
    sweep.streamed_ids = arguments_.query_ids;
    sweep.streamed_positives = arguments_.positives;
    sweep.streamed_weights = row_weights_for_keys();
    sweep.tiles_per_split = plan_.key_tiles_per_split;
    SetOutputs(true, &sweep);
    const int error = RunSweep(stream_, arguments_, plan_, sweep, plan_.key_splits);
    if (error) return error;
    return Launch(FinishKeysKernel<T>, RowBlocks(queries_.m), dim3(kRowThreads), 0, stream_,
                  static_cast<const float*>(sweep.maxima),
                  static_cast<const float*>(sweep.outputs), arguments_.key_mask,
                  plan_.key_splits, plan_.width, queries_.m, queries_.d,
                  static_cast<T*>(gradients));
  }

 private:
  template <typename T>
  T* At(size_t offset) const {
    return reinterpret_cast<T*>(workspace_ + offset);
  }

  int32_t* error_flag() const { return At<int32_t>(0); }
  RowWeight* row_weights_for_keys() const { return At<RowWeight>(plan_.row_weights); }
  float* temperature_gradients() const { return At<float>(plan_.temperature_gradients); }

  void SetOutputs(bool with_outputs, Sweep* sweep) const {
    sweep->width = plan_.width;
    sweep->scale = queries_.scale;
    sweep->maxima = At<float>(plan_.maxima);
    sweep->sums = At<float>(plan_.sums);
    sweep->outputs = with_outputs ? At<float>(plan_.outputs) : nullptr;
  }

  CUstream_st* const stream_;
  const InfoNceArguments& arguments_;
  const Plan& plan_;
  unsigned char* const workspace_;
  const void* const packed_queries_;
  const void* const packed_keys_;
  Queries queries_;
};

// Checks a call, plans it and runs `body(call, T())` with T the type of the rows.
template <typename Body>
int Run(CUstream_st* stream, const InfoNceArguments& arguments, bool with_gradients,
        void* workspace, size_t workspace_size, Body body) {
  if (!IsValid(arguments)) return cudaErrorInvalidValue;
  Engine engine;
  int error = ChooseEngine(arguments, &engine);
  if (error) return error;
  const Plan plan = MakePlan(arguments, engine, with_gradients);
  if (workspace == nullptr || workspace_size < plan.size) return cudaErrorInvalidValue;
  Call call(stream, arguments, plan, workspace);
  error = call.Prepare();
  if (error) return error;
  switch (arguments.type) {
    case DataType::kFloat32:
      return body(call, float());
    case DataType::kFloat16:
      return body(call, __half());
    case DataType::kBFloat16:
      return body(call, __nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t InfoNceWorkspaceSize(const InfoNceArguments& arguments, bool with_gradients) {
  if (!IsValid(arguments)) return 0;
  Engine engine = arguments.engine;
  if (engine == Engine::kAuto && ChooseEngine(arguments, &engine) != cudaSuccess) return 0;
  return MakePlan(arguments, engine, with_gradients).size;
}

int InfoNceForward(CUstream_st* stream, const InfoNceArguments& arguments, float* loss,
                   float* log_sum_exp, float* positive_similarity, void* workspace,
                   size_t workspace_size) {
  return Run(stream, arguments, false, workspace, workspace_size, [&](Call& call, auto type) {
    return call.SweepQueries<decltype(type)>(nullptr, loss, log_sum_exp, positive_similarity,
                                             false, nullptr, nullptr);
  });
}

int InfoNceBackward(CUstream_st* stream, const InfoNceArguments& arguments,
                    const float* row_gradients, const float* log_sum_exp,
                    const float* positive_similarity, void* grad_queries, void* grad_keys,
                    float* grad_temperature, void* workspace, size_t workspace_size) {
  if (grad_temperature && !grad_queries) return cudaErrorInvalidValue;
  return Run(stream, arguments, true, workspace, workspace_size, [&](Call& call, auto type) {
    using T = decltype(type);
    int error = cudaSuccess;
    if (grad_queries) {
      error = call.SweepQueries<T>(row_gradients, nullptr, nullptr, nullptr, false, grad_queries,
                                   grad_temperature);
    }
    if (error || !grad_keys) return error;
    error = call.ComputeRowWeights(row_gradients, log_sum_exp, positive_similarity);
    if (error) return error;
    return call.SweepKeys<T>(grad_keys);
  });
}

int InfoNceForwardBackward(CUstream_st* stream, const InfoNceArguments& arguments,
                           const float* row_weights, float* loss, float* log_sum_exp,
                           float* positive_similarity, void* grad_queries, void* grad_keys,
                           float* grad_temperature, void* workspace, size_t workspace_size) {
  if (grad_temperature && !grad_queries) return cudaErrorInvalidValue;
  return Run(stream, arguments, true, workspace, workspace_size, [&](Call& call, auto type) {
    using T = decltype(type);
    const int error =
        call.SweepQueries<T>(row_weights, loss, log_sum_exp, positive_similarity,
                             grad_keys != nullptr, grad_queries, grad_temperature);
    if (error || !grad_keys) return error;
    return call.SweepKeys<T>(grad_keys);
  });
}

int NormalizeRows(CUstream_st* stream, DataType type, const void* rows, int64_t n, int64_t d,
                  float epsilon, void* normalized, float* inverse_norms) {
  if (n < 0 || d < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    return Launch(NormalizeRowsKernel<T>, RowBlocks(n), dim3(kRowThreads), 0, stream,
                  static_cast<const T*>(rows), n, d, epsilon, static_cast<T*>(normalized),
                  inverse_norms);
  };
  switch (type) {
    case DataType::kFloat32:
      return launch(float());
    case DataType::kFloat16:
      return launch(__half());
    case DataType::kBFloat16:
      return launch(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

int NormalizeRowsBackward(CUstream_st* stream, DataType type, const void* rows,
                          const float* inverse_norms, const void* grad_normalized, int64_t n,
                          int64_t d, float epsilon, void* grad_rows) {
  if (n < 0 || d < 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    return Launch(NormalizeRowsBackwardKernel<T>, RowBlocks(n), dim3(kRowThreads), 0, stream,
                  static_cast<const T*>(rows), inverse_norms,
                  static_cast<const T*>(grad_normalized), n, d, epsilon,
                  static_cast<T*>(grad_rows));
  };
  switch (type) {
    case DataType::kFloat32:
      return launch(float());
    case DataType::kFloat16:
      return launch(__half());
    case DataType::kBFloat16:
      return launch(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

const char* InfoNceErrorString(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace tfmtseg
