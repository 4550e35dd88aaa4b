"""Interaction: dot products of all pairs of vectors, of which only those above the diagonal exist.

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems"
(2019, arXiv:1906.00091). Neither the joined vectors nor the square of products is ever stored.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shardwise.ops.interaction import reference
from shardwise.ops.library import register

__all__ = ["interaction"]


def _fake(dense: Tensor, sparse: Tensor) -> Tensor:
    num_sparse = sparse.shape[1]
    columns = dense.shape[1] + num_sparse * (num_sparse + 1) // 2
    return dense.new_empty(dense.shape[0], columns)


_interaction = register("interaction", reference=reference.interaction, fake=_fake)
_interaction_grad = register(
    "interaction_grad",
    reference=reference.interaction_grad,
    fake=lambda grad, dense, sparse: (torch.empty_like(dense), torch.empty_like(sparse)),
)


def _keep_vectors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    dense, sparse = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives are asked for
        return reference.interaction_grad(grad, dense, sparse)
    grads: tuple[Tensor, Tensor] = _interaction_grad(grad.contiguous(), dense, sparse)
    return grads


torch.library.register_autograd("shardwise::interaction", _grads, setup_context=_keep_vectors)


def interaction(
    dense: Float[Tensor, "B D"], sparse: Float[Tensor, "B F D"]
) -> Float[Tensor, "B dots"]:
    """Give the dense vector and the dot products of all pairs.

    Vector 0 is the dense one. After the dense vector itself come the products of the pairs (0, 1),
    (0, 2), …, (1, 2), …

    Args:
        dense: One vector per sample.
        sparse: F vectors per sample. float32 for both takes the fast way; other dtypes, mixed
            ones too, are promoted as PyTorch does.

    Returns:
        D + F(F + 1)/2 columns, differentiable.
    """
    if dense.dtype == sparse.dtype == torch.float32:
        result: Tensor = _interaction(dense.contiguous(), sparse.contiguous())
        return result
    return reference.interaction(dense, sparse)
