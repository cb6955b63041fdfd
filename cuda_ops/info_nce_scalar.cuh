// Engine kScalar: the sweep in float32 multiply-adds, for any number of features.
#ifndef TFMTSEG_CUDA_OPS_INFO_NCE_SCALAR_CUH_
#define TFMTSEG_CUDA_OPS_INFO_NCE_SCALAR_CUH_

#include "info_nce_sweep.cuh"

namespace tfmtseg {

constexpr int kScalarTile = 64;  // owners and streamed rows of a tile
constexpr int kScalarThreads = 256;

// One slice of 16 features of 64 rows, transposed: slice[feature][row].
constexpr int kSliceFeatures = 16;
constexpr int kSlicePitch = kScalarTile + 4;  // float4 stays aligned, rows in other banks

__device__ inline void LoadSlice(const float* rows, int first_row, int row_count,
                                 const StreamedRow* streamed, int first_feature, int width,
                                 float (*slice)[kSlicePitch]) {
#pragma unroll 2
  for (int e = threadIdx.x; e < kScalarTile * kSliceFeatures; e += kScalarThreads) {
    const int r = e / kSliceFeatures;
    const int c = e % kSliceFeatures;
    const bool valid = first_row + r < row_count && first_feature + c < width &&
                       !(streamed && streamed[r].bias == -INFINITY);
    slice[c][r] =
        valid ? rows[static_cast<int64_t>(first_row + r) * width + first_feature + c] : 0.0f;
  }
}

// Purpose: one sweep (info_nce_sweep.cuh) over float32 rows.
// Shapes: as in Sweep; grid (owner tiles, splits, blocks of kColumns output columns). kColumns 0:
// no outputs. Every block along z computes the similarities anew, so width > 256 costs more.
// Thread (ty, tx) of 16 x 16 has similarities of owners 4 ty .. 4 ty + 3 with streamed rows
// 4 tx .. 4 tx + 3, and outputs of the same owners.
template <int kColumns>
__global__ void __launch_bounds__(kScalarThreads, 2) ScalarSweepKernel(Sweep sweep) {
  constexpr int kGroups = kColumns / 64;  // of 4 columns per thread
  __shared__ __align__(16) float owner_slice[kSliceFeatures][kSlicePitch];
  __shared__ __align__(16) float streamed_slice[kSliceFeatures][kSlicePitch];
  __shared__ __align__(16) float weights[kScalarTile][kSlicePitch];  // [streamed][owner]
  __shared__ __align__(16) float values[kSliceFeatures][kColumns > 0 ? kColumns : 1];
  // Not in registers, which kColumns = 256 needs for the outputs.
  __shared__ OwnerRow owner_rows[kScalarTile];
  __shared__ StreamedRow streamed_rows[kScalarTile];
  __shared__ float signs[kScalarTile];

  const float* owners = static_cast<const float*>(sweep.owners);
  const float* streamed = static_cast<const float*>(sweep.streamed);
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const int first_owner = blockIdx.x * kScalarTile;
  const int first_column = blockIdx.z * kColumns;

  float maximum[4];
  float sum[4];
  float output[4][kColumns > 0 ? kColumns / 16 : 1];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    maximum[i] = -INFINITY;
    sum[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) output[i][c] = 0.0f;
  }

  if (threadIdx.x < kScalarTile) {
    owner_rows[threadIdx.x] = LoadOwnerRow(sweep, first_owner + threadIdx.x);
  }

  const int tiles = (sweep.streamed_count + kScalarTile - 1) / kScalarTile;
  const int first_tile = blockIdx.y * sweep.tiles_per_split;
  const int end_tile = min(first_tile + sweep.tiles_per_split, tiles);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int first = tile * kScalarTile;
    if (threadIdx.x < kScalarTile) {
      LoadStreamedRow(sweep, first + threadIdx.x, &streamed_rows[threadIdx.x],
                      &signs[threadIdx.x]);
    }
    __syncthreads();

