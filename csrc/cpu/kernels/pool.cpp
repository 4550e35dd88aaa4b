// Rows to vectors: sums of bags, single rows, and their products with gradients.
#include <vector>

#include "vector.h"

namespace shardwise::cpu::SHARDWISE_ISA {

int64_t pool(const Pool& p);
int64_t weight_dots(const Pool& p);

namespace {

constexpr int64_t kAhead = 16;  // rows between a prefetch and its use

// Row numbers of a pool's ids: the ids themselves where all are there, else resolved, -1 for none.
struct RowIds {
  const int32_t* ints = nullptr;
  const int64_t* longs = nullptr;

  SHARDWISE_INLINE int64_t operator[](int64_t i) const { return longs ? longs[i] : ints[i]; }
};

template <typename Id>
bool all_good(const Id* ids, int64_t count, int64_t rows) {
  bool is_good = true;
  for (int64_t i = 0; i < count; ++i) {
    is_good &= static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(rows);
  }
  return is_good;
}

// Reads the ids [first_id, last_id) under the policy, and notes whether some read no row. Gives the
// position of the first id that the policy refuses, or -1.
int64_t read_rows(const Pool& p, RowIds* rows, bool* has_gaps, std::vector<int64_t>* resolved) {
  const int64_t count = p.last_id - p.first_id;
  if (p.ids.is_long) {
    rows->longs = static_cast<const int64_t*>(p.ids.data) + p.first_id;
    if (all_good(rows->longs, count, p.table.rows)) return -1;
  } else {
    rows->ints = static_cast<const int32_t*>(p.ids.data) + p.first_id;
    if (all_good(rows->ints, count, p.table.rows)) return -1;
  }
  resolved->resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = resolve(p.ids[p.first_id + i], p.table.rows, p.ids.bad_ids);
    (*resolved)[i] = row;
    if (row < 0 && p.ids.bad_ids == BadIds::kRaise) return p.first_id + i;
    *has_gaps |= row < 0;
  }
  rows->longs = resolved->data();
  return -1;
}

template <typename T>
struct Rows {
  const Pool& p;
  RowIds ids;
  bool has_gaps;
  int64_t count;

  SHARDWISE_INLINE const T* row(int64_t i) const {
    return static_cast<const T*>(p.table.data) + ids[i] * p.table.width;
  }
  SHARDWISE_INLINE bool is_there(int64_t i) const { return !has_gaps || ids[i] >= 0; }
  SHARDWISE_INLINE void prefetch(int64_t i) const {
    if (i < count && is_there(i)) {
      prefetch_row(row(i), p.table.width * static_cast<int64_t>(sizeof(T)));
    }
  }
};

// Sums N vectors of columns over the ids [begin, end), in registers.
template <int N, bool kPrefetch, typename T>
SHARDWISE_INLINE void sum_panel(const Rows<T>& rows, int64_t begin, int64_t end,
                                const int64_t* columns, float divisor, float* out) {
  Floats sums[N];
  for (int v = 0; v < N; ++v) sums[v] = splat(0.0f);
  const float* weights = rows.p.ids.weights;
  for (int64_t i = begin; i < end; ++i) {
    if (kPrefetch) rows.prefetch(i + kAhead);
    if (!rows.is_there(i)) continue;
    const T* row = rows.row(i);
    if (weights == nullptr) {
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + load(row + columns[v]);
    } else {
      const Floats weight = splat(weights[rows.p.first_id + i]);
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + weight * load(row + columns[v]);
    }
  }
  for (int v = 0; v < N; ++v) {
    store(out + columns[v], divisor == 1.0f ? sums[v] : sums[v] / splat(divisor));
  }
}

// Where each vector of a row starts. The last one ends with the row and may overlap the one before:
// both compute the same sums for the columns they share.
struct Columns {
  explicit Columns(int64_t width) : starts((width + kLanes - 1) / kLanes) {
    for (size_t v = 0; v < starts.size(); ++v) starts[v] = v * kLanes;
    if (width >= kLanes) starts.back() = width - kLanes;
  }
  std::vector<int64_t> starts;
};

template <typename T>
SHARDWISE_INLINE void sum_narrow(const Rows<T>& rows, int64_t begin, int64_t end, float divisor,
                                 float* out) {
  const int64_t width = rows.p.table.width;
  const float* weights = rows.p.ids.weights;
  Floats sums = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    rows.prefetch(i + kAhead);
    if (!rows.is_there(i)) continue;
    const Floats row = load(rows.row(i), width);
    sums = sums + (weights == nullptr ? row : splat(weights[rows.p.first_id + i]) * row);
  }
  store(out, divisor == 1.0f ? sums : sums / splat(divisor), width);
}

