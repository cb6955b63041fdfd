// What all engines share: one sweep over similarities, and its description.
//
// A block owns a tile of rows (the "owners") and streams the rows of the other side past it. For
// owner i and streamed row j, with e_ij = scale * (owner_i . streamed_j) + bias_j:
//
//   maximum_i = max_j e_ij
//   sum_i     = sum_j 2^(e_ij - maximum_i)
//   output_i  = sum_j sign_j 2^(e_ij - maximum_i) streamed_j
//
// Queries own: bias 0, the positive is left out; this gives log-sum-exp and, up to the positive's
// own term, the gradient of the queries. Keys own: bias_j = log2(weight_j) - log2-sum-exp_j makes
// the exponential the weight of the pair in the gradient of the key, and the positive enters with
// an exponent of its own and the opposite sign. The weights that multiply the rows are therefore
// at most 1 in both sweeps, which fits float16.
//
// Exponents are to base 2: scale = log2(e) / temperature.
#ifndef TFMTSEG_CUDA_OPS_INFO_NCE_SWEEP_CUH_
#define TFMTSEG_CUDA_OPS_INFO_NCE_SWEEP_CUH_

#include "cuda_primitives.cuh"

namespace tfmtseg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A query's part in the gradients of the keys.
struct RowWeight {
  float bias;           // -inf: no part
  float positive_bias;  // exponent of its positive
  float sign;           // of its negatives: 1 or -1; the positive's is the opposite
};

struct Sweep {
  const void* owners;    // [owner_count, width], in the engine's type
  const void* streamed;  // [streamed_count, width]
  int owner_count;
  int streamed_count;
  int width;
  const int32_t* owner_ids;  // both or neither
  const int32_t* streamed_ids;
  const int32_t* owner_positives;     // null if keys own
  const int32_t* streamed_positives;  // null if queries own
  const bool* streamed_mask;          // may be null
  const RowWeight* streamed_weights;  // null if queries own
  float scale;
  int tiles_per_split;  // streamed tiles per block; block (x, y) makes part y of owner tile x
  float* maxima;        // [splits, owner_count]
  float* sums;          // [splits, owner_count]
  float* outputs;       // [splits, owner_count, width]; null: not wanted
};

// What a sweep knows of one row besides its features.
struct OwnerRow {
  int index;
  int positive;
  int id;
};

struct alignas(16) StreamedRow {
  float bias;  // -inf: left out
  float positive_bias;
  int positive;
  int id;
};

__device__ inline OwnerRow LoadOwnerRow(const Sweep& sweep, int index) {
  const bool exists = index < sweep.owner_count;
  OwnerRow row;
  row.index = index;
  row.positive = exists && sweep.owner_positives ? sweep.owner_positives[index] : -1;
  row.id = exists && sweep.owner_ids ? sweep.owner_ids[index] : 0;
  return row;
}

// Whether a streamed row takes part at all; those that do not are read as zeros, so that a NaN
// in them stays there.
__device__ inline bool TakesPart(const Sweep& sweep, int index) {
  if (index >= sweep.streamed_count) return false;
  if (sweep.streamed_mask && !sweep.streamed_mask[index]) return false;
  return !(sweep.streamed_weights && sweep.streamed_weights[index].bias == -INFINITY);
}

__device__ inline void LoadStreamedRow(const Sweep& sweep, int index, StreamedRow* row,
                                       float* sign) {
  row->bias = -INFINITY;
  row->positive_bias = -INFINITY;
  row->positive = -1;
  row->id = 0;
  *sign = 1.0f;
  if (!TakesPart(sweep, index)) return;
  row->bias = 0.0f;
  if (sweep.streamed_ids) row->id = sweep.streamed_ids[index];
  if (sweep.streamed_positives) row->positive = sweep.streamed_positives[index];
  if (sweep.streamed_weights) {
    const RowWeight weight = sweep.streamed_weights[index];
    row->bias = weight.bias;
    row->positive_bias = weight.positive_bias;
    *sign = weight.sign;
  }
}

__device__ inline float Exponent(float dot, const Sweep& sweep, const OwnerRow& owner,
                                 const StreamedRow& streamed, int streamed_index) {
  float exponent = fmaf(dot, sweep.scale, streamed.bias);
  // The owner's NaN would survive adding -inf.
  if (streamed.bias == -INFINITY) exponent = -INFINITY;
  if (sweep.owner_ids && owner.id == streamed.id) exponent = -INFINITY;
  const bool is_positive =
      owner.positive == streamed_index || streamed.positive == owner.index;
  return is_positive ? streamed.positive_bias : exponent;
}

// -inf - -inf is NaN: nothing has been seen yet, any finite shift will do.
__device__ inline float Shift(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

}  // namespace tfmtseg

#endif  // TFMTSEG_CUDA_OPS_INFO_NCE_SWEEP_CUH_
