// What `combine` and its gradients share: which vectors of an answer make up which rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../torch_abi.h"
#include "inputs.h"
#include "isa.h"

namespace shardwise::cpu {

// The vector at `position` of a slot; slot -1: none.
struct Entry {
  int32_t slot, position;
};

// One input read through one cutting of a table's rows: the bags and entries that are its own.
struct Split {
  int64_t key;
  bool is_rows;
  int64_t num_slots;
  int64_t first_bag, num_bags;      // within the entry offsets
  int64_t first_entry, num_entries;
  int64_t first_slot;               // within the counts of vectors
  // What the entries turned out to be.
  bool is_good = true;   // slots and positions are there
  bool is_dense = true;  // the vectors of a slot have their first entries in order
  bool is_plain = true;  // dense, and no vector has two
};

// One feature's share of one column block.
struct Stripe {
  const Split* split;
  Pooling pooling;
  int64_t feature;
  int64_t column, width, feature_width;
  const int64_t* bases;  // where the vectors of each slot begin in the answer
  int64_t block = 0;     // which one of the output its feature is
};

// Consecutive bags of one source that a stripe reads.
struct Bags {
  int64_t count;
  const int64_t* ids;      // where the ids of each begin, within the call
  const int64_t* entries;  // where the entries of each begin
  int64_t out;             // first element of their rows
};

// Bags [first, last) of a stripe, counted over all sources.
struct Range {
  const Stripe* stripe;
  int64_t first, last;
};

class Stripes {
 public:
  // Takes the shared arguments, in the order of the schemas, off the stack.
  explicit Stripes(Arguments& arguments);

  // Reads the layout. Throws std::runtime_error where the arguments contradict each other.
  // `rows` x `width` is the shape of the output or its gradient.
  void lay_out(int64_t answer_size, int64_t rows, int64_t width);

  const std::vector<Stripe>& all() const { return stripes_; }
  const Entry* entries() const { return entries_; }
  // Of the ids of rows; null: all 1.
  const float* weights(const Stripe& stripe) const {
    return stripe.split->is_rows && is_weighted_ ? weights_.data<float>() : nullptr;
  }
  int64_t num_weights() const { return weights_.numel(); }
  // Elements between two rows of a stripe.
  int64_t stride(const Stripe& stripe) const { return columns_ ? width_ : stripe.feature_width; }
  // Whether every element of the output is some stripe's.
  bool fills_output() const { return fills_output_; }
  // Whether every element of the answer lies in exactly one vector, which has an entry.
  bool fills_answer(int64_t answer_size) const;

  // Cuts stripes into tasks of about equal work.
  std::vector<Range> cut() const;

  // Runs body(bags) over the bags of a range, source by source.
  template <typename Body>
  void for_bags(const Range& range, const Body& body) const {
    const Stripe& stripe = *range.stripe;
    const Split& split = *stripe.split;
    const int64_t num_sources = inputs_->num_sources();
    const int64_t* before = bags_before_.data() + split.key * (num_sources + 1);
    int64_t s = std::upper_bound(before, before + num_sources + 1, range.first) - before - 1;
    for (int64_t first = range.first; first < range.last; ++s) {
      const int64_t last = std::min(range.last, before[s + 1]);
      if (first == last) continue;
      const int64_t* source = inputs_->offsets() + inputs_->run(split.key, s).first_bag;
      const int64_t* ids = source + (first - before[s]);
      const int64_t row = stripe.pooling == Pooling::kNone ? *ids - *source : first - before[s];
      const int64_t start = starts_[stripe.block * num_sources + s];
      body(Bags{last - first, ids, entry_offsets_ + split.first_bag + first,
                start + stripe.column + row * stride(stripe)});
      first = last;
    }
  }

 private:
  void check_dtypes() const;
  void read_bags();
  void read_splits();
  void read_entries();
  void scan(Split& split);
  void check_rows(const Split& split, int64_t number) const;
  void read_stripes();
  void check_vectors(int64_t answer_size) const;
  std::vector<const Stripe*> number_blocks();
  int64_t num_rows(const Stripe& stripe, int64_t source) const;
  void place_blocks(int64_t rows);

  Tensor bases_tensor_, entries_tensor_, entry_offsets_tensor_, offsets_, weights_;
  bool is_weighted_;
  Tensor bags_, splits_tensor_, stripes_tensor_;
  bool columns_;

  std::optional<Inputs> inputs_;
  std::vector<int64_t> bags_before_;  // of each input, those of the sources before [K, S + 1]
  const Entry* entries_ = nullptr;
  const int64_t* entry_offsets_ = nullptr;
  std::vector<Split> splits_;
  std::vector<int32_t> counts_;  // vectors of each slot of each split
  std::vector<Stripe> stripes_;
  std::vector<int64_t> starts_;  // [block][source], elements of the output
  int64_t num_blocks_ = 0, width_ = 0;
  bool fills_output_ = false;
};

}  // namespace shardwise::cpu
