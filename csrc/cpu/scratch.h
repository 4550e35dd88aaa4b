// Memory that a thread keeps between calls: fresh pages would cost more than the work done in them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "pages.h"

namespace shardwise::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` uninitialised elements; earlier contents are lost when it must grow.
  template <typename T>
  T* take(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > bytes_) grow(bytes);
    return static_cast<T*>(data_);
  }

 private:
  void grow(size_t bytes) {
    constexpr size_t kPage = size_t{2} << 20;
    const size_t align = bytes < kPage ? 64 : kPage;
    bytes += bytes / 4;
    bytes = (bytes + align - 1) / align * align;
    std::free(data_);
    bytes_ = 0;
    data_ = std::aligned_alloc(align, bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
    advise_huge_pages(data_, bytes);
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace shardwise::cpu
