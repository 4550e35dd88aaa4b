// Never part of the library: compiled, against the headers of the torch that is installed, by a test.
//
// First every C function that the library may use, as torch 2.10, the oldest one served, has it: a
// function that came later is not declared under this target version. Then our declarations, whose
// functions have C linkage: one that differs from torch's is an error.
//
// Weak functions came with torch 2.11; compiling with that target version compares them too.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#define ALLOWED(function) static_assert(std::is_function_v<decltype(function)>)

ALLOWED(aoti_torch_delete_tensor_object);
ALLOWED(aoti_torch_device_type_cpu);
ALLOWED(aoti_torch_dtype_bfloat16);
ALLOWED(aoti_torch_dtype_element_size);
ALLOWED(aoti_torch_dtype_float16);
ALLOWED(aoti_torch_dtype_float32);
ALLOWED(aoti_torch_dtype_float64);
ALLOWED(aoti_torch_dtype_int32);
ALLOWED(aoti_torch_dtype_int64);
ALLOWED(aoti_torch_dtype_uint8);
ALLOWED(aoti_torch_empty_strided);
ALLOWED(aoti_torch_get_dim);
ALLOWED(aoti_torch_get_dtype);
ALLOWED(aoti_torch_get_numel);
ALLOWED(aoti_torch_get_size);
ALLOWED(aoti_torch_get_strides);
ALLOWED(aoti_torch_is_contiguous);
ALLOWED(aoti_torch_library_def);
ALLOWED(aoti_torch_library_init_def);
ALLOWED(aoti_torch_library_init_fragment);
ALLOWED(aoti_torch_library_init_impl);
ALLOWED(torch_delete_list);
ALLOWED(torch_get_const_data_ptr);
ALLOWED(torch_get_mutable_data_ptr);
ALLOWED(torch_get_num_threads);
ALLOWED(torch_get_thread_idx);
ALLOWED(torch_library_impl);
ALLOWED(torch_list_get_item);
ALLOWED(torch_list_push_back);
ALLOWED(torch_list_size);
ALLOWED(torch_new_list_reserve_size);
ALLOWED(torch_parallel_for);

#include "torch_abi.h"
