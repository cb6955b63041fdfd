// Kernels of GroupNorm + ReLU.
//
// A volume's voxels are cut into chunks, and its channels into tiles; a block works on a tile of a
// chunk. Threads side by side have channels side by side, and each keeps its channel.
#ifndef TFMTSEG_CUDA_OPS_GROUP_NORM_CHUNKS_CUH_
#define TFMTSEG_CUDA_OPS_GROUP_NORM_CHUNKS_CUH_

#include "cuda_primitives.cuh"

namespace tfmtseg {

constexpr int kChunkThreads = 256;
constexpr int kGroupThreads = 128;  // one warp for each group of a volume

struct Chunks {
  int64_t n;
  int64_t voxels;
  int channels;
  int per_group;   // channels of a group
  int groups;
  int count;       // chunks of a volume; count * channels is an int
  int64_t length;  // voxels of each but the last
  int columns;     // channels of a tile
  int rows;        // voxels that a block works on at once

  __device__ int64_t Voxels(int chunk) const {
    const int64_t rest = voxels - chunk * length;
    return rest < length ? rest : length;
  }
};

// What this thread works on.
struct Place {
  int64_t volume;
  int chunk;
  int channel;
  int64_t group;  // of all groups of all volumes
  int row;
  bool active;  // else it has no channel

  __device__ explicit Place(const Chunks& chunks)
      : volume(static_cast<int>(blockIdx.x) / chunks.count),
        chunk(static_cast<int>(blockIdx.x) % chunks.count),
        channel(static_cast<int>(blockIdx.y) * chunks.columns +
                static_cast<int>(threadIdx.x) % chunks.columns),
        group(0),
        row(static_cast<int>(threadIdx.x) / chunks.columns),
        active(row < chunks.rows && channel < chunks.channels) {
    if (active) group = volume * chunks.groups + channel / chunks.per_group;
  }

  // The first of this thread's numbers, the distance to the next, and how many there are.
  __device__ int64_t First(const Chunks& chunks) const {
    return ((volume * chunks.voxels + chunk * chunks.length + row) * chunks.channels) + channel;
  }
  __device__ int64_t Step(const Chunks& chunks) const {
    return int64_t{chunks.rows} * chunks.channels;
  }
  __device__ int64_t Count(const Chunks& chunks) const {
    const int64_t rest = chunks.Voxels(chunk) - row;
    return active && rest > 0 ? (rest + chunks.rows - 1) / chunks.rows : 0;
  }

  // Where this chunk leaves its numbers for this channel: [n, count, channels].
  __device__ int64_t Part(const Chunks& chunks) const {
    return (volume * chunks.count + chunk) * chunks.channels + channel;
  }
};

// Purpose: of each channel of a chunk the mean, and the sum of the squared differences from it.
// Squares of the numbers themselves would cancel where the mean is large.
// Shapes: x [n, voxels, channels] -> means, squares [n, chunks, channels].
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    ChunkStatisticsKernel(Chunks chunks, const T* x, float* means, float* squares) {
  __shared__ float shared_means[kChunkThreads];
  __shared__ float shared_squares[kChunkThreads];
  __shared__ float shared_counts[kChunkThreads];
  const Place place(chunks);
  const int64_t count = place.Count(chunks), step = place.Step(chunks);
  const T* own = x + place.First(chunks);
  float sum = 0.0f, square = 0.0f;
  const float shift = count > 0 ? ToFloat(own[0]) : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float value = ToFloat(own[i * step]) - shift;
    sum += value;
    square = fmaf(value, value, square);
  }
  const float length = static_cast<float>(count);
  const float average = count > 0 ? sum / length : 0.0f;
  shared_means[threadIdx.x] = shift + average;
  shared_squares[threadIdx.x] = square - sum * average;
  shared_counts[threadIdx.x] = length;
  __syncthreads();
  if (!place.active || place.row != 0) return;
  // Of two parts together: the squares within each, and those of their distance.
  float total = 0.0f, mean = 0.0f, within = 0.0f;
  for (int row = 0; row < chunks.rows; ++row) {
    const int other = row * chunks.columns + threadIdx.x;
    const float more = shared_counts[other];
    if (more == 0.0f) break;
    const float distance = shared_means[other] - mean;
    const float share = more / (total + more);
    within += shared_squares[other] + distance * distance * total * share;
    mean += distance * share;
    total += more;
  }
  means[place.Part(chunks)] = mean;
  squares[place.Part(chunks)] = within;
}

