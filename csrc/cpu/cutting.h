// A cutting of a table's rows into blocks: which block a row lies in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace shardwise::cpu {

// Rows from the end of the block before to `end`; one is sent to `slot`, less `base`.
struct Block {
  int64_t end, slot, base;
};

class Cutting {
 public:
  Cutting(const Block* blocks, int64_t count) : blocks_(blocks), count_(count) {
    const int64_t height = blocks[0].end;
    bool is_even = height > 1 && num_rows() < (int64_t{1} << 32) &&
                   height * (count - 1) < num_rows() && num_rows() <= height * count;
    for (int64_t b = 0; b + 1 < count; ++b) is_even &= blocks[b].end == height * (b + 1);
    if (is_even) magic_ = UINT64_MAX / static_cast<uint64_t>(height) + 1;
  }

  int64_t num_rows() const { return blocks_[count_ - 1].end; }
  const Block& operator[](int64_t block) const { return blocks_[block]; }

  // Writes each id's block, or -1 for none under the policy. Gives how many ids are outside.
  template <typename Id>
  int64_t find(const Id* ids, int64_t count, BadIds policy, int32_t* found) const {
    const auto run = [&](const auto& block_of) {
      const auto rows = static_cast<uint64_t>(num_rows());
      int64_t num_bad = 0;
      for (int64_t i = 0; i < count; ++i) {
        num_bad += static_cast<uint64_t>(ids[i]) >= rows;
        found[i] = block_of(ids[i]);
      }
      if (num_bad == 0) return num_bad;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = resolve(ids[i], num_rows(), policy);
        found[i] = row < 0 ? -1 : block_of(row);
      }
      return num_bad;
    };
    if (count_ == 1) return run([](int64_t) { return 0; });
    if (magic_ == 0) return run([this](int64_t row) { return search(row); });
    // Below 2^32 the high word of the product is the quotient, exactly (D. Lemire et al., 2019).
    return run([magic = magic_](int64_t row) {
      const auto product = static_cast<unsigned __int128>(magic) * static_cast<uint32_t>(row);
      return static_cast<int32_t>(product >> 64);
    });
  }

 private:
  int32_t search(int64_t row) const {
    const Block* block = std::upper_bound(
        blocks_, blocks_ + count_, row, [](int64_t r, const Block& b) { return r < b.end; });
    return static_cast<int32_t>(block - blocks_);
  }

  const Block* blocks_;
  int64_t count_;
  uint64_t magic_ = 0;  // 2^64 over the height of equal blocks, rounded up; 0: not equal
};

}  // namespace shardwise::cpu
