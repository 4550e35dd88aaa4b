// The first half of `route`: the block of each id, repeated rows, and what goes to each slot.
#include <algorithm>
#include <vector>

#include "repeats.h"
#include "routing.h"
#include "tasks.h"

namespace shardwise::cpu::routing {
namespace {

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
void count_ids(Job& job) {
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

}  // namespace

void count(Job& job) {
  job.request.ids.dtype() == DType::kInt64 ? count_ids<int64_t>(job) : count_ids<int32_t>(job);
}

}  // namespace shardwise::cpu::routing
