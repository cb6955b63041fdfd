// Engines kTensorCore and kSplit: the sweep on tensor cores, mma.sync m16n8k16.
#ifndef TFMTSEG_CUDA_OPS_INFO_NCE_TENSOR_CORE_CUH_
#define TFMTSEG_CUDA_OPS_INFO_NCE_TENSOR_CORE_CUH_

#include "info_nce_sweep.cuh"

namespace tfmtseg {

constexpr int kTensorCoreThreads = 128;
constexpr int kTensorCoreOwners = 64;  // 16 per warp

// Rows are padded with zeros to one of the widths 64, 128 and 256. With kSplit a row is two rows
// of bfloat16 whose sum it is: [high | low].
template <bool kSplit, int kWidth>
struct TensorCoreTile {
  static constexpr int kParts = kSplit ? 2 : 1;
  static constexpr int kStreamed = kSplit ? 32 : 64;  // rows per tile
  // With two stages the next tile arrives while this one is used. One stage leaves room for two
  // blocks per multiprocessor, whose copies and products overlap instead.
  static constexpr int kStages = kSplit ? 1 : 2;
  static constexpr int kPitch = kWidth * 2;  // bytes
  static constexpr int kOwnerBytes = kParts * kTensorCoreOwners * kPitch;
  static constexpr int kStreamedBytes = kParts * kStreamed * kPitch;
  static constexpr int kRowBytes = kStreamed * (sizeof(StreamedRow) + sizeof(float));
  static constexpr int kSharedBytes = kOwnerBytes + kStages * (kStreamedBytes + kRowBytes);
};

#if TFMTSEG_HAS_TENSOR_CORES

// Where the 8 elements from column 8 * chunk of a row lie. Exchanging chunks by row lets the
// eight rows of a matrix, one pitch apart, lie in different banks.
__device__ inline unsigned char* Chunk(unsigned char* part, int pitch, int row, int chunk) {
  return part + row * pitch + ((chunk ^ (row & 7)) * 16);
}

// Begins to copy kRows rows of kParts parts. `takes_part(row)`: else zeros.
template <int kRows, int kParts, int kWidth, typename Predicate>
__device__ inline void CopyRows(const void* rows, int first, unsigned char* tile,
                                Predicate takes_part) {
  constexpr int kChunks = kWidth / 8;
  const unsigned char* source = static_cast<const unsigned char*>(rows);
  for (int e = threadIdx.x; e < kRows * kParts * kChunks; e += kTensorCoreThreads) {
    const int r = e / (kParts * kChunks);
    const int part = e / kChunks % kParts;
    const int chunk = e % kChunks;
    const bool valid = takes_part(first + r);
    // The address of a row that is not there is not even formed.
    const int64_t row = valid ? first + r : 0;
    CopyAsync16(Chunk(tile + part * kRows * kWidth * 2, kWidth * 2, r, chunk),
                source + ((row * kParts + part) * kChunks + chunk) * 16, valid);
  }
}

#endif  // TFMTSEG_HAS_TENSOR_CORES

// Purpose: one sweep (info_nce_sweep.cuh) over rows of T = __half or __nv_bfloat16.
// Shapes: as in Sweep with width kWidth, rows [kParts][kWidth]; grid (owner tiles, splits).
// A warp has 16 owners and all streamed rows of a tile. Its similarities stay in the registers
// where mma left them, which is where the second product wants its left factor: register h of
// owner 8 * (h / 2) + lane / 4, streamed row 8 * block + 2 * (lane % 4) + h % 2.
template <typename T, bool kSplit, int kWidth>
__global__ void __launch_bounds__(kTensorCoreThreads, 2) TensorCoreSweepKernel(Sweep sweep) {
#if TFMTSEG_HAS_TENSOR_CORES
  using Tile = TensorCoreTile<kSplit, kWidth>;
  constexpr int kStreamed = Tile::kStreamed;
  constexpr int kPitch = Tile::kPitch;
  unsigned char* const owner_tile = DynamicShared();
  unsigned char* const streamed_tiles = owner_tile + Tile::kOwnerBytes;
  StreamedRow* const all_rows =
      reinterpret_cast<StreamedRow*>(streamed_tiles + Tile::kStages * Tile::kStreamedBytes);
  float* const all_signs = reinterpret_cast<float*>(all_rows + Tile::kStages * kStreamed);

  const int lane = threadIdx.x % 32;
  const int warp_owner = threadIdx.x / 32 * 16;  // the warp's first owner in the tile
  const int first_owner = blockIdx.x * kTensorCoreOwners;

  const int tiles = (sweep.streamed_count + kStreamed - 1) / kStreamed;
  const int first_tile = blockIdx.y * sweep.tiles_per_split;
  const int end_tile = min(first_tile + sweep.tiles_per_split, tiles);

  const auto begin_tile = [&](int tile) {
    const int stage = (tile - first_tile) % Tile::kStages;
    const int first = tile * kStreamed;
    if (threadIdx.x < kStreamed) {
      LoadStreamedRow(sweep, first + threadIdx.x, &all_rows[stage * kStreamed + threadIdx.x],
                      &all_signs[stage * kStreamed + threadIdx.x]);
    }
    CopyRows<kStreamed, Tile::kParts, kWidth>(
        sweep.streamed, first, streamed_tiles + stage * Tile::kStreamedBytes,
        [&](int row) { return TakesPart(sweep, row); });
  };

  CopyRows<kTensorCoreOwners, Tile::kParts, kWidth>(
      sweep.owners, first_owner, owner_tile, [&](int row) { return row < sweep.owner_count; });
  if (first_tile < end_tile) begin_tile(first_tile);

  OwnerRow owner[2];
  float maximum[2];
  float sum[2];  // this thread's share
  float output[kWidth / 8][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    owner[h] = LoadOwnerRow(sweep, first_owner + warp_owner + 8 * h + lane / 4);
    maximum[h] = -INFINITY;
    sum[h] = 0.0f;
  }
#pragma unroll
  for (int b = 0; b < kWidth / 8; ++b) {
#pragma unroll
    for (int h = 0; h < 4; ++h) output[b][h] = 0.0f;
  }

  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = (tile - first_tile) % Tile::kStages;
    unsigned char* const streamed_tile = streamed_tiles + stage * Tile::kStreamedBytes;
    const StreamedRow* const rows = all_rows + stage * kStreamed;
    const float* const signs = all_signs + stage * kStreamed;
    WaitForCopies();
    __syncthreads();  // this tile is here, and nobody reads the one before any more
    if (Tile::kStages == 2 && tile + 1 < end_tile) begin_tile(tile + 1);

    // Similarities.
    float score[kStreamed / 8][4];
#pragma unroll
    for (int b = 0; b < kStreamed / 8; ++b) {
#pragma unroll
      for (int h = 0; h < 4; ++h) score[b][h] = 0.0f;
    }
#pragma unroll(kSplit ? 2 : 4)
    for (int k = 0; k < kWidth / 16; ++k) {
      const int owner_row = warp_owner + lane % 16;
      const int owner_chunk = 2 * k + lane / 16;
      uint32_t a[4];
      LoadMatrices(a, Chunk(owner_tile, kPitch, owner_row, owner_chunk));
      uint32_t a_low[4];
      if constexpr (kSplit) {
        LoadMatrices(a_low, Chunk(owner_tile + kTensorCoreOwners * kPitch, kPitch, owner_row,
                                  owner_chunk));
      }
#pragma unroll
      for (int b = 0; b < kStreamed / 16; ++b) {
        const int row = 16 * b + lane % 8 + lane / 16 * 8;
        const int chunk = 2 * k + lane / 8 % 2;
        uint32_t right[4];
        LoadMatrices(right, Chunk(streamed_tile, kPitch, row, chunk));
        if constexpr (kSplit) {
          uint32_t right_low[4];
          LoadMatrices(right_low,
                       Chunk(streamed_tile + kStreamed * kPitch, kPitch, row, chunk));
          MultiplyAccumulate<T>(score[2 * b], a, right_low[0], right_low[1]);
          MultiplyAccumulate<T>(score[2 * b + 1], a, right_low[2], right_low[3]);
          MultiplyAccumulate<T>(score[2 * b], a_low, right[0], right[1]);
          MultiplyAccumulate<T>(score[2 * b + 1], a_low, right[2], right[3]);
        }
        MultiplyAccumulate<T>(score[2 * b], a, right[0], right[1]);
        MultiplyAccumulate<T>(score[2 * b + 1], a, right[2], right[3]);
      }
    }

    // Exponents and their maxima. The four lanes of a quad have the same owners.
    float largest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int b = 0; b < kStreamed / 8; ++b) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * b + 2 * (lane % 4) + e;
        const StreamedRow row = rows[r];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = score[b][2 * h + e];
          s = Exponent(s, sweep, owner[h], row, tile * kStreamed + r);
          largest[h] = fmaxf(largest[h], s);
        }
      }
    }
    float shift[2];
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullWarp, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullWarp, largest[h], 2));
      shift[h] = Shift(largest[h]);
      correction[h] = exp2f(maximum[h] - shift[h]);
      maximum[h] = largest[h];
      sum[h] *= correction[h];
    }

    // Weights, with their signs.
