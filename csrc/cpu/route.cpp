// The operator `route`: ids to one message per rank, and what the bags are made of.
//
// Tasks of some thousand ids find the block of each id and count what they send to each slot; sums
// of the counts say where each task writes; then the tasks write. A split of rows needs, in between,
// the first occurrence of each row.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cutting.h"
#include "inputs.h"
#include "kernels.h"
#include "repeats.h"
#include "scratch.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kTaskIds = 4096;
constexpr int64_t kSmallWork = 8192;  // ids and bags below which one thread is faster
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

[[noreturn]] void fail(const std::string& text) {
  throw std::runtime_error("shardwise: route: " + text);
}
std::string str(int64_t number) { return std::to_string(number); }

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

// Where a task writes next for one slot.
template <typename Out>
struct Cursor {
  Out* ids;
  int32_t* lengths;  // null: not sent
  float* weights;
  int64_t* origins;
  int32_t position;
  int32_t pending;  // ids of the present bag
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
  const int64_t* starts = nullptr;  // of the bags
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
    return channels[request.channels.data<int64_t>()[split.first_slot + slot]];
  }
  int64_t num_ids(const Piece& piece) const {
    return starts[piece.first_bag + piece.num_bags] - starts[piece.first_bag];
  }
};

// ---- reading

void check(const Request& request) {
  require_integers(request.ids, "ids");
  for (const Tensor* table :
       {&request.splits, &request.blocks, &request.channels, &request.first_channel}) {
    require(*table, "tables of routes", DType::kInt64, "int64");
  }
  if (request.policy < BadIds::kRaise || request.policy > BadIds::kIgnore) {
    fail("unknown policy for bad ids");
  }
  if (request.is_weighted) {
    require(request.weights, "weights", DType::kFloat32, "float32");
    if (request.weights.numel() != request.ids.numel()) {
      fail(str(request.weights.numel()) + " weights for " + str(request.ids.numel()) + " ids");
    }
  }
  const int64_t* first = request.first_channel.data<int64_t>();
  bool is_ordered = request.num_ranks() >= 0 && first[0] == 0;
  for (int64_t q = 0; is_ordered && q < request.num_ranks(); ++q) is_ordered = first[q] <= first[q + 1];
  if (!is_ordered) fail("first_channel must start at 0 and never decrease");
}

void check_blocks(const std::string& split, const Block* blocks, int64_t count, int64_t num_slots,
                  bool is_wide) {
  int64_t row = 0;
  for (int64_t b = 0; b < count; ++b) {
    const Block& block = blocks[b];
    if (block.end < row) fail(split + ": the rows of its blocks must never decrease");
    if (block.slot < 0 || block.slot >= num_slots) fail(split + " has no slot " + str(block.slot));
    if (!is_wide && block.end > row &&
        (block.end - 1 - block.base > kMost || row - block.base < -kMost)) {
      fail(split + ": ids of block " + str(b) + " do not fit in 32 bits");
    }
    row = block.end;
  }
}

std::vector<Split> read_splits(const Request& request, const Inputs& inputs) {
  const auto* blocks = reinterpret_cast<const Block*>(request.blocks.data<int64_t>());
  const int64_t num_blocks = request.blocks.numel() / 3, num_slots = request.channels.numel();
  std::vector<Split> splits;
  for (int64_t p = 0; p < request.splits.numel() / 6; ++p) {
    const int64_t* row = request.splits.data<int64_t>() + 6 * p;
    const std::string name = "split " + str(p);
    const auto is_range = [](int64_t first, int64_t count, int64_t all) {
      return first >= 0 && count > 0 && first <= all && count <= all - first;
    };
    if (row[0] < 0 || row[0] >= inputs.num_inputs()) fail(name + ": no input " + str(row[0]));
    if (row[1] < 0 || row[1] > 1) fail(name + ": unknown mode " + str(row[1]));
    if (!is_range(row[2], row[3], num_blocks)) fail(name + ": its blocks are not there");
    if (!is_range(row[4], row[5], num_slots)) fail(name + ": its slots are not there");
    check_blocks(name, blocks + row[2], row[3], row[5], request.is_wide);
    splits.push_back({row[0], row[1] == 1, Cutting(blocks + row[2], row[3]), row[4], row[5]});
  }
  return splits;
}

