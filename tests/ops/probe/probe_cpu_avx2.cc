#include "probe_cpu.h"

#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "this unit is for AVX2 and FMA"
#endif

namespace tfmtseg {

const char* TwiceAvx2(const float* x, float* twice, int64_t n) {
  for (int64_t i = 0; i < n; ++i) twice[i] = 2 * x[i];
  return "avx2";
}

}  // namespace tfmtseg
