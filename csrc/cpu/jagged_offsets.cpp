// Offsets from lengths: a running sum, in two passes where there are threads to share them.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "copies.h"
#include "kernels.h"
#include "results.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kBlock = 32768;

// Wraps around, because lengths that nobody has checked may overflow.
template <typename T>
T next(T offset, T length) {
  using Bits = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<Bits>(offset) + static_cast<Bits>(length));
}

// Eight at a time, so that the running sum waits for one addition and not for eight.
template <typename T>
void run_sum(const T* lengths, int64_t count, T start, T* offsets) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    T sums[8] = {lengths[i]};
    for (int64_t k = 1; k < 8; ++k) sums[k] = next(sums[k - 1], lengths[i + k]);
    offsets[i] = start;
    for (int64_t k = 1; k < 8; ++k) offsets[i + k] = next(start, sums[k - 1]);
    start = next(start, sums[7]);
  }
  for (; i < count; ++i) {
    offsets[i] = start;
    start = next(start, lengths[i]);
  }
}

template <typename T>
void fill_offsets(const Tensor& lengths, const Tensor& offsets) {
  const T* from = lengths.data<T>();
  T* to = offsets.mutable_data<T>();
  const int64_t count = lengths.numel();
  // One thread needs no totals beforehand: a single block.
  const int64_t length = num_threads() == 1 ? std::max(count, kBlock) : kBlock;
  const int64_t blocks = (count + length - 1) / length;
  const bool is_small = blocks < 2;
  const auto size = [&](int64_t block) { return std::min(length, count - block * length); };
  std::vector<T> sums(blocks), starts(blocks + 1);
  if (!is_small) {
    run_tasks(blocks, false, [&](int64_t b) { sums[b] = static_cast<T>(sum_of(from + b * length, size(b))); });
  }
  run_sum(sums.data(), blocks, T{0}, starts.data());
  run_tasks(blocks, is_small, [&](int64_t b) {
    run_sum(from + b * length, size(b), starts[b], to + b * length);
  });
  to[count] = count == 0 ? T{0} : next(to[count - 1], from[count - 1]);
}

}  // namespace

void offsets_from_lengths(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor lengths = arguments.tensor();
  const DType dtype = lengths.dtype();
  if (!lengths.is_contiguous() || (dtype != DType::kInt32 && dtype != DType::kInt64)) {
    throw std::runtime_error("offsets_from_lengths: lengths must be contiguous int32 or int64");
  }
  Tensor offsets = make_result({lengths.numel() + 1}, lengths.dtype_code());
  if (dtype == DType::kInt32) {
    fill_offsets<int32_t>(lengths, offsets);
  } else {
    fill_offsets<int64_t>(lengths, offsets);
  }
  arguments.give(std::move(offsets));
}

}  // namespace shardwise::cpu