// Cuts the bags of a split into tasks of about equal numbers of ids, many enough for the counts by
// slot not to matter.
void cut_tasks(Job& job, const Inputs& inputs, int64_t p) {
  Split& split = job.splits[p];
  split.first_item = job.num_items;
  split.first_bag = job.num_bags;
  split.first_task = job.tasks.size();
  const int64_t grain = std::max(kTaskIds, 4 * split.num_slots);
  Task task{p, job.pieces.size(), 0, 0, 0};
  int64_t number = 0, work = 0;
  const auto close = [&] {
    if (work == 0) return;
    task.last_piece = job.pieces.size();
    task.first_count = job.num_counts;
    job.num_counts += split.num_slots;
    job.tasks.push_back(task);
    task = {p, job.pieces.size(), 0, 0, 0};
    work = 0;
  };
  for (int64_t s = 0; s < inputs.num_sources(); ++s) {
    const Run& run = inputs.run(split.key, s);
    for (int64_t first = run.first_bag, end = first + run.num_bags; first < end;) {
      const int64_t* begin = job.starts + first;
      const int64_t most = std::min(end - first, grain);
      const int64_t* bound = std::upper_bound(begin, begin + most + 1, *begin + grain);
      const int64_t bags = std::clamp<int64_t>(bound - begin - 1, 1, most);
      job.pieces.push_back({first, bags, number, split.num_items});
      const int64_t ids = begin[bags] - begin[0];
      task.num_ids += ids;
      split.num_items += ids;
      number += bags;
      first += bags;
      work += ids + bags;
      if (work >= grain) close();
    }
  }
  close();
  if (split.num_items > kMost) fail("split " + str(p) + " has more than 2^31 ids");
  split.last_task = job.tasks.size();
  job.num_items += split.num_items;
  job.num_bags += number;
}

// ---- counting

template <typename Id>
const Id* ids_of(const Job& job, const Piece& piece) {
  return job.request.ids.data<Id>() + job.starts[piece.first_bag];
}

void count_partials(const Job& job, const Piece& piece, const Cutting& cutting,
                    const int32_t* found, Task& task) {
  Counts* counts = job.counts + task.first_count;
  const int64_t* starts = job.starts + piece.first_bag;
  for (int64_t b = 0; b < piece.num_bags; ++b) {
    const auto bag = static_cast<int32_t>(piece.number + b);
    for (int64_t i = starts[b]; i < starts[b + 1]; ++i) {
      const int32_t block = found[i - starts[0]];
      if (block < 0) continue;
      Counts& own = counts[cutting[block].slot];
      const int32_t is_new = own.last_bag != bag;
      own.last_bag = bag;
      own.bags += is_new;
      own.ids += 1;
      task.num_entries += is_new;
    }
  }
}

template <typename Id>
void count_task(const Job& job, Task& task) {
  const Split& split = job.splits[task.split];
  std::fill_n(job.counts + task.first_count, split.num_slots, Counts{0, 0, -1});
  for (size_t k = task.first_piece; k < task.last_piece; ++k) {
    const Piece& piece = job.pieces[k];
    int32_t* found = job.found + split.first_item + piece.item;
    const Id* ids = ids_of<Id>(job, piece);
    task.num_bad += split.cutting.find(ids, job.num_ids(piece), job.request.policy, found);
    if (!split.is_rows) count_partials(job, piece, split.cutting, found, task);
  }
  if (split.is_rows) task.num_entries = task.num_ids;
}

template <typename Id>
[[noreturn]] void refuse(const Job& job, const Task& task) {
  const Split& split = job.splits[task.split];
  for (size_t k = task.first_piece; k < task.last_piece; ++k) {
    const Piece& piece = job.pieces[k];
    const int64_t* starts = job.starts + piece.first_bag;
    const int32_t* found = job.found + split.first_item + piece.item;
    const int32_t* bad = std::find(found, found + job.num_ids(piece), -1);
    if (bad == found + job.num_ids(piece)) continue;
    const int64_t place = bad - found;
    const int64_t* bag = std::upper_bound(starts, starts + piece.num_bags + 1, starts[0] + place);
    throw std::runtime_error("shardwise: split " + str(task.split) + ", bag " +
                             str(piece.number + (bag - starts) - 1) + ": id " +
                             str(ids_of<Id>(job, piece)[place]) + " is outside a table of " +
                             str(split.cutting.num_rows()) + " rows");
  }
  fail("a bad id was counted and not found");
}

