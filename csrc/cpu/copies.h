// Many copies of any size, shared out over torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"

namespace shardwise::cpu {

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
