// InfoNCE on CPU for one instruction set. Included once by each info_nce_cpu_<set>.cc, which
// defines TFMTSEG_SET (a namespace), kWidth (floats in a vector register), kRows and kVectors:
// the product of two matrices is made in tiles of kRows x kVectors registers. It also defines
// Group, what one step of a product multiplies and adds up: one float, or a uint32_t with two
// neighbouring bfloat16, the first in the low half; for these also MultiplyAdd.
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
#include <type_traits>
#include <vector>

#include "info_nce_cpu.h"

namespace tfmtseg {
namespace TFMTSEG_SET {

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef float LooseVector __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint32_t BitVector __attribute__((vector_size(kWidth * 4)));
typedef Group Groups __attribute__((vector_size(kWidth * 4)));

constexpr int64_t kDepth = std::is_same_v<Group, float> ? 1 : 2;  // numbers of a group
constexpr int64_t kPanel = kVectors * kWidth;  // columns of a tile
constexpr int64_t kTask = 48;                  // rows that one task works on, even
constexpr int64_t kColumns = 192;              // columns of a strip of the slab
// Longer than kColumns, by an odd number of cache lines in all: rows at a power-of-two distance
// would fall on each other in the cache.
constexpr int64_t kStride = kColumns + 16;
constexpr int64_t kSlabElements = 1 << 21;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

static_assert(kTask % kRows == 0 && kColumns % kRows == 0 && kColumns % kPanel == 0, "tiles");

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Vector Splat(float value) { return Vector{} + value; }

int64_t GroupsOf(int64_t numbers) { return (numbers + kDepth - 1) / kDepth; }

// The nearest bfloat16, ties to even, as its 16 bits. NaNs here have clear low bits, as
// processors make them, and stay NaN.
uint32_t BFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Both numbers as a group; of groups of one number, the first.
Group Join(float first, [[maybe_unused]] float second) {
  if constexpr (kDepth == 1) {
    return first;
  } else {
    return BFloat16(first) | BFloat16(second) << 16;
  }
}

inline Vector MultiplyAdd(float left, Vector right, Vector sum) { return sum + left * right; }

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

// C[rows, kPanel] = (add ? C : 0) + A[rows, k] B[k, kPanel], with k counted in groups; B is a
// panel, A may be transposed. Products are added in the order of k.
template <int rows, bool transposed>
void Tile(const Group* a, int64_t a_stride, const Group* b, int64_t k, float* c, int64_t c_stride,
          bool add) {
  Vector sum[rows][kVectors];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = add ? (Vector) * (const LooseVector*)(c + i * c_stride + v * kWidth) : Vector{};
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    Groups right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = *(const Groups*)(b + j * kPanel + v * kWidth);
    for (int i = 0; i < rows; ++i) {
      const Group left = transposed ? a[j * a_stride + i] : a[i * a_stride + j];
      for (int v = 0; v < kVectors; ++v) sum[i][v] = MultiplyAdd(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      *(LooseVector*)(c + i * c_stride + v * kWidth) = sum[i][v];
    }
  }
}

template <bool transposed, int rows = kRows>
void TileOf(int64_t count, const Group* a, int64_t a_stride, const Group* b, int64_t k, float* c,
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
void TimesPanel(int64_t rows, const Group* a, int64_t a_stride, const Group* b, int64_t k,
                float* c, int64_t c_stride, bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    TileOf<transposed>(std::min<int64_t>(kRows, rows - i),
                       a + (transposed ? i : i * a_stride), a_stride, b, k, c + i * c_stride,
                       c_stride, add);
  }
}

// Columns [first, first + kPanel) of x[rows, columns], times factor(row), as a panel
// [groups of rows, kPanel]; zeros beyond the last row and column, and for rows of factor 0, which
// may hold NaN.
template <typename Factor>
void PackColumns(const float* x, int64_t rows, int64_t columns, int64_t first, Factor factor,
                 Group* panel) {
  const int64_t count = std::min(kPanel, columns - first);
  const float* in = x + first;
  for (int64_t i = 0; i < rows; i += kDepth) {
    const float own = factor(i);
    const float following = kDepth == 2 && i + 1 < rows ? factor(i + 1) : 0.0f;
    const float* row = in + i * columns;
    const float* next = following == 0 ? nullptr : row + columns;
    Group* out = panel + i / kDepth * kPanel;
    for (int64_t j = 0; j < count; ++j) {
      out[j] = Join(own == 0 ? 0.0f : row[j] * own, next == nullptr ? 0.0f : next[j] * following);
    }
    std::fill(out + count, out + kPanel, Group{});
  }
}

// Rows [first, first + kPanel) of x[rows, columns] as the columns of a panel
// [groups of columns, kPanel].
void PackRows(const float* x, int64_t rows, int64_t columns, int64_t first, Group* panel) {
  const int64_t count = std::clamp<int64_t>(rows - first, 0, kPanel);
  for (int64_t j = 0; j < columns; j += kDepth) {
    const bool has_next = kDepth == 2 && j + 1 < columns;
    Group* out = panel + j / kDepth * kPanel;
    for (int64_t i = 0; i < count; ++i) {
      const float* in = x + (first + i) * columns + j;
      out[i] = Join(in[0], has_next ? in[1] : 0.0f);
    }
    std::fill(out + count, out + kPanel, Group{});
  }
}

struct Positive {
  int64_t key;
  float logit;   // times log2(e)
  float weight;  // of the gradient
};

class Runner {
 public:
  Runner(const InfoNceProblem& problem, const ParallelFor& parallel_for, const Allocate& allocate,
         const InfoNceResult& result)
      : p_(problem), parallel_for_(parallel_for), allocate_(allocate), r_(result) {}

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
    const int64_t panels = features_ / kPanel;
    Pack(gradients);
    // Depends on m alone, so that the order of sums does.
    const int64_t block =
        std::max<int64_t>(kTask, kSlabElements / RoundUp(m, kColumns) / kTask * kTask);
    const int64_t most = std::min(block, RoundUp(n, kTask));
    slab_ = New<float>(most * strips_ * kStride);
    if (gradients) {
      query_panels_ = New<Group>(GroupsOf(most) * features_);
      factors_ = New<float>(most);
      temperature_terms_ = New<double>(n);
      for (int64_t i = 0; i < n; ++i) temperature_terms_[i] = 0;
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
      parallel_for_(panels, rows * kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          PackColumns(p_.queries + first * d, rows, d, panel * kPanel,
                      [&](int64_t row) { return factors_[row]; },
                      query_panels_ + panel * GroupsOf(rows) * kPanel);
        }
      });
      parallel_for_(strips_ * panels, kColumns * rows * kPanel * 2,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        WorkOnColumns(first, rows, i / panels, i % panels);
                      }
                    });
    }
    if (gradients) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += temperature_terms_[i];
      *r_.grad_temperature = static_cast<float>(-total / p_.temperature);
    }
  }

 private:
  template <typename T>
  T* New(int64_t count) {
    return static_cast<T*>(allocate_(std::max<int64_t>(count, 1) * sizeof(T)));
  }

  // Copies of the keys in the order in which the two products read them.
  void Pack(bool gradients) {
    const int64_t n = p_.n, m = p_.m, d = p_.d, groups = GroupsOf(d);
    const int64_t padded = strips_ * kColumns;
    Group* logit_panels = New<Group>(padded * groups);
    logit_panels_ = logit_panels;
    parallel_for_(padded / kPanel, kPanel * d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        PackRows(p_.keys, m, d, i * kPanel, logit_panels + i * kPanel * groups);
      }
    });
    if constexpr (kDepth == 1) {
      query_rows_ = reinterpret_cast<const Group*>(p_.queries);
    } else {
      Group* rows = New<Group>(n * groups);
      query_rows_ = rows;
      parallel_for_(n, d, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float* q = p_.queries + i * d;
          for (int64_t j = 0; j < d; j += 2) {
            rows[i * groups + j / 2] = Join(q[j], j + 1 < d ? q[j + 1] : 0.0f);
          }
        }
      });
    }
    if (!gradients) return;
    Group* key_panels = New<Group>(GroupsOf(m) * features_);
    key_panels_ = key_panels;
    const auto kept = [this](int64_t key) {
      return p_.key_mask == nullptr || p_.key_mask[key] ? 1.0f : 0.0f;
    };
    parallel_for_(features_ / kPanel, m * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        PackColumns(p_.keys, m, d, i * kPanel, kept, key_panels + i * GroupsOf(m) * kPanel);
      }
    });
  }

  // The slab holds strips of kColumns columns, each [rows of the block, kStride].
  float* Strip(int64_t strip, int64_t row) {
    return slab_ + (strip * static_cast<int64_t>(block_positives_.size()) + row) * kStride;
  }

  // Of an even row and the next one, turns numbers into groups for both products, in place: along
  // a row for the gradient of the queries, in the first half of each row; across both for that of
  // the keys, in the second half, first that of the one, then that of the other.
  void Regroup(float* row, bool has_next) {
    if constexpr (kDepth == 1) return;
    constexpr int64_t half = kColumns / 2;
    alignas(64) float numbers[2][kColumns];
    std::copy_n(row, kColumns, numbers[0]);
    if (has_next) {
      std::copy_n(row + kStride, kColumns, numbers[1]);
    } else {
      std::fill_n(numbers[1], kColumns, 0.0f);
    }
    alignas(64) Group groups[kColumns];
    for (int64_t i = 0; i < 2; ++i) {
      float* out = row + i * kStride;
      for (int64_t j = 0; j < half; ++j) {
        groups[j] = Join(numbers[i][2 * j], numbers[i][2 * j + 1]);
      }
      std::memcpy(out, groups, half * sizeof(Group));
    }
    for (int64_t j = 0; j < kColumns; ++j) groups[j] = Join(numbers[0][j], numbers[1][j]);
    for (int64_t i = 0; i < 2; ++i) {
      std::memcpy(row + i * kStride + half, groups + i * half, half * sizeof(Group));
    }
  }

  // Losses and query gradients of `count` rows from `row` of the block on.
  void WorkOnRows(int64_t first, int64_t row, int64_t count) {
    const int64_t m = p_.m, d = p_.d, groups = GroupsOf(d), query = first + row;
    for (int64_t s = 0; s < strips_; ++s) {
      for (int64_t j = 0; j < kColumns; j += kPanel) {
        TimesPanel<false>(count, query_rows_ + query * groups, groups,
                          logit_panels_ + (s * kColumns + j) * groups, groups,
                          Strip(s, row) + j, kStride, false);
      }
    }
    for (int64_t i = 0; i < count; ++i) FinishRow(query + i, row + i);
    if (!r_.with_gradients) return;

    std::vector<float> sums(count * features_, 0.0f);
    for (int64_t s = 0; s < strips_; ++s) {
      for (int64_t i = 0; i < count; i += 2) Regroup(Strip(s, row + i), i + 1 < count);
      const int64_t columns = std::min(kColumns, m - s * kColumns);
      for (int64_t panel = 0; panel < features_ / kPanel; ++panel) {
        TimesPanel<false>(
            count, reinterpret_cast<const Group*>(Strip(s, row)), kStride,
            key_panels_ + (panel * GroupsOf(m) + s * kColumns / kDepth) * kPanel,
            GroupsOf(columns), sums.data() + panel * kPanel, features_, true);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (block_positives_[row + i].empty()) continue;  // its gradient stays 0
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
      if (!r_.with_gradients) return;  // the loss stays 0
      factors_[row] = 0;
      for (int64_t s = 0; s < strips_; ++s) std::fill_n(Strip(s, row), kColumns, 0.0f);
      return;
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
    // Without a negative there is nothing to scale, and the power may be infinite.
    factors_[row] = negatives == -kInfinity
                        ? 0
                        : static_cast<float>(weight * std::exp2(maximum - everything));
    const double share = std::exp2(negatives - everything);  // of the negatives
    for (Positive& p : positives) {
      const double among = std::exp2(p.logit - together);
      p.weight = static_cast<float>(weight * ((among - 1.0 / positives.size()) - among * share));
    }
  }

  // Adds what a block of rows gives to some features of the gradients of the keys of a strip.
  void WorkOnColumns(int64_t first, int64_t rows, int64_t strip, int64_t panel) {
    const int64_t d = p_.d, start = strip * kColumns;
    const int64_t columns = std::min(kColumns, p_.m - start);
    const int64_t feature = panel * kPanel, features = std::min(kPanel, d - feature);
    const Group* queries = query_panels_ + panel * GroupsOf(rows) * kPanel;
    float* gradient = r_.grad_keys + start * d + feature;
    // The last panel may be narrower than a tile: it takes a detour.
    std::vector<float> edge;
    float* sums = gradient;
    int64_t stride = d;
    if (features < kPanel) {
      edge.assign(columns * kPanel, 0.0f);
      sums = edge.data();
      stride = kPanel;
      for (int64_t j = 0; j < columns; ++j) {
        std::copy_n(gradient + j * d, features, sums + j * kPanel);
      }
    }
    // With groups, see Regroup for where the columns are.
    constexpr int64_t part = kColumns / kDepth;
    for (int64_t j = 0; j < columns; j += part) {
      const float* row = Strip(strip, j / part);
      const Group* weights = reinterpret_cast<const Group*>(row) + (kDepth == 1 ? 0 : part);
      TimesPanel<true>(std::min(part, columns - j), weights, kDepth * kStride, queries,
                       GroupsOf(rows), sums + j * stride, stride, true);
    }
    if (features < kPanel) {
      for (int64_t j = 0; j < columns; ++j) {
        std::copy_n(sums + j * kPanel, features, gradient + j * d);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* q = p_.queries + (first + i) * d + feature;
      const std::vector<Positive>& positives = block_positives_[i];  // in the order of the keys
      auto positive = std::lower_bound(positives.begin(), positives.end(), start,
                                       [](const Positive& p, int64_t key) { return p.key < key; });
      for (; positive != positives.end() && positive->key < start + columns; ++positive) {
        float* out = gradient + (positive->key - start) * d;
        for (int64_t f = 0; f < features; ++f) out[f] += positive->weight * q[f];
      }
    }
  }

  const InfoNceProblem& p_;
  const ParallelFor& parallel_for_;
  const Allocate& allocate_;
  const InfoNceResult& r_;
  int64_t strips_ = 0;
  int64_t features_ = 0;  // d, rounded up to whole panels
  const Group* query_rows_ = nullptr;    // [n, groups of d]
  const Group* logit_panels_ = nullptr;  // keys transposed: [m / kPanel][groups of d, kPanel]
  const Group* key_panels_ = nullptr;    // [d / kPanel][groups of m, kPanel]
  // Of a block, each row times its factor: [d / kPanel][groups of rows, kPanel].
  Group* query_panels_ = nullptr;
  float* slab_ = nullptr;
  float* factors_ = nullptr;  // w / temperature * exp(largest negative - log-sum-exp), of rows
  std::vector<std::vector<Positive>> block_positives_;
  double* temperature_terms_ = nullptr;  // of each query
};

using Run = void (*)(const InfoNceProblem&, const ParallelFor&, const Allocate&,
                     const InfoNceResult&);
extern const Run kRun;
const Run kRun = [](const InfoNceProblem& problem, const ParallelFor& parallel_for,
                    const Allocate& allocate, const InfoNceResult& result) {
  Runner(problem, parallel_for, allocate, result).Run();
};

}  // namespace TFMTSEG_SET
}  // namespace tfmtseg
