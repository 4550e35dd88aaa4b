// The operators `combine`, `combine_grad` and `combine_weight_grads`: answers to rows, and back.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "repeats.h"
#include "results.h"
#include "scratch.h"
#include "stripes.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kSmallFloats = 64 << 10;  // read below which one thread is faster
constexpr int64_t kAhead = 16;              // entries between a prefetch and its use

const float* floats_of(const Tensor& tensor, const char* name) {
  require(tensor, name, DType::kFloat32, "float32");
  return tensor.data<float>();
}

Tensor make(const std::vector<int64_t>& sizes) {
  return make_result(sizes, aoti_torch_dtype_float32());
}

int64_t floats_read(const Stripes& stripes) {
  int64_t floats = 0;
  for (const Stripe& stripe : stripes.all()) floats += stripe.split->num_entries * stripe.width;
  return floats;
}

float divisor_of(const Stripe& stripe, const Bags& bags, int64_t bag) {
  const int64_t num_ids = bags.ids[bag + 1] - bags.ids[bag];
  return stripe.pooling == Pooling::kMean ? static_cast<float>(std::max<int64_t>(num_ids, 1)) : 1.0f;
}

// The vectors of one stripe in an answer, or in its gradient.
template <typename Float>
struct Vectors {
  Float* answer;
  const int64_t* bases;
  int64_t width;

  Float* operator[](const Entry& entry) const {
    return answer + bases[entry.slot] + entry.position * width;
  }
  void prefetch(const Entry& entry) const {
    if (entry.slot < 0) return;
    const Float* vector = (*this)[entry];
    for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(vector + c, !std::is_const_v<Float>);
  }
};

// ---- combine

template <bool kAdds>
void put(float* __restrict out, const float* __restrict vector, float weight, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    out[c] = kAdds ? out[c] + weight * vector[c] : weight * vector[c];
  }
}

// Sums the vectors of the entries in order. `weights` are the entries' own; null: all 1.
void sum_entries(const Vectors<const float>& vectors, const Entry* entries, int64_t count,
                 const float* weights, float divisor, float* out) {
  bool is_first = true;
  for (int64_t e = 0; e < count; ++e) {
    if (entries[e].slot < 0) continue;
    const float weight = weights == nullptr ? 1.0f : weights[e];
    if (is_first) {
      put<false>(out, vectors[entries[e]], weight, vectors.width);
    } else {
      put<true>(out, vectors[entries[e]], weight, vectors.width);
    }
    is_first = false;
  }
  if (is_first) std::fill_n(out, vectors.width, 0.0f);
  if (divisor != 1.0f) {
    for (int64_t c = 0; c < vectors.width; ++c) out[c] /= divisor;
  }
}

void sum_bags(const Stripes& stripes, const Stripe& stripe, const Bags& bags,
              const float* answer, float* out) {
  const Vectors<const float> vectors{answer, stripe.bases, stripe.width};
  const float* weights = stripes.weights(stripe);
  const Entry* entries = stripes.entries();
  const int64_t last = stripe.split->first_entry + stripe.split->num_entries;
  const bool is_pooled = stripe.pooling != Pooling::kNone;
  const int64_t stride = stripes.stride(stripe);
  float* row = out + bags.out;
  for (int64_t b = 0; b < bags.count; ++b) {
    const int64_t begin = bags.entries[b], count = bags.entries[b + 1] - begin;
    for (int64_t e = begin + kAhead; e < std::min(begin + count + kAhead, last); ++e) {
      vectors.prefetch(entries[e]);
    }
    const float* own = weights == nullptr ? nullptr : weights + bags.ids[b];
    const int64_t step = is_pooled ? count : 1;
    for (int64_t e = 0; e < (is_pooled ? 1 : count); ++e, row += stride) {
      sum_entries(vectors, entries + begin + e, step, own == nullptr ? nullptr : own + e,
                  divisor_of(stripe, bags, b), row);
    }
  }
}

// ---- combine_grad

// Runs body(entry, its number within the bag, bag, the row that it is part of) over entries.
template <typename Body>
void for_entries(const Stripes& stripes, const Stripe& stripe, const Bags& bags, const Body& body) {
  const int64_t step = stripe.pooling == Pooling::kNone ? stripes.stride(stripe) : 0;
  int64_t row = bags.out;
  for (int64_t b = 0; b < bags.count; ++b) {
    const int64_t begin = bags.entries[b], count = bags.entries[b + 1] - begin;
    for (int64_t e = 0; e < count; ++e, row += step) {
      if (stripes.entries()[begin + e].slot >= 0) body(stripes.entries()[begin + e], e, b, row);
    }
    if (step == 0) row += stripes.stride(stripe);
  }
}

template <bool kAdds>
void put_scaled(float* __restrict out, const float* __restrict grad, float factor, float scale,
                int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    const float value = grad[c] * factor * scale;
    out[c] = kAdds ? out[c] + value : value;
  }
}

struct Backward {
  const Stripes& stripes;
  const float* grad;
  float* answer_grad;
  float scale;

