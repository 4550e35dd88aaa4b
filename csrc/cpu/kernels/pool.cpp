// Rows to vectors: sums of bags, single rows, and their products with gradients.
#include <algorithm>
#include <vector>

#include "vector.h"

namespace shardwise::cpu::SHARDWISE_ISA {

int64_t pool(const Pool& p);
int64_t weight_dots(const Pool& p);

namespace {

constexpr int64_t kAhead = 16;  // rows between a prefetch and its use

template <typename Id>
bool all_good(const Id* ids, int64_t count, int64_t rows) {
  bool is_good = true;
  for (int64_t i = 0; i < count; ++i) {
    is_good &= static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(rows);
  }
  return is_good;
}

// The rows that a pool's ids read. Plain ones are the ids themselves: all are there and none is
// weighted. The others were resolved, -1 for none.
template <typename T, typename Id, bool kIsPlain>
struct Rows {
  const Pool& p;
  const Id* ids;
  int64_t count;

  SHARDWISE_INLINE const T* row(int64_t i) const {
    return static_cast<const T*>(p.table.data) + static_cast<int64_t>(ids[i]) * p.table.width;
  }
  SHARDWISE_INLINE bool is_there(int64_t i) const { return kIsPlain || ids[i] >= 0; }
  SHARDWISE_INLINE float weight(int64_t i) const {
    return kIsPlain || p.ids.weights == nullptr ? 1.0f : p.ids.weights[p.first_id + i];
  }
  SHARDWISE_INLINE void prefetch_first() const {
    for (int64_t i = 0; i < std::min(kAhead, count); ++i) {
      if (is_there(i)) prefetch_row(row(i), p.table.row_bytes());
    }
  }
};

// Runs body(rows) over the rows that a pool's ids read under the policy. Gives the position of the
// first id that the policy refuses, or -1.
template <typename T, typename Body>
int64_t with_rows(const Pool& p, const Body& body) {
  const int64_t count = p.last_id - p.first_id;
  const auto* longs = static_cast<const int64_t*>(p.ids.data) + (p.ids.is_long ? p.first_id : 0);
  const auto* ints = static_cast<const int32_t*>(p.ids.data) + (p.ids.is_long ? 0 : p.first_id);
  const bool is_good = p.ids.is_long ? all_good(longs, count, p.table.rows)
                                     : all_good(ints, count, p.table.rows);
  if (is_good && p.ids.weights == nullptr) {
    if (p.ids.is_long) {
      body(Rows<T, int64_t, true>{p, longs, count});
    } else {
      body(Rows<T, int32_t, true>{p, ints, count});
    }
    return -1;
  }
  std::vector<int64_t> resolved(count);
  for (int64_t i = 0; i < count; ++i) {
    resolved[i] = resolve(p.ids[p.first_id + i], p.table.rows, p.ids.bad_ids);
    if (resolved[i] < 0 && p.ids.bad_ids == BadIds::kRaise) return p.first_id + i;
  }
  body(Rows<T, int64_t, false>{p, resolved.data(), count});
  return -1;
}

// Sums N vectors of columns over the ids [begin, end), in registers. Fetches the same columns of
// the rows that come later.
template <int N, typename T, typename Id, bool kIsPlain>
SHARDWISE_INLINE void sum_panel(const Rows<T, Id, kIsPlain>& rows, int64_t begin, int64_t end,
                                const int64_t* columns, float divisor, float* out) {
  constexpr int kVectorsPerLine = sizeof(T) == 4 ? 1 : 2;
  Floats sums[N];
  for (int v = 0; v < N; ++v) sums[v] = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < rows.count && rows.is_there(i + kAhead)) {
      const T* ahead = rows.row(i + kAhead);
      for (int v = 0; v < N; v += kVectorsPerLine) __builtin_prefetch(ahead + columns[v]);
    }
    if (!rows.is_there(i)) continue;
    const T* row = rows.row(i);
    if constexpr (kIsPlain) {
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + load(row + columns[v]);
    } else {
      const Floats weight = splat(rows.weight(i));
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

template <typename T, typename Id, bool kIsPlain>
SHARDWISE_INLINE void sum_narrow(const Rows<T, Id, kIsPlain>& rows, int64_t begin, int64_t end,
                                 float divisor, float* out) {
  const int64_t width = rows.p.table.width;
  Floats sums = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < rows.count && rows.is_there(i + kAhead)) {
      __builtin_prefetch(rows.row(i + kAhead));
    }
    if (!rows.is_there(i)) continue;
    const Floats row = load(rows.row(i), width);
    sums = sums + (kIsPlain ? row : splat(rows.weight(i)) * row);
  }
  store(out, divisor == 1.0f ? sums : sums / splat(divisor), width);
}

template <typename R>
SHARDWISE_INLINE void sum_bag(const R& rows, int64_t begin, int64_t end, const Columns& columns,
                              float divisor, float* out) {
  if (rows.p.table.width < kLanes) return sum_narrow(rows, begin, end, divisor, out);
  const int64_t* column = columns.starts.data();
  int64_t left = static_cast<int64_t>(columns.starts.size());
  for (; left >= 8; column += 8, left -= 8) sum_panel<8>(rows, begin, end, column, divisor, out);
  if (left >= 4) sum_panel<4>(rows, begin, end, column, divisor, out), column += 4, left -= 4;
  if (left >= 2) sum_panel<2>(rows, begin, end, column, divisor, out), column += 2, left -= 2;
  if (left >= 1) sum_panel<1>(rows, begin, end, column, divisor, out);
}

template <typename T>
int64_t pool_rows(const Pool& p) {
  const Columns columns(p.table.width);
  return with_rows<T>(p, [&](const auto& rows) {
    rows.prefetch_first();
    float* out = p.out;
    if (p.pooling == Pooling::kNone) {
      for (int64_t i = 0; i < rows.count; ++i, out += p.stride) {
        sum_bag(rows, i, i + 1, columns, 1.0f, out);
      }
      return;
    }
    for (int64_t bag = p.first_bag; bag < p.last_bag; ++bag, out += p.stride) {
      const int64_t begin = p.ids.offsets[bag], end = p.ids.offsets[bag + 1];
      const bool divides = p.pooling == Pooling::kMean && end > begin;
      sum_bag(rows, begin - p.first_id, end - p.first_id, columns,
              divides ? static_cast<float>(end - begin) : 1.0f, out);
    }
  });
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
  return with_rows<T>(p, [&](const auto& rows) {
    rows.prefetch_first();
    const float* grad = p.out;
    const auto run = [&](int64_t begin, int64_t end) {
      const float divisor = p.pooling == Pooling::kMean ? static_cast<float>(end - begin) : 1.0f;
      for (int64_t i = begin; i < end; ++i) {
        if (i + kAhead < rows.count && rows.is_there(i + kAhead)) {
          prefetch_row(rows.row(i + kAhead), p.table.row_bytes());
        }
        if (!rows.is_there(i)) continue;
        p.weight_grads[p.first_id + i] += dot(rows.row(i), grad, p.table.width) / divisor;
      }
      grad += p.stride;
    };
    if (p.pooling == Pooling::kNone) {
      for (int64_t i = 0; i < rows.count; ++i) run(i, i + 1);
      return;
    }
    for (int64_t bag = p.first_bag; bag < p.last_bag; ++bag) {
      run(p.ids.offsets[bag] - p.first_id, p.ids.offsets[bag + 1] - p.first_id);
    }
  });
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
