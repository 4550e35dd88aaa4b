// The update rules: each a pair (sums over the columns of a row, apply); see ops/lookup/rules.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "rounding.h"

namespace shardwise::cpu::SHARDWISE_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Neither decays nor clips.
SHARDWISE_INLINE bool is_plain(const RuleNumbers& k) {
  return k.weight_decay == 0.0f && !(k.max_gradient < kInfinity);
}

// One touched row: before the update, its summed gradient (padded to whole vectors) and its states
// (of a state per row, the pointer to its number).
template <typename T>
struct Row {
  T* weight;
  const float* grad;
  float* state0;
  float* state1;
  int64_t width;
  int64_t number;  // within the local table
};

// Sixteen columns of a row, or its last n.
struct Chunk {
  Floats weight, grad;
  int64_t column, n;
};

// Runs body(chunk) over the columns, with the gradient clipped and L2 decay added.
template <typename T, typename Body>
SHARDWISE_INLINE void for_chunks(const Row<T>& row, const RuleNumbers& k, Body body) {
  for (int64_t c = 0; c < row.width; c += kLanes) {
    Chunk chunk{load(row.weight + c, row.width - c), load(row.grad + c), c, row.width - c};
    if (k.max_gradient < kInfinity) chunk.grad = clamp(chunk.grad, k.max_gradient);
    if (!k.is_decoupled && k.weight_decay != 0.0f) {
      chunk.grad = chunk.grad + splat(k.weight_decay) * chunk.weight;
    }
    body(chunk);
  }
}

// Runs step(chunk), the amount to subtract, over the columns and writes the new row.
template <bool kShrinks, typename T, typename Step>
SHARDWISE_INLINE void write_row(const Row<T>& row, const RuleNumbers& k, Step step) {
  const uint32_t key = row_key(k.random_key, row.number + k.first_row);
  const float kept = 1.0f - k.lr * k.weight_decay;
  for_chunks(row, k, [&](const Chunk& chunk) {
    const Floats amount = step(chunk);
    const bool shrinks = kShrinks && k.is_decoupled && k.weight_decay != 0.0f;
    Floats next = (shrinks ? chunk.weight * splat(kept) : chunk.weight) - amount;
    if constexpr (sizeof(T) == 2) {
      if (k.rounds_stochastically) {
        const Bits random = random_bits(key, chunk.column + k.first_column);
        next = round_to(row.weight, next, random);
      }
    }
    store(row.weight + chunk.column, next, chunk.n);
  });
}

SHARDWISE_INLINE Floats first_moment(const float* state, const Chunk& x, const RuleNumbers& k) {
  return splat(k.beta1) * load(state + x.column, x.n) + splat(k.rest1) * x.grad;
}
SHARDWISE_INLINE Floats second_moment(const float* state, const Chunk& x, const RuleNumbers& k) {
  return splat(k.beta2) * load(state + x.column, x.n) + splat(k.rest2) * (x.grad * x.grad);
}
SHARDWISE_INLINE Floats direction(const Floats& first, const Floats& second,
                                  const RuleNumbers& k) {
  const Floats root = sqrt(second / splat(k.correction2)) + splat(k.eps);
  return first / splat(k.correction1) / root;
}
SHARDWISE_INLINE float next_row_moment(float state, float squared_sum, const RuleNumbers& k) {
  return k.beta2 * state + k.rest2 * (squared_sum / k.logical_width);
}
SHARDWISE_INLINE float decay_in_trust(const RuleNumbers& k) {
  return k.is_decoupled ? k.weight_decay : 0.0f;
}
SHARDWISE_INLINE float trust(float weight_squared, float update_squared) {
  if (!(weight_squared > 0.0f) || !(update_squared > 0.0f)) return 1.0f;
  return std::sqrt(weight_squared) / std::sqrt(update_squared);
}

template <RuleCode kCode>
struct Rule;

template <>
struct Rule<RuleCode::kSgd> {
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float*) {
    write_row<true>(row, k, [&](const Chunk& x) { return splat(k.lr) * x.grad; });
  }
};

template <>
struct Rule<RuleCode::kAdagrad> {
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float*) {
    write_row<true>(row, k, [&](const Chunk& x) {
      const Floats total = load(row.state0 + x.column, x.n) + x.grad * x.grad;
      store(row.state0 + x.column, total, x.n);
      return splat(k.lr) * x.grad / (sqrt(total) + splat(k.eps));
    });
  }
};

struct SquaredGradient {
  template <typename T>
  SHARDWISE_INLINE static void sums(const Row<T>& row, const RuleNumbers& k, float* out) {
    Floats squared = splat(0.0f);
    for_chunks(row, k, [&](const Chunk& x) { squared = squared + x.grad * x.grad; });
    out[0] = sum(squared);
  }
};

template <>
struct Rule<RuleCode::kRowWiseAdagrad> : SquaredGradient {
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float* sums) {
    *row.state0 += sums[0] / k.logical_width;
    const Floats factor = splat(k.lr / (std::sqrt(*row.state0) + k.eps));
    write_row<true>(row, k, [&](const Chunk& x) { return factor * x.grad; });
  }
};

