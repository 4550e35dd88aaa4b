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
constexpr int64_t kPieceItems = 4096;  // gradient rows per task
constexpr int64_t kFewItems = 256;     // of a table, that are sorted sooner than looked through
constexpr int64_t kMarks = 16;         // marks per item, to tell rows that occur once

enum class Order { kAscending, kAny };

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

// Whether all are rows. A negative number, and one of `rows` or more, sets the sign.
template <typename Id>
bool are_rows(const Id* ids, int64_t count, int64_t rows) {
  int64_t signs = 0;
  for (int64_t i = 0; i < count; ++i) signs |= ids[i] | (rows - 1 - ids[i]);
  return signs >= 0;
}

bool is_good(const Ids& ids, const Group& group, int64_t rows) {
  if (!ids.is_long) {
    return are_rows(static_cast<const int32_t*>(ids.data) + group.first_id, group.num_ids, rows);
  }
  return are_rows(static_cast<const int64_t*>(ids.data) + group.first_id, group.num_ids, rows);
}

void check_ids(const Call& call, const std::vector<TableView>& tables) {
  const Ids ids = call.ids();
  const std::vector<Group>& groups = call.groups();
  std::vector<char> is_bad(groups.size());
  run_tasks(static_cast<int64_t>(groups.size()), call.num_ids() < kSmallWork, [&](int64_t g) {
    const int64_t table = groups[g].table;
    is_bad[g] = table >= 0 && !is_good(ids, groups[g], tables[table].rows);
  });
  for (size_t g = 0; g < groups.size(); ++g) {
    if (!is_bad[g]) continue;
    int64_t i = groups[g].first_id;
    while (resolve(ids[i], tables[groups[g].table].rows, BadIds::kRaise) >= 0) ++i;
    throw_bad_id(call, tables, groups[g], i);
  }
}

// Tells rows that occur once from others, in two bits per row; rows share them where there are too
// many, and are then taken to be others.
class Marks {
 public:
  Marks(int64_t num_items, int64_t num_rows) {
    thread_local Scratch scratch;
    const int bits = std::max<int>(6, std::bit_width(static_cast<uint64_t>(kMarks * num_items)));
    const bool is_own = num_rows <= int64_t{1} << bits;
    const int64_t size = is_own ? (num_rows + 63) / 64 : int64_t{1} << (bits - 6);
    if (!is_own) multiplier_ = 0x9e3779b97f4a7c15, shift_ = 64 - bits;  // Fibonacci hashing
    marks_ = scratch.take<Mark>(size);
    std::fill_n(marks_, size, Mark{});
  }
  void see(uint64_t row) {
    const uint64_t at = place(row), bit = uint64_t{1} << (at % 64);
    Mark& mark = marks_[at / 64];
    mark.again |= mark.seen & bit;
    mark.seen |= bit;
  }
  int64_t is_again(uint64_t row) const {
    const uint64_t at = place(row);
    return marks_[at / 64].again >> (at % 64) & 1;
  }

 private:
  struct Mark {
    uint64_t seen, again;
  };
  uint64_t place(uint64_t row) const { return (row * multiplier_) >> shift_; }

  Mark* marks_;
  uint64_t multiplier_ = 1;
  int shift_ = 0;
};

// Lists (row, item) of all ids of a table, and shows `see` each row. Gives how many there are,
// fewer where ids are ignored.
template <bool kIsDirect, typename Id, typename Key, typename See>
int64_t list_items(const Call& call, const Plan& plan, const Arrays& arrays, Pair<Key>* pairs,
                   See see) {
  const Ids ids = call.ids();
  const auto* numbers = static_cast<const Id*>(ids.data);
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
        const int64_t row = resolve(numbers[i], plan.table.rows, ids.bad_ids);
        if (row < 0) continue;
        see(static_cast<uint64_t>(row));
        pairs[count] = {static_cast<Key>(row), static_cast<uint32_t>(kIsDirect ? out : count)};
        if constexpr (!kIsDirect) {
          where[count] = out;
          scale[count] = (ids.weights == nullptr ? 1.0f : ids.weights[i]) / divisor;
        }
        ++count;
      }
    }
  }
  return count;
}

template <typename Key, typename See>
int64_t list_items(const Call& call, const Plan& plan, bool is_direct, const Arrays& arrays,
                   Pair<Key>* pairs, See see) {
  const bool is_long = call.ids().is_long;
  const auto list = is_direct ? (is_long ? list_items<true, int64_t, Key, See>
                                         : list_items<true, int32_t, Key, See>)
                              : (is_long ? list_items<false, int64_t, Key, See>
                                         : list_items<false, int32_t, Key, See>);
  return list(call, plan, arrays, pairs, see);
}

// Distinct rows and the items of each, written one after the other.
struct RowList {
  int64_t* rows;
  int64_t* starts;
  uint32_t* items;
  int64_t num_rows = 0, num_items = 0, num_singles = 0;

  // Takes the pairs of rows that occur once, in the order they come; leaves the others in front.
  template <typename Key>
  int64_t take_singles(Pair<Key>* pairs, int64_t count, const Marks& marks) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Pair<Key> pair = pairs[i];
      const int64_t is_again = marks.is_again(pair.row);
      rows[num_rows] = static_cast<int64_t>(pair.row);
      items[num_rows] = pair.item;
      pairs[left] = pair;
      left += is_again;
      num_rows += 1 - is_again;
    }
    num_items = num_singles = num_rows;
    return left;
  }

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
};

