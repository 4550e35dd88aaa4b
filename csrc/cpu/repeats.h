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
// ids and looks after the rows whose hash is its own, so the parts do not change what is found.
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

template <typename Key>  // of rows: int32_t if they fit, which halves the table
class Repeats {
 public:
  // For at most `num_items` ids of the part, below `num_rows`. Writes to `firsts`, by item, the
  // first item of the same row, or -1 for an id left out.
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
    constexpr int64_t kAhead = 16;
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) __builtin_prefetch(table_ + place_of(ids[i + kAhead]));
      const int64_t row = resolve(ids[i], num_rows_, policy);
      if (!part_.owns(row)) continue;
      const auto item = static_cast<int32_t>(first_item + i);
      firsts_[item] = row < 0 ? -1 : first_of(static_cast<Key>(row), item);
    }
  }

 private:
  struct Seen {
    Key row;  // -1: free
    int32_t item;
  };

  uint64_t place_of(int64_t row) const {
    if (is_direct_) return static_cast<uint64_t>(row);
    return (static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u) >> shift_;
  }
  int32_t first_of(Key row, int32_t item) {
    for (uint64_t place = place_of(row);; place = place + 1 == capacity_ ? 0 : place + 1) {
      // Whether a row is new is not foreseeable, so both cases go without a branch.
      Seen& seen = table_[place];
      const bool is_new = seen.row < 0;
      if (!is_new & (seen.row != row)) continue;
      seen = {row, is_new ? item : seen.item};
      return seen.item;
    }
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
