// Offsets from lengths: a running sum, in two passes where there are threads to share them.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kBlock = 32768;

template <typename T>
void run_sum(const T* lengths, int64_t count, T start, T* offsets) {
  // Unsigned, because lengths that nobody has checked may overflow.
  using Bits = std::make_unsigned_t<T>;
  Bits sum = static_cast<Bits>(start);
  for (int64_t i = 0; i < count; ++i) {
    offsets[i] = static_cast<T>(sum);
    sum += static_cast<Bits>(lengths[i]);
  }
}

template <typename T>
T total(const T* lengths, int64_t count) {
  using Bits = std::make_unsigned_t<T>;
  Bits sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<Bits>(lengths[i]);
  return static_cast<T>(sum);
}

template <typename T>
void fill_offsets(const Tensor& lengths, const Tensor& offsets) {
  const T* from = lengths.data<T>();
  T* to = offsets.mutable_data<T>();
  const int64_t count = lengths.numel();
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const bool is_small = blocks < 2;
  const auto size = [&](int64_t block) { return std::min(kBlock, count - block * kBlock); };
  std::vector<T> sums(blocks), starts(blocks + 1);
  run_tasks(blocks, is_small,
            [&](int64_t b) { sums[b] = total(from + b * kBlock, size(b)); });
  run_sum(sums.data(), blocks, T{0}, starts.data());
  run_tasks(blocks, is_small, [&](int64_t b) {
    run_sum(from + b * kBlock, size(b), starts[b], to + b * kBlock);
  });
  if (blocks > 0) starts[blocks] = starts[blocks - 1] + sums[blocks - 1];
  to[count] = starts[blocks];
}

}  // namespace

void offsets_from_lengths(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor lengths = arguments.tensor();
  const DType dtype = lengths.dtype();
  if (!lengths.is_contiguous() || (dtype != DType::kInt32 && dtype != DType::kInt64)) {
    throw std::runtime_error("offsets_from_lengths: lengths must be contiguous int32 or int64");
  }
  Tensor offsets = Tensor::empty({lengths.numel() + 1}, lengths.dtype_code());
  if (dtype == DType::kInt32) {
    fill_offsets<int32_t>(lengths, offsets);
  } else {
    fill_offsets<int64_t>(lengths, offsets);
  }
  arguments.give(std::move(offsets));
}

}  // namespace shardwise::cpu
