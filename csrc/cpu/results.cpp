#include "results.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "kernels.h"
#include "pages.h"

namespace shardwise::cpu {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kStep = size_t{64} << 10;    // of sizes below a page
constexpr size_t kLarge = size_t{128} << 10;  // from here on results keep their memory
constexpr size_t kMostIdle = size_t{256} << 20;

// Blocks that no tensor uses at the moment, the one freed last at the end.
class IdleBlocks {
 public:
  // The smallest block that fits and is not twice too large, or a fresh one. `bytes` becomes its size.
  void* take(size_t* bytes) {
    const size_t unit = *bytes < kPage ? kStep : kPage;
    *bytes = (*bytes + unit - 1) / unit * unit;
    if (void* data = reuse(bytes)) return data;
    void* data = std::aligned_alloc(unit, *bytes);
    if (data == nullptr) throw std::bad_alloc();
    advise_huge_pages(data, *bytes);
    return data;
  }

  void give_back(void* data, size_t bytes) noexcept {
    std::vector<Block> unwanted;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back({data, bytes});
      total_ += bytes;
      while (total_ > kMostIdle) {
        unwanted.push_back(blocks_.front());
        total_ -= blocks_.front().bytes;
        blocks_.erase(blocks_.begin());
      }
    } catch (const std::bad_alloc&) {  // of the lists: then memory is not kept, at worst lost
    }
    for (const Block& block : unwanted) std::free(block.data);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  void* reuse(size_t* bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= *bytes && block->bytes < 2 * *bytes;
      if (fits && (best == blocks_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == blocks_.end()) return nullptr;
    void* data = best->data;
    *bytes = best->bytes;
    total_ -= best->bytes;
    blocks_.erase(best);
    return data;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t total_ = 0;
};

IdleBlocks& idle_blocks() {
  static IdleBlocks& blocks = *new IdleBlocks;  // never destroyed: tensors may outlive statics
  return blocks;
}

void give_back(void* data, void* bytes) {
  idle_blocks().give_back(data, reinterpret_cast<size_t>(bytes));
}

}  // namespace

Tensor make_result(const std::vector<int64_t>& sizes, int32_t dtype_code) {
  size_t bytes = aoti_torch_dtype_element_size(dtype_code);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kLarge || torch_from_blob == nullptr) {  // torch 2.10 has no such function
    Tensor result = Tensor::empty(sizes, dtype_code);
    advise_huge_pages(result.mutable_data<char>(), bytes);
    return result;
  }
  void* data = idle_blocks().take(&bytes);
  return Tensor::from_memory(data, sizes, dtype_code, give_back, reinterpret_cast<void*>(bytes));
}

void new_result(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor like = arguments.tensor();
  arguments.give(make_result({arguments.integer()}, like.dtype_code()));
}

}  // namespace shardwise::cpu
