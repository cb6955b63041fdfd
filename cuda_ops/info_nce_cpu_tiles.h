// InfoNCE on CPU for one instruction set. Included once by each info_nce_cpu_<set>.cc, which
// defines TFMTSEG_SET (a namespace), kWidth (floats in a vector register), kRows and kVectors:
// the product of two matrices is made in tiles of kRows x kVectors registers.
//
// Of a block of queries, all logits are held at once (the slab). Two passes over it:
//   by rows      logits, softmax over the negatives, losses, gradient of the queries;
//   by columns   gradient of the keys.
// Every number is added up in one order, whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "info_nce_cpu.h"

namespace tfmtseg {
namespace TFMTSEG_SET {

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef float LooseVector __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint32_t BitVector __attribute__((vector_size(kWidth * 4)));

constexpr int64_t kPanel = kVectors * kWidth;  // columns of a tile
constexpr int64_t kTask = 48;                  // rows that one task works on
constexpr int64_t kColumns = 192;              // columns of a strip of the slab
// Longer than kColumns, by an odd number of cache lines in all: rows at a power-of-two distance
// would fall on each other in the cache.
constexpr int64_t kStride = kColumns + 16;
constexpr int64_t kSlabElements = 1 << 22;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

static_assert(kTask % kRows == 0 && kColumns % kRows == 0 && kColumns % kPanel == 0, "tiles");

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer Allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Vector Splat(float value) { return Vector{} + value; }

// 2^x to about 1e-7 of its value; 0 below 2^-126. NaN stays NaN.
Vector Exp2(Vector x) {
  const Vector magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
  const BitVector tiny = (BitVector)(x < Splat(-126.0f));
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);
  // Taylor series of 2^f, |f| <= 1/2.
  Vector p = Splat(1.52527338e-5f);
  p = p * f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  // The low bits of `shifted` hold the integer part; it goes into the exponent.
  const BitVector power = ((BitVector)shifted << 23) + (127u << 23);
  const BitVector bits = (BitVector)(p * (Vector)power);
  return (Vector)(bits & ~tiny);
}

float Sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// C[rows, kPanel] = (add ? C : 0) + A[rows, k] B[k, kPanel]; B is a panel, A may be transposed.
// Products are added in the order of k.
template <int rows, bool transposed>
void Tile(const float* a, int64_t a_stride, const float* b, int64_t k, float* c, int64_t c_stride,
          bool add) {
  Vector sum[rows][kVectors];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = add ? (Vector) * (const LooseVector*)(c + i * c_stride + v * kWidth) : Vector{};
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = *(const Vector*)(b + j * kPanel + v * kWidth);
    for (int i = 0; i < rows; ++i) {
      const float left = transposed ? a[j * a_stride + i] : a[i * a_stride + j];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      *(LooseVector*)(c + i * c_stride + v * kWidth) = sum[i][v];
    }
  }
}

template <bool transposed, int rows = kRows>
void TileOf(int64_t count, const float* a, int64_t a_stride, const float* b, int64_t k, float* c,
            int64_t c_stride, bool add) {
  if constexpr (rows > 0) {
    if (count == rows) {
      Tile<rows, transposed>(a, a_stride, b, k, c, c_stride, add);
    } else {
      TileOf<transposed, rows - 1>(count, a, a_stride, b, k, c, c_stride, add);
    }
  }
}

// The same for any number of rows.
template <bool transposed>
void TimesPanel(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t k,
                float* c, int64_t c_stride, bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    TileOf<transposed>(std::min<int64_t>(kRows, rows - i),
                       a + (transposed ? i : i * a_stride), a_stride, b, k, c + i * c_stride,
                       c_stride, add);
  }
}

// Columns [first, first + kPanel) of x[rows, columns], times a factor for each row, as a panel
// [rows, kPanel]; zeros beyond the last column.
void PackColumns(const float* x, int64_t rows, int64_t columns, int64_t first,
                 const float* factors, float* panel) {
  const int64_t count = std::min(kPanel, columns - first);
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = factors == nullptr ? 1.0f : factors[i];
    float* out = panel + i * kPanel;
    for (int64_t j = 0; j < count; ++j) out[j] = x[i * columns + first + j] * factor;
    std::fill(out + count, out + kPanel, 0.0f);
  }
}

