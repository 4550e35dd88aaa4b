#include "call.h"

#include <algorithm>
#include <string>

namespace shardwise::cpu {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("shardwise: " + text); }

std::string str(int64_t number) { return std::to_string(number); }

void require(const Tensor& tensor, const char* name, DType dtype, const char* dtype_name) {
  if (tensor.dtype() != dtype) fail(std::string(name) + " must be " + dtype_name);
  if (!tensor.is_contiguous()) fail(std::string(name) + " must be contiguous");
}

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
  if (ids_.dtype() != DType::kInt32) require(ids_, "ids", DType::kInt64, "int32 or int64");
  if (!ids_.is_contiguous()) fail("ids must be contiguous");
  if (offsets_.dtype() != DType::kInt32) {
    require(offsets_, "offsets", DType::kInt64, "int32 or int64");
  }
  require(features_, "features", DType::kInt64, "int64");
  require(bags_, "bags", DType::kInt64, "int64");
  if (bad_ids_ < BadIds::kRaise || bad_ids_ > BadIds::kIgnore) fail("unknown policy for bad ids");
  num_ids_ = ids_.numel();
  if (is_weighted_) {
    require(weights_, "weights", DType::kFloat32, "float32");
    if (weights_.numel() != num_ids_) {
      fail(str(weights_.numel()) + " weights for " + str(num_ids_) + " ids");
    }
  }
  read_offsets();
  read_groups(tables, rows, width);
}

void Call::read_offsets() {
  if (!offsets_.is_contiguous()) fail("offsets must be contiguous");
  num_bags_ = offsets_.numel() - 1;
  if (num_bags_ < 0) fail("offsets must hold at least one number");
  if (offsets_.dtype() == DType::kInt32) {
    const int32_t* data = offsets_.data<int32_t>();
    converted_.assign(data, data + num_bags_ + 1);
    starts_ = converted_.data();
  } else {
    starts_ = offsets_.data<int64_t>();
  }
  bool is_ordered = starts_[0] == 0;
  for (int64_t b = 0; b < num_bags_; ++b) is_ordered &= starts_[b] <= starts_[b + 1];
  if (!is_ordered) fail("offsets must start at 0 and never decrease (a length is negative)");
  if (starts_[num_bags_] != num_ids_) {
    fail("lengths sum to " + str(starts_[num_bags_]) + ", but there are " + str(num_ids_) + " ids");
  }
}

std::vector<int64_t> Call::bag_counts(int64_t num_inputs) const {
  if (bags_.numel() > 0) {
    if (bags_.dim() != 2 || bags_.size(0) != num_inputs) fail("bags must be [inputs, sources]");
    const int64_t* data = bags_.data<int64_t>();
    return std::vector<int64_t>(data, data + bags_.numel());
  }
  if (num_inputs == 0 || num_bags_ % num_inputs != 0) {
    fail(str(num_bags_) + " bags cannot be shared by " + str(num_inputs) + " inputs equally");
  }
  return std::vector<int64_t>(num_inputs, num_bags_ / num_inputs);
}

void Call::read_groups(const std::vector<Tensor>& tables, int64_t rows, int64_t width) {
  num_features_ = features_.numel() / 4;
  const int64_t* features = features_.data<int64_t>();
  int64_t num_inputs = bags_.numel() > 0 ? bags_.size(0) : 0;
  for (int64_t f = 0; f < num_features_; ++f) {
    if (features[4 * f] < 0 || (bags_.numel() > 0 && features[4 * f] >= num_inputs)) {
      fail("feature " + str(f) + " reads input " + str(features[4 * f]) + ", which is not there");
    }
    if (bags_.numel() == 0) num_inputs = std::max(num_inputs, features[4 * f] + 1);
  }
  const std::vector<int64_t> counts = bag_counts(num_inputs);
  const int64_t num_sources = num_inputs > 0 ? static_cast<int64_t>(counts.size()) / num_inputs : 0;
  if (columns_ && num_sources != 1) fail("columns need ids of one source");
  groups_.reserve(num_sources * num_features_);
  std::vector<int64_t> first_bags(num_inputs);
  int64_t bag = 0, out = 0;
  for (int64_t s = 0; s < num_sources; ++s) {
    for (int64_t k = 0; k < num_inputs; ++k) {
      first_bags[k] = bag;
      if (counts[k * num_sources + s] < 0) fail("bags must not be negative");
      bag += counts[k * num_sources + s];
    }
    if (bag > num_bags_) fail("bags name more bags than there are offsets");
    for (int64_t f = 0; f < num_features_; ++f) {
      const int64_t* feature = features + 4 * f;
      Group group{};
      group.feature = f;
      group.table = feature[1];
      group.pooling = static_cast<Pooling>(feature[2]);
      group.width = feature[3];
      group.first_bag = first_bags[feature[0]];
      group.num_bags = counts[feature[0] * num_sources + s];
      group.first_id = starts_[group.first_bag];
      group.num_ids = starts_[group.first_bag + group.num_bags] - group.first_id;
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
  if (bag != num_bags_) fail("bags name " + str(bag) + " of " + str(num_bags_) + " bags");
  if (out != (columns_ ? width : rows * width)) fail("the features do not fill the output");
}

Ids Call::ids() const {
  return Ids{ids_.data<char>(), ids_.dtype() == DType::kInt64, starts_,
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
