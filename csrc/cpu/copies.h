// Many copies of any size, shared out over torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "tasks.h"

namespace shardwise::cpu {

// Adds up in eight lanes: one would make each addition wait for the one before it. Wraps around.
template <typename T>
int64_t sum_of(const T* numbers, int64_t count) {
  constexpr int64_t kLanes = 8;
  uint64_t sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += static_cast<uint64_t>(numbers[i + k]);
  }
  for (; i < count; ++i) sums[0] += static_cast<uint64_t>(numbers[i]);
  return static_cast<int64_t>(std::accumulate(sums, sums + kLanes, uint64_t{0}));
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
