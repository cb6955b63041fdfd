// InfoNCE on CPU. No TensorFlow header here or in the files that include this one.

#ifndef TFMTSEG_INFO_NCE_CPU_H_
#define TFMTSEG_INFO_NCE_CPU_H_

#include <cstdint>

#include "cpu_runtime.h"

namespace tfmtseg {

// Queries [n, d] and keys [m, d], row-major, as they are compared: normalised before, if at all.
// Pointers that may be null say so; then nothing is left out for their reason.
struct InfoNceProblem {
  const float* queries;
  const float* keys;
  // Either the key each query has to find (a negative number: none), [n] ...
  const int32_t* positives;
  // ... or labels, [n] and [m]: keys of a query's label are its positives.
  const int32_t* query_labels;
  const int32_t* key_labels;
  // May be null, [n] and [m]. Pairs of equal ids are not compared; an explicit positive is.
  const int32_t* query_ids;
  const int32_t* key_ids;
  const bool* key_mask;  // may be null, [m]; false leaves a key out everywhere
  int64_t n, m, d;
  float temperature;
  // Whether all numbers of queries and keys are bfloat16 numbers. Products are then made of such
  // where the processor has an instruction for it: the losses are those of float32, gradients are
  // off by about 2^-8 of their length.
  bool is_bfloat16;
};

// Gradients are of sum_i w_i loss_i. Without them, what stands below is not touched.
struct InfoNceResult {
  float* losses;  // [n]
  bool with_gradients;
  const float* row_weights;  // w, [n]
  float* grad_queries;       // [n, d]
  float* grad_keys;          // [m, d]
  float* grad_temperature;   // one number
};

// Never holds the n x m matrix: about 8 MB of it at most, or 48 rows where these are more, and
// two copies of the keys. By label, each positive pair among these rows takes 16 bytes more, up to
// four times the rows themselves where all labels are one, and twice that as std::vector grows.
// The same bits at any number of threads. Throws std::bad_alloc.
void InfoNceCpu(const InfoNceProblem& problem, const ParallelFor& parallel_for,
                const Allocate& allocate, const InfoNceResult& result);

}  // namespace tfmtseg

#endif  // TFMTSEG_INFO_NCE_CPU_H_
