// Sixteen floats at a time, on any instruction set, with the same bits on all of them.
//
// A sum over columns is always kept in sixteen partial sums that are added in one order, and no
// multiply-add is contracted (-ffp-contract=off), so that results do not depend on the machine.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"

#define SHARDWISE_INLINE inline __attribute__((always_inline))
#define SHARDWISE_INLINE_BODY __attribute__((always_inline))  // of a lambda

namespace shardwise::cpu::SHARDWISE_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

typedef float NativeFloats __attribute__((vector_size(kNative * 4)));
typedef uint32_t NativeBits __attribute__((vector_size(kNative * 4)));
typedef int32_t NativeInts __attribute__((vector_size(kNative * 4)));
typedef uint16_t NativeShorts __attribute__((vector_size(kNative * 2)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <typename Native>
struct Lanes {
  Native part[kParts];
};
using Floats = Lanes<NativeFloats>;
using Bits = Lanes<NativeBits>;

template <typename Native, typename Op>
SHARDWISE_INLINE Lanes<Native> each(Op op) {
  Lanes<Native> result;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) result.part[i] = op(i);
  return result;
}

#define SHARDWISE_OPERATOR(symbol)                                                          \
  template <typename Native>                                                                \
  SHARDWISE_INLINE Lanes<Native> operator symbol(const Lanes<Native>& a,                    \
                                                 const Lanes<Native>& b) {                  \
    return each<Native>([&](int i) { return a.part[i] symbol b.part[i]; });                 \
  }
SHARDWISE_OPERATOR(+)
SHARDWISE_OPERATOR(-)
SHARDWISE_OPERATOR(*)
SHARDWISE_OPERATOR(/)
SHARDWISE_OPERATOR(&)
SHARDWISE_OPERATOR(|)
SHARDWISE_OPERATOR(^)
SHARDWISE_OPERATOR(<<)
SHARDWISE_OPERATOR(>>)
#undef SHARDWISE_OPERATOR

SHARDWISE_INLINE Floats splat(float x) {
  return each<NativeFloats>([&](int) { return x - NativeFloats{}; });
}
SHARDWISE_INLINE Bits splat_bits(uint32_t x) {
  return each<NativeBits>([&](int) { return x - NativeBits{}; });
}
SHARDWISE_INLINE Bits as_bits(const Floats& x) {
  return each<NativeBits>([&](int i) { return reinterpret_cast<NativeBits>(x.part[i]); });
}
SHARDWISE_INLINE Floats as_floats(const Bits& x) {
  return each<NativeFloats>([&](int i) { return reinterpret_cast<NativeFloats>(x.part[i]); });
}
// a where `test` holds, else b; `test` is all ones or zeros per lane.
template <typename Native>
SHARDWISE_INLINE Lanes<Native> select(const Lanes<NativeInts>& test, const Lanes<Native>& a,
                                      const Lanes<Native>& b) {
  return each<Native>([&](int i) { return test.part[i] ? a.part[i] : b.part[i]; });
}
SHARDWISE_INLINE Lanes<NativeInts> below(const Bits& a, const Bits& b) {
  return each<NativeInts>([&](int i) { return a.part[i] < b.part[i]; });
}

// Clamped as torch does: NaN stays NaN.
SHARDWISE_INLINE Floats clamp(const Floats& x, float limit) {
  return each<NativeFloats>([&](int i) {
    const NativeFloats high = limit - NativeFloats{}, low = -high;
    NativeFloats y = x.part[i] > high ? high : x.part[i];
    return y < low ? low : y;
  });
}

SHARDWISE_INLINE Floats sqrt(const Floats& x) {
  return each<NativeFloats>([&](int i) -> NativeFloats {
#if defined(__AVX512F__)
    return reinterpret_cast<NativeFloats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x.part[i])));
#elif defined(__AVX2__)
    return reinterpret_cast<NativeFloats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x.part[i])));
#elif defined(__x86_64__)
    return reinterpret_cast<NativeFloats>(_mm_sqrt_ps(reinterpret_cast<__m128>(x.part[i])));
#else
    NativeFloats root;
    for (int j = 0; j < kNative; ++j) root[j] = __builtin_sqrtf(x.part[i][j]);
    return root;
#endif
  });
}

