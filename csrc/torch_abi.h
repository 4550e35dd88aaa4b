// The C functions of PyTorch's stable ABI that this library uses, and RAII around their handles.
//
// Declared by hand, so that no torch header is needed to build and one binary serves every torch
// from 2.10 on. `check_abi.cpp` compares these declarations with the installed torch's headers.
//
// Calling convention of a kernel: one 64-bit word per argument of its schema. Tensor: an owned
// handle; int: the value; float: the bits of a double; bool: the low byte; T[]: an owned list of
// such words. Results overwrite the words from the first on.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using StableListHandle = StableListOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* result);
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* result);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** result);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* result);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* result);
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* result);
size_t aoti_torch_dtype_element_size(int32_t dtype);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_uint8();
AOTITorchError aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line,
                                           TorchLibraryHandle* result);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file,
                                            uint32_t line, TorchLibraryHandle* result);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);

AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*kernel)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t abi_version);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** result);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** result);
AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* result);
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item);
AOTITorchError torch_list_size(StableListHandle list, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* item);
AOTITorchError torch_delete_list(StableListHandle list);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                  void (*body)(int64_t begin, int64_t end, void* context),
                                  void* context);
AOTITorchError torch_get_num_threads(uint32_t* result);

// Of torch 2.11 on; null under 2.10.
__attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* deleter_context);
}

namespace shardwise {

// 2.10.0, the oldest torch whose behaviour of these functions is relied on.
constexpr uint64_t kAbiVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

inline void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("shardwise: torch refused ") + what);
}

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64, kUInt8, kOther };

inline DType dtype_from_code(int32_t code) {
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_int64()) return DType::kInt64;
  if (code == aoti_torch_dtype_int32()) return DType::kInt32;
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (code == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (code == aoti_torch_dtype_uint8()) return DType::kUInt8;
  return DType::kOther;
}

// An owned tensor handle. `name` is only for messages.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  // A contiguous CPU tensor with uninitialised elements.
  static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype_code);

  // A contiguous CPU tensor of the caller's memory; `free_memory` is called with it and `context`
  // when the last tensor that uses it goes. Needs `torch_from_blob`.
  static Tensor from_memory(void* data, const std::vector<int64_t>& sizes, int32_t dtype_code,
                            void (*free_memory)(void* data, void* context), void* context);

  int64_t dim() const { return query(aoti_torch_get_dim, "the number of dimensions"); }
  int64_t numel() const { return query(aoti_torch_get_numel, "the number of elements"); }
  int64_t size(int64_t d) const {
    int64_t result = 0;
    check(aoti_torch_get_size(handle_, d, &result), "a size");
    return result;
  }
  int64_t stride(int64_t d) const {
    int64_t* strides = nullptr;
    check(aoti_torch_get_strides(handle_, &strides), "the strides");
    return strides[d];
  }
  int32_t dtype_code() const {
    int32_t code = 0;
    check(aoti_torch_get_dtype(handle_, &code), "the dtype");
    return code;
  }
  DType dtype() const { return dtype_from_code(dtype_code()); }
  size_t element_size() const { return aoti_torch_dtype_element_size(dtype_code()); }
  bool is_contiguous() const {
    bool result = false;
    check(aoti_torch_is_contiguous(handle_, &result), "the contiguity");
    return result;
  }
  template <typename T>
  const T* data() const {
    const void* result = nullptr;
    check(torch_get_const_data_ptr(handle_, &result), "a data pointer");
    return static_cast<const T*>(result);
  }
  template <typename T>
  T* mutable_data() const {
    void* result = nullptr;
    check(torch_get_mutable_data_ptr(handle_, &result), "a data pointer");
    return static_cast<T*>(result);
  }
  StableIValue release() {
    return reinterpret_cast<StableIValue>(std::exchange(handle_, nullptr));
  }

 private:
  int64_t query(AOTITorchError (*ask)(AtenTensorHandle, int64_t*), const char* what) const {
    int64_t result = 0;
    check(ask(handle_, &result), what);
    return result;
  }

  AtenTensorHandle handle_;
};

inline std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

inline Tensor Tensor::empty(const std::vector<int64_t>& sizes, int32_t dtype_code) {
  const std::vector<int64_t> strides = strides_of(sizes);
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype_code, aoti_torch_device_type_cpu(), 0, &handle),
        "an allocation");
  return Tensor(handle);
}

inline Tensor Tensor::from_memory(void* data, const std::vector<int64_t>& sizes,
                                  int32_t dtype_code,
                                  void (*free_memory)(void* data, void* context), void* context) {
  constexpr int32_t kStrided = 0;
  const std::vector<int64_t> strides = strides_of(sizes);
  AtenTensorHandle handle = nullptr;
  check(torch_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                        dtype_code, aoti_torch_device_type_cpu(), -1, &handle, kStrided, nullptr,
                        0, free_memory, context),
        "memory for a result");
  return Tensor(handle);
}

// The words of one call, read in order of the schema. Each owned word is taken exactly once, so a
// kernel reads all of its arguments before it checks any: what it throws over is then freed.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack), next_(stack) {}

  Tensor tensor() { return Tensor(reinterpret_cast<AtenTensorHandle>(*next_++)); }
  int64_t integer() { return static_cast<int64_t>(*next_++); }
  bool boolean() { return (*next_++ & 0xff) != 0; }
  double number() {
    double result;
    std::memcpy(&result, next_++, sizeof(result));
    return result;
  }
  std::vector<Tensor> tensors() {
    std::vector<Tensor> result;
    for_items([&](StableIValue item) {
      result.emplace_back(reinterpret_cast<AtenTensorHandle>(item));
    });
    return result;
  }
  std::vector<int64_t> integers() {
    std::vector<int64_t> result;
    for_items([&](StableIValue item) { result.push_back(static_cast<int64_t>(item)); });
    return result;
  }
  std::vector<double> numbers() {
    std::vector<double> result;
    for_items([&](StableIValue item) {
      std::memcpy(&result.emplace_back(), &item, sizeof(item));
    });
    return result;
  }
  // Results, in order; call after all arguments are read.
  void give(Tensor&& tensor) { stack_[given_++] = tensor.release(); }
  void give(std::vector<Tensor>&& tensors) {
    StableListHandle list = nullptr;
    check(torch_new_list_reserve_size(tensors.size(), &list), "a list");
    for (Tensor& tensor : tensors) check(torch_list_push_back(list, tensor.release()), "an item");
    stack_[given_++] = reinterpret_cast<StableIValue>(list);
  }

 private:
  template <typename Take>
  void for_items(Take take) {
    auto list = reinterpret_cast<StableListHandle>(*next_++);
    size_t size = 0;
    check(torch_list_size(list, &size), "a list's size");
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      check(torch_list_get_item(list, i, &item), "a list's item");
      take(item);
    }
    check(torch_delete_list(list), "to free a list");
  }

  StableIValue* stack_;
  StableIValue* next_;
  size_t given_ = 0;
};

using Kernel = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs);

// Runs body(begin, end) on torch's thread pool, over [0, count) in pieces of at least `grain`.
// The body must not throw: an exception that leaves a worker loses its text.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  check(torch_parallel_for(
            0, count, grain,
            [](int64_t begin, int64_t end, void* context) {
              (*static_cast<Plain*>(context))(begin, end);
            },
            const_cast<void*>(static_cast<const void*>(&body))),
        "a parallel loop");
}

inline int64_t num_threads() {
  uint32_t result = 1;
  check(torch_get_num_threads(&result), "the number of threads");
  return result;
}

}  // namespace shardwise