template <>
struct Rule<RuleCode::kAdam> {
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float*) {
    write_row<true>(row, k, [&](const Chunk& x) {
      const Floats first = first_moment(row.state0, x, k);
      const Floats second = second_moment(row.state1, x, k);
      store(row.state0 + x.column, first, x.n);
      store(row.state1 + x.column, second, x.n);
      return splat(k.lr) * direction(first, second, k);
    });
  }
};

template <>
struct Rule<RuleCode::kPartialRowWiseAdam> : SquaredGradient {
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float* sums) {
    *row.state1 = next_row_moment(*row.state1, sums[0], k);
    const Floats second = splat(*row.state1);
    write_row<true>(row, k, [&](const Chunk& x) {
      const Floats first = first_moment(row.state0, x, k);
      store(row.state0 + x.column, first, x.n);
      return splat(k.lr) * direction(first, second, k);
    });
  }
};

template <>
struct Rule<RuleCode::kLamb> {
  template <typename T>
  SHARDWISE_INLINE static Floats update(const Row<T>& row, const RuleNumbers& k, const Chunk& x) {
    const Floats second = second_moment(row.state1, x, k);
    return direction(first_moment(row.state0, x, k), second, k) +
           splat(decay_in_trust(k)) * x.weight;
  }
  template <typename T>
  SHARDWISE_INLINE static void sums(const Row<T>& row, const RuleNumbers& k, float* out) {
    Floats weight = splat(0.0f), change = splat(0.0f);
    for_chunks(row, k, [&](const Chunk& x) {
      const Floats step = update(row, k, x);
      weight = weight + x.weight * x.weight;
      change = change + step * step;
    });
    out[0] = sum(weight);
    out[1] = sum(change);
  }
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float* sums) {
    const Floats factor = splat(k.lr * trust(sums[0], sums[1]));
    write_row<false>(row, k, [&](const Chunk& x) {
      const Floats step = update(row, k, x);
      const Floats first = first_moment(row.state0, x, k);
      store(row.state1 + x.column, second_moment(row.state1, x, k), x.n);
      store(row.state0 + x.column, first, x.n);
      return factor * step;
    });
  }
};

// The norm of the step needs the second moment of the whole row, so there are two rounds of sums.
template <>
struct Rule<RuleCode::kPartialRowWiseLamb> : SquaredGradient {
  SHARDWISE_INLINE static Floats update(const Floats& first, float second, const RuleNumbers& k,
                                        const Chunk& x) {
    return direction(first, splat(second), k) + splat(decay_in_trust(k)) * x.weight;
  }
  template <typename T>
  SHARDWISE_INLINE static void second_sums(const Row<T>& row, const RuleNumbers& k, float* out) {
    const float second = next_row_moment(*row.state1, out[0], k);
    Floats weight = splat(0.0f), change = splat(0.0f);
    for_chunks(row, k, [&](const Chunk& x) {
      const Floats step = update(first_moment(row.state0, x, k), second, k, x);
      weight = weight + x.weight * x.weight;
      change = change + step * step;
    });
    out[1] = sum(weight);
    out[2] = sum(change);
  }
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float* sums) {
    *row.state1 = next_row_moment(*row.state1, sums[0], k);
    const Floats factor = splat(k.lr * trust(sums[1], sums[2]));
    write_row<false>(row, k, [&](const Chunk& x) {
      const Floats first = first_moment(row.state0, x, k);
      store(row.state0 + x.column, first, x.n);
      return factor * update(first, *row.state1, k, x);
    });
  }
};

template <>
struct Rule<RuleCode::kLarsSgd> {
  template <typename T>
  SHARDWISE_INLINE static void sums(const Row<T>& row, const RuleNumbers& k, float* out) {
    Floats weight = splat(0.0f), grad = splat(0.0f);
    for_chunks(row, k, [&](const Chunk& x) {
      weight = weight + x.weight * x.weight;
      grad = grad + x.grad * x.grad;
    });
    out[0] = sum(weight);
    out[1] = sum(grad);
  }
  template <typename T>
  SHARDWISE_INLINE static void apply(const Row<T>& row, const RuleNumbers& k, const float* sums) {
    const float decay = decay_in_trust(k), norm = std::sqrt(sums[0]);
    const float bound = std::sqrt(sums[1]) + decay * norm;
    const Floats factor = splat(bound > 0.0f ? k.lr * k.eta * norm / bound : 0.0f);
    write_row<false>(row, k, [&](const Chunk& x) {
      const Floats momentum = splat(k.momentum) * load(row.state0 + x.column, x.n) +
                              factor * (x.grad + splat(decay) * x.weight);
      store(row.state0 + x.column, momentum, x.n);
      return momentum;
    });
  }
};

}  // namespace shardwise::cpu::SHARDWISE_ISA
