// Launchers of GroupNorm + ReLU: cut the volumes, lay out the workspace, queue the kernels.
#include "group_norm_cuda.h"

#include <algorithm>
#include <limits>

#include "group_norm_chunks.cuh"

namespace tfmtseg {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostTiles = 65535;

// Cuts the volumes; `count` is 0 if that cannot be done.
Chunks Cut(const GroupNormArguments& arguments) {
  Chunks chunks = {};
  if (arguments.n < 0 || arguments.n > kMost || arguments.voxels < 0 || arguments.channels < 1 ||
      arguments.channels > kMostTiles * kChunkThreads || arguments.groups < 1 ||
      arguments.channels % arguments.groups != 0) {
    return chunks;
  }
  chunks.n = arguments.n;
  chunks.voxels = arguments.voxels;
  chunks.channels = static_cast<int>(arguments.channels);
  chunks.groups = static_cast<int>(arguments.groups);
  chunks.per_group = chunks.channels / chunks.groups;
  chunks.columns = std::min(chunks.channels, kChunkThreads);
  chunks.rows = kChunkThreads / chunks.columns;
  const int64_t tiles = (chunks.channels + chunks.columns - 1) / chunks.columns;
  // Some blocks for each multiprocessor, and some voxels for each thread.
  const int64_t wanted = 4 * BlocksWanted() / std::max<int64_t>(1, chunks.n * tiles);
  const int64_t most = chunks.voxels / (8 * chunks.rows);
  const int64_t count = std::max<int64_t>(1, std::min(wanted, most));
  chunks.length = std::max<int64_t>(1, (chunks.voxels + count - 1) / count);
  chunks.count = std::max(1, static_cast<int>((chunks.voxels + chunks.length - 1) / chunks.length));
  if (chunks.n * chunks.count > kMost || chunks.n * chunks.groups > kMost - kGroupThreads ||
      int64_t{chunks.count} * chunks.channels > kMost) {
    chunks.count = 0;
  }
  return chunks;
}

dim3 ChunkBlocks(const Chunks& chunks) {
  const int64_t tiles = (chunks.channels + chunks.columns - 1) / chunks.columns;
  return dim3(static_cast<unsigned>(chunks.n * chunks.count), static_cast<unsigned>(tiles));
}

dim3 GroupBlocks(const Chunks& chunks) {
  constexpr int64_t kPerBlock = kGroupThreads / 32;
  return dim3(static_cast<unsigned>((chunks.n * chunks.groups + kPerBlock - 1) / kPerBlock));
}

// The workspace, laid out.
struct Workspace {
  float* parts[2];     // [n, chunks, channels]
  float* channels[2];  // [n, channels]
  float* groups[2];    // [n, groups]
  size_t size;

  Workspace(const Chunks& chunks, void* memory) : size(0) {
    const auto reserve = [&](int64_t count) {
      float* place = reinterpret_cast<float*>(static_cast<unsigned char*>(memory) + size);
      size += (count * sizeof(float) + 255) / 256 * 256;
      return place;
    };
    for (float*& part : parts) part = reserve(chunks.n * chunks.count * chunks.channels);
    for (float*& channel : channels) channel = reserve(chunks.n * chunks.channels);
    for (float*& group : groups) group = reserve(chunks.n * chunks.groups);
    size = std::max<size_t>(size, 256);
  }
};

// Checks a call and runs `body(chunks, workspace, T())` with T the type of x.
template <typename Body>
int Run(const GroupNormArguments& arguments, void* memory, size_t size, Body body) {
  const Chunks chunks = Cut(arguments);
  if (chunks.count == 0 || memory == nullptr) return cudaErrorInvalidValue;
  const Workspace workspace(chunks, memory);
  if (size < workspace.size) return cudaErrorInvalidValue;
  switch (arguments.type) {
    case DataType::kFloat32:
      return body(chunks, workspace, float());
    case DataType::kFloat16:
      return body(chunks, workspace, __half());
    case DataType::kBFloat16:
      return body(chunks, workspace, __nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t GroupNormWorkspaceSize(const GroupNormArguments& arguments) {
  const Chunks chunks = Cut(arguments);
  return chunks.count == 0 ? 0 : Workspace(chunks, nullptr).size;
}

int GroupNormReluForward(CUstream_st* stream, const GroupNormArguments& arguments, float epsilon,
                         void* y, float* mean, float* rstd, void* workspace,
                         size_t workspace_size) {
  return Run(arguments, workspace, workspace_size,
             [&](const Chunks& chunks, const Workspace& work, auto type) -> int {
               using T = decltype(type);
               if (chunks.n == 0) return cudaSuccess;
               const T* x = static_cast<const T*>(arguments.x);
               int error =
                   Launch(ChunkStatisticsKernel<T>, ChunkBlocks(chunks), dim3(kChunkThreads), 0,
                          stream, chunks, x, work.parts[0], work.parts[1]);
               if (error) return error;
               error = Launch(GroupStatisticsKernel, GroupBlocks(chunks), dim3(kGroupThreads), 0,
                              stream, chunks, work.parts[0], work.parts[1], epsilon, mean, rstd);
               if (error) return error;
               return Launch(NormalizeKernel<T>, ChunkBlocks(chunks), dim3(kChunkThreads), 0,
                             stream, chunks, x, arguments.gamma, arguments.beta, mean, rstd,
                             static_cast<T*>(y));
             });
}

int GroupNormReluBackward(CUstream_st* stream, const GroupNormArguments& arguments,
                          const void* upstream, const float* mean, const float* rstd,
                          void* grad_x, float* grad_gamma, float* grad_beta, void* workspace,
                          size_t workspace_size) {
  return Run(
      arguments, workspace, workspace_size,
      [&](const Chunks& chunks, const Workspace& work, auto type) -> int {
        using T = decltype(type);
        const T* x = static_cast<const T*>(arguments.x);
        const T* up = static_cast<const T*>(upstream);
        int error = 0;
        if (chunks.n > 0) {
          error = Launch(ChunkGradientsKernel<T>, ChunkBlocks(chunks), dim3(kChunkThreads), 0,
                         stream, chunks, up, x, arguments.gamma, arguments.beta, mean, rstd,
                         work.parts[0], work.parts[1]);
          if (error) return error;
          error = Launch(GroupGradientsKernel, GroupBlocks(chunks), dim3(kGroupThreads), 0, stream,
                         chunks, work.parts[0], work.parts[1], arguments.gamma, rstd,
                         work.channels[0], work.channels[1], work.groups[0], work.groups[1]);
          if (error) return error;
        }
        const int64_t blocks = (chunks.channels + kChunkThreads - 1) / kChunkThreads;
        error = Launch(ChannelGradientsKernel, dim3(static_cast<unsigned>(blocks)),
                       dim3(kChunkThreads), 0, stream, chunks, work.channels[0], work.channels[1],
                       grad_gamma, grad_beta);
        if (error || chunks.n == 0) return error;
        return Launch(GradientsKernel<T>, ChunkBlocks(chunks), dim3(kChunkThreads), 0, stream,
                      chunks, up, x, arguments.gamma, arguments.beta, mean, rstd, work.groups[0],
                      work.groups[1], static_cast<T*>(grad_x));
      });
}

const char* GroupNormErrorString(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace tfmtseg
