// Dot products of all pairs of a sample's vectors, and their gradient, in register tiles.
//
// Forward lays the vectors out as columns, so that sixteen products are summed at a time, column
// after column of the vectors; backward needs no layout but the gradients as a symmetric matrix.
#include <algorithm>

#include "vector.h"

namespace shardwise::cpu::SHARDWISE_ISA {

void interact(const Interaction& p);
void interact_grad(const Interaction& p);

namespace {

// What a tile may keep in registers: AVX-512 has 32 of 16 numbers, the others 16 smaller ones.
constexpr int64_t kRows = kParts == 4 ? 2 : 4;
constexpr int64_t kDotVectors = kParts == 1 ? 2 : 1;
constexpr int64_t kGradVectors = kParts == 1 ? 4 : 1;

SHARDWISE_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

SHARDWISE_INLINE const float* vector_of(const Interaction& p, int64_t sample, int64_t i) {
  if (i == 0) return p.dense + sample * p.width;
  return p.sparse + (sample * (p.num_vectors - 1) + i - 1) * p.width;
}

// The low or high halves of a and b, their lanes in turn.
template <bool kIsHigh>
SHARDWISE_INLINE NativeFloats interleave_native(const NativeFloats& a, const NativeFloats& b) {
  NativeInts order;
  for (int i = 0; i < kNative; ++i) {
    order[i] = (kIsHigh ? kNative / 2 : 0) + i / 2 + (i % 2 == 0 ? 0 : kNative);
  }
#if defined(__clang__)
  NativeFloats result;
  for (int i = 0; i < kNative; ++i) {
    result[i] = order[i] < kNative ? a[order[i]] : b[order[i] - kNative];
  }
  return result;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

template <bool kIsHigh>
SHARDWISE_INLINE Floats interleave(const Floats& a, const Floats& b) {
  if constexpr (kParts == 1) {
    return {{interleave_native<kIsHigh>(a.part[0], b.part[0])}};
  } else {
    return each<NativeFloats>([&](int i) {
      const int from = (kIsHigh ? kParts / 2 : 0) + i / 2;
      return i % 2 == 0 ? interleave_native<false>(a.part[from], b.part[from])
                        : interleave_native<true>(a.part[from], b.part[from]);
    });
  }
}

// Transposes a 16 x 16 block: four rounds of interleaving vector i with vector i + 8.
SHARDWISE_INLINE void transpose(Floats (&rows)[kLanes]) {
  for (int round = 0; round < 4; ++round) {
    Floats next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + kLanes / 2]);
    }
    std::copy_n(next, kLanes, rows);
  }
}

// Writes [column][vector], zeros where there is no vector.
void lay_out(const Interaction& p, int64_t sample, int64_t stride, float* columns) {
  for (int64_t i = 0; i < p.num_vectors; i += kLanes) {
    for (int64_t c = 0; c < p.width; c += kLanes) {
      Floats block[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) {
        block[k] = i + k < p.num_vectors ? load(vector_of(p, sample, i + k) + c, p.width - c)
                                         : splat(0.0f);
      }
      transpose(block);
      const int64_t left = std::min<int64_t>(kLanes, p.width - c);
      for (int64_t k = 0; k < left; ++k) store(columns + (c + k) * stride + i, block[k]);
    }
  }
}

// The products of vectors [row, row + kRows) with 16 N vectors from `first` on.
template <int N>
SHARDWISE_INLINE void multiply(const float* columns, int64_t stride, int64_t width, int64_t row,
                               int64_t first, float* dots) {
  Floats sums[kRows][N];
  for (auto& each : sums) {
    for (Floats& sum : each) sum = splat(0.0f);
  }
  for (int64_t c = 0; c < width; ++c, columns += stride) {
    Floats right[N];
    for (int v = 0; v < N; ++v) right[v] = load(columns + first + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Floats left = splat(columns[row + r]);
      for (int v = 0; v < N; ++v) sums[r][v] = sums[r][v] + left * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < N; ++v) store(dots + r * stride + first + v * kLanes, sums[r][v]);
  }
}

