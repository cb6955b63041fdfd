#include "probe_cpu.h"

namespace tfmtseg {

const char* Twice(const float* x, float* twice, int64_t n) {
#if TFMTSEG_X86
  if (__builtin_cpu_supports("avx512f")) return TwiceAvx512(x, twice, n);
  if (__builtin_cpu_supports("avx2")) return TwiceAvx2(x, twice, n);
#endif
  return TwiceGeneric(x, twice, n);
}

}  // namespace tfmtseg