#pragma unroll
    for (int b = 0; b < kStreamed / 8; ++b) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 8 * b + 2 * (lane % 4) + e;
        const float sign = signs[r];
        const int positive = rows[r].positive;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = score[b][2 * h + e];
          const float weight = exp2f(s - shift[h]);
          sum[h] += weight;
          // If queries own, the weight of the positive is 0 and its sign of no interest.
          s = (positive == owner[h].index ? -sign : sign) * weight;
        }
      }
    }

    if (sweep.outputs) {
      if (__any_sync(kFullWarp, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
        for (int b = 0; b < kWidth / 8; ++b) {
#pragma unroll
          for (int h = 0; h < 4; ++h) output[b][h] *= correction[h / 2];
        }
      }
      // With kSplit a loop: unrolled, more products are under way at once than registers hold.
#pragma unroll(kSplit ? 1 : kStreamed / 16)
      for (int k = 0; k < kStreamed / 16; ++k) {
        uint32_t a[4];
        uint32_t a_low[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const float* const pair = &score[h / 2][2 * (h % 2)];
          a[h] = PackPair<T>(pair[0], pair[1]);
          if constexpr (kSplit) {
            a_low[h] = PackPair<T>(pair[0] - ToFloat(FromFloat<T>(pair[0])),
                                   pair[1] - ToFloat(FromFloat<T>(pair[1])));
          }
        }
        // The next ones come to where a loop can name them.
#pragma unroll
        for (int c = 2; c < kStreamed / 8; ++c) {
#pragma unroll
          for (int h = 0; h < 4; ++h) score[c - 2][h] = score[c][h];
        }
#pragma unroll
        for (int b = 0; b < kWidth / 16; ++b) {
          const unsigned char* const place =
              Chunk(streamed_tile, kPitch, 16 * k + lane % 16, 2 * b + lane / 16);
          uint32_t right[4];
          LoadMatricesTransposed(right, place);
          if constexpr (kSplit) {
            uint32_t right_low[4];
            LoadMatricesTransposed(right_low, place + kStreamed * kPitch);
            // Tensor cores cut what they add, toward zero: a bias that grows with the rows if the
            // sum stays in them. Added here, each part is rounded.
            float part[2][4] = {};
            MultiplyAccumulate<T>(part[0], a, right_low[0], right_low[1]);
            MultiplyAccumulate<T>(part[1], a, right_low[2], right_low[3]);
            MultiplyAccumulate<T>(part[0], a_low, right[0], right[1]);
            MultiplyAccumulate<T>(part[1], a_low, right[2], right[3]);
            MultiplyAccumulate<T>(part[0], a, right[0], right[1]);
            MultiplyAccumulate<T>(part[1], a, right[2], right[3]);
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              output[2 * b][h] += part[0][h];
              output[2 * b + 1][h] += part[1][h];
            }
          } else {
            MultiplyAccumulate<T>(output[2 * b], a, right[0], right[1]);
            MultiplyAccumulate<T>(output[2 * b + 1], a, right[2], right[3]);
          }
        }
      }
    }

    if (Tile::kStages == 1) {
      __syncthreads();  // all have read the tile
      if (tile + 1 < end_tile) begin_tile(tile + 1);
    }
  }

  const int64_t split = blockIdx.y;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 1);
    sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 2);
    if (owner[h].index >= sweep.owner_count) continue;
    const int64_t row = split * sweep.owner_count + owner[h].index;
    if (lane % 4 == 0) {
      sweep.maxima[row] = maximum[h];
      sweep.sums[row] = sum[h];
    }
    if (!sweep.outputs) continue;
