// Stochastic rounding with bits keyed by (seed, step, table, row, column); see ops/lookup/rounding.py.
#pragma once

#include "vector.h"

namespace shardwise::cpu::SHARDWISE_ISA {

SHARDWISE_INLINE Bits mix_lanes(Bits x) {
  x = (x ^ (x >> splat_bits(16))) * splat_bits(0x85ebca6bu);
  x = (x ^ (x >> splat_bits(13))) * splat_bits(0xc2b2ae35u);
  return x ^ (x >> splat_bits(16));
}

SHARDWISE_INLINE uint32_t row_key(uint32_t key, int64_t row) {
  return mix(mix(key + static_cast<uint32_t>(row)) + static_cast<uint32_t>(row >> 32));
}

// Bits for sixteen columns from `column` on.
SHARDWISE_INLINE Bits random_bits(uint32_t row_key, int64_t column) {
  uint32_t columns[kLanes];
  for (int i = 0; i < kLanes; ++i) columns[i] = static_cast<uint32_t>(column + i) * 0x9e3779b1u;
  Bits lanes;
  std::memcpy(&lanes, columns, sizeof(columns));
  return mix_lanes(splat_bits(row_key) ^ lanes);
}

// Values that the type holds exactly, so that the store that follows rounds nothing.
SHARDWISE_INLINE Floats round_to(const BFloat*, const Floats& x, const Bits& random) {
  const Bits raw = as_bits(x);
  const Bits size = raw & splat_bits(0x7fffffff);
  const Bits rounded = (size + (random & splat_bits(0xffff))) & splat_bits(0xffff0000);
  const auto is_finite = below(size, splat_bits(0x7f800000));
  return as_floats(select(is_finite, rounded | (raw & splat_bits(0x80000000)), raw));
}

SHARDWISE_INLINE Floats round_to(const Half*, const Floats& x, const Bits& random) {
  const Bits raw = as_bits(x);
  const Bits size = raw & splat_bits(0x7fffffff);
  const Bits exponent = size >> splat_bits(23);
  Bits normal = (size + (random & splat_bits(0x1fff))) & splat_bits(0xffffe000);
  normal = select(below(normal, splat_bits(0x477fe001)), normal, splat_bits(0x477fe000));
  // Below 2^-14: a count of 2^-24, float16's smallest step.
  const auto is_tiny = below(exponent, splat_bits(113));
  Bits shift = select(is_tiny, splat_bits(126) - exponent, splat_bits(0));
  shift = select(below(shift, splat_bits(31)), shift, splat_bits(31));
  const Bits mantissa = (size & splat_bits(0x7fffff)) | splat_bits(0x800000);
  const Bits below_one = (splat_bits(1) << shift) - splat_bits(1);
  const Bits units = (mantissa + (random & below_one)) >> shift;
  const Floats count = each<NativeFloats>([&](int i) {
    return __builtin_convertvector(reinterpret_cast<NativeInts>(units.part[i]), NativeFloats);
  });
  const Bits tiny = as_bits(count * splat(0x1p-24f));
  const Bits rounded = select(is_tiny, tiny, normal) | (raw & splat_bits(0x80000000));
  return as_floats(select(below(size, splat_bits(0x7f800000)), rounded, raw));
}

}  // namespace shardwise::cpu::SHARDWISE_ISA
