// Gradients to rows: sum the gradient rows of each distinct row, then run the rule on it.
#include <memory>

#include "rules.h"

namespace shardwise::cpu::SHARDWISE_ISA {

int64_t pool(const Pool& p);
int64_t weight_dots(const Pool& p);
void interact(const Interaction& p);
void interact_grad(const Interaction& p);

namespace {

constexpr int64_t kItemsAhead = 24;
constexpr int64_t kRowsAhead = 16;

SHARDWISE_INLINE const float* grad_row(const RowRun& run, uint32_t item) {
  return run.grad + (run.where == nullptr ? item : run.where[item]);
}

// Sums N vectors of columns over the items [begin, end), in registers. Fetches the same columns of
// the items that come later, also those of the rows after this one.
template <int N>
SHARDWISE_INLINE void sum_panel(const RowRun& run, int64_t begin, int64_t end, int64_t column,
                                float* out) {
  const int64_t last_item = run.starts[run.last];
  Floats sums[N];
  for (int v = 0; v < N; ++v) sums[v] = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kItemsAhead < last_item) {
      const float* ahead = grad_row(run, run.items[i + kItemsAhead]) + column;
      for (int v = 0; v < N; ++v) __builtin_prefetch(ahead + v * kLanes);
    }
    const uint32_t item = run.items[i];
    const float* grad = grad_row(run, item) + column;
    if (run.scale == nullptr) {
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + load(grad + v * kLanes);
    } else {
      const Floats scale = splat(run.scale[item]);
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + scale * load(grad + v * kLanes);
    }
  }
  for (int v = 0; v < N; ++v) store(out + column + v * kLanes, sums[v]);
}

// The summed gradient of one row, padded with zeros to whole vectors.
SHARDWISE_INLINE void sum_gradient(const RowRun& run, int64_t begin, int64_t end, float* out) {
  const int64_t width = run.table.width;
  int64_t c = 0;
  for (; c + 8 * kLanes <= width; c += 8 * kLanes) sum_panel<8>(run, begin, end, c, out);
  if (c + 4 * kLanes <= width) sum_panel<4>(run, begin, end, c, out), c += 4 * kLanes;
  if (c + 2 * kLanes <= width) sum_panel<2>(run, begin, end, c, out), c += 2 * kLanes;
  if (c + kLanes <= width) sum_panel<1>(run, begin, end, c, out), c += kLanes;
  if (c == width) return;
  Floats sums = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t item = run.items[i];
    const Floats grad = load(grad_row(run, item) + c, width - c);
    sums = sums + (run.scale == nullptr ? grad : splat(run.scale[item]) * grad);
  }
  store(out + c, sums);
}

// Runs body(row number, summed gradient) over the rows of a run, with memory fetched ahead.
template <typename Body>
SHARDWISE_INLINE void for_rows(const RowRun& run, bool fetches_rows, const Body& body) {
  const int64_t width = run.table.width, row_bytes = run.table.row_bytes();
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  const std::unique_ptr<float[]> grad(new float[padded]);
  const int64_t first_item = run.starts[run.first], last_item = run.starts[run.last];
  for (int64_t i = first_item; i < std::min(first_item + kItemsAhead, last_item); ++i) {
    prefetch_row(grad_row(run, run.items[i]), width * 4);
  }
  for (int64_t r = run.first; r < run.last; ++r) {
    if (fetches_rows && r + kRowsAhead < run.last) {
      const int64_t ahead = run.rows[r + kRowsAhead];
      prefetch_row(static_cast<const char*>(run.table.data) + ahead * row_bytes, row_bytes);
    }
    sum_gradient(run, run.starts[r], run.starts[r + 1], grad.get());
    body(r, grad.get());
  }
}

// What one row's state holds: a number, or one per column.
template <RuleCode kCode>
SHARDWISE_INLINE int64_t state_width(const RowRun& run, int64_t state) {
  return shape_of(kCode).is_per_row[state] ? 1 : run.table.width;
}

template <RuleCode kCode, typename T>
SHARDWISE_INLINE Row<T> view_row(const RowRun& run, int64_t r, const float* grad) {
  const int64_t row = run.rows[r], width = run.table.width;
  return {static_cast<T*>(run.table.data) + row * width,
          grad,
          run.states[0] + row * state_width<kCode>(run, 0),
          run.states[1] + row * state_width<kCode>(run, 1),
          width,
          row};
}

template <RuleCode kCode>
SHARDWISE_INLINE void prefetch_states(const RowRun& run, int64_t r) {
  if (r >= run.last) return;
  for (int64_t state = 0; state < shape_of(kCode).num_states; ++state) {
    const int64_t width = state_width<kCode>(run, state);
    prefetch_row(run.states[state] + run.rows[r] * width, width * 4);
  }
}

constexpr int kMostSums = 3;

template <RuleCode kCode, typename T>
void run_rule(const RowRun& run, const RuleNumbers& k, bool only_sums) {
  const int64_t count = shape_of(kCode).num_sums;
  for_rows(run, true, [&](int64_t r, const float* grad) {
    prefetch_states<kCode>(run, r + kRowsAhead);
    const Row<T> row = view_row<kCode, T>(run, r, grad);
    float sums[kMostSums] = {};
    if (run.given_sums != nullptr) std::copy_n(run.given_sums + r * count, count, sums);
    if constexpr (requires { Rule<kCode>::sums(row, k, sums); }) {
      if (run.given_sums == nullptr) Rule<kCode>::sums(row, k, sums);
    }
    if constexpr (requires { Rule<kCode>::second_sums(row, k, sums); }) {
      if (only_sums || run.given_sums == nullptr) Rule<kCode>::second_sums(row, k, sums);
    }
    if (only_sums) {
      std::copy_n(sums, count, run.out + r * count);
    } else {
      Rule<kCode>::apply(row, k, sums);
    }
  });
}

template <RuleCode kCode>
void run_dtype(const RowRun& run, const RuleNumbers& k, bool only_sums) {
  switch (run.table.dtype) {
    case DType::kFloat16:
      return run_rule<kCode, Half>(run, k, only_sums);
    case DType::kBFloat16:
      return run_rule<kCode, BFloat>(run, k, only_sums);
    default:
      return run_rule<kCode, float>(run, k, only_sums);
  }
}

void run_code(const RowRun& run, const RuleNumbers& k, bool only_sums) {
  constexpr void (*kRules[])(const RowRun&, const RuleNumbers&, bool) = {
      run_dtype<RuleCode::kSgd>,
      run_dtype<RuleCode::kAdagrad>,
      run_dtype<RuleCode::kRowWiseAdagrad>,
      run_dtype<RuleCode::kAdam>,
      run_dtype<RuleCode::kPartialRowWiseAdam>,
      run_dtype<RuleCode::kLamb>,
      run_dtype<RuleCode::kPartialRowWiseLamb>,
      run_dtype<RuleCode::kLarsSgd>,
  };
  kRules[static_cast<int64_t>(k.code)](run, k, only_sums);
}

void update(const RowRun& run, const RuleNumbers& k) { run_code(run, k, false); }
void row_sums(const RowRun& run, const RuleNumbers& k) { run_code(run, k, true); }

void row_grads(const RowRun& run) {
  const int64_t width = run.table.width;
  for_rows(run, false, [&](int64_t r, const float* grad) {
    std::copy_n(grad, width, run.out + r * width);
  });
}

}  // namespace

extern const IsaKernels kernels;
const IsaKernels kernels = {pool, weight_dots, update,   row_sums,
                            row_grads, interact, interact_grad};

}  // namespace shardwise::cpu::SHARDWISE_ISA
