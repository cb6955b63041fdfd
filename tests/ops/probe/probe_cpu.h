#ifndef TFMTSEG_PROBE_CPU_H_
#define TFMTSEG_PROBE_CPU_H_

#include <cstdint>

namespace tfmtseg {

// Writes 2 * x[0..n); returns the name of the unit that did.
const char* Twice(const float* x, float* twice, int64_t n);

const char* TwiceGeneric(const float* x, float* twice, int64_t n);
const char* TwiceAvx2(const float* x, float* twice, int64_t n);
const char* TwiceAvx512(const float* x, float* twice, int64_t n);

}  // namespace tfmtseg

#endif  // TFMTSEG_PROBE_CPU_H_