void count_rows(const Job& job, const Task& task) {
  const Split& split = job.splits[task.split];
  Counts* counts = job.counts + task.first_count;
  const int32_t* found = job.found + split.first_item;
  const int32_t* firsts = job.firsts + split.first_item;
  const auto begin = static_cast<int32_t>(job.pieces[task.first_piece].item);
  for (int32_t i = begin; i < begin + task.num_ids; ++i) {
    counts[split.cutting[std::max(found[i], 0)].slot].ids += firsts[i] == i;
  }
}

// Runs body(ids, count, first item) over the ids of a split, in order.
template <typename Id, typename Body>
void for_ids(const Job& job, const Split& split, const Body& body) {
  if (split.first_task == split.last_task) return;
  const size_t last = job.tasks[split.last_task - 1].last_piece;
  for (size_t k = job.tasks[split.first_task].first_piece; k < last; ++k) {
    body(ids_of<Id>(job, job.pieces[k]), job.num_ids(job.pieces[k]), job.pieces[k].item);
  }
}

template <typename Id, typename Key>
void search(const Job& job, const Split& split, const Part& part) {
  const int64_t num_rows = split.cutting.num_rows();
  const BadIds policy = job.request.policy;
  int64_t own = part.count == 1 ? split.num_items : 0;
  if (part.count > 1) {
    for_ids<Id>(job, split, [&](const Id* ids, int64_t count, int64_t) {
      for (int64_t i = 0; i < count; ++i) own += part.owns(resolve(ids[i], num_rows, policy));
    });
  }
  Repeats<Key> repeats(part, num_rows, own, job.firsts + split.first_item);
  for_ids<Id>(job, split, [&](const Id* ids, int64_t count, int64_t item) {
    repeats.find(ids, count, item, policy);
  });
}

template <typename Id>
void find_repeats(const Job& job) {
  struct Search {
    const Split* split;
    Part part;
  };
  std::vector<Search> searches;
  for (const Split& split : job.splits) {
    const int64_t num_parts = split.is_rows ? Part::count_for(split.num_items) : 0;
    for (int64_t n = 0; n < num_parts; ++n) searches.push_back({&split, {n, num_parts}});
  }
  run_tasks(static_cast<int64_t>(searches.size()), job.is_small, [&](int64_t n) {
    const auto& [split, part] = searches[n];
    const bool is_wide = split->cutting.num_rows() > kMost;
    is_wide ? search<Id, int64_t>(job, *split, part) : search<Id, int32_t>(job, *split, part);
  });
}

template <typename Id>
void count(Job& job) {
  const auto num_tasks = static_cast<int64_t>(job.tasks.size());
  run_tasks(num_tasks, job.is_small, [&](int64_t t) { count_task<Id>(job, job.tasks[t]); });
  for (const Task& task : job.tasks) {
    if (task.num_bad > 0 && job.request.policy == BadIds::kRaise) refuse<Id>(job, task);
  }
  find_repeats<Id>(job);
  run_tasks(num_tasks, job.is_small, [&](int64_t t) {
    if (job.splits[job.tasks[t].split].is_rows) count_rows(job, job.tasks[t]);
  });
}

// ---- placing

void assign_channels(const Job& job) {
  const int64_t num_channels = job.request.num_channels();
  std::fill_n(job.channels, num_channels, Channel{});
  for (const Split& split : job.splits) {
    const int64_t* numbers = job.request.channels.data<int64_t>() + split.first_slot;
    for (int64_t s = 0; s < split.num_slots; ++s) {
      if (numbers[s] < 0 || numbers[s] >= num_channels) fail("no channel " + str(numbers[s]));
      Channel& channel = job.channels[numbers[s]];
      if (channel.is_used) fail("two slots share channel " + str(numbers[s]));
      channel.is_used = true;
      channel.is_rows = split.is_rows;
    }
  }
}

// Turns each task's counts into those of the tasks before it in its split.
void add_up(Job& job) {
  for (Task& task : job.tasks) {
    const Split& split = job.splits[task.split];
    for (int64_t s = 0; s < split.num_slots; ++s) {
      Channel& channel = job.channel(split, s);
      Counts& counts = job.counts[task.first_count + s];
      const Counts own = counts;
      counts = {channel.num_bags, channel.num_ids, 0};
      channel.num_bags += own.bags;
      channel.num_ids += own.ids;
    }
    task.first_entry = job.num_entries;
    job.num_entries += task.num_entries;
  }
}

