// Where the bags of each input lie: [source][input][bag], with one `offsets` over all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "../torch_abi.h"

namespace shardwise::cpu {

// The bags of one input that come from one source.
struct Run {
  int64_t first_bag, num_bags;
};

class Inputs {
 public:
  // `bags` is [inputs, sources]; where it is empty, `num_inputs` share the bags of one source
  // equally. Throws std::runtime_error where the offsets do not partition the ids, or `bags` the
  // offsets. Both tensors must outlive this.
  Inputs(const Tensor& offsets, const Tensor& bags, int64_t num_ids, int64_t num_inputs);

  const int64_t* offsets() const { return offsets_; }
  int64_t num_inputs() const { return num_inputs_; }
  int64_t num_sources() const { return num_sources_; }
  const Run& run(int64_t input, int64_t source) const {
    return runs_[input * num_sources_ + source];
  }

 private:
  void read_offsets(const Tensor& offsets, int64_t num_ids);
  void read_bags(const Tensor& bags, int64_t num_inputs);

  const int64_t* offsets_ = nullptr;
  std::vector<int64_t> converted_;
  int64_t num_bags_ = 0, num_inputs_ = 0, num_sources_ = 0;
  std::vector<Run> runs_;  // [input][source]
};

// Throws for a tensor that is not contiguous, or neither int32 nor int64.
void require_integers(const Tensor& tensor, const char* name);
// Throws for a tensor that is not contiguous, or of another dtype.
void require(const Tensor& tensor, const char* name, DType dtype, const char* dtype_name);

}  // namespace shardwise::cpu