    float score[4][4] = {};
    for (int feature = 0; feature < sweep.width; feature += kSliceFeatures) {
      LoadSlice(owners, first_owner, sweep.owner_count, nullptr, feature, sweep.width,
                owner_slice);
      LoadSlice(streamed, first, sweep.streamed_count, streamed_rows, feature, sweep.width,
                streamed_slice);
      __syncthreads();
#pragma unroll 2
      for (int c = 0; c < kSliceFeatures; ++c) {
        const float4 a = *reinterpret_cast<const float4*>(&owner_slice[c][4 * ty]);
        const float4 b = *reinterpret_cast<const float4*>(&streamed_slice[c][4 * tx]);
        const float left[4] = {a.x, a.y, a.z, a.w};
        const float right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) score[i][j] = fmaf(left[i], right[j], score[i][j]);
        }
      }
      __syncthreads();
    }

    // Exponents and their maxima.
    float largest[4] = {maximum[0], maximum[1], maximum[2], maximum[3]};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = 4 * tx + j;
      const StreamedRow row = streamed_rows[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[i][j] = Exponent(score[i][j], sweep, owner_rows[4 * ty + i], row, first + r);
        largest[i] = fmaxf(largest[i], score[i][j]);
      }
    }
    float shift[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // The 16 threads with the same owners are half a warp.
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], step));
      }
      shift[i] = Shift(largest[i]);
      const float correction = exp2f(maximum[i] - shift[i]);
      maximum[i] = largest[i];
      sum[i] *= correction;
#pragma unroll
      for (int c = 0; c < kColumns / 16; ++c) output[i][c] *= correction;
    }

    // Weights, with their signs.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = 4 * tx + j;
      const float sign = signs[r];
      const int positive = streamed_rows[r].positive;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = exp2f(score[i][j] - shift[i]);
        sum[i] += weight;
        // If queries own, the weight of the positive is 0 and its sign of no interest.
        const bool is_positive = positive == first_owner + 4 * ty + i;
        weights[r][4 * ty + i] = (is_positive ? -sign : sign) * weight;
      }
    }

    if constexpr (kColumns > 0) {
      for (int slice = 0; slice < kScalarTile; slice += kSliceFeatures) {
#pragma unroll 2
        for (int e = threadIdx.x; e < kSliceFeatures * kColumns; e += kScalarThreads) {
          const int r = slice + e / kColumns;
          const int column = first_column + e % kColumns;
          const bool valid = column < sweep.width && streamed_rows[r].bias != -INFINITY;
          values[e / kColumns][e % kColumns] =
              valid ? streamed[static_cast<int64_t>(first + r) * sweep.width + column] : 0.0f;
        }
        __syncthreads();  // also: all weights are written
#pragma unroll 2
        for (int x = 0; x < kSliceFeatures; ++x) {
          const float4 w = *reinterpret_cast<const float4*>(&weights[slice + x][4 * ty]);
          const float left[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            const float4 v = *reinterpret_cast<const float4*>(&values[x][64 * g + 4 * tx]);
            const float right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                output[i][4 * g + c] = fmaf(left[i], right[c], output[i][4 * g + c]);
              }
            }
          }
        }
        __syncthreads();
      }
    }
    __syncthreads();  // the next tile replaces streamed_rows
  }

  const int64_t split = blockIdx.y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], step);
    }
    const int owner = first_owner + 4 * ty + i;
    if (owner >= sweep.owner_count) continue;
    const int64_t row = split * sweep.owner_count + owner;
    if (tx == 0 && blockIdx.z == 0) {
      sweep.maxima[row] = maximum[i];
      sweep.sums[row] = sum[i];
    }
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      const int column = first_column + 64 * (c / 4) + 4 * tx + c % 4;
      if (column < sweep.width) sweep.outputs[row * sweep.width + column] = output[i][c];
    }
  }
}

inline int LaunchScalarSweep(CUstream_st* stream, const Sweep& sweep, int splits) {
  const unsigned owner_tiles = (sweep.owner_count + kScalarTile - 1) / kScalarTile;
  const auto launch = [&](void (*kernel)(Sweep), int columns) {
    const unsigned column_blocks = columns > 0 ? (sweep.width + columns - 1) / columns : 1;
    return Launch(kernel, dim3(owner_tiles, splits, column_blocks), dim3(kScalarThreads), 0,
                  stream, sweep);
  };
  if (!sweep.outputs) return launch(ScalarSweepKernel<0>, 0);
  if (sweep.width <= 64) return launch(ScalarSweepKernel<64>, 64);
  if (sweep.width <= 128) return launch(ScalarSweepKernel<128>, 128);
  return launch(ScalarSweepKernel<256>, 256);
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_INFO_NCE_SCALAR_CUH_
