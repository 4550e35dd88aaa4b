#include "call.h"

#include <algorithm>
#include <string>

namespace shardwise::cpu {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("shardwise: " + text); }

std::string str(int64_t number) { return std::to_string(number); }

}  // namespace

Call::Call(Arguments& arguments)
    : ids_(arguments.tensor()),
      offsets_(arguments.tensor()),
      weights_(arguments.tensor()),
      is_weighted_(arguments.boolean()),
      features_(arguments.tensor()),
      bags_(arguments.tensor()),
      columns_(arguments.boolean()),
      bad_ids_(static_cast<BadIds>(arguments.integer())) {}

void Call::lay_out(const std::vector<Tensor>& tables, int64_t rows, int64_t width) {
  require_integers(ids_, "ids");
  require(features_, "features", DType::kInt64, "int64");
  if (bad_ids_ < BadIds::kRaise || bad_ids_ > BadIds::kIgnore) fail("unknown policy for bad ids");
  num_ids_ = ids_.numel();
  if (is_weighted_) {
    require(weights_, "weights", DType::kFloat32, "float32");
    if (weights_.numel() != num_ids_) {
      fail(str(weights_.numel()) + " weights for " + str(num_ids_) + " ids");
    }
  }
  num_features_ = features_.numel() / 4;
  inputs_.emplace(offsets_, bags_, num_ids_, count_inputs());
  read_groups(tables, rows, width);
}

// The inputs that the features read; `bags` may have more.
int64_t Call::count_inputs() const {
  const int64_t* features = features_.data<int64_t>();
  int64_t count = 0;
  for (int64_t f = 0; f < num_features_; ++f) {
    const int64_t input = features[4 * f];
    if (input < 0 || (bags_.numel() > 0 && input >= bags_.size(0))) {
      fail("feature " + str(f) + " reads input " + str(input) + ", which is not there");
    }
    count = std::max(count, input + 1);
  }
  return count;
}

void Call::read_groups(const std::vector<Tensor>& tables, int64_t rows, int64_t width) {
  const int64_t* features = features_.data<int64_t>();
  const int64_t num_sources = inputs_->num_sources();
  if (columns_ && num_sources != 1) fail("columns need ids of one source");
  groups_.reserve(num_sources * num_features_);
  int64_t out = 0;
  for (int64_t s = 0; s < num_sources; ++s) {
    for (int64_t f = 0; f < num_features_; ++f) {
      const int64_t* feature = features + 4 * f;
      Group group{};
      group.feature = f;
      group.table = feature[1];
      group.pooling = static_cast<Pooling>(feature[2]);
      group.width = feature[3];
      const Run& run = inputs_->run(feature[0], s);
      group.first_bag = run.first_bag;
      group.num_bags = run.num_bags;
      group.first_id = inputs_->offsets()[run.first_bag];
      group.num_ids = inputs_->offsets()[run.first_bag + run.num_bags] - group.first_id;
      group.out = out;
      group.stride = columns_ ? width : group.width;
      if (group.table >= static_cast<int64_t>(tables.size()) ||
          (group.table >= 0 && tables[group.table].size(1) != group.width)) {
        fail("feature " + str(f) + " of width " + str(group.width) + " does not fit its table");
      }
      if (columns_ && group.num_out_rows() != rows) {
        fail("feature " + str(f) + " has " + str(group.num_out_rows()) + " rows, not " + str(rows));
      }
      out += columns_ ? group.width : group.num_out_rows() * group.width;
      groups_.push_back(group);
    }
  }
  if (out != (columns_ ? width : rows * width)) fail("the features do not fill the output");
}

Ids Call::ids() const {
  return Ids{ids_.data<char>(), ids_.dtype() == DType::kInt64, inputs_->offsets(),
             is_weighted_ ? weights_.data<float>() : nullptr, bad_ids_};
}

std::vector<TableView> view_tables(const std::vector<Tensor>& tables) {
  std::vector<TableView> views;
  views.reserve(tables.size());
  for (size_t t = 0; t < tables.size(); ++t) {
    const Tensor& table = tables[t];
    const DType dtype = table.dtype();
    if (table.dim() != 2) fail("table " + str(t) + " must be [rows, width]");
    if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
      fail("table " + str(t) + " must be float32, float16 or bfloat16");
    }
    if (!table.is_contiguous()) fail("table " + str(t) + " must be contiguous");
    views.push_back({const_cast<char*>(table.data<char>()), dtype, table.size(0), table.size(1)});
  }
  return views;
}

void throw_bad_id(const Call& call, const std::vector<TableView>& tables, const Group& group,
                  int64_t position) {
  const Ids ids = call.ids();
  const int64_t* begin = ids.offsets + group.first_bag;
  const int64_t* bag = std::upper_bound(begin, begin + group.num_bags + 1, position) - 1;
  fail("feature " + str(group.feature) + ", bag " + str(bag - begin) + ": id " +
       str(ids[position]) + " is outside table " + str(group.table) + " of " +
       str(tables[group.table].rows) + " rows");
}

}  // namespace shardwise::cpu
