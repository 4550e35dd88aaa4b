#include "pages.h"

#include <cstdint>

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace shardwise::cpu {

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (bytes < 2 * kPage || end <= begin) return;
  // Advice only: a kernel without transparent pages refuses, and 4 KB pages still work.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void advise_huge_pages(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor tensor = arguments.tensor();
  if (!tensor.is_contiguous()) throw std::runtime_error("advise_huge_pages: not contiguous");
  const DType dtype = tensor.dtype();
  const size_t element = dtype == DType::kFloat32 || dtype == DType::kInt32     ? 4
                         : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2
                         : dtype == DType::kInt64 || dtype == DType::kFloat64    ? 8
                                                                                 : 1;
  advise_huge_pages(const_cast<void*>(static_cast<const void*>(tensor.data<char>())),
                    static_cast<size_t>(tensor.numel()) * element);
}

}  // namespace shardwise::cpu
