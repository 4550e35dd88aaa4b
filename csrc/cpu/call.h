// The arguments that all lookup operators share, read, laid out and checked.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../torch_abi.h"
#include "inputs.h"
#include "isa.h"

namespace shardwise::cpu {

// One feature of one source: a run of bags, of ids, and a block of the output.
struct Group {
  int64_t feature;
  int64_t table;  // -1: left out
  Pooling pooling;
  int64_t width;
  int64_t first_bag, num_bags;  // within the offsets
  int64_t first_id, num_ids;
  int64_t out;             // first element of its block
  int64_t stride;          // elements between two rows of its block

  int64_t num_out_rows() const { return pooling == Pooling::kNone ? num_ids : num_bags; }
};

class Call {
 public:
  // Takes the shared arguments, in the order of the schemas, off the stack.
  explicit Call(Arguments& arguments);

  // Reads the layout. Throws std::runtime_error where the arguments contradict each other.
  // `rows` x `width` is the shape of the output or its gradient.
  void lay_out(const std::vector<Tensor>& tables, int64_t rows, int64_t width);

  Ids ids() const;
  const std::vector<Group>& groups() const { return groups_; }  // [source][feature]
  int64_t num_features() const { return num_features_; }
  int64_t num_ids() const { return num_ids_; }

 private:
  int64_t count_inputs() const;
  void read_groups(const std::vector<Tensor>& tables, int64_t rows, int64_t width);

  Tensor ids_, offsets_, weights_;
  bool is_weighted_;
  Tensor features_, bags_;
  bool columns_;
  BadIds bad_ids_;

  int64_t num_ids_ = 0;
  int64_t num_features_ = 0;
  std::optional<Inputs> inputs_;
  std::vector<Group> groups_;
};

std::vector<TableView> view_tables(const std::vector<Tensor>& tables);

// Throws the error for the bad id at `position` of the call.
[[noreturn]] void throw_bad_id(const Call& call, const std::vector<TableView>& tables,
                               const Group& group, int64_t position);

}  // namespace shardwise::cpu
