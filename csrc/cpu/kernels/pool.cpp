// Rows to vectors: sums of bags, single rows, and their products with gradients.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace shardwise::cpu::SHARDWISE_ISA {

int64_t pool(const Pool& p);
int64_t weight_dots(const Pool& p);

namespace {

constexpr int64_t kAhead = 64;  // rows between a prefetch and its use
// Vectors of sums that stay in registers: AVX-512 has 32 registers, the others 16 smaller ones.
constexpr int64_t kMostVectors = kParts == 1 ? 16 : 16 / (2 * kParts);

// A negative id is a huge unsigned one. The maximum is found sixteen bytes or more at a time.
template <typename Id>
bool all_good(const Id* ids, int64_t count, int64_t rows) {
  std::make_unsigned_t<Id> most = 0;
  for (int64_t i = 0; i < count; ++i) {
    most = std::max(most, static_cast<std::make_unsigned_t<Id>>(ids[i]));
  }
  return count == 0 || static_cast<uint64_t>(most) < static_cast<uint64_t>(rows);
}

// The rows that a pool's ids read. Plain ones are the ids themselves: all are there and none is
// weighted. The others were resolved, -1 for none. A width known here spares instructions, which
// lets the processor see further ahead; 0 is any width.
template <typename T, typename Id, bool kIsPlain, int64_t kWidth>
struct Rows {
  const Pool& p;
  const Id* ids;
  int64_t count;

  SHARDWISE_INLINE int64_t width() const { return kWidth > 0 ? kWidth : p.table.width; }
  SHARDWISE_INLINE const T* row(int64_t i) const {
    return static_cast<const T*>(p.table.data) + static_cast<int64_t>(ids[i]) * width();
  }
  SHARDWISE_INLINE bool is_there(int64_t i) const { return kIsPlain || ids[i] >= 0; }
  SHARDWISE_INLINE float weight(int64_t i) const {
    return kIsPlain || p.ids.weights == nullptr ? 1.0f : p.ids.weights[p.first_id + i];
  }
  SHARDWISE_INLINE void prefetch_first() const {
    for (int64_t i = 0; i < std::min(kAhead, count); ++i) {
      if (is_there(i)) prefetch_row(row(i), width() * sizeof(T));
    }
  }
};

template <typename T, typename Id, typename Body>
void with_width(const Pool& p, const Id* ids, int64_t count, const Body& body) {
  switch (p.table.width) {
    case 16:
      return body(Rows<T, Id, true, 16>{p, ids, count});
    case 32:
      return body(Rows<T, Id, true, 32>{p, ids, count});
    case 64:
      return body(Rows<T, Id, true, 64>{p, ids, count});
    case 128:
      return body(Rows<T, Id, true, 128>{p, ids, count});
    case 256:
      return body(Rows<T, Id, true, 256>{p, ids, count});
    default:
      return body(Rows<T, Id, true, 0>{p, ids, count});
  }
}

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
      with_width<T>(p, longs, count, body);
    } else {
      with_width<T>(p, ints, count, body);
    }
    return -1;
  }
  std::vector<int64_t> resolved(count);
  for (int64_t i = 0; i < count; ++i) {
    resolved[i] = resolve(p.ids[p.first_id + i], p.table.rows, p.ids.bad_ids);
    if (resolved[i] < 0 && p.ids.bad_ids == BadIds::kRaise) return p.first_id + i;
  }
  body(Rows<T, int64_t, false, 0>{p, resolved.data(), count});
  return -1;
}