// The sum of all lanes, in one order on every instruction set: halves are added until one is left.
SHARDWISE_INLINE float sum(const Floats& x) {
  typedef float Four __attribute__((vector_size(16)));
  Four quarter[4];
  std::memcpy(quarter, &x, sizeof(quarter));
  const Four four = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// ---- rows in memory

// Part by part: as one piece the compiler moves 16 bytes at a time through the stack, which stalls.
SHARDWISE_INLINE Floats load(const float* p) {
  return each<NativeFloats>([&](int i) {
    NativeFloats part;
    std::memcpy(&part, p + i * kNative, sizeof(part));
    return part;
  });
}
SHARDWISE_INLINE void store(float* p, const Floats& x) {
  for (int i = 0; i < kParts; ++i) std::memcpy(p + i * kNative, &x.part[i], sizeof(x.part[i]));
}

// Past the cache, to an address that 64 divides: what is overwritten is not read first. A `fence`
// must follow before another thread reads it.
SHARDWISE_INLINE void stream(float* p, const Floats& x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(x.part[0]));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) {
    _mm256_stream_ps(p + i * kNative, reinterpret_cast<__m256>(x.part[i]));
  }
#elif defined(__x86_64__)
  for (int i = 0; i < kParts; ++i) {
    _mm_stream_ps(p + i * kNative, reinterpret_cast<__m128>(x.part[i]));
  }
#else
  store(p, x);
#endif
}
SHARDWISE_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

SHARDWISE_INLINE Bits load_shorts(const void* p) {
  return each<NativeBits>([&](int i) {
    NativeShorts raw;
    std::memcpy(&raw, static_cast<const uint16_t*>(p) + i * kNative, sizeof(raw));
    return __builtin_convertvector(raw, NativeBits);
  });
}
SHARDWISE_INLINE void store_shorts(void* p, const Bits& x) {
  for (int i = 0; i < kParts; ++i) {
    const NativeShorts raw = __builtin_convertvector(x.part[i], NativeShorts);
    std::memcpy(static_cast<uint16_t*>(p) + i * kNative, &raw, sizeof(raw));
  }
}

SHARDWISE_INLINE Floats load(const BFloat* p) {
  return as_floats(load_shorts(p) << splat_bits(16));
}

// The exponent is moved by a multiplication, which also normalises float16's subnormals.
SHARDWISE_INLINE Floats load(const Half* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{reinterpret_cast<NativeFloats>(_mm512_cvtph_ps(raw))}};
#else
  const Bits raw = load_shorts(p);
  const Bits size = raw & splat_bits(0x7fff);
  const Bits finite = as_bits(as_floats(size << splat_bits(13)) * splat(0x1p112f));
  const Bits special = (size << splat_bits(13)) | splat_bits(0x7f800000);
  const Bits magnitude = select(below(size, splat_bits(0x7c00)), finite, special);
  return as_floats(magnitude | ((raw & splat_bits(0x8000)) << splat_bits(16)));
#endif
}

// To the nearest, ties to even.
SHARDWISE_INLINE void store(BFloat* p, const Floats& x) {
  const Bits raw = as_bits(x);
  const Bits odd = (raw >> splat_bits(16)) & splat_bits(1);
  const Bits rounded = (raw + splat_bits(0x7fff) + odd) >> splat_bits(16);
  const Bits quiet = (raw >> splat_bits(16)) | splat_bits(0x40);
  const auto is_number = below(raw & splat_bits(0x7fffffff), splat_bits(0x7f800001));
  store_shorts(p, select(is_number, rounded, quiet));
}

SHARDWISE_INLINE void store(Half* p, const Floats& x) {
#if defined(__AVX512F__)
  const __m256i raw = _mm512_cvtps_ph(reinterpret_cast<__m512>(x.part[0]), 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), raw);
#else
  const Bits raw = as_bits(x);
  const Bits size = raw & splat_bits(0x7fffffff);
  // Normal: round the 13 bits cut off, then move the exponent. Past 65519 this gives infinity.
  const Bits odd = (size >> splat_bits(13)) & splat_bits(1);
  const Bits normal = (size + splat_bits(0xfff) + odd - splat_bits(112u << 23)) >> splat_bits(13);
  // Subnormal: adding a half leaves the rounded count of 2^-24 in the low bits.
  const Bits tiny = as_bits(as_floats(size) + splat(0.5f)) - splat_bits(0x3f000000);
  const Bits infinite = select(below(splat_bits(0x7f800000), size), splat_bits(0x7e00),
                               splat_bits(0x7c00));
  Bits result = select(below(size, splat_bits(113u << 23)), tiny, normal);
  result = select(below(size, splat_bits(0x477ff000)), result, infinite);
  store_shorts(p, result | ((raw >> splat_bits(16)) & splat_bits(0x8000)));
#endif
}

// The last columns of a row: n of sixteen; the others read as zero and are not written.
template <typename T>
SHARDWISE_INLINE Floats load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    return {{reinterpret_cast<NativeFloats>(_mm512_maskz_loadu_ps(mask, p))}};
  }
#endif
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
SHARDWISE_INLINE void store(T* p, const Floats& x, int64_t n) {
  if (n >= kLanes) return store(p, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    return _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(x.part[0]));
  }
#endif
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

SHARDWISE_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

}  // namespace shardwise::cpu::SHARDWISE_ISA
