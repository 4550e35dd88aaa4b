#include "inputs.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace shardwise::cpu {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error("shardwise: " + text); }

std::string str(int64_t number) { return std::to_string(number); }

}  // namespace

void require(const Tensor& tensor, const char* name, DType dtype, const char* dtype_name) {
  if (tensor.dtype() != dtype) fail(std::string(name) + " must be " + dtype_name);
  if (!tensor.is_contiguous()) fail(std::string(name) + " must be contiguous");
}

void require_integers(const Tensor& tensor, const char* name) {
  const DType dtype = tensor.dtype() == DType::kInt32 ? DType::kInt32 : DType::kInt64;
  require(tensor, name, dtype, "int32 or int64");
}

Inputs::Inputs(const Tensor& offsets, const Tensor& bags, int64_t num_ids, int64_t num_inputs) {
  read_offsets(offsets, num_ids);
  read_bags(bags, num_inputs);
}

void Inputs::read_offsets(const Tensor& offsets, int64_t num_ids) {
  require_integers(offsets, "offsets");
  num_bags_ = offsets.numel() - 1;
  if (num_bags_ < 0) fail("offsets must hold at least one number");
  if (offsets.dtype() == DType::kInt32) {
    const int32_t* data = offsets.data<int32_t>();
    converted_.assign(data, data + num_bags_ + 1);
    offsets_ = converted_.data();
  } else {
    offsets_ = offsets.data<int64_t>();
  }
  bool is_ordered = offsets_[0] == 0;
  for (int64_t b = 0; b < num_bags_; ++b) is_ordered &= offsets_[b] <= offsets_[b + 1];
  if (!is_ordered) fail("offsets must start at 0 and never decrease (a length is negative)");
  if (offsets_[num_bags_] != num_ids) {
    fail("lengths sum to " + str(offsets_[num_bags_]) + ", but there are " + str(num_ids) + " ids");
  }
}

void Inputs::read_bags(const Tensor& bags, int64_t num_inputs) {
  require(bags, "bags", DType::kInt64, "int64");
  num_inputs_ = num_inputs;
  num_sources_ = num_inputs > 0;
  std::vector<int64_t> equal;
  const int64_t* counts = nullptr;
  if (bags.numel() > 0) {
    if (bags.dim() != 2) fail("bags must be [inputs, sources]");
    num_inputs_ = bags.size(0);
    num_sources_ = bags.size(1);
    counts = bags.data<int64_t>();
  } else {
    if (num_inputs == 0 ? num_bags_ != 0 : num_bags_ % num_inputs != 0) {
      fail(str(num_bags_) + " bags cannot be shared by " + str(num_inputs) + " inputs equally");
    }
    equal.assign(num_inputs, num_inputs == 0 ? 0 : num_bags_ / num_inputs);
    counts = equal.data();
  }
  runs_.reserve(num_inputs_ * num_sources_);
  // Bags lie source by source, but are read input by input: there may be thousands of sources.
  std::vector<int64_t> next(num_sources_ + 1);
  int64_t bag = 0;
  for (int64_t k = 0; k < num_inputs_; ++k) {
    for (int64_t s = 0; s < num_sources_; ++s) {
      const int64_t count = *counts++;
      if (count < 0) fail("bags must not be negative");
      if (count > num_bags_ - bag) fail("bags name more bags than there are offsets");
      bag += count;
      next[s + 1] += count;
      runs_.push_back({0, count});
    }
  }
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (int64_t k = 0; k < num_inputs_; ++k) {
    for (int64_t s = 0; s < num_sources_; ++s) {
      Run& run = runs_[k * num_sources_ + s];
      run.first_bag = next[s];
      next[s] += run.num_bags;
    }
  }
  if (bag != num_bags_) fail("bags name " + str(bag) + " of " + str(num_bags_) + " bags");
}

}  // namespace shardwise::cpu
