// InfoNCE on CPU of bfloat16 numbers, compiled for the instruction set in this file's name.

#include <immintrin.h>

#include <cstdint>

#define TFMTSEG_SET info_nce_avx512bf16

namespace tfmtseg {
namespace TFMTSEG_SET {
constexpr int kWidth = 16;
constexpr int kRows = 12;
constexpr int kVectors = 2;

using Group = uint32_t;
typedef float Sums __attribute__((vector_size(kWidth * 4)));
typedef Group Pairs __attribute__((vector_size(kWidth * 4)));

// Adds both products of a pair with each of `right`.
inline Sums MultiplyAdd(Group left, Pairs right, Sums sum) {
  return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
}
}  // namespace TFMTSEG_SET
}  // namespace tfmtseg

#include "info_nce_cpu_tiles.h"
