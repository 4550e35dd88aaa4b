// Gradients to rows: sum the gradient rows of each distinct row, then run the rule on it.
#include <memory>
#include <type_traits>

#include "rules.h"

namespace shardwise::cpu::SHARDWISE_ISA {

int64_t pool(const Pool& p);
int64_t weight_dots(const Pool& p);
void interact(const Interaction& p);
void interact_grad(const Interaction& p);

namespace {

constexpr int64_t kItemsAhead = 24;
constexpr int64_t kRowsAhead = 24;
constexpr int kMostVectors = kParts == 1 ? 8 : 16 / (2 * kParts);  // sums that stay in registers

// A run of rows whose width is known here (0: any), as the way from items to gradients is. What is
// known spares instructions, which lets the processor see further ahead.
template <int64_t kWidth, bool kIsDirect, bool kIsScaled>
struct Run : RowRun {
  // The gradient of a row that occurs once needs no sum, and may be read to its end. The rule
  // neither decays nor clips, so its sums of gradients are of nothing else.
  static constexpr bool kReadsInPlace = kWidth > 0;
  SHARDWISE_INLINE int64_t width() const { return kWidth > 0 ? kWidth : table.width; }
  SHARDWISE_INLINE const float* grad_row(int64_t i) const {
    return grad + (kIsDirect ? items[i] : where[items[i]]);
  }
  SHARDWISE_INLINE Floats scaled(int64_t i, const Floats& x) const {
    if constexpr (kIsScaled) return splat(scale[items[i]]) * x;
    return x;
  }
};

// Runs body(run) with what is known of a run.
template <int64_t kWidth, typename Body>
SHARDWISE_INLINE void with_items(const RowRun& run, const Body& body) {
  if (run.scale != nullptr) return body(Run<kWidth, false, true>{run});
  if (run.where != nullptr) return body(Run<kWidth, false, false>{run});
  return body(Run<kWidth, true, false>{run});
}
// Runs body(run, numbers) with what is known of both. Constants leave out the instructions of what
// is not asked for.
template <typename Body>
SHARDWISE_INLINE void with_width(const RowRun& run, const RuleNumbers& k, const Body& body) {
  if (run.scale == nullptr && run.where == nullptr && is_plain(k)) {
    RuleNumbers plain = k;
    plain.weight_decay = 0.0f;
    plain.max_gradient = kInfinity;
    plain.is_decoupled = false;
    switch (run.table.width) {
      case 16:
        return body(Run<16, true, false>{run}, plain);
      case 32:
        return body(Run<32, true, false>{run}, plain);
      case 64:
        return body(Run<64, true, false>{run}, plain);
      case 128:
        return body(Run<128, true, false>{run}, plain);
      case 256:
        return body(Run<256, true, false>{run}, plain);
      default:
        break;
    }
  }
  with_items<0>(run, [&](const auto& items) { body(items, k); });
}

// Sums N vectors of columns over the items [begin, end), in registers. Fetches the same columns of
// the items that come later, also those of the rows after this one.
template <int N, typename R>
SHARDWISE_INLINE void sum_panel(const R& run, int64_t begin, int64_t end, int64_t last_item,
                                int64_t column, float* out) {
  Floats sums[N];
  for (int v = 0; v < N; ++v) sums[v] = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kItemsAhead < last_item) {
      const float* ahead = run.grad_row(i + kItemsAhead) + column;
      for (int v = 0; v < N; ++v) __builtin_prefetch(ahead + v * kLanes);
    }
    const float* grad = run.grad_row(i) + column;
    for (int v = 0; v < N; ++v) sums[v] = sums[v] + run.scaled(i, load(grad + v * kLanes));
  }
  for (int v = 0; v < N; ++v) store(out + column + v * kLanes, sums[v]);
}

// Whole vectors of columns from `column` on, in panels of N and then of fewer.
template <int N, typename R>
SHARDWISE_INLINE void sum_panels(const R& run, int64_t begin, int64_t end, int64_t last_item,
                                 int64_t column, float* out) {
  for (; column + N * kLanes <= run.width(); column += N * kLanes) {
    sum_panel<N>(run, begin, end, last_item, column, out);
  }
  if constexpr (N > 1) sum_panels<N / 2>(run, begin, end, last_item, column, out);
}

// The summed gradient of one row, padded with zeros to whole vectors.
template <typename R>
SHARDWISE_INLINE void sum_gradient(const R& run, int64_t begin, int64_t end, int64_t last_item,
                                   float* out) {
  const int64_t width = run.width(), whole = width / kLanes * kLanes;
  sum_panels<kMostVectors>(run, begin, end, last_item, 0, out);
  if (whole == width) return;
  Floats sums = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    sums = sums + run.scaled(i, load(run.grad_row(i) + whole, width - whole));
  }
  store(out + whole, sums);
}

