// Group the ids of a call by the row they touch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "call.h"

namespace shardwise::cpu {

// Ascending rows, or first those that occur once as they come: nothing sorts them, and memory reads
// and writes random rows faster than ascending ones, which lie in few of its banks.
enum class Order { kAscending, kAny };

// The distinct rows of one table, each with the gradient rows that it sums, in the order
// [feature][source][bag]. `first_row` counts the distinct rows of the tables before it.
struct TouchedRows {
  RowRun run;
  int64_t first_row;

  int64_t count() const { return run.last; }
};

// Reads no more than ids, and throws for a bad id before anything could be written. What the runs
// point to lives until the calling thread calls this again.
std::vector<TouchedRows> group_rows(const Call& call, const std::vector<TableView>& tables,
                                    const float* grad, int64_t grad_numel,
                                    Order order = Order::kAscending);

// Runs body(touched, run), on torch's threads, for pieces of about equal work that together cover
// all rows, each row in one piece.
void for_each_piece(const std::vector<TouchedRows>& touched,
                    const std::function<void(const TouchedRows&, const RowRun&)>& body);

}  // namespace shardwise::cpu
