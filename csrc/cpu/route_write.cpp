// The second half of `route`: messages, entries and origins.
#include <algorithm>
#include <bit>
#include <vector>

#include "routing.h"
#include "scratch.h"
#include "tasks.h"

namespace shardwise::cpu::routing {
namespace {

// Where a task writes next for one slot.
template <typename Out>
struct Cursor {
  Out* ids;
  int32_t* lengths;  // null: not sent
  float* weights;    // of weighted partials
  int64_t* origins;  // of weighted partials
  int32_t position;
  int32_t pending;  // ids of the present bag
};

template <typename Out>
Cursor<Out>* set_cursors(const Job& job, const Task& task, Scratch& scratch) {
  const Split& split = job.splits[task.split];
  auto* cursors = scratch.take<Cursor<Out>>(split.num_slots);
  for (int64_t s = 0; s < split.num_slots; ++s) {
    const Channel& channel = job.channel(split, s);
    const Counts& before = job.counts[task.first_count + s];
    Cursor<Out>& cursor = cursors[s];
    cursor = {reinterpret_cast<Out*>(job.message + channel.ids) + before.ids, nullptr, nullptr,
              nullptr, split.is_rows ? before.ids : before.bags, 0};
    if (channel.lengths >= 0) {
      cursor.lengths = reinterpret_cast<int32_t*>(job.message + channel.lengths);
    }
    if (job.request.is_weighted && !split.is_rows) {
      cursor.weights = reinterpret_cast<float*>(job.message + channel.weights) + before.ids;
      cursor.origins = job.origins + channel.origins + before.ids;
    }
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
void write_all(const Job& job) {
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

template <typename Id>
void write_ids(const Job& job) {
  job.request.is_wide ? write_all<Id, int64_t>(job) : write_all<Id, int32_t>(job);
}

}  // namespace

void write(const Job& job) {
  job.request.ids.dtype() == DType::kInt64 ? write_ids<int64_t>(job) : write_ids<int32_t>(job);
}

}  // namespace shardwise::cpu::routing