// Of all groups of all volumes, of which there are fewer than 2^31.
__device__ inline int GroupOfThisWarp() {
  return static_cast<int>(blockIdx.x * (kGroupThreads / 32) + threadIdx.x / 32);
}

// Purpose: puts the chunks together in a fixed order.
// Shapes: means, squares [n, chunks, channels] -> mean, rstd [n, groups].
__global__ void __launch_bounds__(kGroupThreads)
    GroupStatisticsKernel(Chunks chunks, const float* means, const float* squares, float epsilon,
                          float* mean, float* rstd) {
  const int group = GroupOfThisWarp();
  if (group >= chunks.n * chunks.groups) return;
  const int lane = threadIdx.x % 32;
  const int per_group = chunks.per_group, parts = chunks.count * per_group;
  const int64_t volume = group / chunks.groups;
  const int64_t first =
      volume * chunks.count * chunks.channels + group % chunks.groups * per_group;
  const float numbers = static_cast<float>(chunks.voxels * per_group);
  float sum = 0.0f;
  for (int i = lane; i < parts; i += 32) {
    const int chunk = i / per_group;
    sum = fmaf(static_cast<float>(chunks.Voxels(chunk)),
               means[first + chunk * chunks.channels + i % per_group], sum);
  }
  const float centre = numbers > 0.0f ? WarpSum(sum) / numbers : 0.0f;
  float within = 0.0f;
  for (int i = lane; i < parts; i += 32) {
    const int chunk = i / per_group;
    const int64_t part = first + chunk * chunks.channels + i % per_group;
    const float distance = means[part] - centre;
    within += squares[part] + static_cast<float>(chunks.Voxels(chunk)) * distance * distance;
  }
  const float variance = numbers > 0.0f ? WarpSum(within) / numbers : 0.0f;
  if (lane != 0) return;
  mean[group] = centre;
  rstd[group] = 1.0f / sqrtf(variance + epsilon);
}

// A comparison in the kernels below, not fmaxf, so that NaN stays NaN.

// Purpose: the result.
// Shapes: x, y [n, voxels, channels], gamma, beta [channels], mean, rstd [n, groups].
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    NormalizeKernel(Chunks chunks, const T* x, const float* gamma, const float* beta,
                    const float* mean, const float* rstd, T* y) {
  const Place place(chunks);
  const int64_t count = place.Count(chunks);
  if (count == 0) return;
  const int64_t first = place.First(chunks), step = place.Step(chunks);
  const float centre = mean[place.group], scale = rstd[place.group] * gamma[place.channel];
  const float offset = beta[place.channel];
  for (int64_t i = 0; i < count; ++i) {
    const float value = fmaf(ToFloat(x[first + i * step]) - centre, scale, offset);
    y[first + i * step] = FromFloat<T>(value < 0.0f ? 0.0f : value);
  }
}

// Purpose: of each channel of a chunk the sums of d and of d (x - mean), with d the gradient
// before the ReLU.
// Shapes: upstream, x [n, voxels, channels] -> sums, centred_sums [n, chunks, channels].
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    ChunkGradientsKernel(Chunks chunks, const T* upstream, const T* x, const float* gamma,
                         const float* beta, const float* mean, const float* rstd, float* sums,
                         float* centred_sums) {
  __shared__ float shared_sums[kChunkThreads];
  __shared__ float shared_centred_sums[kChunkThreads];
  const Place place(chunks);
  const int64_t count = place.Count(chunks);
  float sum = 0.0f, centred_sum = 0.0f;
  if (count > 0) {
    const int64_t first = place.First(chunks), step = place.Step(chunks);
    const float centre = mean[place.group], scale = rstd[place.group] * gamma[place.channel];
    const float offset = beta[place.channel];
    for (int64_t i = 0; i < count; ++i) {
      const float centred = ToFloat(x[first + i * step]) - centre;
      const float d =
          fmaf(centred, scale, offset) > 0.0f ? ToFloat(upstream[first + i * step]) : 0.0f;
      sum += d;
      centred_sum = fmaf(d, centred, centred_sum);
    }
  }
  shared_sums[threadIdx.x] = sum;
  shared_centred_sums[threadIdx.x] = centred_sum;
  __syncthreads();
  if (!place.active || place.row != 0) return;
  for (int row = 1; row < chunks.rows; ++row) {
    sum += shared_sums[row * chunks.columns + threadIdx.x];
    centred_sum += shared_centred_sums[row * chunks.columns + threadIdx.x];
  }
  sums[place.Part(chunks)] = sum;
  centred_sums[place.Part(chunks)] = centred_sum;
}

