// Offsets from lengths: a running sum, in blocks that threads share.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "copies.h"
#include "kernels.h"
#include "results.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kBlock = 32768;
constexpr size_t kStreamBytes = size_t{16} << 20;  // offsets of this size would flush the cache

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

#ifdef __x86_64__
// Eight in one register. The running sum waits for one addition here too.
template <bool streams>
SHARDWISE_WIDE void run_sum_wide(const int64_t* lengths, int64_t count, int64_t start,
                                 int64_t* offsets) {
  const __m512i last = _mm512_set1_epi64(7);
  __m512i before = _mm512_set1_epi64(start);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m512i sums = _mm512_loadu_si512(lengths + i);
    sums = _mm512_add_epi64(sums, _mm512_maskz_alignr_epi64(0xfe, sums, sums, 7));
    sums = _mm512_add_epi64(sums, _mm512_maskz_alignr_epi64(0xfc, sums, sums, 6));
    sums = _mm512_add_epi64(sums, _mm512_maskz_alignr_epi64(0xf0, sums, sums, 4));
    const __m512i starts = _mm512_add_epi64(before, _mm512_maskz_alignr_epi64(0xfe, sums, sums, 7));
    if constexpr (streams) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(offsets + i), starts);
    } else {
      _mm512_storeu_si512(offsets + i, starts);
    }
    before = _mm512_add_epi64(before, _mm512_maskz_permutexvar_epi64(0xff, last, sums));
  }
  if constexpr (streams) _mm_sfence();
  const int64_t rest = i == 0 ? start : next(offsets[i - 1], lengths[i - 1]);
  run_sum(lengths + i, count - i, rest, offsets + i);
}
#endif

// With `streams`, whose offsets must be aligned, results may go past the cache.
template <typename T>
void run_sum(const T* lengths, int64_t count, T start, T* offsets, [[maybe_unused]] bool streams) {
#ifdef __x86_64__
  if constexpr (sizeof(T) == 8) {
    const auto run = streams ? run_sum_wide<true> : run_sum_wide<false>;
    if (is_wide()) return run(lengths, count, start, offsets);
  }
#endif
  run_sum(lengths, count, start, offsets);
}

// A block is summed first, which brings it into the cache; its start is known once the block before
// has been summed, by whoever took that one earlier.
template <typename T>
void fill_offsets(const Tensor& lengths, const Tensor& offsets) {
  const T* from = lengths.data<T>();
  T* to = offsets.mutable_data<T>();
  const int64_t count = lengths.numel();
  // One thread needs no sums beforehand: a single block.
  const int64_t length = num_threads() == 1 ? std::max(count, kBlock) : kBlock;
  const int64_t blocks = (count + length - 1) / length;
  const bool streams = static_cast<size_t>(count) * sizeof(T) >= kStreamBytes &&
                       reinterpret_cast<uintptr_t>(to) % 64 == 0;
  std::vector<T> ends(blocks);
  std::vector<std::atomic<bool>> is_known(blocks);
  run_tasks(blocks, blocks < 2, [&](int64_t b) {
    const T* block = from + b * length;
    const int64_t size = std::min(length, count - b * length);
    const T sum = b + 1 < blocks ? static_cast<T>(sum_of(block, size)) : T{0};
    while (b > 0 && !is_known[b - 1].load(std::memory_order_acquire)) std::this_thread::yield();
    const T start = b > 0 ? ends[b - 1] : T{0};
    ends[b] = next(start, sum);
    is_known[b].store(true, std::memory_order_release);
    run_sum(block, size, start, to + b * length, streams);
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
