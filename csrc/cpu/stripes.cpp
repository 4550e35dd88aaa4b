#include "stripes.h"

#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "scratch.h"
#include "tasks.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kSmallWork = 16384;     // entries below which one thread is faster
constexpr int64_t kTaskFloats = 1 << 17;  // read and written by one task

[[noreturn]] void fail(const std::string& text) {
  throw std::runtime_error("shardwise: combine: " + text);
}

std::string str(int64_t number) { return std::to_string(number); }

int64_t last_offset(const Tensor& offsets) {
  require_integers(offsets, "offsets");
  const int64_t last = offsets.numel() - 1;
  if (last < 0) fail("offsets must hold at least one number");
  return offsets.dtype() == DType::kInt64 ? offsets.data<int64_t>()[last]
                                          : offsets.data<int32_t>()[last];
}

// Runs body(first element, elements, number) over the vectors of each slot of each stripe.
template <typename Body>
void for_slots(const std::vector<Stripe>& stripes, const std::vector<int32_t>& counts,
               const Body& body) {
  for (size_t n = 0; n < stripes.size(); ++n) {
    const Stripe& stripe = stripes[n];
    const int32_t* own = counts.data() + stripe.split->first_slot;
    for (int64_t slot = 0; slot < stripe.split->num_slots; ++slot) {
      if (own[slot] > 0) body(stripe.bases[slot], own[slot] * stripe.width, n);
    }
  }
}

}  // namespace

Stripes::Stripes(Arguments& arguments)
    : bases_tensor_(arguments.tensor()),
      entries_tensor_(arguments.tensor()),
      entry_offsets_tensor_(arguments.tensor()),
      offsets_(arguments.tensor()),
      weights_(arguments.tensor()),
      is_weighted_(arguments.boolean()),
      bags_(arguments.tensor()),
      splits_tensor_(arguments.tensor()),
      stripes_tensor_(arguments.tensor()),
      columns_(arguments.boolean()) {}

void Stripes::lay_out(int64_t answer_size, int64_t rows, int64_t width) {
  width_ = width;
  check_dtypes();
  read_bags();
  read_splits();
  read_entries();
  read_stripes();
  check_vectors(answer_size);
  place_blocks(rows);
}

void Stripes::check_dtypes() const {
  require(bases_tensor_, "bases", DType::kInt64, "int64");
  require(entries_tensor_, "entries", DType::kInt32, "int32");
  require(entry_offsets_tensor_, "entry_offsets", DType::kInt64, "int64");
  require(splits_tensor_, "splits", DType::kInt64, "int64");
  require(stripes_tensor_, "stripes", DType::kInt64, "int64");
  if (!is_weighted_) return;
  require(weights_, "weights", DType::kFloat32, "float32");
  if (weights_.numel() != last_offset(offsets_)) {
    fail(str(weights_.numel()) + " weights for " + str(last_offset(offsets_)) + " ids");
  }
}

void Stripes::read_bags() {
  const int64_t num_inputs = bags_.dim() == 2 ? bags_.size(0) : 0;
  inputs_.emplace(offsets_, bags_, last_offset(offsets_), num_inputs);
  const int64_t num_sources = inputs_->num_sources();
  if (columns_ && num_sources > 1) fail("columns need ids of one source");
  bags_before_.reserve(num_inputs * (num_sources + 1));
  for (int64_t k = 0; k < num_inputs; ++k) {
    bags_before_.push_back(0);
    for (int64_t s = 0; s < num_sources; ++s) {
      bags_before_.push_back(bags_before_.back() + inputs_->run(k, s).num_bags);
    }
  }
}

void Stripes::read_splits() {
  const int64_t* numbers = splits_tensor_.data<int64_t>();
  int64_t first_bag = 0, first_slot = 0;
  for (int64_t p = 0; p < splits_tensor_.numel() / 6; ++p, numbers += 6) {
    const int64_t key = numbers[0], mode = numbers[1], num_slots = numbers[5];
    if (key < 0 || key >= inputs_->num_inputs()) fail("split " + str(p) + ": no input " + str(key));
    if (mode < 0 || mode > 1) fail("split " + str(p) + ": unknown mode " + str(mode));
    if (num_slots < 0 || num_slots > std::numeric_limits<int32_t>::max()) {
      fail("split " + str(p) + ": its slots are not there");
    }
    const int64_t num_bags = bags_before_[(key + 1) * (inputs_->num_sources() + 1) - 1];
    splits_.push_back({key, mode == 1, num_slots, first_bag, num_bags, 0, 0, first_slot});
    first_bag += num_bags;
    first_slot += num_slots;
  }
  counts_.resize(first_slot);
  if (entry_offsets_tensor_.numel() != first_bag + 1) {
    fail(str(entry_offsets_tensor_.numel()) + " entry_offsets for " + str(first_bag) + " bags");
  }
}

