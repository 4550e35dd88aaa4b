// The operators `lookup` and `weight_grads`: rows to vectors.
#include <algorithm>
#include <atomic>

#include "call.h"
#include "kernels.h"
#include "results.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kTaskIds = 8192;
constexpr int64_t kTaskBags = 4096;
// A result of this size would push itself out of the cache.
constexpr int64_t kStreamBytes = 32 << 20;
constexpr int64_t kSmallBytes = 256 << 10;  // rows read below which one thread is faster

struct Task {
  const Group* group;
  Pool pool;
};

// Whether all vectors that a pool writes are whole cache lines.
bool can_stream(const Pool& pool) {
  constexpr int64_t kLine = 16;  // floats
  const bool is_aligned = reinterpret_cast<uintptr_t>(pool.out) % (kLine * sizeof(float)) == 0;
  return is_aligned && pool.stride % kLine == 0 && pool.table.width % kLine == 0;
}

// Splits the groups into tasks of about equal numbers of ids.
std::vector<Task> split(const Call& call, const std::vector<TableView>& tables, float* out,
                        float* weight_grads, bool streams) {
  std::vector<Task> tasks;
  const Ids ids = call.ids();
  for (const Group& group : call.groups()) {
    if (group.table < 0) continue;
    Pool pool{tables[group.table], ids, group.pooling, 0, 0, 0, 0, nullptr, group.stride,
              weight_grads, false};
    const bool is_pooled = group.pooling != Pooling::kNone;
    const int64_t* bounds = ids.offsets + group.first_bag;
    const int64_t count = group.num_out_rows();
    for (int64_t first = 0; first < count;) {
      int64_t last = std::min(first + (is_pooled ? kTaskBags : kTaskIds), count);
      if (is_pooled) {
        const int64_t* bound =
            std::upper_bound(bounds + first, bounds + last + 1, bounds[first] + kTaskIds);
        last = std::clamp<int64_t>(bound - bounds - 1, first + 1, last);
        pool.first_bag = group.first_bag + first;
        pool.last_bag = group.first_bag + last;
      }
      pool.first_id = is_pooled ? bounds[first] : group.first_id + first;
      pool.last_id = is_pooled ? bounds[last] : group.first_id + last;
      pool.out = out + group.out + first * group.stride;
      pool.streams = streams && can_stream(pool);
      tasks.push_back({&group, pool});
      first = last;
    }
  }
  return tasks;
}

// Runs a kernel over all tasks; throws for the first bad id of the call.
void run(const Call& call, const std::vector<TableView>& tables, const std::vector<Task>& tasks,
         int64_t (*kernel)(const Pool&)) {
  int64_t bytes = 0;
  for (const Task& task : tasks) {
    bytes += (task.pool.last_id - task.pool.first_id) * task.pool.table.row_bytes();
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::vector<int64_t> bad(tasks.size());
  run_tasks(count, bytes < kSmallBytes, [&](int64_t i) { bad[i] = kernel(tasks[i].pool); });
  for (int64_t i = 0; i < count; ++i) {
    if (bad[i] >= 0) throw_bad_id(call, tables, *tasks[i].group, bad[i]);
  }
}

}  // namespace

void lookup(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Call call(arguments);
  const std::vector<Tensor> tables = arguments.tensors();
  const int64_t rows = arguments.integer(), width = arguments.integer();
  call.lay_out(tables, rows, width);
  const std::vector<TableView> views = view_tables(tables);
  Tensor result = make_result({rows, width}, aoti_torch_dtype_float32());
  float* out = result.mutable_data<float>();
  const bool streams = rows * width * static_cast<int64_t>(sizeof(float)) >= kStreamBytes;
  run(call, views, split(call, views, out, nullptr, streams), isa().pool);
  arguments.give(std::move(result));
}

void count_bad_ids(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Call call(arguments);
  const std::vector<Tensor> tables = arguments.tensors();
  const int64_t rows = arguments.integer(), width = arguments.integer();
  call.lay_out(tables, rows, width);
  const std::vector<TableView> views = view_tables(tables);
  Tensor result = Tensor::empty({call.num_features()}, aoti_torch_dtype_int64());
  int64_t* counts = result.mutable_data<int64_t>();
  std::fill_n(counts, call.num_features(), 0);
  const Ids ids = call.ids();
  for (const Group& group : call.groups()) {
    const int64_t end = group.first_id + group.num_ids;
    for (int64_t i = group.first_id; i < end; ++i) {
      counts[group.feature] += ids[i] < 0 || ids[i] >= views[group.table].rows;
    }
  }
  arguments.give(std::move(result));
}

void weight_grads(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  Call call(arguments);
  const std::vector<Tensor> tables = arguments.tensors();
  call.lay_out(tables, grad.size(0), grad.size(1));
  const std::vector<TableView> views = view_tables(tables);
  Tensor result = Tensor::empty({call.num_ids()}, aoti_torch_dtype_float32());
  float* out = result.mutable_data<float>();
  std::fill_n(out, call.num_ids(), 0.0f);
  float* gradient = const_cast<float*>(grad.data<float>());
  std::vector<Task> tasks = split(call, views, gradient, out, false);
  // Features that read one input add to the same numbers, so they run one after the other.
  const int64_t features = call.num_features();
  for (int64_t f = 0; f < features; ++f) {
    std::vector<Task> own;
    std::copy_if(tasks.begin(), tasks.end(), std::back_inserter(own),
                 [f](const Task& task) { return task.group->feature == f; });
    run(call, views, own, isa().weight_dots);
  }
  arguments.give(std::move(result));
}

}  // namespace shardwise::cpu
