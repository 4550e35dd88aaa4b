// Permute the segments of lengths, values and weights; a segment is a run of bags.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "copies.h"
#include "kernels.h"
#include "results.h"

namespace shardwise::cpu {
namespace {

using Counts = std::vector<int64_t>;

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error("permute_segments: " + what);
}

Counts starts_of(const Counts& counts) {
  Counts starts(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), starts.begin() + 1);
  return starts;
}

template <typename T>
Counts sum_segments(const T* lengths, const Counts& bags) {
  const Counts starts = starts_of(bags);
  Counts sums(bags.size());
  run_tasks(static_cast<int64_t>(bags.size()), starts.back() < 65536, [&](int64_t s) {
    sums[s] = std::accumulate(lengths + starts[s], lengths + starts[s + 1], int64_t{0});
  });
  return sums;
}

Counts count_values(const Tensor& lengths, const Counts& bags) {
  switch (lengths.dtype()) {
    case DType::kInt32:
      return sum_segments(lengths.data<int32_t>(), bags);
    case DType::kInt64:
      return sum_segments(lengths.data<int64_t>(), bags);
    default:
      refuse("lengths must be int32 or int64");
  }
}

void check_counts(const Counts& counts, int64_t size, const char* what) {
  int64_t sum = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    // The upper bound keeps the sum from wrapping around.
    if (counts[s] < 0 || counts[s] > size) {
      refuse("segment " + std::to_string(s) + " has " + std::to_string(counts[s]) + " " + what +
             ", there are " + std::to_string(size));
    }
    sum += counts[s];
  }
  if (sum != size) {
    refuse("the segments need " + std::to_string(sum) + " " + what + ", there are " +
           std::to_string(size));
  }
}

// Plans the copy of the segments `order` of `from`, whose rows are cut by `counts`.
Tensor gather(const Tensor& from, const Counts& counts, const Counts& order, Copies& copies) {
  const Counts starts = starts_of(counts);
  int64_t rows = 0;
  for (const int64_t s : order) rows += counts[s];
  size_t row_bytes = from.element_size();
  std::vector<int64_t> sizes{rows};
  for (int64_t d = 1; d < from.dim(); ++d) {
    sizes.push_back(from.size(d));
    row_bytes *= static_cast<size_t>(from.size(d));
  }
  Tensor to = make_result(sizes, from.dtype_code());
  char* out = to.mutable_data<char>();
  for (const int64_t s : order) {
    const size_t bytes = static_cast<size_t>(counts[s]) * row_bytes;
    copies.add(out, from.data<char>() + static_cast<size_t>(starts[s]) * row_bytes, bytes);
    out += bytes;
  }
  return to;
}

}  // namespace

void permute_segments(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor lengths = arguments.tensor();
  const Tensor values = arguments.tensor();
  const Tensor weights = arguments.tensor();
  const bool is_weighted = arguments.boolean();
  const Counts order = arguments.integers();
  const Counts bags = arguments.integers();
  Counts counts = arguments.integers();
  const auto num_segments = static_cast<int64_t>(bags.size());
  if (!lengths.is_contiguous() || !values.is_contiguous() || !weights.is_contiguous()) {
    refuse("tensors must be contiguous");
  }
  for (const int64_t s : order) {
    if (s < 0 || s >= num_segments) refuse("there is no segment " + std::to_string(s));
  }
  if (counts.size() != bags.size()) refuse("bags and counts must be for the same segments");
  check_counts(bags, lengths.numel(), "lengths");
  const bool is_known = std::find(counts.begin(), counts.end(), -1) == counts.end();
  if (!is_known) counts = count_values(lengths, bags);
  check_counts(counts, values.size(0), "values");
  if (is_weighted) check_counts(counts, weights.size(0), "weights");

  Copies copies;
  Tensor new_lengths = gather(lengths, bags, order, copies);
  Tensor new_values = gather(values, counts, order, copies);
  const Counts none;
  Tensor new_weights = gather(weights, is_weighted ? counts : none, is_weighted ? order : none,
                              copies);
  copies.run();
  arguments.give(std::move(new_weights));
  arguments.give(std::move(new_values));
  arguments.give(std::move(new_lengths));
}

}  // namespace shardwise::cpu