// Places the channels of one rank from the byte `start` on; gives where the message to it ends.
int64_t place_rank(Channel* begin, Channel* end, const Request& request, int64_t start,
                   int64_t& origin) {
  const int64_t first_origin = origin;
  int64_t lengths = 0;
  for (Channel* channel = begin; channel < end; ++channel) {
    channel->ids = start;
    start += channel->num_ids * request.id_bytes();
    channel->origins = origin;
    if (request.is_weighted && !channel->is_rows) origin += channel->num_ids;
    const bool has_lengths = !channel->is_rows && channel->num_bags != channel->num_ids;
    channel->lengths = has_lengths ? lengths : -1;
    lengths += has_lengths ? channel->num_bags * 4 : 0;
  }
  const int64_t weights_start = start + lengths;
  for (Channel* channel = begin; channel < end; ++channel) {
    if (channel->lengths >= 0) channel->lengths += start;
    channel->weights = weights_start + (channel->origins - first_origin) * 4;
  }
  return (weights_start + (origin - first_origin) * 4 + 7) / 8 * 8;
}

Tensor make(const std::vector<int64_t>& sizes) {
  return Tensor::empty(sizes, aoti_torch_dtype_int64());
}

struct Results {
  Tensor sizes, counts, bad_counts;
  int64_t bytes = 0, origins = 0;
};

Results place_all(Job& job) {
  const Request& request = job.request;
  thread_local Scratch scratch;
  job.channels = scratch.take<Channel>(request.num_channels());
  assign_channels(job);
  add_up(job);
  Results results{make({request.num_ranks()}), make({request.num_channels(), 2}),
                  make({static_cast<int64_t>(job.splits.size())})};
  const int64_t* first = request.first_channel.data<int64_t>();
  for (int64_t q = 0; q < request.num_ranks(); ++q) {
    const int64_t end = place_rank(job.channels + first[q], job.channels + first[q + 1], request,
                                   results.bytes, results.origins);
    results.sizes.mutable_data<int64_t>()[q] = end - results.bytes;
    results.bytes = end;
  }
  int64_t* counts = results.counts.mutable_data<int64_t>();
  for (int64_t c = 0; c < request.num_channels(); ++c) {
    counts[2 * c] = job.channels[c].num_bags;
    counts[2 * c + 1] = job.channels[c].num_ids;
  }
  int64_t* bad = results.bad_counts.mutable_data<int64_t>();
  std::fill_n(bad, job.splits.size(), 0);
  for (const Task& task : job.tasks) bad[task.split] += task.num_bad;
  return results;
}

// ---- writing

template <typename Out>
Cursor<Out>* set_cursors(const Job& job, const Task& task, Scratch& scratch) {
  const Split& split = job.splits[task.split];
  auto* cursors = scratch.take<Cursor<Out>>(split.num_slots);
  for (int64_t s = 0; s < split.num_slots; ++s) {
    const Channel& channel = job.channel(split, s);
    const Counts& before = job.counts[task.first_count + s];
    auto* lengths = reinterpret_cast<int32_t*>(job.message + channel.lengths);
    cursors[s] = {reinterpret_cast<Out*>(job.message + channel.ids) + before.ids,
                  channel.lengths < 0 ? nullptr : lengths,
                  reinterpret_cast<float*>(job.message + channel.weights) + before.ids,
                  job.origins + channel.origins + before.ids,
                  split.is_rows ? before.ids : before.bags,
                  0};
  }
  return cursors;
}

// The slots that a bag touches, to be visited in order.
struct FewSlots {  // up to 64
  static constexpr int64_t kMostSlots = 64;
  uint64_t mask = 0;

  explicit FewSlots(int64_t) {}
  void add(int64_t slot, bool) { mask |= uint64_t{1} << slot; }
  template <typename Body>
  void visit(const Body& body) {
    for (; mask != 0; mask &= mask - 1) body(std::countr_zero(mask));
  }
};
struct ManySlots {
  std::vector<int32_t> touched;

