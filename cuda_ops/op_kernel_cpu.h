// What the OpKernels on CPU have in common: TensorFlow's threads and memory as the CPU code takes
// them, and half precision as float32. Included before all other headers.

#ifndef TFMTSEG_OP_KERNEL_CPU_H_
#define TFMTSEG_OP_KERNEL_CPU_H_

#define EIGEN_USE_THREADS

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <new>
#include <type_traits>

#include "cpu_runtime.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/util/work_sharder.h"

namespace tfmtseg {

// Threads take the next part when they are done with one: parts dealt out beforehand, as Shard
// does it, leave threads waiting at the end of each of an op's few steps. What `body` throws ends
// the work and is thrown again by the calling thread: one of TensorFlow's would end the process.
inline ParallelFor ParallelForOf(tensorflow::OpKernelContext* context) {
  return [context](int64_t total, int64_t cost,
                   const std::function<void(int64_t, int64_t)>& body) {
    const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
    constexpr int64_t kWorthwhile = 50'000;  // operations, about 1 microsecond
    const int64_t part = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(cost, 1));
    const int64_t parts = (total + part - 1) / part;
    const int64_t takers = std::min<int64_t>(threads.num_threads, parts);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;  // the first
    const auto take = [&](int64_t, int64_t) {
      try {
        for (int64_t i = next++; i < parts && !failed; i = next++) {
          body(i * part, std::min(total, (i + 1) * part));
        }
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    constexpr int64_t kLarge = int64_t{1} << 40;  // so that each taker is scheduled by itself
    tensorflow::Shard(threads.num_threads, threads.workers, takers, kLarge, take);
    if (failure) std::rethrow_exception(failure);
  };
}

// Memory of TensorFlow's for the time of one call.
class Workspace {
 public:
  explicit Workspace(tensorflow::OpKernelContext* context) : context_(context) {}

  Allocate allocate() {
    return [this](int64_t bytes) -> void* {
      tensorflow::Tensor& memory = tensors_.emplace_back();
      const tensorflow::TensorShape shape({bytes});
      if (!context_->allocate_temp(tensorflow::DT_INT8, shape, &memory).ok()) {
        throw std::bad_alloc();
      }
      return memory.flat<int8_t>().data();
    };
  }

 private:
  tensorflow::OpKernelContext* const context_;
  std::deque<tensorflow::Tensor> tensors_;
};

// An input of type T as float32: itself, or a copy in `buffer`.
template <typename T>
absl::Status AsFloat(tensorflow::OpKernelContext* context, const tensorflow::Tensor& input,
                     tensorflow::Tensor* buffer, const float** result) {
  if constexpr (std::is_same_v<T, float>) {
    *result = input.flat<float>().data();
  } else {
    TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_FLOAT, input.shape(), buffer));
    buffer->flat<float>().device(context->eigen_device<Eigen::ThreadPoolDevice>()) =
        input.flat<T>().template cast<float>();
    *result = buffer->flat<float>().data();
  }
  return absl::OkStatus();
}

// An output of type T, made as float32.
template <typename T>
class FloatOutput {
 public:
  absl::Status Allocate(tensorflow::OpKernelContext* context, int index,
                        const tensorflow::TensorShape& shape) {
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output_));
    if constexpr (std::is_same_v<T, float>) {
      values_ = *output_;
      return absl::OkStatus();
    }
    return context->allocate_temp(tensorflow::DT_FLOAT, shape, &values_);
  }

  float* data() { return values_.flat<float>().data(); }

  void Finish(tensorflow::OpKernelContext* context) {
    if constexpr (!std::is_same_v<T, float>) {
      output_->flat<T>().device(context->eigen_device<Eigen::ThreadPoolDevice>()) =
          values_.flat<float>().template cast<T>();
    }
  }

 private:
  tensorflow::Tensor* output_ = nullptr;
  tensorflow::Tensor values_;
};

}  // namespace tfmtseg

#endif  // TFMTSEG_OP_KERNEL_CPU_H_
