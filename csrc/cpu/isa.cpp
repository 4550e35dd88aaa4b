#include "isa.h"

#include <cstdlib>
#include <string_view>

namespace shardwise::cpu {
namespace {

const IsaKernels& choose() {
#ifdef SHARDWISE_ONLY_BASELINE
  return baseline::kernels;
#else
  const char* asked = std::getenv("SHARDWISE_OPS");
  const std::string_view name = asked == nullptr ? "" : asked;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "baseline") return baseline::kernels;
  if (has_avx512 && name != "avx2") return avx512::kernels;
  return has_avx2 ? avx2::kernels : baseline::kernels;
#endif
}

}  // namespace

const IsaKernels& isa() {
  static const IsaKernels& chosen = choose();
  return chosen;
}

}  // namespace shardwise::cpu