  // The bags of a range whose vectors `part` owns. A vector's first entry writes, unless the vector
  // holds a number already.
  void run(const Range& range, const Part& part, bool is_zeroed) const {
    const Stripe& stripe = *range.stripe;
    const bool always_writes = stripe.split->is_plain && !is_zeroed;
    thread_local Scratch scratch;
    const int64_t num_slots = always_writes ? 0 : stripe.split->num_slots;
    auto* seen = scratch.take<int32_t>(num_slots);
    std::fill_n(seen, num_slots, 0);
    const Vectors<float> vectors{answer_grad, stripe.bases, stripe.width};
    const float* weights = stripes.weights(stripe);
    stripes.for_bags(range, [&](const Bags& bags) {
      for_entries(stripes, stripe, bags, [&](const Entry& entry, int64_t e, int64_t b, int64_t row) {
        constexpr int64_t kSpread = 0x9e3779b1;
        if (!part.owns(entry.slot * kSpread + entry.position)) return;
        const float weight = weights == nullptr ? 1.0f : weights[bags.ids[b] + e];
        const float factor = weight / divisor_of(stripe, bags, b);
        bool is_first = always_writes;
        if (!always_writes && !is_zeroed && entry.position >= seen[entry.slot]) {
          seen[entry.slot] = entry.position + 1;
          is_first = true;
        }
        const auto put = is_first ? put_scaled<false> : put_scaled<true>;
        put(vectors[entry], grad + row, factor, scale, stripe.width);
      });
    });
  }
};

struct BackwardTask {
  Range range;
  Part part;
};

std::vector<BackwardTask> backward_tasks(const Stripes& stripes) {
  std::vector<BackwardTask> tasks;
  for (const Range& range : stripes.cut()) {
    if (range.stripe->split->is_plain) tasks.push_back({range, {0, 1}});
  }
  for (const Stripe& stripe : stripes.all()) {
    if (stripe.split->is_plain) continue;
    const int64_t num_parts = Part::count_for(stripe.split->num_entries);
    for (int64_t n = 0; n < num_parts; ++n) {
      tasks.push_back({{&stripe, 0, stripe.split->num_bags}, {n, num_parts}});
    }
  }
  return tasks;
}

// ---- combine_weight_grads

// In sixteen partial sums, added in the order in which `weight_grads` adds those of local rows.
float dot(const float* a, const float* b, int64_t width) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += a[c + i] * b[c + i];
  }
  for (int64_t i = 0; c < width; ++c, ++i) sums[i] += a[c] * b[c];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace

void combine(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor answer = arguments.tensor();
  Stripes stripes(arguments);
  const int64_t rows = arguments.integer(), width = arguments.integer();
  const float* data = floats_of(answer, "answer");
  stripes.lay_out(answer.numel(), rows, width);
  Tensor result = make({rows, width});
  float* out = result.mutable_data<float>();
  if (!stripes.fills_output()) std::fill_n(out, rows * width, 0.0f);
  const std::vector<Range> ranges = stripes.cut();
  const bool is_small = floats_read(stripes) < kSmallFloats;
  run_tasks(static_cast<int64_t>(ranges.size()), is_small, [&](int64_t n) {
    stripes.for_bags(ranges[n], [&](const Bags& bags) {
      sum_bags(stripes, *ranges[n].stripe, bags, data, out);
    });
  });
  arguments.give(std::move(result));
}

void combine_grad(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  Stripes stripes(arguments);
  const int64_t size = arguments.integer();
  const auto scale = static_cast<float>(arguments.number());
  const float* data = floats_of(grad, "grad");
  if (grad.dim() != 2) throw std::runtime_error("shardwise: combine_grad: grad must be [rows, width]");
  stripes.lay_out(size, grad.size(0), grad.size(1));
  Tensor result = make({size});
  float* out = result.mutable_data<float>();
  const Backward backward{stripes, data, out, scale};
  if (stripes.fills_answer(size)) {
    const std::vector<BackwardTask> tasks = backward_tasks(stripes);
    const bool is_small = floats_read(stripes) < kSmallFloats;
    run_tasks(static_cast<int64_t>(tasks.size()), is_small, [&](int64_t n) {
      backward.run(tasks[n].range, tasks[n].part, false);
    });
  } else {  // stripes may share vectors: one after another
    std::fill_n(out, size, 0.0f);
    for (const Stripe& stripe : stripes.all()) {
      backward.run({&stripe, 0, stripe.split->num_bags}, {0, 1}, true);
    }
  }
  arguments.give(std::move(result));
}

void combine_weight_grads(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  const Tensor answer = arguments.tensor();
  Stripes stripes(arguments);
  const float* gradient = floats_of(grad, "grad");
  const float* data = floats_of(answer, "answer");
  if (grad.dim() != 2) throw std::runtime_error("shardwise: combine_weight_grads: grad must be [rows, width]");
  stripes.lay_out(answer.numel(), grad.size(0), grad.size(1));
  Tensor result = make({stripes.num_weights()});
  float* out = result.mutable_data<float>();
  std::fill_n(out, stripes.num_weights(), 0.0f);
  // Stripes that read one input add to the same numbers, so they run one after the other.
  std::vector<std::vector<Range>> rounds;
  for (const Range& range : stripes.cut()) {
    if (stripes.weights(*range.stripe) == nullptr) continue;
    if (rounds.empty() || rounds.back().back().stripe != range.stripe) rounds.emplace_back();
    rounds.back().push_back(range);
  }
  const bool is_small = floats_read(stripes) < kSmallFloats;
  for (const std::vector<Range>& ranges : rounds) {
    run_tasks(static_cast<int64_t>(ranges.size()), is_small, [&](int64_t n) {
      const Stripe& stripe = *ranges[n].stripe;
      const Vectors<const float> vectors{data, stripe.bases, stripe.width};
      stripes.for_bags(ranges[n], [&](const Bags& bags) {
        for_entries(stripes, stripe, bags, [&](const Entry& entry, int64_t e, int64_t b, int64_t row) {
          out[bags.ids[b] + e] += dot(vectors[entry], gradient + row, stripe.width) /
                                  divisor_of(stripe, bags, b);
        });
      });
    });
  }
  arguments.give(std::move(result));
}

}  // namespace shardwise::cpu