void Stripes::read_entries() {
  entries_ = reinterpret_cast<const Entry*>(entries_tensor_.data<int32_t>());
  entry_offsets_ = entry_offsets_tensor_.data<int64_t>();
  const int64_t num_bags = entry_offsets_tensor_.numel() - 1;
  bool is_ordered = entry_offsets_[0] == 0;
  for (int64_t b = 0; b < num_bags; ++b) is_ordered &= entry_offsets_[b] <= entry_offsets_[b + 1];
  if (!is_ordered || entry_offsets_[num_bags] != entries_tensor_.numel() / 2) {
    fail("entry_offsets must go from 0 to the number of entries and never decrease");
  }
  const bool is_small = entry_offsets_[num_bags] < kSmallWork;
  run_tasks(static_cast<int64_t>(splits_.size()), is_small, [&](int64_t p) { scan(splits_[p]); });
  for (size_t p = 0; p < splits_.size(); ++p) {
    if (!splits_[p].is_good) fail("an entry of split " + str(p) + " names no vector of a slot");
    if (splits_[p].is_rows) check_rows(splits_[p], static_cast<int64_t>(p));
  }
}

// Counts the vectors of each slot of a split.
void Stripes::scan(Split& split) {
  constexpr auto kMost = static_cast<uint32_t>(std::numeric_limits<int32_t>::max());
  split.first_entry = entry_offsets_[split.first_bag];
  split.num_entries = entry_offsets_[split.first_bag + split.num_bags] - split.first_entry;
  int32_t* counts = counts_.data() + split.first_slot;
  const Entry* end = entries_ + split.first_entry + split.num_entries;
  for (const Entry* entry = entries_ + split.first_entry; entry < end; ++entry) {
    if (entry->slot == -1) continue;
    if (static_cast<uint32_t>(entry->slot) >= split.num_slots ||
        static_cast<uint32_t>(entry->position) >= kMost) {
      split.is_good = false;
      return;
    }
    int32_t& count = counts[entry->slot];
    split.is_dense &= entry->position <= count;
    split.is_plain &= entry->position == count;
    count = std::max(count, entry->position + 1);
  }
}

// Rows have an entry for each id.
void Stripes::check_rows(const Split& split, int64_t number) const {
  for (int64_t s = 0; s < inputs_->num_sources(); ++s) {
    const Run& run = inputs_->run(split.key, s);
    const int64_t* ids = inputs_->offsets() + run.first_bag;
    const int64_t* entries = entry_offsets_ + split.first_bag +
                             bags_before_[split.key * (inputs_->num_sources() + 1) + s];
    bool is_equal = true;
    for (int64_t b = 0; b < run.num_bags; ++b) {
      is_equal &= ids[b + 1] - ids[b] == entries[b + 1] - entries[b];
    }
    if (!is_equal) fail("split " + str(number) + " of rows must have one entry for each id");
  }
}

void Stripes::read_stripes() {
  const int64_t num_bases = bases_tensor_.numel();
  const int64_t* numbers = stripes_tensor_.data<int64_t>();
  for (int64_t n = 0; n < stripes_tensor_.numel() / 7; ++n, numbers += 7) {
    const std::string name = "stripe " + str(n);
    if (numbers[0] < 0 || numbers[0] >= static_cast<int64_t>(splits_.size())) {
      fail(name + ": no split " + str(numbers[0]));
    }
    const Split& split = splits_[numbers[0]];
    const auto pooling = static_cast<Pooling>(numbers[1]);
    const int64_t column = numbers[3], width = numbers[4], base = numbers[5], all = numbers[6];
    if (pooling < Pooling::kSum || pooling > Pooling::kNone) fail(name + ": unknown pooling");
    if (pooling == Pooling::kNone && !split.is_rows) fail(name + ": only rows can stay unpooled");
    if (all < 0 || all > std::numeric_limits<int32_t>::max() || width < 0 || column < 0 ||
        column > all - width) {
      fail(name + ": its columns are not within its feature");
    }
    if (base < 0 || split.num_slots > num_bases || base > num_bases - split.num_slots) {
      fail(name + ": its bases are not there");
    }
    stripes_.push_back({&split, pooling, numbers[2], column, width, all,
                        bases_tensor_.data<int64_t>() + base});
  }
}

void Stripes::check_vectors(int64_t answer_size) const {
  for_slots(stripes_, counts_, [&](int64_t base, int64_t size, size_t n) {
    if (base < 0 || size > answer_size || base > answer_size - size) {
      fail("the vectors of stripe " + str(static_cast<int64_t>(n)) + " are not within the answer");
    }
  });
}

