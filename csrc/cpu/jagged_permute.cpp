// Permute the segments of lengths, values and weights; a segment is a run of bags.
#include <algorithm>
#include <cstdint>
#include <cstring>
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

// Copies the lengths of a permutation and adds up those of each segment, in pieces that stay in the
// cache in between.
template <typename T>
Counts copy_and_count(const T* from, const Counts& bags, const Counts& order, T* to) {
  constexpr int64_t kPiece = 2048;
  const Counts starts = starts_of(bags);
  Counts counts(bags.size()), places(bags.size());
  for (int64_t place = 0; const int64_t s : order) {
    places[s] = place;
    place += bags[s];
  }
  run_tasks(static_cast<int64_t>(bags.size()), starts.back() < 65536, [&](int64_t s) {
    for (int64_t done = 0; done < bags[s]; done += kPiece) {
      const T* piece = from + starts[s] + done;
      const int64_t size = std::min(kPiece, bags[s] - done);
      std::memcpy(to + places[s] + done, piece, size * sizeof(T));
      counts[s] += sum_of(piece, size);
    }
  });
  return counts;
}

Counts copy_and_count(const Tensor& from, const Counts& bags, const Counts& order, Tensor& to) {
  switch (from.dtype()) {
    case DType::kInt32:
      return copy_and_count(from.data<int32_t>(), bags, order, to.mutable_data<int32_t>());
    case DType::kInt64:
      return copy_and_count(from.data<int64_t>(), bags, order, to.mutable_data<int64_t>());
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

// Finds the counts where they are not known.
Tensor copy_lengths(const Tensor& lengths, const Counts& bags, const Counts& order, Counts& counts,
                    Copies& copies) {
  if (std::find(counts.begin(), counts.end(), -1) == counts.end()) {
    return gather(lengths, bags, order, copies);
  }
  Counts sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (size_t s = 0; s < std::max(sorted.size(), bags.size()); ++s) {
    if (s >= sorted.size() || sorted[s] != static_cast<int64_t>(s)) {
      refuse("counts must be known where the order is no permutation");
    }
  }
  Tensor moved = make_result({lengths.numel()}, lengths.dtype_code());
  counts = copy_and_count(lengths, bags, order, moved);
  return moved;
}

}  // namespace

void permute_segments(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor lengths = arguments.tensor();
  const Tensor values = arguments.tensor();
  const Tensor weights = arguments.tensor();
  const bool is_weighted = arguments.boolean();
  const Counts order = arguments.integers();
  Counts bags = arguments.integers();
  Counts counts = arguments.integers();
  // One number may stand for all segments: long lists cost more than what they describe.
  if (bags.size() == 1 && bags[0] > 0 && lengths.numel() % bags[0] == 0) {
    bags.assign(lengths.numel() / bags[0], bags[0]);
  }
  if (counts.size() == 1 && counts[0] == -1) counts.assign(bags.size(), -1);
  const auto num_segments = static_cast<int64_t>(bags.size());
  if (!lengths.is_contiguous() || !values.is_contiguous() || !weights.is_contiguous()) {
    refuse("tensors must be contiguous");
  }
  for (const int64_t s : order) {
    if (s < 0 || s >= num_segments) refuse("there is no segment " + std::to_string(s));
  }
  if (counts.size() != bags.size()) refuse("bags and counts must be for the same segments");
  check_counts(bags, lengths.numel(), "lengths");
  Copies copies;
  Tensor new_lengths = copy_lengths(lengths, bags, order, counts, copies);
  check_counts(counts, values.size(0), "values");
  if (is_weighted) check_counts(counts, weights.size(0), "weights");

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
