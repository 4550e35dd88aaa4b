#include "rows.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <memory>

#include "scratch.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kSmallWork = 2048;   // ids below which waking threads costs more than it saves
constexpr int64_t kPieceItems = 1024;  // gradient rows per task
constexpr int64_t kFewItems = 256;     // of a table, that are sorted sooner than looked through
constexpr int64_t kMarks = 16;         // marks per item, to tell rows that occur once

template <typename Key>
struct Pair {
  Key row;
  uint32_t item;
};

// Sorts by row, keeping the order of equal rows. Gives where the result lies: `a` or `b`.
template <typename Key>
Pair<Key>* radix_sort(Pair<Key>* a, Pair<Key>* b, int64_t count, int64_t num_rows) {
  constexpr int kDigit = 11;
  constexpr int kShort = 64;
  if (count <= kShort) {  // insertion sort: the histograms would cost more
    for (int64_t i = 1; i < count; ++i) {
      const Pair<Key> pair = a[i];
      int64_t j = i;
      for (; j > 0 && a[j - 1].row > pair.row; --j) a[j] = a[j - 1];
      a[j] = pair;
    }
    return a;
  }
  const int bits = std::bit_width(static_cast<uint64_t>(num_rows - 1));
  for (int shift = 0; shift < bits; shift += kDigit) {
    uint32_t starts[(1 << kDigit) + 1] = {};
    constexpr Key kMask = (1 << kDigit) - 1;
    for (int64_t i = 0; i < count; ++i) ++starts[((a[i].row >> shift) & kMask) + 1];
    for (int d = 0; d < (1 << kDigit); ++d) starts[d + 1] += starts[d];
    for (int64_t i = 0; i < count; ++i) b[starts[(a[i].row >> shift) & kMask]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

// Memory of one call, kept by its thread. Each table uses the part from its first item on.
struct Arrays {
  int64_t* rows;     // distinct rows
  int64_t* starts;   // one more than rows, so tables are one apart
  uint32_t* items;
  int64_t* where;
  float* scale;
};

struct Plan {
  TableView table;
  std::vector<const Group*> groups;  // in the order [feature][source]
  int64_t first_item = 0;
  int64_t num_items = 0;
  bool is_scaled = false;
};

std::vector<Plan> plan_tables(const Call& call, const std::vector<TableView>& tables) {
  std::vector<Plan> plans(tables.size());
  for (size_t t = 0; t < tables.size(); ++t) plans[t].table = tables[t];
  const int64_t features = call.num_features();
  const int64_t count = static_cast<int64_t>(call.groups().size());
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t g = f; g < count; g += features) {
      const Group& group = call.groups()[g];
      if (group.table < 0) continue;
      Plan& plan = plans[group.table];
      plan.groups.push_back(&group);
      plan.num_items += group.num_ids;
      plan.is_scaled |= call.ids().weights != nullptr || group.pooling == Pooling::kMean;
    }
  }
  int64_t item = 0;
  for (Plan& plan : plans) {
    plan.first_item = item;
    item += plan.num_items;
  }
  return plans;
}

struct Fault {
  const Group* group = nullptr;
  int64_t position = 0;
};

// Lists (row, item) of all ids of a table. Gives how many there are, fewer where ids are ignored.
template <typename Key>
int64_t list_items(const Call& call, const Plan& plan, bool is_direct, const Arrays& arrays,
                   Pair<Key>* pairs, Fault* fault) {
  const Ids ids = call.ids();
  int64_t* where = arrays.where + plan.first_item;
  float* scale = arrays.scale + plan.first_item;
  int64_t count = 0;
  for (const Group* group : plan.groups) {
    const bool is_pooled = group->pooling != Pooling::kNone;
    const int64_t num_blocks = is_pooled ? group->num_bags : 1;
    for (int64_t bag = 0; bag < num_blocks; ++bag) {
      const int64_t* bounds = ids.offsets + group->first_bag + bag;
      const int64_t begin = is_pooled ? bounds[0] : group->first_id;
      const int64_t end = is_pooled ? bounds[1] : group->first_id + group->num_ids;
      const float divisor = group->pooling == Pooling::kMean ? static_cast<float>(end - begin) : 1;
      int64_t out = group->out + bag * group->stride;
      const int64_t step = is_pooled ? 0 : group->stride;
      for (int64_t i = begin; i < end; ++i, out += step) {
        const int64_t row = resolve(ids[i], plan.table.rows, ids.bad_ids);
        if (row < 0) {
          if (ids.bad_ids != BadIds::kRaise) continue;
          *fault = {group, i};
          return 0;
        }
        pairs[count] = {static_cast<Key>(row), static_cast<uint32_t>(is_direct ? out : count)};
        if (!is_direct) where[count] = out;
        if (plan.is_scaled) {
          scale[count] = (ids.weights == nullptr ? 1.0f : ids.weights[i]) / divisor;
        }
        ++count;
      }
    }
  }
  return count;
}

// Distinct rows and the items of each, written one after the other.
struct RowList {
  int64_t* rows;
  int64_t* starts;
  uint32_t* items;
  int64_t num_rows = 0, num_items = 0;

  template <typename Key>
  void add_sorted(const Pair<Key>* pairs, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || pairs[i].row != pairs[i - 1].row) {
        rows[num_rows] = static_cast<int64_t>(pairs[i].row);
        starts[num_rows++] = num_items;
      }
      items[num_items++] = pairs[i].item;
    }
    starts[num_rows] = num_items;
  }

  // Takes the pairs of rows that occur once, in the order they come; leaves the others in front.
  // Rows share a mark where there are too many of them, and are then left though they occur once.
  template <typename Key>
  int64_t take_singles(Pair<Key>* pairs, int64_t count, int64_t table_rows) {
    struct Marks {
      uint64_t seen, again;
    };
    thread_local Scratch scratch;
    const int bits = std::max<int>(6, std::bit_width(static_cast<uint64_t>(kMarks * count)));
    const bool is_own = table_rows <= int64_t{1} << bits;
    const int64_t num_marks = is_own ? (table_rows + 63) / 64 : int64_t{1} << (bits - 6);
    Marks* marks = scratch.take<Marks>(num_marks);
    std::fill_n(marks, num_marks, Marks{});
    const uint64_t multiplier = is_own ? 1 : 0x9e3779b97f4a7c15;  // Fibonacci hashing
    const int shift = is_own ? 0 : 64 - bits;
    const auto slot = [&](Key row) { return (row * multiplier) >> shift; };
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t at = slot(pairs[i].row), bit = uint64_t{1} << (at % 64);
      Marks& mark = marks[at / 64];
      mark.again |= mark.seen & bit;
      mark.seen |= bit;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Pair<Key> pair = pairs[i];
      const uint64_t at = slot(pair.row);
      const int64_t is_again = marks[at / 64].again >> (at % 64) & 1;
      rows[num_rows] = static_cast<int64_t>(pair.row);
      items[num_rows] = pair.item;
      starts[num_rows] = num_rows;
      pairs[left] = pair;
      left += is_again;
      num_rows += 1 - is_again;
    }
    num_items = num_rows;
    return left;
  }
};

