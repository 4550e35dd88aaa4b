"""The definition of the interaction, in plain PyTorch."""

import torch
from torch import Tensor


def _pairs(num_vectors: int, device: torch.device) -> Tensor:
    """Number the pairs (i, j), i < j, row by row, as i * num_vectors + j."""
    above: Tensor = torch.triu_indices(num_vectors, num_vectors, 1, device=device)
    return above[0] * num_vectors + above[1]


def interaction(dense: Tensor, sparse: Tensor) -> Tensor:
    """Give the dense vector and the dot products of all pairs of vectors."""
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)  # (B, N, D)
    dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)  # (B, N²)
    pairs = dots.index_select(1, _pairs(vectors.shape[1], dense.device))
    return torch.cat([dense, pairs], dim=1)


def interaction_grad(grad: Tensor, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a gradient of the result to the dense vector and the sparse ones."""
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)  # (B, N, D)
    batch, num_vectors, width = vectors.shape
    above = grad.new_zeros(batch, num_vectors**2)
    above = above.index_add(1, _pairs(num_vectors, dense.device), grad[:, width:])
    above = above.view(batch, num_vectors, num_vectors)
    grads = torch.bmm(above + above.transpose(1, 2), vectors)  # (B, N, D)
    return grads[:, 0] + grad[:, :width], grads[:, 1:].contiguous()
