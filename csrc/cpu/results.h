// Memory of results. Large results are most of what a step writes, and the kernel clears every fresh
// page first, which costs more than a lookup of one id per bag itself.
#pragma once

#include <cstdint>
#include <vector>

#include "../torch_abi.h"

namespace shardwise::cpu {

// A new contiguous CPU tensor with uninitialised elements. From 4 MB on it lies in 2 MB pages that
// outlive it: up to 256 MB stay with the process for the results that follow.
Tensor make_result(const std::vector<int64_t>& sizes, int32_t dtype_code);

}  // namespace shardwise::cpu
