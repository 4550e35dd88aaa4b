// What is compiled once per instruction set: the inner loops over rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../torch_abi.h"

namespace shardwise::cpu {

enum class Pooling : int64_t { kSum = 0, kMean = 1, kNone = 2 };
enum class BadIds : int64_t { kRaise = 0, kClip = 1, kHash = 2, kIgnore = 3 };
enum class RuleCode : int64_t {
  kSgd,
  kAdagrad,
  kRowWiseAdagrad,
  kAdam,
  kPartialRowWiseAdam,
  kLamb,
  kPartialRowWiseLamb,
  kLarsSgd,
  kCount
};

struct RuleShape {
  int64_t num_sums;       // numbers per row that need all of its columns
  int64_t num_states;     // states per table
  bool is_per_row[2];     // a state holds one number per row, not per element
};

constexpr RuleShape kRuleShapes[] = {
    {0, 0, {false, false}},  // SGD
    {0, 1, {false, false}},  // Adagrad
    {1, 1, {true, false}},   // row-wise Adagrad
    {0, 2, {false, false}},  // Adam
    {1, 2, {false, true}},   // partial row-wise Adam
    {2, 2, {false, false}},  // LAMB
    {3, 2, {false, true}},   // partial row-wise LAMB
    {2, 1, {false, false}},  // LARS
};
constexpr const RuleShape& shape_of(RuleCode code) {
  return kRuleShapes[static_cast<int64_t>(code)];
}

struct TableView {
  void* data;
  DType dtype;  // float32, float16 or bfloat16
  int64_t rows, width;

  int64_t row_bytes() const { return width * (dtype == DType::kFloat32 ? 4 : 2); }
};

struct Ids {
  const void* data;
  bool is_long;            // int64, else int32
  const int64_t* offsets;  // of all bags
  const float* weights;    // null: all 1
  BadIds bad_ids;

  int64_t operator[](int64_t position) const {
    return is_long ? static_cast<const int64_t*>(data)[position]
                   : static_cast<const int32_t*>(data)[position];
  }
};

// The row that an id reads under the policy; -1 for none.
inline int64_t resolve(int64_t id, int64_t rows, BadIds policy) {
  if (id >= 0 && id < rows) return id;
  if (rows == 0) return -1;
  if (policy == BadIds::kClip) return id < 0 ? 0 : rows - 1;
  if (policy == BadIds::kHash) return id % rows < 0 ? id % rows + rows : id % rows;
  return -1;
}

// Bags (with pooling) or ids (without) of one group, and where their vectors lie.
struct Pool {
  TableView table;
  Ids ids;
  Pooling pooling;
  int64_t first_bag, last_bag;  // unused without pooling
  int64_t first_id, last_id;
  float* out;  // lookup: written. weight_dots: the gradient, read
  int64_t stride;
  float* weight_grads;  // weight_dots: written, by position
  bool streams;         // lookup: write past the cache; `out` and `stride` are whole cache lines
};

// Scrambles 32 bits: the finalizer of MurmurHash3 (A. Appleby, 2011).
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A rule's numbers for one table, ready to use.
struct RuleNumbers {
  RuleCode code;
  float lr, eps, beta1, beta2, momentum, eta, weight_decay, max_gradient;
  bool is_decoupled;
  float rest1, rest2;              // 1 - beta, from doubles: in floats 1 - 0.999 is off by 5e-5
  float correction1, correction2;  // 1 - beta^step
  float logical_width;             // columns of the whole row
  // Stochastic rounding; the key holds seed, step and table.
  bool rounds_stochastically;
  uint32_t random_key;
  int64_t first_row, first_column;
};

// Distinct rows of one table, and the gradient rows that each sums.
struct RowRun {
  TableView table;
  const int64_t* rows;    // distinct
  int64_t num_singles;    // of the first rows, which have one item each: row r has item r
  const int64_t* starts;  // first item of each other row, and the end
  int64_t first, last;    // which of the rows
  const uint32_t* items;  // gradient offsets, or numbers into `where`
  const float* grad;
  const int64_t* where;  // null: items are offsets of gradient rows
  const float* scale;    // by item; null: all 1
  float* states[2];
  const float* given_sums;  // [row, num_sums]; null: computed here
  float* out;               // row_sums: [row, num_sums]; row_grads: [row, width]

  int64_t first_item(int64_t row) const { return row < num_singles ? row : starts[row]; }
};

// Samples of an interaction: their vectors, of which the first is the dense one, and the result.
struct Interaction {
  const float* dense;   // [samples, width]
  const float* sparse;  // [samples, num_vectors - 1, width]
  int64_t num_vectors, width;
  int64_t first, last;  // samples
  float* scratch;       // of scratch_size()
  float* out;           // forward: [samples, num_columns()]
  const float* grad;    // backward: of the same shape
  float* dense_grad;
  float* sparse_grad;

  int64_t num_columns() const { return width + num_vectors * (num_vectors - 1) / 2; }
  // Floats that a thread needs to lay out the vectors of a sample, or the gradient of their products.
  int64_t scratch_size() const {
    const int64_t columns = (num_vectors + 15) / 16 * 16;
    return columns * (std::max(num_vectors, (width + 15) / 16 * 16) + 4);
  }
};

struct IsaKernels {
  // These give the position of the first id that the policy refuses, or -1.
  int64_t (*pool)(const Pool&);
  int64_t (*weight_dots)(const Pool&);
  void (*update)(const RowRun&, const RuleNumbers&);
  void (*row_sums)(const RowRun&, const RuleNumbers&);
  void (*row_grads)(const RowRun&);
  void (*interact)(const Interaction&);
  void (*interact_grad)(const Interaction&);
};

// The kernels for this machine, or those that SHARDWISE_OPS names (avx512, avx2, baseline).
const IsaKernels& isa();

namespace avx512 {
extern const IsaKernels kernels;
}
namespace avx2 {
extern const IsaKernels kernels;
}
namespace baseline {
extern const IsaKernels kernels;
}

}  // namespace shardwise::cpu
