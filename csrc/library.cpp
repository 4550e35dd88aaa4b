// Defines the operators of `torch.ops.shardwise` and registers their CPU kernels on load.
#include <string>
#include <string_view>

#include "cpu/kernels.h"
#include "torch_abi.h"

namespace shardwise {
namespace {

// The one text of all schemas; Python reads the same file when this library is absent.
constexpr std::string_view kSchemas =
#include "../shardwise/ops/schemas.inc"
    ;

struct Entry {
  const char* name;
  Kernel kernel;
};

constexpr Entry kCpuKernels[] = {
    {"advise_huge_pages", cpu::advise_huge_pages},
    {"new_result", cpu::new_result},
    {"offsets_from_lengths", cpu::offsets_from_lengths},
    {"permute_segments", cpu::permute_segments},
    {"regroup", cpu::regroup},
    {"regroup_grad", cpu::regroup_grad},
    {"interaction", cpu::interaction},
    {"interaction_grad", cpu::interaction_grad},
    {"lookup", cpu::lookup},
    {"count_bad_ids", cpu::count_bad_ids},
    {"update_", cpu::update_},
    {"row_sums", cpu::row_sums},
    {"row_grads", cpu::row_grads},
    {"weight_grads", cpu::weight_grads},
    {"route", cpu::route},
    {"unpack", cpu::unpack},
    {"combine", cpu::combine},
    {"combine_grad", cpu::combine_grad},
    {"combine_weight_grads", cpu::combine_weight_grads},
};

void define_schemas() {
  TorchLibraryHandle library = nullptr;
  check(aoti_torch_library_init_def("shardwise", __FILE__, __LINE__, &library), "a library");
  size_t start = 0;
  while (start < kSchemas.size()) {
    const size_t end = kSchemas.find('\n', start);
    const std::string schema(kSchemas.substr(start, end - start));
    if (!schema.empty()) check(aoti_torch_library_def(library, schema.c_str()), schema.c_str());
    if (end == std::string_view::npos) break;
    start = end + 1;
  }
}

void register_kernels() {
  TorchLibraryHandle library = nullptr;
  check(aoti_torch_library_init_impl("shardwise", "CPU", __FILE__, __LINE__, &library), "a key");
  for (const Entry& entry : kCpuKernels) {
    check(torch_library_impl(library, entry.name, entry.kernel, kAbiVersion), entry.name);
  }
}

// The handles are never freed: an operator stays registered as long as the process lives.
const bool kIsRegistered = [] {
  define_schemas();
  register_kernels();
  return true;
}();

}  // namespace
}  // namespace shardwise
