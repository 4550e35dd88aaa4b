// The operator `unpack`: received messages to ids, offsets and weights, as [source][channel][bag].
#include <algorithm>
#include <string>
#include <vector>

#include "copies.h"
#include "inputs.h"
#include "kernels.h"
#include "results.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kTaskWork = 16384;  // bags and ids

[[noreturn]] void fail(const std::string& text) {
  throw std::runtime_error("shardwise: unpack: " + text);
}
std::string str(int64_t number) { return std::to_string(number); }

struct Channel {
  int64_t bags, ids;
  bool has_lengths, has_weights;
};

// The counts of all channels of all sources, as they were sent.
struct Counts {
  const int64_t* counts;  // [source][channel] of (bags, ids)
  const int64_t* modes;   // [channel]; 1: rows, whose ids are one bag
  int64_t num_sources, num_channels;
  bool is_weighted;

  Channel operator()(int64_t source, int64_t c) const {
    const int64_t* count = counts + 2 * (source * num_channels + c);
    const bool is_rows = modes[c] == 1;
    return {is_rows ? 1 : count[0], count[1], !is_rows && count[0] != count[1],
            !is_rows && is_weighted};
  }
};

// What is read and written next.
struct State {
  int64_t id = 0, bag = 0;
  const int32_t* lengths = nullptr;
  const float* weights = nullptr;

  void pass(const Channel& channel) {
    id += channel.ids;
    bag += channel.bags;
    if (channel.has_lengths) lengths += channel.bags;
    if (channel.has_weights) weights += channel.ids;
  }
};

// Some channels of one source.
struct Task {
  int64_t source, first, last;
  State state;
};

struct Layout {
  std::vector<Task> tasks;
  Copies copies;  // of ids
  State end;
};

// Lays out one source's message, which begins at `message`; gives its bytes.
int64_t lay_out(const Counts& counts, int64_t source, const char* message, int64_t id_bytes,
                Layout& layout) {
  int64_t ids = 0, lengths = 0, weights = 0;
  for (int64_t c = 0; c < counts.num_channels; ++c) {
    const Channel channel = counts(source, c);
    if (channel.bags < 0 || channel.ids < 0) fail("counts must not be negative");
    ids += channel.ids;
    if (channel.has_lengths) lengths += channel.bags;
    if (channel.has_weights) weights += channel.ids;
  }
  State& state = layout.end;
  state.lengths = reinterpret_cast<const int32_t*>(message + ids * id_bytes);
  state.weights = reinterpret_cast<const float*>(state.lengths + lengths);
  Task task{source, 0, 0, state};
  for (int64_t c = 0; c < counts.num_channels; ++c) {
    state.pass(counts(source, c));
    const int64_t work = state.id - task.state.id + state.bag - task.state.bag;
    if (work < kTaskWork && c + 1 < counts.num_channels) continue;
    task.last = c + 1;
    layout.tasks.push_back(task);
    task = {source, c + 1, 0, state};
  }
  return (ids * id_bytes + 4 * (lengths + weights) + 7) / 8 * 8;
}

// Writes where each bag of the task ends, and its weights. False if lengths do not fit the ids.
bool run(const Counts& counts, const Task& task, int64_t* ends, float* weights) {
  State state = task.state;
  bool is_good = true;
  for (int64_t c = task.first; c < task.last; ++c) {
    const Channel channel = counts(task.source, c);
    const int64_t last_id = state.id + channel.ids;
    int64_t* end = ends + state.bag;
    if (channel.has_lengths) {
      int64_t id = state.id;
      for (int64_t b = 0; b < channel.bags; ++b) {
        is_good &= state.lengths[b] >= 0;
        end[b] = id += state.lengths[b];
      }
      is_good &= id == last_id;
    } else if (channel.bags == 1) {
      end[0] = last_id;
    } else {
      for (int64_t b = 0; b < channel.bags; ++b) end[b] = state.id + b + 1;
    }
    if (channel.has_weights) {
      std::copy_n(state.weights, channel.ids, weights + state.id);
    } else if (counts.is_weighted) {
      std::fill_n(weights + state.id, channel.ids, 1.0f);
    }
    state.pass(channel);
  }
  return is_good;
}

}  // namespace

void unpack(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor message = arguments.tensor();
  const Tensor count_table = arguments.tensor();
  const Tensor modes = arguments.tensor();
  const bool is_weighted = arguments.boolean();
  const bool is_wide = arguments.boolean();
  require(message, "message", DType::kUInt8, "uint8");
  require(count_table, "counts", DType::kInt64, "int64");
  require(modes, "modes", DType::kInt64, "int64");
  if (count_table.dim() != 3 || count_table.size(1) != modes.numel() || count_table.size(2) != 2) {
    fail("counts must be [sources, channels, 2], with a mode for each channel");
  }
  const Counts counts{count_table.data<int64_t>(), modes.data<int64_t>(), count_table.size(0),
                      modes.numel(), is_weighted};
  const int64_t id_bytes = is_wide ? 8 : 4;
  std::vector<int64_t> first_ids, starts{0};
  Layout layout;
  for (int64_t s = 0; s < counts.num_sources; ++s) {
    first_ids.push_back(layout.end.id);
    starts.push_back(starts.back() + lay_out(counts, s, message.data<char>() + starts.back(),
                                             id_bytes, layout));
  }
  if (starts.back() != message.numel()) {
    fail("the counts name " + str(starts.back()) + " bytes, but " + str(message.numel()) + " came");
  }
  first_ids.push_back(layout.end.id);

  const int32_t id_dtype = is_wide ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32();
  Tensor ids = make_result({layout.end.id}, id_dtype);
  Tensor offsets = make_result({layout.end.bag + 1}, aoti_torch_dtype_int64());
  Tensor weights = make_result({is_weighted ? layout.end.id : 0}, aoti_torch_dtype_float32());
  for (int64_t s = 0; s < counts.num_sources; ++s) {
    layout.copies.add(ids.mutable_data<char>() + first_ids[s] * id_bytes,
                      message.data<char>() + starts[s],
                      static_cast<size_t>((first_ids[s + 1] - first_ids[s]) * id_bytes));
  }
  layout.copies.run();
  int64_t* ends = offsets.mutable_data<int64_t>();
  ends[0] = 0;
  float* weight_data = weights.mutable_data<float>();
  std::vector<char> is_good(layout.tasks.size());
  run_tasks(static_cast<int64_t>(is_good.size()), layout.end.id + layout.end.bag < kTaskWork,
            [&](int64_t t) { is_good[t] = run(counts, layout.tasks[t], ends + 1, weight_data); });
  for (size_t t = 0; t < is_good.size(); ++t) {
    if (is_good[t]) continue;
    fail("lengths from rank " + str(layout.tasks[t].source) + " do not fit its ids");
  }
  arguments.give(std::move(ids));
  arguments.give(std::move(offsets));
  arguments.give(std::move(weights));
}

}  // namespace shardwise::cpu