// Gives a stripe of each feature, in the order of the output.
std::vector<const Stripe*> Stripes::number_blocks() {
  std::vector<Stripe*> order;
  for (Stripe& stripe : stripes_) order.push_back(&stripe);
  std::sort(order.begin(), order.end(), [](const Stripe* a, const Stripe* b) {
    return a->feature != b->feature ? a->feature < b->feature : a->column < b->column;
  });
  std::vector<const Stripe*> blocks;
  for (size_t n = 0; n < order.size(); ++n) {
    Stripe& own = *order[n];
    if (n == 0 || own.feature != order[n - 1]->feature) {
      blocks.push_back(&own);
    } else {
      const Stripe& left = *order[n - 1];
      if (own.column < left.column + left.width || own.pooling != left.pooling ||
          own.feature_width != left.feature_width || own.split->key != left.split->key) {
        fail("two stripes of feature " + str(own.feature) + " do not fit together");
      }
    }
    own.block = static_cast<int64_t>(blocks.size()) - 1;
  }
  return blocks;
}

int64_t Stripes::num_rows(const Stripe& stripe, int64_t source) const {
  const Run& run = inputs_->run(stripe.split->key, source);
  if (stripe.pooling != Pooling::kNone) return run.num_bags;
  return inputs_->offsets()[run.first_bag + run.num_bags] - inputs_->offsets()[run.first_bag];
}

// Finds where the rows of each feature begin.
void Stripes::place_blocks(int64_t rows) {
  const std::vector<const Stripe*> blocks = number_blocks();
  const int64_t num_sources = inputs_->num_sources();
  num_blocks_ = static_cast<int64_t>(blocks.size());
  // Rows lie source by source, and are counted block by block: there may be thousands of sources.
  std::vector<int64_t> next(num_sources + 1);
  const auto size = [&](const Stripe& block, int64_t s) {
    return columns_ ? block.feature_width : num_rows(block, s) * block.feature_width;
  };
  for (const Stripe* block : blocks) {
    for (int64_t s = 0; s < num_sources; ++s) {
      next[s + 1] += size(*block, s);
      if (columns_ && num_rows(*block, s) != rows) {
        fail("feature " + str(block->feature) + " has " + str(num_rows(*block, s)) +
             " rows, not " + str(rows));
      }
    }
  }
  std::partial_sum(next.begin(), next.end(), next.begin());
  if (next.back() > (columns_ ? width_ : rows * width_)) {
    fail("the features do not fit in the output");
  }
  starts_.reserve(num_blocks_ * num_sources);
  for (const Stripe* block : blocks) {
    for (int64_t s = 0; s < num_sources; ++s) {
      starts_.push_back(next[s]);
      next[s] += size(*block, s);
    }
  }
  int64_t covered = 0;
  for (const Stripe& stripe : stripes_) {
    for (int64_t s = 0; s < num_sources; ++s) covered += num_rows(stripe, s) * stripe.width;
  }
  fills_output_ = covered == rows * width_;
}

bool Stripes::fills_answer(int64_t answer_size) const {
  for (const Stripe& stripe : stripes_) {
    if (!stripe.split->is_dense) return false;
  }
  // Starts that differ, each end a start or the answer's end, a start at 0, and sizes that sum to
  // the answer's: nothing is left out and nothing overlaps. All in time linear in the slots.
  thread_local Scratch scratch;
  const int64_t num_words = answer_size / 64 + 1;
  auto* starts = scratch.take<uint64_t>(num_words);
  std::fill_n(starts, num_words, 0);
  const auto bit = [](int64_t element) { return uint64_t{1} << (element % 64); };
  bool is_exact = true;
  int64_t total = 0;
  for_slots(stripes_, counts_, [&](int64_t base, int64_t size, size_t) {
    if (size == 0) return;
    is_exact &= (starts[base / 64] & bit(base)) == 0;
    starts[base / 64] |= bit(base);
    total += size;
  });
  if (!is_exact || total != answer_size) return false;
  starts[answer_size / 64] |= bit(answer_size);
  is_exact = (starts[0] & 1) != 0;
  for_slots(stripes_, counts_, [&](int64_t base, int64_t size, size_t) {
    is_exact &= (starts[(base + size) / 64] & bit(base + size)) != 0;
  });
  return is_exact;
}

std::vector<Range> Stripes::cut() const {
  std::vector<Range> ranges;
  for (const Stripe& stripe : stripes_) {
    const int64_t num_bags = stripe.split->num_bags;
    const int64_t floats = (stripe.split->num_entries + num_bags) * stripe.width;
    const int64_t count = std::min(num_bags, floats / kTaskFloats + 1);
    for (int64_t n = 0; n < count; ++n) {
      ranges.push_back({&stripe, num_bags * n / count, num_bags * (n + 1) / count});
    }
  }
  return ranges;
}

}  // namespace shardwise::cpu