// Runs body(row number, summed gradient, whether it may differ from the one before) over the rows
// of a run, with memory fetched ahead.
template <typename R, typename Body>
SHARDWISE_INLINE void for_rows(const R& run, bool fetches_rows, int64_t row_bytes,
                               const Body& body) {
  const int64_t width = run.width();
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  const std::unique_ptr<float[]> buffer(new float[padded]);
  const int64_t first_item = run.first_item(run.first), last_item = run.first_item(run.last);
  for (int64_t i = first_item; i < std::min(first_item + kItemsAhead, last_item); ++i) {
    prefetch_row(run.grad_row(i), width * 4);
  }
  const float* grad = nullptr;
  for (int64_t r = run.first; r < run.last; ++r) {
    if (fetches_rows && r + kRowsAhead < run.last) {
      const int64_t ahead = run.rows[r + kRowsAhead];
      prefetch_row(static_cast<const char*>(run.table.data) + ahead * row_bytes, row_bytes);
    }
    bool is_new = true;
    if (R::kReadsInPlace && r < run.num_singles) {
      if (r + kItemsAhead < last_item) prefetch_row(run.grad_row(r + kItemsAhead), width * 4);
      is_new = run.grad_row(r) != grad;  // rows of one bag have one gradient
      grad = run.grad_row(r);
    } else {
      sum_gradient(run, run.first_item(r), run.first_item(r + 1), last_item, buffer.get());
      grad = buffer.get();
    }
    body(r, grad, is_new);
  }
}

// What one row's state holds: a number, or one per column.
template <RuleCode kCode, typename R>
SHARDWISE_INLINE int64_t state_width(const R& run, int64_t state) {
  return shape_of(kCode).is_per_row[state] ? 1 : run.width();
}

template <RuleCode kCode, typename T, typename R>
SHARDWISE_INLINE Row<T> view_row(const R& run, int64_t r, const float* grad) {
  const int64_t row = run.rows[r], width = run.width();
  return {static_cast<T*>(run.table.data) + row * width,
          grad,
          run.states[0] + row * state_width<kCode>(run, 0),
          run.states[1] + row * state_width<kCode>(run, 1),
          width,
          row};
}

template <RuleCode kCode, typename R>
SHARDWISE_INLINE void prefetch_states(const R& run, int64_t r) {
  if (r >= run.last) return;
  for (int64_t state = 0; state < shape_of(kCode).num_states; ++state) {
    const int64_t width = state_width<kCode>(run, state);
    prefetch_row(run.states[state] + run.rows[r] * width, width * 4);
  }
}

constexpr int kMostSums = 3;

template <RuleCode kCode, typename T, bool kOnlySums, typename R>
SHARDWISE_INLINE void run_row(const R& run, const RuleNumbers& k, int64_t r, const float* grad,
                              bool is_new, float* sums) {
  constexpr int64_t kCount = shape_of(kCode).num_sums;
  constexpr bool kKeeps = R::kReadsInPlace && std::is_base_of_v<SquaredGradient, Rule<kCode>>;
  const Row<T> row = view_row<kCode, T>(run, r, grad);
  if (run.given_sums != nullptr) std::copy_n(run.given_sums + r * kCount, kCount, sums);
  if constexpr (requires { Rule<kCode>::sums(row, k, sums); }) {
    if (run.given_sums == nullptr && (is_new || !kKeeps)) Rule<kCode>::sums(row, k, sums);
  }
  if constexpr (requires { Rule<kCode>::second_sums(row, k, sums); }) {
    if (kOnlySums || run.given_sums == nullptr) Rule<kCode>::second_sums(row, k, sums);
  }
  if constexpr (kOnlySums) {
    std::copy_n(sums, kCount, run.out + r * kCount);
  } else {
    Rule<kCode>::apply(row, k, sums);
  }
}

template <RuleCode kCode, typename T>
void run_rule(const RowRun& all, const RuleNumbers& numbers, bool only_sums) {
  // Inlined, so that what is constant in the numbers is known in the loop.
  const auto run_rows = [&](const auto& run, const RuleNumbers& given,
                            auto is_only_sums) SHARDWISE_INLINE_BODY {
    const RuleNumbers k = given;  // a copy that no store to memory can change
    float sums[kMostSums] = {};
    const auto body = [&](int64_t r, const float* grad, bool is_new) SHARDWISE_INLINE_BODY {
      prefetch_states<kCode>(run, r + kRowsAhead);
      run_row<kCode, T, is_only_sums>(run, k, r, grad, is_new, sums);
    };
    for_rows(run, true, run.width() * sizeof(T), body);
  };
  if (only_sums) {
    with_items<0>(all, [&](const auto& run) { run_rows(run, numbers, std::true_type()); });
  } else {
    with_width(all, numbers, [&](const auto& run, const RuleNumbers& k) SHARDWISE_INLINE_BODY {
      run_rows(run, k, std::false_type());
    });
  }
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

void row_grads(const RowRun& all) {
  with_items<0>(all, [&](const auto& run) {
    for_rows(run, false, 0, [&](int64_t r, const float* grad, bool) {
      std::copy_n(grad, run.width(), run.out + r * run.width());
    });
  });
}

}  // namespace

extern const IsaKernels kernels;
const IsaKernels kernels = {pool, weight_dots, update,   row_sums,
                            row_grads, interact, interact_grad};

}  // namespace shardwise::cpu::SHARDWISE_ISA
