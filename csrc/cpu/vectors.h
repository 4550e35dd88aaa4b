// Vectors of an answer: summed, written and multiplied four floats at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "stripes.h"

namespace shardwise::cpu {

typedef float Four __attribute__((vector_size(16)));

inline Four load(const float* from) {
  Four four;
  std::memcpy(&four, from, sizeof(four));
  return four;
}

// With kStreams past the cache, which a large result would push everything out of.
template <bool kStreams>
void store(float* to, Four four) {
#ifdef __SSE2__
  if constexpr (kStreams) return _mm_stream_ps(to, four);
#endif
  std::memcpy(to, &four, sizeof(four));
}

// Makes what was streamed visible to other threads.
inline void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Whether a vector is made of whole cache lines.
inline bool can_stream(const float* vector, int64_t width) {
  return reinterpret_cast<uintptr_t>(vector) % 64 == 0 && width % 16 == 0;
}

inline void prefetch(const float* vector, int64_t width) {
  for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(vector + c);
}

// The vectors of one stripe in an answer, or in its gradient.
template <typename Float>
struct Vectors {
  Float* answer;
  const int64_t* bases;
  int64_t width;

  Float* operator[](const Entry& entry) const {
    return answer + bases[entry.slot] + entry.position * width;
  }
  void prefetch(const Entry& entry) const {
    if (entry.slot >= 0) cpu::prefetch((*this)[entry], width);
  }
};

// The entries of a bag. `weights` are their own; null: all 1.
struct Sum {
  const Vectors<const float>& vectors;
  const Entry* entries;
  int64_t count;
  const float* weights;
  float divisor;

  // Sums in order, in registers, N fours of columns from column `c` on.
  template <int N, bool kStreams>
  void write_panel(int64_t c, float* out) const {
    Four sums[N] = {};
    for (int64_t e = 0; e < count; ++e) {
      if (entries[e].slot < 0) continue;
      const float* vector = vectors[entries[e]] + c;
      const float weight = weights == nullptr ? 1.0f : weights[e];
      for (int i = 0; i < N; ++i) sums[i] += weight * load(vector + 4 * i);
    }
    for (int i = 0; i < N; ++i) {
      store<kStreams>(out + c + 4 * i, divisor == 1.0f ? sums[i] : sums[i] / divisor);
    }
  }

  template <bool kStreams>
  void write(float* out) const {
    const int64_t width = vectors.width;
    int64_t c = 0;
    for (; c + 32 <= width; c += 32) write_panel<8, kStreams>(c, out);
    for (; c + 16 <= width; c += 16) write_panel<4, kStreams>(c, out);
    for (; c + 4 <= width; c += 4) write_panel<1, false>(c, out);
    for (; c < width; ++c) {
      float sum = 0.0f;
      for (int64_t e = 0; e < count; ++e) {
        if (entries[e].slot < 0) continue;
        sum += (weights == nullptr ? 1.0f : weights[e]) * vectors[entries[e]][c];
      }
      out[c] = sum / divisor;
    }
  }
};

enum class Put { kStream, kWrite, kAdd };

// Puts a row, times two factors one after the other, into a vector.
template <Put kPut>
void put(float* __restrict vector, const float* __restrict row, float factor, float scale,
         int64_t width) {
  int64_t c = 0;
  for (; c + 4 <= width; c += 4) {
    const Four value = load(row + c) * factor * scale;
    store<kPut == Put::kStream>(vector + c, kPut == Put::kAdd ? load(vector + c) + value : value);
  }
  for (; c < width; ++c) {
    const float value = row[c] * factor * scale;
    vector[c] = kPut == Put::kAdd ? vector[c] + value : value;
  }
}

// In sixteen partial sums, added in the order in which `weight_grads` adds those of local rows.
inline float dot(const float* a, const float* b, int64_t width) {
  float sums[16] = {};
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) {
    for (int64_t i = 0; i < 16; ++i) sums[i] += a[c + i] * b[c + i];
  }
  for (int64_t i = 0; c < width; ++c, ++i) sums[i] += a[c] * b[c];
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace shardwise::cpu
