// What the parts of `route` share: its arguments, how the work is cut, and where the results go.
//
// Tasks of some thousand ids find the block of each id and count what they send to each slot; sums
// of the counts say where each task writes; then the tasks write. Between the two, the first
// occurrence of each row is found for splits of rows.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../torch_abi.h"
#include "cutting.h"

namespace shardwise::cpu::routing {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

[[noreturn]] inline void fail(const std::string& text) {
  throw std::runtime_error("shardwise: route: " + text);
}
inline std::string str(int64_t number) { return std::to_string(number); }

struct Entry {
  int32_t slot, position;
};

// What a task sends to one slot; after `add_up`, what the tasks before it send.
struct Counts {
  int32_t bags, ids;
  int32_t last_bag;  // the latest one counted
};

// Consecutive bags of one source. `number` and `item` count bags and ids within the split.
struct Piece {
  int64_t first_bag, num_bags, number, item;
};

struct Task {
  int64_t split;
  size_t first_piece, last_piece;
  int64_t num_ids;
  int64_t first_count;  // its slots' in the array of all counts
  int64_t num_bad = 0;
  int64_t num_entries = 0, first_entry = 0;
};

struct Split {
  int64_t key;
  bool is_rows;
  Cutting cutting;
  int64_t first_slot, num_slots;
  int64_t first_item = 0, num_items = 0;  // among all splits' ids
  int64_t first_bag = 0;                  // among all splits' bags
  size_t first_task = 0, last_task = 0;
};

// What goes to a channel, and where it begins: in the message, in bytes, and among the origins.
struct Channel {
  int64_t ids, lengths, weights, origins;  // lengths: -1 if they are not sent
  int32_t num_bags, num_ids;
  bool is_used, is_rows;
};

struct Request {
  explicit Request(Arguments& arguments)
      : ids(arguments.tensor()),
        offsets(arguments.tensor()),
        weights(arguments.tensor()),
        is_weighted(arguments.boolean()),
        bags(arguments.tensor()),
        splits(arguments.tensor()),
        blocks(arguments.tensor()),
        channels(arguments.tensor()),
        first_channel(arguments.tensor()),
        policy(static_cast<BadIds>(arguments.integer())),
        is_wide(arguments.boolean()) {}

  int64_t num_ranks() const { return first_channel.numel() - 1; }
  int64_t num_channels() const { return first_channel.data<int64_t>()[num_ranks()]; }
  int64_t id_bytes() const { return is_wide ? 8 : 4; }

  Tensor ids, offsets, weights;
  bool is_weighted;
  Tensor bags, splits, blocks, channels, first_channel;
  BadIds policy;
  bool is_wide;
};

struct Job {
  const Request& request;
  const int64_t* starts;      // of the bags
  const int64_t* channel_of;  // of each slot
  std::vector<Split> splits;
  std::vector<Piece> pieces;
  std::vector<Task> tasks;
  int64_t num_items = 0, num_bags = 0, num_counts = 0, num_entries = 0;
  bool is_small = false;
  Counts* counts = nullptr;
  int32_t* found = nullptr;   // the block of each item; -1: not sent
  int32_t* firsts = nullptr;  // of rows: the first item of the same row; -1: not sent
  Channel* channels = nullptr;
  char* message = nullptr;
  Entry* entries = nullptr;
  int64_t* entry_ends = nullptr;
  int64_t* origins = nullptr;

  Channel& channel(const Split& split, int64_t slot) const {
    return channels[channel_of[split.first_slot + slot]];
  }
  int64_t num_ids(const Piece& piece) const {
    return starts[piece.first_bag + piece.num_bags] - starts[piece.first_bag];
  }
};

template <typename Id>
const Id* ids_of(const Job& job, const Piece& piece) {
  return job.request.ids.data<Id>() + job.starts[piece.first_bag];
}

// Finds the block of each id and fills the counts. Throws for the first id that the policy refuses.
void count(Job& job);

// Writes messages, entries and origins, where `counts` and `channels` say.
void write(const Job& job);

}  // namespace shardwise::cpu::routing