// The ids of a call, to be grouped table by table. Memory is that of the calling thread.
class Grouping {
 public:
  Grouping(const Call& call, const std::vector<TableView>& tables, const float* grad,
           int64_t grad_numel, Order order)
      : call_(call), plans_(plan_tables(call, tables)), grad_(grad), order_(order) {
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    for (const Plan& plan : plans_) {
      num_items_ += plan.num_items;
      is_wide_ |= plan.table.rows > kMost;
      if (plan.num_items > kMost) {
        throw std::runtime_error("shardwise: more than 2^32 ids of one table in one call");
      }
    }
    if (call.ids().bad_ids == BadIds::kRaise) check_ids(call, tables);
    is_direct_ = grad_numel <= kMost;
    thread_local Scratch scratch[5];
    arrays_ = {scratch[0].take<int64_t>(num_items_ + 1),
               scratch[1].take<int64_t>(num_items_ + plans_.size() + 1),
               scratch[2].take<uint32_t>(num_items_ + 1),
               scratch[3].take<int64_t>(num_items_ + 1),
               scratch[4].take<float>(num_items_ + 1)};
  }

  int64_t num_tables() const { return static_cast<int64_t>(plans_.size()); }
  bool is_small() const { return num_items_ < kSmallWork; }
  // May run at once for different tables.
  RowRun group(int64_t table) const {
    return is_wide_ ? group_as<uint64_t>(table) : group_as<uint32_t>(table);
  }

 private:
  template <typename Key>
  RowRun group_as(int64_t table) const;

  const Call& call_;
  std::vector<Plan> plans_;
  const float* grad_;
  Order order_;
  int64_t num_items_ = 0;
  bool is_wide_ = false, is_direct_;
  Arrays arrays_;
};

template <typename Key>
RowRun Grouping::group_as(int64_t table) const {
  const Plan& plan = plans_[table];
  const bool is_direct = is_direct_ && !plan.is_scaled;
  thread_local Scratch scratch;  // of a table only, so that it stays in the cache
  auto* pairs = scratch.take<Pair<Key>>(2 * plan.num_items + 1);
  RowList list{arrays_.rows + plan.first_item, arrays_.starts + plan.first_item + table,
               arrays_.items + plan.first_item};
  int64_t count;
  if (order_ == Order::kAny && plan.num_items >= kFewItems && plan.table.rows >= plan.num_items) {
    Marks marks(plan.num_items, plan.table.rows);
    const auto see = [&](uint64_t row) { marks.see(row); };
    count = list_items(call_, plan, is_direct, arrays_, pairs, see);
    count = list.take_singles(pairs, count, marks);
  } else {
    count = list_items(call_, plan, is_direct, arrays_, pairs, [](uint64_t) {});
  }
  pairs = radix_sort(pairs, pairs + plan.num_items, count, plan.table.rows);
  list.add_sorted(pairs, count);
  RowRun run{};
  run.table = plan.table;
  run.last = list.num_rows;
  run.rows = list.rows;
  run.num_singles = list.num_singles;
  run.starts = list.starts;
  run.items = list.items;
  run.grad = grad_;
  run.where = is_direct ? nullptr : arrays_.where + plan.first_item;
  run.scale = plan.is_scaled ? arrays_.scale + plan.first_item : nullptr;
  return run;
}

// Cuts the rows of a table into runs of about equal work.
std::vector<RowRun> cut(const RowRun& all) {
  std::vector<RowRun> pieces;
  for (int64_t first = 0; first < all.last;) {
    RowRun piece = all;
    piece.first = first;
    if (first < all.num_singles) {
      piece.last = std::min(first + kPieceItems, all.num_singles);
    } else {
      const int64_t* end = all.starts + all.last + 1;
      const int64_t* bound =
          std::upper_bound(all.starts + first, end, all.first_item(first) + kPieceItems);
      piece.last = std::clamp<int64_t>(bound - all.starts - 1, first + 1, all.last);
    }
    first = piece.last;
    pieces.push_back(piece);
  }
  return pieces;
}

}  // namespace

std::vector<TouchedRows> group_rows(const Call& call, const std::vector<TableView>& tables,
                                    const float* grad, int64_t grad_numel) {
  const Grouping grouping(call, tables, grad, grad_numel, Order::kAscending);
  std::vector<TouchedRows> touched(tables.size());
  run_tasks(grouping.num_tables(), grouping.is_small(),
            [&](int64_t t) { touched[t].run = grouping.group(t); });
  int64_t row = 0;
  for (TouchedRows& table : touched) {
    table.first_row = row;
    row += table.count();
  }
  return touched;
}

void for_each_piece(const std::vector<TouchedRows>& touched, const PieceBody& body) {
  struct Piece {
    int64_t table;
    RowRun run;
  };
  std::vector<Piece> pieces;
  int64_t num_items = 0;
  for (size_t t = 0; t < touched.size(); ++t) {
    num_items += touched[t].run.first_item(touched[t].count());
    for (const RowRun& run : cut(touched[t].run)) pieces.push_back({static_cast<int64_t>(t), run});
  }
  run_tasks(static_cast<int64_t>(pieces.size()), num_items < kSmallWork,
            [&](int64_t i) { body(pieces[i].table, pieces[i].run); });
}

void for_each_piece(const Call& call, const std::vector<TableView>& tables, const float* grad,
                    int64_t grad_numel, const PieceBody& body) {
  const Grouping grouping(call, tables, grad, grad_numel, Order::kAny);
  std::vector<std::vector<RowRun>> pieces(tables.size());
  const auto prepare = [&](int64_t t) {
    pieces[t] = cut(grouping.group(t));
    return static_cast<int64_t>(pieces[t].size());
  };
  run_prepared_tasks(grouping.num_tables(), grouping.is_small(), prepare,
                     [&](int64_t t, int64_t piece) { body(t, pieces[t][piece]); });
}

}  // namespace shardwise::cpu
