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
#include "vectors.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kSmallFloats = 64 << 10;  // read below which one thread is faster
constexpr int64_t kStreamFloats = 8 << 20;  // a result that would push itself out of the cache
constexpr int64_t kAhead = 16;              // entries or bags between a prefetch and its use

const float* floats_of(const Tensor& tensor, const char* name) {
  require(tensor, name, DType::kFloat32, "float32");
  return tensor.data<float>();
}

void lay_out(Stripes& stripes, const Tensor& grad, int64_t answer_size) {
  if (grad.dim() != 2) throw std::runtime_error("shardwise: combine: grad must be [rows, width]");
  stripes.lay_out(answer_size, grad.size(0), grad.size(1));
}

template <typename Body>
void run(const Stripes& stripes, int64_t num_tasks, const Body& body) {
  int64_t floats = 0;
  for (const Stripe& stripe : stripes.all()) floats += stripe.split->num_entries * stripe.width;
  run_tasks(num_tasks, floats < kSmallFloats, body);
}

float divisor_of(const Stripe& stripe, const Bags& bags, int64_t bag) {
  if (stripe.pooling != Pooling::kMean) return 1.0f;
  return static_cast<float>(std::max<int64_t>(bags.ids[bag + 1] - bags.ids[bag], 1));
}

void sum_bags(const Stripes& stripes, const Stripe& stripe, const Bags& bags, const float* answer,
              float* out, bool streams) {
  const Vectors<const float> vectors{answer, stripe.bases, stripe.width};
  const float* weights = stripes.weights(stripe);
  const Entry* entries = stripes.entries();
  const int64_t last = stripe.split->first_entry + stripe.split->num_entries;
  const bool is_pooled = stripe.pooling != Pooling::kNone;
  const int64_t stride = stripes.stride(stripe);
  float* row = out + bags.out;
  for (int64_t b = 0; b < bags.count; ++b) {
    const int64_t begin = bags.entries[b], end = bags.entries[b + 1];
    for (int64_t e = begin + kAhead; e < std::min(end + kAhead, last); ++e) {
      vectors.prefetch(entries[e]);
    }
    const float divisor = divisor_of(stripe, bags, b);
    const int64_t count = is_pooled ? end - begin : 1, num_rows = is_pooled ? 1 : end - begin;
    for (int64_t r = 0; r < num_rows; ++r, row += stride) {
      const float* own = weights == nullptr ? nullptr : weights + bags.ids[b] + r;
      const Sum sum{vectors, entries + begin + r, count, own, divisor};
      if (streams && can_stream(row, stripe.width)) {
        sum.write<true>(row);
      } else {
        sum.write<false>(row);
      }
    }
  }
  if (streams) fence();
}

// Runs body(entry, its row of the gradient, its id, its bag's divisor) over those that are there.
template <typename Body>
void for_entries(const Stripes& stripes, const Vectors<const float>& vectors, const Stripe& stripe,
                 const Bags& bags, const float* grad, const Body& body) {
  const Entry* entries = stripes.entries();
  const int64_t last = stripe.split->first_entry + stripe.split->num_entries;
  const int64_t stride = stripes.stride(stripe);
  const bool is_pooled = stripe.pooling != Pooling::kNone;
  const float* row = grad + bags.out;
  for (int64_t b = 0; b < bags.count; ++b) {
    prefetch(row + kAhead * stride, stripe.width);
    const float divisor = divisor_of(stripe, bags, b);
    for (int64_t e = bags.entries[b]; e < bags.entries[b + 1]; ++e) {
      if (!stripe.split->is_plain && e + kAhead < last) vectors.prefetch(entries[e + kAhead]);
      if (entries[e].slot >= 0) body(entries[e], row, bags.ids[b] + e - bags.entries[b], divisor);
      if (!is_pooled) row += stride;
    }
    if (is_pooled) row += stride;
  }
}

// How `combine_grad` writes.
struct Backward {
  const Stripes& stripes;
  const float* grad;
  float* answer_grad;
  float scale;
  bool is_zeroed;  // all of the result, beforehand
  bool streams;