// Sums N vectors of columns over the ids [begin, end), in registers. Fetches the same columns of
// the rows that come later.
template <int N, typename T, typename Id, bool kIsPlain, int64_t kWidth>
SHARDWISE_INLINE void sum_panel(const Rows<T, Id, kIsPlain, kWidth>& rows, int64_t begin,
                                int64_t end, int64_t column, float divisor, float* out) {
  constexpr int kVectorsPerLine = sizeof(T) == 4 ? 1 : 2;
  Floats sums[N];
  for (int v = 0; v < N; ++v) sums[v] = splat(0.0f);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < rows.count && rows.is_there(i + kAhead)) {
      const T* ahead = rows.row(i + kAhead) + column;
      for (int v = 0; v < N; v += kVectorsPerLine) __builtin_prefetch(ahead + v * kLanes);
    }
    if (!rows.is_there(i)) continue;
    const T* row = rows.row(i) + column;
    if constexpr (kIsPlain) {
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + load(row + v * kLanes);
    } else {
      const Floats weight = splat(rows.weight(i));
      for (int v = 0; v < N; ++v) sums[v] = sums[v] + weight * load(row + v * kLanes);
    }
  }
  if (divisor != 1.0f) {
    for (int v = 0; v < N; ++v) sums[v] = sums[v] / splat(divisor);
  }
  if (rows.p.streams) {
    for (int v = 0; v < N; ++v) stream(out + column + v * kLanes, sums[v]);
  } else {
    for (int v = 0; v < N; ++v) store(out + column + v * kLanes, sums[v]);
  }
}

template <typename T, typename Id, bool kIsPlain, int64_t kWidth>
SHARDWISE_INLINE void sum_narrow(const Rows<T, Id, kIsPlain, kWidth>& rows, int64_t begin,
                                 int64_t end, float divisor, float* out) {
  const int64_t width = rows.width();
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

// All columns, in panels of N vectors and then of fewer.
template <int N, typename R>
SHARDWISE_INLINE void sum_panels(const R& rows, int64_t begin, int64_t end, int64_t column,
                                 float divisor, float* out) {
  for (; column + N * kLanes <= rows.width(); column += N * kLanes) {
    sum_panel<N>(rows, begin, end, column, divisor, out);
  }
  if constexpr (N > 1) sum_panels<N / 2>(rows, begin, end, column, divisor, out);
}

template <typename T, typename Id, bool kIsPlain, int64_t kWidth>
SHARDWISE_INLINE void sum_bag(const Rows<T, Id, kIsPlain, kWidth>& rows, int64_t begin, int64_t end,
                              float divisor, float* out) {
  const int64_t width = rows.width();
  if (width < kLanes) return sum_narrow(rows, begin, end, divisor, out);
  sum_panels<kMostVectors>(rows, begin, end, 0, divisor, out);
  // The last vector may overlap the one before: both compute the same sums of shared columns.
  if (width % kLanes != 0) sum_panel<1>(rows, begin, end, width - kLanes, divisor, out);
}

// Such bags need no inner loop, whose branches would cost as much as their rows.
bool has_one_id_each(const Pool& p) {
  bool has_one = p.last_id - p.first_id == p.last_bag - p.first_bag;
  for (int64_t bag = p.first_bag; has_one && bag < p.last_bag; bag += 64) {
    const int64_t end = std::min(bag + 64, p.last_bag);
    for (int64_t b = bag; b < end; ++b) {
      has_one &= p.ids.offsets[b + 1] - p.ids.offsets[b] == 1;
    }
  }
  return has_one;
}

template <typename T>
int64_t pool_rows(const Pool& p) {
  return with_rows<T>(p, [&](const auto& rows) {
    rows.prefetch_first();
    float* out = p.out;
    if (p.pooling == Pooling::kNone || has_one_id_each(p)) {
      for (int64_t i = 0; i < rows.count; ++i, out += p.stride) {
        sum_bag(rows, i, i + 1, 1.0f, out);
      }
      return;
    }
    for (int64_t bag = p.first_bag; bag < p.last_bag; ++bag, out += p.stride) {
      const int64_t begin = p.ids.offsets[bag], end = p.ids.offsets[bag + 1];
      const bool divides = p.pooling == Pooling::kMean && end > begin;
      sum_bag(rows, begin - p.first_id, end - p.first_id,
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
  const int64_t bad = p.table.dtype == DType::kFloat32   ? pool_rows<float>(p)
                      : p.table.dtype == DType::kFloat16 ? pool_rows<Half>(p)
                                                         : pool_rows<BFloat>(p);
  if (p.streams) fence();
  return bad;
}

int64_t weight_dots(const Pool& p) {
  if (p.table.dtype == DType::kFloat32) return dot_rows<float>(p);
  return p.table.dtype == DType::kFloat16 ? dot_rows<Half>(p) : dot_rows<BFloat>(p);
}

}  // namespace shardwise::cpu::SHARDWISE_ISA
