// How fast this machine reads and writes rows: the bounds that the lookup benchmark is held against.
//
// Nothing but the memory accesses of a lookup or an update: no checks, no layout, threads that share
// the work evenly. Compiled for the machine at hand, for rows of 64 to 1024 bytes.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kTaskIds = 4096;  // ids that a thread takes at a time

typedef float Floats __attribute__((vector_size(64)));

volatile float sink;

template <typename Work>
void run(int64_t num_threads, const Work& work) {
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

Floats load(const float* from) {
  Floats vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Inlined, or g++ takes it for a function without effect and leaves it out.
template <int N>
__attribute__((always_inline)) inline void prefetch(const float* row) {
  for (int v = 0; v < N; ++v) __builtin_prefetch(row + 16 * v);
}

// Rows of N cache lines, ids of one table, and how far ahead they are fetched (0: not at all).
template <int N>
struct Rows {
  const float* data;
  const int64_t* ids;
  int64_t num_ids, ahead;

  const float* operator[](int64_t i) const { return data + ids[i] * N * 16; }
  __attribute__((always_inline)) void fetch(int64_t i) const {
    if (ahead > 0 && i + ahead < num_ids) prefetch<N>((*this)[i + ahead]);
  }
};

// Sums the bags [first, last) of one table; gives the sum of all that was read.
template <int N>
Floats sum_bags(const Rows<N>& rows, int64_t first, int64_t last, int64_t pooling, float* out,
                int64_t stride) {
  Floats total = {};
  for (int64_t bag = first; bag < last; ++bag) {
    Floats sums[N] = {};
    for (int64_t i = bag * pooling; i < (bag + 1) * pooling; ++i) {
      rows.fetch(i);
      for (int v = 0; v < N; ++v) sums[v] += load(rows[i] + 16 * v);
    }
    for (int v = 0; v < N; ++v) {
      if (out != nullptr) {
        std::memcpy(out + bag * stride + 16 * v, &sums[v], sizeof(Floats));
      } else {
        total += sums[v];
      }
    }
  }
  return total;
}

// Adds 1 to all numbers of the rows.
template <int N>
void modify_rows(const Rows<N>& rows, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    rows.fetch(i);
    float* row = const_cast<float*>(rows[i]);
    for (int v = 0; v < N; ++v) {
      const Floats next = load(row + 16 * v) + 1.0f;
      std::memcpy(row + 16 * v, &next, sizeof(next));
    }
  }
}

// Runs body(table, first, last) over ranges of bags of all tables, on threads.
template <typename Body>
void deal(int64_t num_tables, int64_t num_bags, int64_t pooling, int64_t num_threads,
          const Body& body) {
  const int64_t bags_per_task = std::max<int64_t>(1, kTaskIds / pooling);
  const int64_t tasks_per_table = (num_bags + bags_per_task - 1) / bags_per_task;
  std::atomic<int64_t> next{0};
  run(num_threads, [&] {
    for (int64_t i; (i = next++) < num_tables * tasks_per_table;) {
      const int64_t first = i % tasks_per_table * bags_per_task;
      body(i / tasks_per_table, first, std::min(first + bags_per_task, num_bags));
    }
  });
}

template <int N>
void gather_rows(float* const* tables, const int64_t* ids, int64_t num_tables, int64_t num_bags,
                 int64_t pooling, float* out, int64_t ahead, int64_t num_threads) {
  const int64_t num_ids = num_bags * pooling, width = 16 * N;
  deal(num_tables, num_bags, pooling, num_threads, [&](int64_t t, int64_t first, int64_t last) {
    const Rows<N> rows{tables[t], ids + t * num_ids, num_ids, ahead};
    float* to = out == nullptr ? nullptr : out + t * width;
    sink = sum_bags<N>(rows, first, last, pooling, to, num_tables * width)[0];
  });
}

template <int N>
void modify_all(float* const* tables, const int64_t* ids, int64_t num_tables, int64_t num_ids,
                int64_t ahead, int64_t num_threads) {
  deal(num_tables, num_ids, 1, num_threads, [&](int64_t t, int64_t first, int64_t last) {
    modify_rows<N>({tables[t], ids + t * num_ids, num_ids, ahead}, first, last);
  });
}

// Calls body with the number of cache lines per row as a constant; false where it has none.
template <typename Body>
bool with_lines(int64_t width, const Body& body) {
  switch (width) {
    case 16: return body(std::integral_constant<int, 1>()), true;
    case 32: return body(std::integral_constant<int, 2>()), true;
    case 64: return body(std::integral_constant<int, 4>()), true;
    case 128: return body(std::integral_constant<int, 8>()), true;
    case 256: return body(std::integral_constant<int, 16>()), true;
    default: return false;
  }
}

}  // namespace

// Ids are [table][bag][pooling]; `out` is [bags, tables * width], or null to write nothing.
extern "C" bool gather(float* const* tables, int64_t width, const int64_t* ids, int64_t num_tables,
                       int64_t num_bags, int64_t pooling, float* out, int64_t ahead,
                       int64_t num_threads) {
  return with_lines(width, [&](auto lines) {
    gather_rows<lines>(tables, ids, num_tables, num_bags, pooling, out, ahead, num_threads);
  });
}

// Ids are [table][id]; no id may occur twice in a table.
extern "C" bool modify(float* const* tables, int64_t width, const int64_t* ids, int64_t num_tables,
                       int64_t num_ids, int64_t ahead, int64_t num_threads) {
  return with_lines(width, [&](auto lines) {
    modify_all<lines>(tables, ids, num_tables, num_ids, ahead, num_threads);
  });
}

// Reads everything once, in order.
extern "C" void stream(const float* data, int64_t count, int64_t num_threads) {
  constexpr int64_t kTask = 1 << 18;
  std::atomic<int64_t> next{0};
  run(num_threads, [&] {
    Floats totals[4] = {};
    for (int64_t i; (i = kTask * next++) < count;) {
      const int64_t end = std::min(i + kTask, count / 64 * 64);
      for (; i < end; i += 64) {
        for (int v = 0; v < 4; ++v) totals[v] += load(data + i + 16 * v);
      }
    }
    sink = (totals[0] + totals[1] + totals[2] + totals[3])[0];
  });
}
