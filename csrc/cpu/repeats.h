// The first occurrence of each row, by a hash table that stays in the cache.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../torch_abi.h"
#include "isa.h"
#include "scratch.h"

namespace shardwise::cpu {

// One of the parts that share the search among some ids, each on a thread of its own. It reads all
// ids and looks after the rows whose hash is its own, so what is found does not depend on the parts.
struct Part {
  int64_t number, count;

  static int64_t count_for(int64_t num_ids) {
    constexpr int64_t kWorth = 32768;
    return std::clamp<int64_t>(num_ids / kWorth, 1, num_threads());
  }
  bool owns(int64_t row) const {
    if (count == 1) return true;
    const uint64_t hash = mix(static_cast<uint32_t>(row));
    return static_cast<int64_t>((hash * static_cast<uint64_t>(count)) >> 32) == number;
  }
};

class Repeats {
 public:
  // For at most `num_items` ids of the part, below `num_rows`. Writes to `firsts`, by item, the first
  // item of the same row, or -1 for an id left out.
  Repeats(const Part& part, int64_t num_rows, int64_t num_items, int32_t* firsts)
      : part_(part), num_rows_(num_rows), firsts_(firsts) {
    thread_local Scratch scratch;
    capacity_ = std::bit_ceil(static_cast<uint64_t>(2 * num_items + 16));
    shift_ = 64 - std::countr_zero(capacity_);
    is_direct_ = num_rows <= static_cast<int64_t>(capacity_);
    if (is_direct_) capacity_ = static_cast<uint64_t>(num_rows);
    table_ = scratch.take<Seen>(capacity_);
    std::fill_n(table_, capacity_, Seen{-1, 0});
  }

  template <typename Id>
  void find(const Id* ids, int64_t count, int64_t first_item, BadIds policy) {
    constexpr int64_t kAhead = 8;
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count && !is_direct_) {
        __builtin_prefetch(table_ + (hash(ids[i + kAhead]) >> shift_));
      }
      const int64_t row = resolve(ids[i], num_rows_, policy);
      if (part_.owns(row)) firsts_[first_item + i] = row < 0 ? -1 : first_of(row, first_item + i);
    }
  }

 private:
  struct Seen {
    int64_t row;  // -1: free
    int32_t item;
  };

  static uint64_t hash(int64_t row) { return static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u; }
  int32_t first_of(int64_t row, int64_t item) {
    uint64_t place = is_direct_ ? static_cast<uint64_t>(row) : hash(row) >> shift_;
    while (table_[place].row != row) {
      if (table_[place].row < 0) {
        table_[place] = {row, static_cast<int32_t>(item)};
        break;
      }
      place = place + 1 == capacity_ ? 0 : place + 1;
    }
    return table_[place].item;
  }

  Part part_;
  int64_t num_rows_;
  int32_t* firsts_;
  bool is_direct_;  // a row's place is its number
  uint64_t capacity_;
  int shift_;
  Seen* table_;
};

}  // namespace shardwise::cpu