// Rows [first, first + kPanel) of x[rows, columns] as the columns of a panel [columns, kPanel].
void PackRows(const float* x, int64_t rows, int64_t columns, int64_t first, float* panel) {
  const int64_t count = std::min(kPanel, rows - first);
  for (int64_t j = 0; j < columns; ++j) {
    float* out = panel + j * kPanel;
    for (int64_t i = 0; i < count; ++i) out[i] = x[(first + i) * columns + j];
    std::fill(out + count, out + kPanel, 0.0f);
  }
}

struct Positive {
  int64_t key;
  float logit;   // times log2(e)
  float weight;  // of the gradient
};

class Runner {
 public:
  Runner(const InfoNceProblem& problem, const ParallelFor& parallel_for,
         const InfoNceResult& result)
      : p_(problem), parallel_for_(parallel_for), r_(result) {}

  void Run() {
    const int64_t n = p_.n, m = p_.m, d = p_.d;
    const bool gradients = r_.with_gradients;
    if (gradients) {
      std::fill(r_.grad_queries, r_.grad_queries + n * d, 0.0f);
      std::fill(r_.grad_keys, r_.grad_keys + m * d, 0.0f);
      *r_.grad_temperature = 0.0f;
    }
    std::fill(r_.losses, r_.losses + n, 0.0f);
    if (n == 0 || m == 0) return;

    strips_ = (m + kColumns - 1) / kColumns;
    features_ = RoundUp(d, kPanel);
    Pack(gradients);
    // Depends on m alone, so that the order of sums does.
    const int64_t block =
        std::max<int64_t>(kTask, kSlabElements / RoundUp(m, kColumns) / kTask * kTask);
    const int64_t most = std::min(block, RoundUp(n, kTask));
    slab_ = Allocate(most * strips_ * kStride);
    if (gradients) {
      query_panels_ = Allocate(most * features_);
      factors_ = Allocate(most);
      temperature_terms_.assign(n, 0.0);
    }
    block_positives_.resize(most);
    for (int64_t first = 0; first < n; first += block) {
      const int64_t rows = std::min(block, n - first);
      const int64_t tasks = (rows + kTask - 1) / kTask;
      parallel_for_(tasks, kTask * m * d * (gradients ? 4 : 2), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          WorkOnRows(first, t * kTask, std::min(kTask, rows - t * kTask));
        }
      });
      if (!gradients) continue;
      parallel_for_(features_ / kPanel, rows * kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          PackColumns(p_.queries + first * d, rows, d, panel * kPanel, factors_.get(),
                      query_panels_.get() + panel * rows * kPanel);
        }
      });
      parallel_for_(strips_, kColumns * rows * d * 2, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) WorkOnColumns(first, rows, s);
      });
    }
    if (gradients) {
      double total = 0;
      for (double term : temperature_terms_) total += term;
      *r_.grad_temperature = static_cast<float>(-total / p_.temperature);
    }
  }

 private:
  // Copies of the keys in the order in which the two products read them.
  void Pack(bool gradients) {
    const int64_t m = p_.m, d = p_.d;
    const int64_t padded = strips_ * kColumns;
    logit_panels_ = Allocate(padded * d);
    parallel_for_(padded / kPanel, kPanel * d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* panel = logit_panels_.get() + i * kPanel * d;
        if (i * kPanel < m) {
          PackRows(p_.keys, m, d, i * kPanel, panel);
        } else {
          std::fill(panel, panel + kPanel * d, 0.0f);
        }
      }
    });
    if (!gradients) return;
    key_panels_ = Allocate(m * features_);
    parallel_for_(features_ / kPanel, m * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        PackColumns(p_.keys, m, d, i * kPanel, nullptr, key_panels_.get() + i * m * kPanel);
      }
    });
  }

  // The slab holds strips of kColumns columns, each [rows of the block, kStride].
  float* Strip(int64_t strip, int64_t row) {
    return slab_.get() + (strip * static_cast<int64_t>(block_positives_.size()) + row) * kStride;
  }

  // Losses and query gradients of `count` rows from `row` of the block on.
  void WorkOnRows(int64_t first, int64_t row, int64_t count) {
    const int64_t m = p_.m, d = p_.d, query = first + row;
    for (int64_t s = 0; s < strips_; ++s) {
      for (int64_t j = 0; j < kColumns; j += kPanel) {
        TimesPanel<false>(count, p_.queries + query * d, d,
                          logit_panels_.get() + (s * kColumns + j) * d, d, Strip(s, row) + j,
                          kStride, false);
      }
    }
    for (int64_t i = 0; i < count; ++i) FinishRow(query + i, row + i);
    if (!r_.with_gradients) return;

    std::vector<float> sums(count * features_, 0.0f);
    for (int64_t s = 0; s < strips_; ++s) {
      const int64_t columns = std::min(kColumns, m - s * kColumns);
      for (int64_t panel = 0; panel < features_ / kPanel; ++panel) {
        TimesPanel<false>(count, Strip(s, row), kStride,
                          key_panels_.get() + (panel * m + s * kColumns) * kPanel, columns,
                          sums.data() + panel * kPanel, features_, true);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* q = p_.queries + (query + i) * d;
      float* gradient = r_.grad_queries + (query + i) * d;
      const float factor = factors_[row + i];
      for (int64_t f = 0; f < d; ++f) gradient[f] = factor * sums[i * features_ + f];
      for (const Positive& positive : block_positives_[row + i]) {
        const float* key = p_.keys + positive.key * d;
        for (int64_t f = 0; f < d; ++f) gradient[f] += positive.weight * key[f];
      }
      double dot = 0;
      for (int64_t f = 0; f < d; ++f) dot += static_cast<double>(q[f]) * gradient[f];
      temperature_terms_[query + i] = dot;
    }
  }

  // Turns a row of dot products into exp(logit - largest logit) of the negatives, zeros for
  // everything else, and writes its loss and what the gradients need.
  void FinishRow(int64_t query, int64_t row) {
    const float scale = kLog2e / p_.temperature;
    std::vector<Positive>& positives = block_positives_[row];
    positives.clear();
    const int64_t positive = p_.positives == nullptr ? -1 : p_.positives[query];
    Vector largest = Splat(-kInfinity);
    for (int64_t s = 0; s < strips_; ++s) {
      float* u = Strip(s, row);
      const int64_t start = s * kColumns, columns = std::min(kColumns, p_.m - start);
      for (int64_t j = 0; j < kColumns; j += kWidth) *(Vector*)(u + j) *= scale;
      if (positive >= start && positive < start + columns &&
          (p_.key_mask == nullptr || p_.key_mask[positive])) {
        positives.push_back({positive, u[positive - start], 0});
      }
      LeaveOut(query, start, columns, u, &positives);
      if (positive >= start && positive < start + columns) u[positive - start] = -kInfinity;
      std::fill(u + columns, u + kColumns, -kInfinity);
      for (int64_t j = 0; j < kColumns; j += kWidth) {
        const Vector x = *(const Vector*)(u + j);
        largest = x > largest ? x : largest;
      }
    }
    float maximum = -kInfinity;
    for (int i = 0; i < kWidth; ++i) maximum = std::max(maximum, largest[i]);
    if (maximum == -kInfinity) maximum = 0;  // no negative: each exp below is 0
    double total = 0;
    for (int64_t s = 0; s < strips_; ++s) {
      float* u = Strip(s, row);
      Vector sum = {};
      for (int64_t j = 0; j < kColumns; j += kWidth) {
        const Vector x = Exp2(*(const Vector*)(u + j) - maximum);
        *(Vector*)(u + j) = x;
        sum += x;
      }
      total += Sum(sum);
    }
    const double negatives = maximum + std::log2(total);  // -infinity without any
    FinishLoss(query, row, maximum, negatives);
  }

  // Sets masked keys and pairs of equal ids to -infinity, and moves positives by label out.
  void LeaveOut(int64_t query, int64_t start, int64_t columns, float* u,
                std::vector<Positive>* positives) {
    if (p_.key_mask != nullptr) {
      for (int64_t j = 0; j < columns; ++j) {
        if (!p_.key_mask[start + j]) u[j] = -kInfinity;
      }
    }
    if (p_.query_ids != nullptr) {
      const int32_t id = p_.query_ids[query];
      for (int64_t j = 0; j < columns; ++j) {
        if (p_.key_ids[start + j] == id) u[j] = -kInfinity;
      }
    }
    if (p_.query_labels == nullptr) return;
    const int32_t label = p_.query_labels[query];
    for (int64_t j = 0; j < columns; ++j) {
      if (p_.key_labels[start + j] == label && u[j] != -kInfinity) {
        positives->push_back({start + j, u[j], 0});
        u[j] = -kInfinity;
      }
    }
  }

  // With l the log-sum-exp of the negatives, h that of the c positives and a their mean:
  // loss = softplus(l - h) + (h - a). Both terms keep their relative precision; the usual
  // log-sum-exp of everything minus a loses it where positives dominate.
  void FinishLoss(int64_t query, int64_t row, double maximum, double negatives) {
    std::vector<Positive>& positives = block_positives_[row];
    if (positives.empty()) {
      if (r_.with_gradients) factors_[row] = 0;
      return;  // the loss stays 0
    }
    double top = -kInfinity, mean = 0, sum = 0;
    for (const Positive& p : positives) top = std::fmax(top, p.logit);
    for (const Positive& p : positives) {
      sum += std::exp2(p.logit - top);
      mean += p.logit;
    }
    mean /= positives.size();
    const double together = top + std::log2(sum);
    const double x = (negatives - together) * kLn2;
    const double softplus = x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
    r_.losses[query] = static_cast<float>(softplus + (together - mean) * kLn2);
    if (!r_.with_gradients) return;
    const double weight = static_cast<double>(r_.row_weights[query]) / p_.temperature;
    const double everything = together + softplus / kLn2;
    factors_[row] = static_cast<float>(weight * std::exp2(maximum - everything));
    const double share = std::exp2(negatives - everything);  // of the negatives
    for (Positive& p : positives) {
      const double among = std::exp2(p.logit - together);
      p.weight = static_cast<float>(weight * ((among - 1.0 / positives.size()) - among * share));
    }
  }

  // Adds what a block of rows gives to the gradients of the keys of a strip.
  void WorkOnColumns(int64_t first, int64_t rows, int64_t strip) {
    const int64_t d = p_.d, start = strip * kColumns;
    const int64_t columns = std::min(kColumns, p_.m - start);
    float* gradient = r_.grad_keys + start * d;
    std::vector<float> edge;
    for (int64_t panel = 0; panel < features_ / kPanel; ++panel) {
      const float* queries = query_panels_.get() + panel * rows * kPanel;
      const int64_t feature = panel * kPanel, count = std::min(kPanel, d - feature);
      if (count == kPanel) {
        TimesPanel<true>(columns, Strip(strip, 0), kStride, queries, rows, gradient + feature, d,
                         true);
        continue;
      }
      // The last panel is narrower than a tile: it takes a detour.
      edge.assign(columns * kPanel, 0.0f);
      for (int64_t j = 0; j < columns; ++j) {
        std::copy_n(gradient + j * d + feature, count, edge.data() + j * kPanel);
      }
      TimesPanel<true>(columns, Strip(strip, 0), kStride, queries, rows, edge.data(), kPanel,
                       true);
      for (int64_t j = 0; j < columns; ++j) {
        std::copy_n(edge.data() + j * kPanel, count, gradient + j * d + feature);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* q = p_.queries + (first + i) * d;
      for (const Positive& positive : block_positives_[i]) {
        const int64_t j = positive.key - start;
        if (j < 0 || j >= columns) continue;
        for (int64_t f = 0; f < d; ++f) gradient[j * d + f] += positive.weight * q[f];
      }
    }
  }

  const InfoNceProblem& p_;
  const ParallelFor& parallel_for_;
  const InfoNceResult& r_;
  int64_t strips_ = 0;
  int64_t features_ = 0;  // d, rounded up to whole panels
  Buffer logit_panels_;   // keys transposed: [m / kPanel][d, kPanel]
  Buffer key_panels_;     // [d / kPanel][m, kPanel]
  Buffer query_panels_;   // of a block, each row times its factor: [d / kPanel][rows, kPanel]
  Buffer slab_;
  Buffer factors_;  // w / temperature * exp(largest negative - log-sum-exp), for each row
  std::vector<std::vector<Positive>> block_positives_;
  std::vector<double> temperature_terms_;
};

extern void (*const kRun)(const InfoNceProblem&, const ParallelFor&, const InfoNceResult&);
void (*const kRun)(const InfoNceProblem&, const ParallelFor&, const InfoNceResult&) =
    [](const InfoNceProblem& problem, const ParallelFor& parallel_for,
       const InfoNceResult& result) { Runner(problem, parallel_for, result).Run(); };

}  // namespace TFMTSEG_SET
}  // namespace tfmtseg
