// The operators `interaction` and `interaction_grad`: dot products of all pairs of vectors.
#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "kernels.h"
#include "results.h"
#include "scratch.h"

namespace shardwise::cpu {
namespace {

constexpr int64_t kGrainProducts = 1 << 20;  // multiplications worth a thread

void require(bool is_right, const char* what) {
  if (!is_right) throw std::runtime_error(std::string("interaction: ") + what);
}

Interaction describe(const Tensor& dense, const Tensor& sparse) {
  require(dense.dtype() == DType::kFloat32 && sparse.dtype() == DType::kFloat32 &&
              dense.is_contiguous() && sparse.is_contiguous(),
          "vectors must be float32, contiguous");
  require(dense.dim() == 2 && sparse.dim() == 3 && dense.size(0) == sparse.size(0) &&
              dense.size(1) == sparse.size(2),
          "needs dense [B, D] and sparse [B, F, D]");
  Interaction all{};
  all.dense = dense.data<float>();
  all.sparse = sparse.data<float>();
  all.num_vectors = sparse.size(1) + 1;
  all.width = dense.size(1);
  all.last = dense.size(0);
  return all;
}

void run(const Interaction& all, void (*kernel)(const Interaction&)) {
  const int64_t products = all.num_vectors * all.num_vectors * all.width / 2 + all.width + 1;
  parallel_for(all.last, kGrainProducts / products + 1, [&](int64_t first, int64_t last) {
    thread_local Scratch scratch;
    Interaction part = all;
    part.first = first;
    part.last = last;
    part.scratch = scratch.take<float>(all.scratch_size());
    kernel(part);
  });
}

}  // namespace

void interaction(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor dense = arguments.tensor(), sparse = arguments.tensor();
  Interaction all = describe(dense, sparse);
  Tensor result = make_result({all.last, all.num_columns()}, aoti_torch_dtype_float32());
  all.out = result.mutable_data<float>();
  run(all, isa().interact);
  arguments.give(std::move(result));
}

void interaction_grad(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor grad = arguments.tensor();
  const Tensor dense = arguments.tensor(), sparse = arguments.tensor();
  Interaction all = describe(dense, sparse);
  require(grad.dtype() == DType::kFloat32 && grad.is_contiguous() && grad.dim() == 2 &&
              grad.size(0) == all.last && grad.size(1) == all.num_columns(),
          "the gradient must be float32, contiguous, of the result's shape");
  Tensor dense_grad = make_result({all.last, all.width}, aoti_torch_dtype_float32());
  Tensor sparse_grad = make_result({all.last, all.num_vectors - 1, all.width}, aoti_torch_dtype_float32());
  all.grad = grad.data<float>();
  all.dense_grad = dense_grad.mutable_data<float>();
  all.sparse_grad = sparse_grad.mutable_data<float>();
  run(all, isa().interact_grad);
  arguments.give(std::move(dense_grad));
  arguments.give(std::move(sparse_grad));
}

}  // namespace shardwise::cpu
