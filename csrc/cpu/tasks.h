// Deal out tasks of uneven cost to torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../torch_abi.h"

namespace shardwise::cpu {

// Runs body(task) for each task in [0, count); which thread runs it does not change any result.
// With `is_small` the caller's thread runs them all: waking others costs more than small work.
template <typename Body>
void run_tasks(int64_t count, bool is_small, const Body& body) {
  const int64_t threads = is_small ? 1 : std::min(count, num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < count; task = next++) body(task);
    }
  });
}

}  // namespace shardwise::cpu
