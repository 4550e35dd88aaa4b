// The operators' CPU kernels, by name; each is registered in library.cpp.
#pragma once

#include "../torch_abi.h"

namespace shardwise::cpu {

void advise_huge_pages(StableIValue* stack, uint64_t, uint64_t);
void new_result(StableIValue* stack, uint64_t, uint64_t);
void offsets_from_lengths(StableIValue* stack, uint64_t, uint64_t);
void permute_segments(StableIValue* stack, uint64_t, uint64_t);
void regroup(StableIValue* stack, uint64_t, uint64_t);
void regroup_grad(StableIValue* stack, uint64_t, uint64_t);
void interaction(StableIValue* stack, uint64_t, uint64_t);
void interaction_grad(StableIValue* stack, uint64_t, uint64_t);
void lookup(StableIValue* stack, uint64_t, uint64_t);
void count_bad_ids(StableIValue* stack, uint64_t, uint64_t);
void update_(StableIValue* stack, uint64_t, uint64_t);
void row_sums(StableIValue* stack, uint64_t, uint64_t);
void row_grads(StableIValue* stack, uint64_t, uint64_t);
void weight_grads(StableIValue* stack, uint64_t, uint64_t);
void route(StableIValue* stack, uint64_t, uint64_t);
void unpack(StableIValue* stack, uint64_t, uint64_t);
void combine(StableIValue* stack, uint64_t, uint64_t);
void combine_grad(StableIValue* stack, uint64_t, uint64_t);
void combine_weight_grads(StableIValue* stack, uint64_t, uint64_t);

}  // namespace shardwise::cpu