  explicit ManySlots(int64_t num_slots) { touched.reserve(num_slots); }
  void add(int64_t slot, bool is_new) {
    if (is_new) touched.push_back(static_cast<int32_t>(slot));
  }
  template <typename Body>
  void visit(const Body& body) {
    if (touched.size() > 1) std::sort(touched.begin(), touched.end());
    for (const int32_t slot : touched) body(slot);
    touched.clear();
  }
};

template <typename Id, typename Out, bool kIsWeighted, typename Slots>
void write_partials(const Job& job, const Task& task, Cursor<Out>* cursors) {
  const Split& split = job.splits[task.split];
  Entry* entry = job.entries + task.first_entry;
  const float* weights = kIsWeighted ? job.request.weights.data<float>() : nullptr;
  Slots slots(split.num_slots);
  for (size_t k = task.first_piece; k < task.last_piece; ++k) {
    const Piece& piece = job.pieces[k];
    const int64_t* starts = job.starts + piece.first_bag;
    const Id* ids = job.request.ids.data<Id>();
    const int32_t* found = job.found + split.first_item + piece.item - starts[0];
    int64_t* ends = job.entry_ends + split.first_bag + piece.number;
    for (int64_t b = 0; b < piece.num_bags; ++b) {
      for (int64_t i = starts[b]; i < starts[b + 1]; ++i) {
        if (found[i] < 0) continue;
        const Block& block = split.cutting[found[i]];
        Cursor<Out>& cursor = cursors[block.slot];
        slots.add(block.slot, cursor.pending++ == 0);
        const int64_t row = resolve(ids[i], split.cutting.num_rows(), job.request.policy);
        *cursor.ids++ = static_cast<Out>(row - block.base);
        if constexpr (kIsWeighted) {
          *cursor.weights++ = weights[i];
          *cursor.origins++ = i;
        }
      }
      slots.visit([&](int32_t slot) {
        Cursor<Out>& cursor = cursors[slot];
        if (cursor.lengths != nullptr) cursor.lengths[cursor.position] = cursor.pending;
        cursor.pending = 0;
        *entry++ = {slot, cursor.position++};
      });
      ends[b] = entry - job.entries;
    }
  }
}

// Lists, without a branch, the numbers i in [0, count) for which test(i): whether a row repeats is
// not foreseeable. Gives how many there are.
template <typename Test>
int64_t list(int64_t count, int32_t* numbers, const Test& test) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    numbers[size] = static_cast<int32_t>(i);
    size += test(i);
  }
  return size;
}

// Writes the rows that occur first in this task, and their entries.
template <typename Id, typename Out>
void write_rows(const Job& job, const Task& task, Cursor<Out>* cursors) {
  const Split& split = job.splits[task.split];
  Entry* entry = job.entries + task.first_entry;
  thread_local Scratch scratch;
  auto* news = scratch.take<int32_t>(task.num_ids + 1);
  for (size_t k = task.first_piece; k < task.last_piece; ++k) {
    const Piece& piece = job.pieces[k];
    const int64_t* starts = job.starts + piece.first_bag;
    const Id* ids = ids_of<Id>(job, piece);
    const int32_t* found = job.found + split.first_item + piece.item;
    const int32_t* firsts = job.firsts + split.first_item + piece.item;
    const int64_t count = job.num_ids(piece);
    const int64_t num_news =
        list(count, news, [&](int64_t i) { return firsts[i] == piece.item + i; });
    for (int64_t n = 0; n < num_news; ++n) {
      const int32_t i = news[n];
      const Block& block = split.cutting[found[i]];
      Cursor<Out>& cursor = cursors[block.slot];
      const int64_t row = resolve(ids[i], split.cutting.num_rows(), job.request.policy);
      *cursor.ids++ = static_cast<Out>(row - block.base);
      entry[i] = {static_cast<int32_t>(block.slot), cursor.position++};
    }
    entry += count;
    int64_t* ends = job.entry_ends + split.first_bag + piece.number;
    for (int64_t b = 0; b < piece.num_bags; ++b) {
      ends[b] = (entry - job.entries) - (starts[piece.num_bags] - starts[b + 1]);
    }
  }
}