// Purpose: puts the chunks together in a fixed order.
// Shapes: sums, centred_sums [n, chunks, channels] -> what a volume adds to the gradients of gamma
// and beta, [n, channels], and what its voxels need, slopes and constants, [n, groups].
__global__ void __launch_bounds__(kGroupThreads)
    GroupGradientsKernel(Chunks chunks, const float* sums, const float* centred_sums,
                         const float* gamma, const float* rstd, float* by_gamma, float* by_beta,
                         float* slopes, float* constants) {
  const int group = GroupOfThisWarp();
  if (group >= chunks.n * chunks.groups) return;
  const int lane = threadIdx.x % 32;
  const int per_group = chunks.per_group;
  const int64_t volume = group / chunks.groups;
  const int first = group % chunks.groups * per_group;
  const float numbers = static_cast<float>(chunks.voxels * per_group);
  float average = 0.0f, centred_average = 0.0f;
  for (int channel = first; channel < first + per_group; ++channel) {
    float sum = 0.0f, centred_sum = 0.0f;
    for (int chunk = lane; chunk < chunks.count; chunk += 32) {
      const int64_t part = (volume * chunks.count + chunk) * chunks.channels + channel;
      sum += sums[part];
      centred_sum += centred_sums[part];
    }
    sum = WarpSum(sum);
    centred_sum = WarpSum(centred_sum);
    average = fmaf(sum, gamma[channel] / numbers, average);
    centred_average = fmaf(centred_sum, gamma[channel] / numbers, centred_average);
    if (lane == 0) {
      by_gamma[volume * chunks.channels + channel] = centred_sum * rstd[group];
      by_beta[volume * chunks.channels + channel] = sum;
    }
  }
  if (lane != 0) return;
  slopes[group] = rstd[group] * rstd[group] * rstd[group] * centred_average;
  constants[group] = rstd[group] * average;
}

// Purpose: the gradients of gamma and beta.
// Shapes: by_gamma, by_beta [n, channels] -> grad_gamma, grad_beta [channels].
__global__ void __launch_bounds__(kChunkThreads)
    ChannelGradientsKernel(Chunks chunks, const float* by_gamma, const float* by_beta,
                           float* grad_gamma, float* grad_beta) {
  const int channel = static_cast<int>(blockIdx.x * kChunkThreads + threadIdx.x);
  if (channel >= chunks.channels) return;
  float gamma = 0.0f, beta = 0.0f;
  for (int64_t volume = 0; volume < chunks.n; ++volume) {
    gamma += by_gamma[volume * chunks.channels + channel];
    beta += by_beta[volume * chunks.channels + channel];
  }
  grad_gamma[channel] = gamma;
  grad_beta[channel] = beta;
}

// Purpose: the gradient of x.
// Shapes: upstream, x, grad_x [n, voxels, channels]; mean, rstd, slopes, constants [n, groups].
template <typename T>
__global__ void __launch_bounds__(kChunkThreads)
    GradientsKernel(Chunks chunks, const T* upstream, const T* x, const float* gamma,
                    const float* beta, const float* mean, const float* rstd, const float* slopes,
                    const float* constants, T* grad_x) {
  const Place place(chunks);
  const int64_t count = place.Count(chunks);
  if (count == 0) return;
  const int64_t first = place.First(chunks), step = place.Step(chunks);
  const float centre = mean[place.group], scale = rstd[place.group] * gamma[place.channel];
  const float offset = beta[place.channel];
  const float slope = slopes[place.group], constant = constants[place.group];
  for (int64_t i = 0; i < count; ++i) {
    const float centred = ToFloat(x[first + i * step]) - centre;
    const float d =
        fmaf(centred, scale, offset) > 0.0f ? ToFloat(upstream[first + i * step]) : 0.0f;
    grad_x[first + i * step] = FromFloat<T>(d * scale - centred * slope - constant);
  }
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_GROUP_NORM_CHUNKS_CUH_