#pragma unroll
    for (int b = 0; b < kWidth / 8; ++b) {
      float* const pair = sweep.outputs + row * kWidth + 8 * b + 2 * (lane % 4);
      *reinterpret_cast<float2*>(pair) = make_float2(output[b][2 * h], output[b][2 * h + 1]);
    }
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // compiled for older GPUs and run on a newer one: an error, not what memory holds
#endif  // TFMTSEG_HAS_TENSOR_CORES
}

template <typename T, bool kSplit, int kWidth>
int LaunchTensorCoreSweep(CUstream_st* stream, const Sweep& sweep, int splits) {
  const unsigned owner_tiles =
      (sweep.owner_count + kTensorCoreOwners - 1) / kTensorCoreOwners;
  return Launch(TensorCoreSweepKernel<T, kSplit, kWidth>, dim3(owner_tiles, splits),
                dim3(kTensorCoreThreads), TensorCoreTile<kSplit, kWidth>::kSharedBytes, stream,
                sweep);
}

template <typename T, bool kSplit>
int LaunchTensorCoreSweep(CUstream_st* stream, const Sweep& sweep, int splits) {
  if (sweep.width == 64) return LaunchTensorCoreSweep<T, kSplit, 64>(stream, sweep, splits);
  if (sweep.width == 128) return LaunchTensorCoreSweep<T, kSplit, 128>(stream, sweep, splits);
  return LaunchTensorCoreSweep<T, kSplit, 256>(stream, sweep, splits);
}

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_INFO_NCE_TENSOR_CORE_CUH_