// Gives each repeat in the task the entry of the first id of the same row.
void copy_entries(const Job& job, const Task& task) {
  const Split& split = job.splits[task.split];
  Entry* entries = job.entries + job.tasks[split.first_task].first_entry;
  const int64_t begin = job.pieces[task.first_piece].item;
  const int32_t* firsts = job.firsts + split.first_item;
  thread_local Scratch scratch;
  auto* repeats = scratch.take<int32_t>(task.num_ids + 1);
  const int64_t num_repeats = list(task.num_ids, repeats, [&](int64_t i) {
    return firsts[begin + i] != begin + i;
  });
  for (int64_t n = 0; n < num_repeats; ++n) {
    const int32_t first = firsts[begin + repeats[n]];
    entries[begin + repeats[n]] = first < 0 ? Entry{-1, 0} : entries[first];
  }
}

template <typename Id, typename Out>
void write(const Job& job) {
  const auto num_tasks = static_cast<int64_t>(job.tasks.size());
  run_tasks(num_tasks, job.is_small, [&](int64_t t) {
    thread_local Scratch scratch;
    const Task& task = job.tasks[t];
    const Split& split = job.splits[task.split];
    Cursor<Out>* cursors = set_cursors<Out>(job, task, scratch);
    const bool is_weighted = job.request.is_weighted;
    if (split.is_rows) {
      write_rows<Id>(job, task, cursors);
    } else if (split.num_slots <= FewSlots::kMostSlots) {
      is_weighted ? write_partials<Id, Out, true, FewSlots>(job, task, cursors)
                  : write_partials<Id, Out, false, FewSlots>(job, task, cursors);
    } else {
      is_weighted ? write_partials<Id, Out, true, ManySlots>(job, task, cursors)
                  : write_partials<Id, Out, false, ManySlots>(job, task, cursors);
    }
  });
  run_tasks(num_tasks, job.is_small, [&](int64_t t) {
    if (job.splits[job.tasks[t].split].is_rows) copy_entries(job, job.tasks[t]);
  });
}

// Zeroes the last bytes to each rank, of which some may be left over.
void pad(const Job& job, const Results& results) {
  const int64_t* sizes = results.sizes.data<int64_t>();
  int64_t end = 0;
  for (int64_t q = 0; q < job.request.num_ranks(); ++q) {
    end += sizes[q];
    if (sizes[q] > 0) std::memset(job.message + end - 4, 0, 4);
  }
}

template <typename Id>
void write_ids(const Job& job) {
  job.request.is_wide ? write<Id, int64_t>(job) : write<Id, int32_t>(job);
}

}  // namespace

void route(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Request request(arguments);
  check(request);
  const int64_t num_inputs = request.bags.dim() == 2 ? request.bags.size(0) : 0;
  const Inputs inputs(request.offsets, request.bags, request.ids.numel(), num_inputs);
  Job job{request, inputs.offsets(), read_splits(request, inputs), {}, {}};
  for (size_t p = 0; p < job.splits.size(); ++p) cut_tasks(job, inputs, static_cast<int64_t>(p));
  job.is_small = job.num_items + job.num_bags < kSmallWork;
  thread_local Scratch scratch[3];
  job.counts = scratch[0].take<Counts>(job.num_counts);
  job.found = scratch[1].take<int32_t>(job.num_items);
  job.firsts = scratch[2].take<int32_t>(job.num_items);
  const bool is_long = request.ids.dtype() == DType::kInt64;
  is_long ? count<int64_t>(job) : count<int32_t>(job);

  Results results = place_all(job);
  Tensor message = Tensor::empty({results.bytes}, aoti_torch_dtype_uint8());
  Tensor entries = Tensor::empty({job.num_entries, 2}, aoti_torch_dtype_int32());
  Tensor entry_offsets = make({job.num_bags + 1}), origins = make({results.origins});
  job.message = message.mutable_data<char>();
  job.entries = reinterpret_cast<Entry*>(entries.mutable_data<int32_t>());
  job.origins = origins.mutable_data<int64_t>();
  entry_offsets.mutable_data<int64_t>()[0] = 0;
  job.entry_ends = entry_offsets.mutable_data<int64_t>() + 1;
  pad(job, results);
  is_long ? write_ids<int64_t>(job) : write_ids<int32_t>(job);

  arguments.give(std::move(message));
  arguments.give(std::move(results.sizes));
  arguments.give(std::move(results.counts));
  arguments.give(std::move(entries));
  arguments.give(std::move(entry_offsets));
  arguments.give(std::move(origins));
  arguments.give(std::move(results.bad_counts));
}

}  // namespace shardwise::cpu
