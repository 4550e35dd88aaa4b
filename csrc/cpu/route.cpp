// The operator `route`: ids to one message per rank, and what the bags are made of.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "inputs.h"
#include "kernels.h"
#include "results.h"
#include "routing.h"
#include "scratch.h"

namespace shardwise::cpu {
namespace routing {
namespace {

constexpr int64_t kTaskIds = 4096;
constexpr int64_t kSmallWork = 8192;  // ids and bags below which one thread is faster

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
  for (int64_t q = 0; is_ordered && q < request.num_ranks(); ++q) {
    is_ordered = first[q] <= first[q + 1];
  }
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

void assign_channels(const Job& job) {
  const int64_t num_channels = job.request.num_channels();
  std::fill_n(job.channels, num_channels, Channel{});
  for (const Split& split : job.splits) {
    const int64_t* numbers = job.channel_of + split.first_slot;
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
  return make_result(sizes, aoti_torch_dtype_int64());
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
  for (int64_t c = 0, count = request.num_channels(); c < count; ++c) {
    counts[2 * c] = job.channels[c].num_bags;
    counts[2 * c + 1] = job.channels[c].num_ids;
  }
  int64_t* bad = results.bad_counts.mutable_data<int64_t>();
  std::fill_n(bad, job.splits.size(), 0);
  for (const Task& task : job.tasks) bad[task.split] += task.num_bad;
  return results;
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

}  // namespace
}  // namespace routing

void route(StableIValue* stack, uint64_t, uint64_t) {
  using namespace routing;
  Arguments arguments(stack);
  const Request request(arguments);
  check(request);
  const int64_t num_inputs = request.bags.dim() == 2 ? request.bags.size(0) : 0;
  const Inputs inputs(request.offsets, request.bags, request.ids.numel(), num_inputs);
  Job job{request, inputs.offsets(), request.channels.data<int64_t>(),
          read_splits(request, inputs), {}, {}};
  for (size_t p = 0; p < job.splits.size(); ++p) cut_tasks(job, inputs, static_cast<int64_t>(p));
  job.is_small = job.num_items + job.num_bags < kSmallWork;
  thread_local Scratch scratch[3];
  job.counts = scratch[0].take<Counts>(job.num_counts);
  job.found = scratch[1].take<int32_t>(job.num_items);
  job.firsts = scratch[2].take<int32_t>(job.num_items);
  count(job);

  Results results = place_all(job);
  Tensor message = make_result({results.bytes}, aoti_torch_dtype_uint8());
  Tensor entries = make_result({job.num_entries, 2}, aoti_torch_dtype_int32());
  Tensor entry_offsets = make({job.num_bags + 1}), origins = make({results.origins});
  job.message = message.mutable_data<char>();
  job.entries = reinterpret_cast<Entry*>(entries.mutable_data<int32_t>());
  job.origins = origins.mutable_data<int64_t>();
  entry_offsets.mutable_data<int64_t>()[0] = 0;
  job.entry_ends = entry_offsets.mutable_data<int64_t>() + 1;
  pad(job, results);
  write(job);

  arguments.give(std::move(message));
  arguments.give(std::move(results.sizes));
  arguments.give(std::move(results.counts));
  arguments.give(std::move(entries));
  arguments.give(std::move(entry_offsets));
  arguments.give(std::move(origins));
  arguments.give(std::move(results.bad_counts));
}

}  // namespace shardwise::cpu