// Sums 16 N columns of all vectors into rows [row, row + kRows), by the factors of each row.
template <int N>
SHARDWISE_INLINE void combine(const Interaction& p, int64_t sample, const float* factors,
                              int64_t stride, int64_t column, Floats (&sums)[kRows][N]) {
  for (auto& each : sums) {
    for (Floats& sum : each) sum = splat(0.0f);
  }
  for (int64_t j = 0; j < p.num_vectors; ++j) {
    const float* from = vector_of(p, sample, j) + column;
    Floats vector[N];
    for (int v = 0; v < N; ++v) {
      vector[v] = load(from + v * kLanes, p.width - column - v * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = splat(factors[r * stride + j]);
      for (int v = 0; v < N; ++v) sums[r][v] = sums[r][v] + factor * vector[v];
    }
  }
}

template <int N>
SHARDWISE_INLINE void write_grads(const Interaction& p, int64_t sample, const float* factors,
                                  int64_t stride, int64_t row, int64_t column) {
  Floats sums[kRows][N];
  combine<N>(p, sample, factors + row * stride, stride, column, sums);
  const float* dense_grad = p.grad + sample * p.num_columns();
  for (int64_t r = 0; r < std::min(kRows, p.num_vectors - row); ++r) {
    const int64_t i = row + r;
    float* to = i == 0 ? p.dense_grad + sample * p.width
                       : p.sparse_grad + (sample * (p.num_vectors - 1) + i - 1) * p.width;
    for (int64_t v = 0, c = column; v < N; ++v, c += kLanes) {
      if (i == 0) sums[r][v] = sums[r][v] + load(dense_grad + c, p.width - c);
      store(to + c, sums[r][v], p.width - c);
    }
  }
}

}  // namespace

void interact(const Interaction& p) {
  const int64_t stride = round_up(p.num_vectors, kLanes);
  float* columns = p.scratch;
  float* dots = columns + round_up(p.width, kLanes) * stride;  // [kRows, stride]
  for (int64_t sample = p.first; sample < p.last; ++sample) {
    lay_out(p, sample, stride, columns);
    float* out = p.out + sample * p.num_columns();
    std::copy_n(p.dense + sample * p.width, p.width, out);
    out += p.width;
    for (int64_t row = 0; row + 1 < p.num_vectors; row += kRows) {
      int64_t first = row / kLanes * kLanes;  // what lies left of it was done by earlier rows
      for (; first + kDotVectors * kLanes <= stride; first += kDotVectors * kLanes) {
        multiply<kDotVectors>(columns, stride, p.width, row, first, dots);
      }
      if (first < stride) multiply<1>(columns, stride, p.width, row, first, dots);
      for (int64_t i = row; i < std::min(row + kRows, p.num_vectors - 1); ++i) {
        const int64_t count = p.num_vectors - 1 - i;
        std::copy_n(dots + (i - row) * stride + i + 1, count, out);
        out += count;
      }
    }
  }
}

void interact_grad(const Interaction& p) {
  const int64_t stride = p.num_vectors;
  float* factors = p.scratch;
  std::fill_n(factors, round_up(p.num_vectors, kRows) * stride, 0.0f);  // the diagonal stays zero
  for (int64_t sample = p.first; sample < p.last; ++sample) {
    const float* grad = p.grad + sample * p.num_columns() + p.width;
    for (int64_t i = 0; i < p.num_vectors; ++i) {
      for (int64_t j = i + 1; j < p.num_vectors; ++j, ++grad) {
        factors[i * stride + j] = factors[j * stride + i] = *grad;
      }
    }
    for (int64_t row = 0; row < p.num_vectors; row += kRows) {
      int64_t c = 0;
      for (; c + kGradVectors * kLanes <= p.width; c += kGradVectors * kLanes) {
        write_grads<kGradVectors>(p, sample, factors, stride, row, c);
      }
      for (; c < p.width; c += kLanes) write_grads<1>(p, sample, factors, stride, row, c);
    }
  }
}

}  // namespace shardwise::cpu::SHARDWISE_ISA