template <typename T>
SHARDWISE_INLINE void sum_bag(const Rows<T>& rows, int64_t begin, int64_t end,
                              const Columns& columns, float divisor, float* out) {
  if (rows.p.table.width < kLanes) return sum_narrow(rows, begin, end, divisor, out);
  const int64_t* column = columns.starts.data();
  int64_t left = static_cast<int64_t>(columns.starts.size());
  // The widest panel goes first and prefetches whole rows; the others find them in cache.
  if (left >= 8) {
    sum_panel<8, true>(rows, begin, end, column, divisor, out), column += 8, left -= 8;
    for (; left >= 8; column += 8, left -= 8) {
      sum_panel<8, false>(rows, begin, end, column, divisor, out);
    }
  } else if (left >= 4) {
    sum_panel<4, true>(rows, begin, end, column, divisor, out), column += 4, left -= 4;
  } else if (left >= 2) {
    sum_panel<2, true>(rows, begin, end, column, divisor, out), column += 2, left -= 2;
  } else {
    sum_panel<1, true>(rows, begin, end, column, divisor, out), column += 1, left -= 1;
  }
  if (left >= 4) sum_panel<4, false>(rows, begin, end, column, divisor, out), column += 4, left -= 4;
  if (left >= 2) sum_panel<2, false>(rows, begin, end, column, divisor, out), column += 2, left -= 2;
  if (left >= 1) sum_panel<1, false>(rows, begin, end, column, divisor, out);
}

template <typename T>
int64_t pool_rows(const Pool& p) {
  std::vector<int64_t> resolved;
  Rows<T> rows{p, {}, false, p.last_id - p.first_id};
  const int64_t refused = read_rows(p, &rows.ids, &rows.has_gaps, &resolved);
  if (refused >= 0) return refused;
  const Columns columns(p.table.width);
  for (int64_t i = 0; i < kAhead; ++i) rows.prefetch(i);
  float* out = p.out;
  if (p.pooling == Pooling::kNone) {
    for (int64_t i = 0; i < rows.count; ++i, out += p.stride) {
      sum_bag(rows, i, i + 1, columns, 1.0f, out);
    }
    return -1;
  }
  for (int64_t bag = p.first_bag; bag < p.last_bag; ++bag, out += p.stride) {
    const int64_t begin = p.ids.offsets[bag], end = p.ids.offsets[bag + 1];
    const bool divides = p.pooling == Pooling::kMean && end > begin;
    sum_bag(rows, begin - p.first_id, end - p.first_id, columns,
            divides ? static_cast<float>(end - begin) : 1.0f, out);
  }
  return -1;
}

template <typename T>
SHARDWISE_INLINE float dot(const T* row, const float* grad, int64_t width) {
  Floats sums = splat(0.0f);
  for (int64_t c = 0; c < width; c += kLanes) {
    sums = sums + load(row + c, width - c) * load(grad + c, width - c);
  }
  return sum(sums);
}

template <typename T>
int64_t dot_rows(const Pool& p) {
  std::vector<int64_t> resolved;
  Rows<T> rows{p, {}, false, p.last_id - p.first_id};
  const int64_t refused = read_rows(p, &rows.ids, &rows.has_gaps, &resolved);
  if (refused >= 0) return refused;
  const float* grad = p.out;
  const auto run = [&](int64_t begin, int64_t end) {
    const float divisor = p.pooling == Pooling::kMean ? static_cast<float>(end - begin) : 1.0f;
    for (int64_t i = begin; i < end; ++i) {
      rows.prefetch(i + kAhead);
      if (!rows.is_there(i)) continue;
      p.weight_grads[p.first_id + i] += dot(rows.row(i), grad, p.table.width) / divisor;
    }
    grad += p.stride;
  };
  if (p.pooling == Pooling::kNone) {
    for (int64_t i = 0; i < rows.count; ++i) run(i, i + 1);
    return -1;
  }
  for (int64_t bag = p.first_bag; bag < p.last_bag; ++bag) {
    run(p.ids.offsets[bag] - p.first_id, p.ids.offsets[bag + 1] - p.first_id);
  }
  return -1;
}

}  // namespace

int64_t pool(const Pool& p) {
  if (p.table.dtype == DType::kFloat32) return pool_rows<float>(p);
  return p.table.dtype == DType::kFloat16 ? pool_rows<Half>(p) : pool_rows<BFloat>(p);
}

int64_t weight_dots(const Pool& p) {
  if (p.table.dtype == DType::kFloat32) return dot_rows<float>(p);
  return p.table.dtype == DType::kFloat16 ? dot_rows<Half>(p) : dot_rows<BFloat>(p);
}

}  // namespace shardwise::cpu::SHARDWISE_ISA
