// The operators' CPU kernels, by name; each is registered in library.cpp.
#pragma once

#include "../torch_abi.h"

namespace shardwise::cpu {

void advise_huge_pages(StableIValue* stack, uint64_t, uint64_t);

}  // namespace shardwise::cpu