template <typename Key>
RowRun group_table(const Call& call, const Plan& plan, int64_t table, Order order, bool is_direct,
                   const Arrays& arrays, const float* grad, Fault* fault) {
  thread_local Scratch scratch;  // of a table only, so that it stays in the cache
  auto* pairs = scratch.take<Pair<Key>>(2 * plan.num_items + 1);
  is_direct &= !plan.is_scaled;
  int64_t count = list_items(call, plan, is_direct, arrays, pairs, fault);
  RowList list{arrays.rows + plan.first_item, arrays.starts + plan.first_item + table,
               arrays.items + plan.first_item};
  if (order == Order::kAny && count >= kFewItems && plan.table.rows >= count) {
    count = list.take_singles(pairs, count, plan.table.rows);
  }
  pairs = radix_sort(pairs, pairs + plan.num_items, count, plan.table.rows);
  list.add_sorted(pairs, count);
  RowRun run{};
  run.table = plan.table;
  run.last = list.num_rows;
  run.rows = list.rows;
  run.starts = list.starts;
  run.items = list.items;
  run.grad = grad;
  run.where = is_direct ? nullptr : arrays.where + plan.first_item;
  run.scale = plan.is_scaled ? arrays.scale + plan.first_item : nullptr;
  return run;
}

}  // namespace

std::vector<TouchedRows> group_rows(const Call& call, const std::vector<TableView>& tables,
                                    const float* grad, int64_t grad_numel, Order order) {
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  const std::vector<Plan> plans = plan_tables(call, tables);
  int64_t num_items = 0, most_rows = 0;
  for (const Plan& plan : plans) {
    num_items += plan.num_items;
    most_rows = std::max(most_rows, plan.table.rows);
    if (plan.num_items > kMost) {
      throw std::runtime_error("shardwise: more than 2^32 ids of one table in one call");
    }
  }
  const bool is_wide = most_rows > kMost;
  thread_local Scratch scratch[5];
  const Arrays arrays = {scratch[0].take<int64_t>(num_items + 1),
                         scratch[1].take<int64_t>(num_items + plans.size() + 1),
                         scratch[2].take<uint32_t>(num_items + 1),
                         scratch[3].take<int64_t>(num_items + 1),
                         scratch[4].take<float>(num_items + 1)};
  std::vector<TouchedRows> touched(plans.size());
  std::vector<Fault> faults(plans.size());
  const bool is_direct = grad_numel <= kMost;
  run_tasks(static_cast<int64_t>(plans.size()), num_items < kSmallWork, [&](int64_t t) {
    const auto group = is_wide ? group_table<uint64_t> : group_table<uint32_t>;
    touched[t].run = group(call, plans[t], t, order, is_direct, arrays, grad, &faults[t]);
  });
  for (const Fault& fault : faults) {
    if (fault.group != nullptr) throw_bad_id(call, tables, *fault.group, fault.position);
  }
  int64_t row = 0;
  for (TouchedRows& table : touched) {
    table.first_row = row;
    row += table.count();
  }
  return touched;
}

void for_each_piece(const std::vector<TouchedRows>& touched,
                    const std::function<void(const TouchedRows&, const RowRun&)>& body) {
  struct Piece {
    const TouchedRows* table;
    int64_t first, last;
  };
  std::vector<Piece> pieces;
  int64_t num_items = 0;
  for (const TouchedRows& table : touched) {
    const int64_t* starts = table.run.starts;
    num_items += starts[table.count()];
    for (int64_t first = 0; first < table.count();) {
      const int64_t* bound = std::upper_bound(starts + first, starts + table.count() + 1,
                                              starts[first] + kPieceItems);
      const int64_t last = std::clamp<int64_t>(bound - starts - 1, first + 1, table.count());
      pieces.push_back({&table, first, last});
      first = last;
    }
  }
  run_tasks(static_cast<int64_t>(pieces.size()), num_items < kSmallWork, [&](int64_t i) {
    RowRun run = pieces[i].table->run;
    run.first = pieces[i].first;
    run.last = pieces[i].last;
    body(*pieces[i].table, run);
  });
}

}  // namespace shardwise::cpu
