// Sums, and many copies of any size, shared out over torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "isa.h"
#include "tasks.h"

namespace shardwise::cpu {

// Adds up in eight lanes: one would make each addition wait for the one before it. Wraps around.
template <typename T>
int64_t sum_lanes(const T* numbers, int64_t count) {
  constexpr int64_t kLanes = 8;
  uint64_t sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += static_cast<uint64_t>(numbers[i + k]);
  }
  for (; i < count; ++i) sums[0] += static_cast<uint64_t>(numbers[i]);
  return static_cast<int64_t>(std::accumulate(sums, sums + kLanes, uint64_t{0}));
}

#ifdef __x86_64__
// For where the kernels in use are those of AVX-512. Masks that keep every lane stand where plain
// intrinsics would make g++ 12 warn of its own undefined operands.
#define SHARDWISE_WIDE __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
inline bool is_wide() { return &isa() == &avx512::kernels; }

SHARDWISE_WIDE inline __m512i load_wide(const int64_t* numbers) {
  return _mm512_loadu_si512(numbers);
}
SHARDWISE_WIDE inline __m512i load_wide(const int32_t* numbers) {
  const auto* eight = reinterpret_cast<const __m256i*>(numbers);
  return _mm512_maskz_cvtepi32_epi64(0xff, _mm256_loadu_si256(eight));
}

template <typename T>
SHARDWISE_WIDE int64_t sum_wide(const T* numbers, int64_t count) {
  __m512i sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int64_t k = 0; k < 4; ++k) {
      sums[k] = _mm512_add_epi64(sums[k], load_wide(numbers + i + 8 * k));
    }
  }
  int64_t lanes[8];
  _mm512_storeu_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]),
                                              _mm512_add_epi64(sums[2], sums[3])));
  const auto rest = static_cast<uint64_t>(sum_lanes(numbers + i, count - i));
  return static_cast<int64_t>(rest + static_cast<uint64_t>(sum_lanes(lanes, 8)));
}
#endif

template <typename T>
int64_t sum_of(const T* numbers, int64_t count) {
#ifdef __x86_64__
  if (is_wide()) return sum_wide(numbers, count);
#endif
  return sum_lanes(numbers, count);
}

class Copies {
 public:
  // Long copies are cut, so that no thread waits for another's long one.
  void add(void* to, const void* from, size_t bytes) {
    total_ += bytes;
    for (size_t done = 0; done < bytes; done += kPiece) {
      pieces_.push_back({static_cast<char*>(to) + done, static_cast<const char*>(from) + done,
                         std::min(kPiece, bytes - done)});
    }
  }

  void run() const {
    run_tasks(static_cast<int64_t>(pieces_.size()), total_ < 2 * kPiece, [&](int64_t i) {
      std::memcpy(pieces_[i].to, pieces_[i].from, pieces_[i].bytes);
    });
  }

 private:
  static constexpr size_t kPiece = size_t{64} << 10;
  struct Piece {
    char* to;
    const char* from;
    size_t bytes;
  };
  std::vector<Piece> pieces_;
  size_t total_ = 0;
};

}  // namespace shardwise::cpu