  // Brings the gradient of a range's rows to the vectors that `part` owns.
  void run(const Range& range, const Part& part) const {
    const Stripe& stripe = *range.stripe;
    if (!is_zeroed && stripe.split->is_plain) {
      return for_vectors(range, [&](const Entry&, float* vector, const float* row, float factor) {
        if (streams && can_stream(vector, stripe.width)) {
          put<Put::kStream>(vector, row, factor, scale, stripe.width);
        } else {
          put<Put::kWrite>(vector, row, factor, scale, stripe.width);
        }
      });
    }
    thread_local Scratch scratch;
    auto* seen = scratch.take<int32_t>(stripe.split->num_slots);  // vectors of each slot
    std::fill_n(seen, stripe.split->num_slots, 0);
    for_vectors(range, [&](const Entry& entry, float* vector, const float* row, float factor) {
      constexpr int64_t kSpread = 0x9e3779b1;
      if (!part.owns(entry.slot * kSpread + entry.position)) return;
      if (!is_zeroed && entry.position >= seen[entry.slot]) {
        seen[entry.slot] = entry.position + 1;
        put<Put::kWrite>(vector, row, factor, scale, stripe.width);
      } else {
        put<Put::kAdd>(vector, row, factor, scale, stripe.width);
      }
    });
  }

 private:
  template <typename Body>
  void for_vectors(const Range& range, const Body& body) const {
    const Stripe& stripe = *range.stripe;
    const Vectors<float> vectors{answer_grad, stripe.bases, stripe.width};
    const Vectors<const float> ahead{answer_grad, stripe.bases, stripe.width};
    const float* weights = stripes.weights(stripe);
    stripes.for_bags(range, [&](const Bags& bags) {
      for_entries(stripes, ahead, stripe, bags, grad,
                  [&](const Entry& entry, const float* row, int64_t id, float divisor) {
                    const float weight = weights == nullptr ? 1.0f : weights[id];
                    body(entry, vectors[entry], row, weight / divisor);
                  });
    });
    if (streams) fence();
  }
};

struct BackwardTask {
  Range range;
  Part part;
};

// Each vector is written by one task, in order of its entries.
std::vector<BackwardTask> cut_backward(const Stripes& stripes) {
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

}  // namespace

void combine(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor answer = arguments.tensor();
  Stripes stripes(arguments);
  const int64_t rows = arguments.integer(), width = arguments.integer();
  const float* data = floats_of(answer, "answer");
  stripes.lay_out(answer.numel(), rows, width);
  Tensor result = make_result({rows, width}, aoti_torch_dtype_float32());
  float* out = result.mutable_data<float>();
  if (!stripes.fills_output()) std::fill_n(out, rows * width, 0.0f);
  const std::vector<Range> ranges = stripes.cut();
  run(stripes, static_cast<int64_t>(ranges.size()), [&](int64_t n) {
    stripes.for_bags(ranges[n], [&](const Bags& bags) {
      sum_bags(stripes, *ranges[n].stripe, bags, data, out, rows * width >= kStreamFloats);
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
  lay_out(stripes, grad, size);
  Tensor result = make_result({size}, aoti_torch_dtype_float32());
  float* out = result.mutable_data<float>();
  const bool is_simple = stripes.fills_answer(size);
  const Backward backward{stripes, data, out, scale, !is_simple, size >= kStreamFloats};
  if (is_simple) {
    const std::vector<BackwardTask> tasks = cut_backward(stripes);
    run(stripes, static_cast<int64_t>(tasks.size()),
        [&](int64_t n) { backward.run(tasks[n].range, tasks[n].part); });
  } else {  // stripes may share vectors: one after another
    std::fill_n(out, size, 0.0f);
    for (const Stripe& stripe : stripes.all()) {
      backward.run({&stripe, 0, stripe.split->num_bags}, {0, 1});
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
  lay_out(stripes, grad, answer.numel());
  Tensor result = Tensor::empty({stripes.num_weights()}, aoti_torch_dtype_float32());
  float* out = result.mutable_data<float>();
  std::fill_n(out, stripes.num_weights(), 0.0f);
  const std::vector<Range> ranges = stripes.cut();
  // Stripes that read one input add to the same numbers, so they run one after the other.
  for (size_t first = 0, last = 0; first < ranges.size(); first = last) {
    const Stripe& stripe = *ranges[first].stripe;
    while (last < ranges.size() && ranges[last].stripe == &stripe) ++last;
    if (stripes.weights(stripe) == nullptr) continue;
    const Vectors<const float> vectors{data, stripe.bases, stripe.width};
    run(stripes, static_cast<int64_t>(last - first), [&](int64_t n) {
      stripes.for_bags(ranges[first + n], [&](const Bags& bags) {
        for_entries(stripes, vectors, stripe, bags, gradient,
                    [&](const Entry& entry, const float* row, int64_t id, float divisor) {
                      out[id] += dot(vectors[entry], row, stripe.width) / divisor;
                    });
      });
    });
  }
  arguments.give(std::move(result));
}

}  // namespace shardwise::cpu
