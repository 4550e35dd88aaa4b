// Deal out tasks of uneven cost to torch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

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

// Runs prepare(task), which gives how many parts a task has, and then body(task, part) for each. A
// thread that has prepared a task goes over its parts, while what they read is in its cache; once
// all are prepared it helps with those of others.
template <typename Prepare, typename Body>
void run_prepared_tasks(int64_t count, bool is_small, const Prepare& prepare, const Body& body) {
  struct Parts {
    std::atomic<int64_t> next{0}, count{-1};  // -1: not prepared yet
  };
  std::vector<Parts> parts(count);
  std::atomic<int64_t> next{0};
  const auto run_parts = [&](int64_t task) {
    const int64_t last = parts[task].count;
    for (int64_t part = parts[task].next++; part < last; part = parts[task].next++) {
      body(task, part);
    }
  };
  const int64_t threads = is_small ? 1 : num_threads();
  const auto work = [&] {
    for (int64_t task = next++; task < count; task = next++) {
      int64_t num_parts = 0;  // of a task that fails
      try {
        num_parts = prepare(task);
      } catch (...) {
        parts[task].count = 0;
        throw;
      }
      parts[task].count = num_parts;
      run_parts(task);
    }
    for (int64_t task = 0; task < count; ++task) {
      while (parts[task].count < 0) std::this_thread::yield();
      run_parts(task);
    }
  };
  if (threads <= 1) return work();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work();
  });
}

}  // namespace shardwise::cpu
