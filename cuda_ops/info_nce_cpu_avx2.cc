// InfoNCE on CPU, compiled for the instruction set in this file's name.

#include <cstdint>

#define TFMTSEG_SET info_nce_avx2

namespace tfmtseg {
namespace TFMTSEG_SET {
constexpr int kWidth = 8;
constexpr int kRows = 6;
constexpr int kVectors = 2;
using Group = float;
}  // namespace TFMTSEG_SET
}  // namespace tfmtseg

#include "info_nce_cpu_tiles.h"
