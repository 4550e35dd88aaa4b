// Group the ids of a call by the row they touch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "call.h"

namespace shardwise::cpu {

// The distinct rows of one table in ascending order, each with the gradient rows that it sums, in
// the order [feature][source][bag]. `first_row` counts the distinct rows of the tables before it.
struct TouchedRows {
  RowRun run;
  int64_t first_row;

  int64_t count() const { return run.last; }
};

// Reads no more than ids, and throws for a bad id before anything could be written. What the runs
// point to lives until the calling thread calls this again.
std::vector<TouchedRows> group_rows(const Call& call, const std::vector<TableView>& tables,
                                    const float* grad, int64_t grad_numel);

using PieceBody = std::function<void(int64_t table, const RowRun&)>;

// Runs the body, on torch's threads, for pieces of about equal work that together cover all rows,
// each row in one piece.
void for_each_piece(const std::vector<TouchedRows>& touched, const PieceBody& body);

// The same, each table grouped just before its pieces. Rows that occur once come first, in the
// order of their ids: nothing sorts them, and memory reads and writes random rows faster than
// ascending ones, which lie in few of its banks. Throws for a bad id before the body runs.
void for_each_piece(const Call& call, const std::vector<TableView>& tables, const float* grad,
                    int64_t grad_numel, const PieceBody& body);

}  // namespace shardwise::cpu
