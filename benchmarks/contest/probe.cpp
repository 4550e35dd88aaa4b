// How fast this machine reads random rows: the bound that the lookup benchmark is held against.
//
// Nothing but the reads of a pooled lookup, with the rows prefetched: no checks, no layout, threads
// that share the work evenly. Compiled for one width and the machine at hand.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kAhead = 16;      // rows between a prefetch and its use
constexpr int64_t kTaskIds = 4096;  // ids that a thread takes at a time
constexpr int kVectors = WIDTH / 16;
static_assert(WIDTH % 16 == 0);

typedef float Floats __attribute__((vector_size(64)));

volatile float sink;

void prefetch(const float* row) {
  for (int c = 0; c < WIDTH; c += 16) __builtin_prefetch(row + c);
}

// Sums the bags [first, last) of one table; gives the sum of all that was read.
Floats sum_bags(const float* table, const int64_t* ids, int64_t num_ids, int64_t first,
                int64_t last, int64_t pooling, float* out, int64_t stride) {
  Floats total = {};
  for (int64_t bag = first; bag < last; ++bag) {
    Floats sums[kVectors] = {};
    for (int64_t i = bag * pooling; i < (bag + 1) * pooling; ++i) {
      if (i + kAhead < num_ids) prefetch(table + ids[i + kAhead] * WIDTH);
      const float* row = table + ids[i] * WIDTH;
      for (int v = 0; v < kVectors; ++v) {
        Floats part;
        std::memcpy(&part, row + 16 * v, sizeof(part));
        sums[v] += part;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      if (out != nullptr) {
        std::memcpy(out + bag * stride + 16 * v, &sums[v], sizeof(Floats));
      } else {
        total += sums[v];
      }
    }
  }
  return total;
}

}  // namespace

// Ids are [table][bag][pooling]; `out` is [bags, tables * WIDTH], or null to write nothing.
extern "C" void gather(const float* const* tables, const int64_t* ids, int64_t num_tables,
                       int64_t num_bags, int64_t pooling, float* out, int64_t num_threads) {
  const int64_t bags_per_task = std::max<int64_t>(1, kTaskIds / pooling);
  const int64_t tasks_per_table = (num_bags + bags_per_task - 1) / bags_per_task;
  const int64_t num_ids = num_bags * pooling;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Floats total = {};
    for (int64_t i; (i = next++) < num_tables * tasks_per_table;) {
      const int64_t table = i / tasks_per_table;
      const int64_t first = i % tasks_per_table * bags_per_task;
      const int64_t last = std::min(first + bags_per_task, num_bags);
      total += sum_bags(tables[table], ids + table * num_ids, num_ids, first, last, pooling,
                        out == nullptr ? nullptr : out + table * WIDTH, num_tables * WIDTH);
    }
    sink = total[0];
  };
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}
