"""Factorization machine and deep part over a list of embeddings.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction" (2017,
arXiv:1703.04247).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DeepFM(nn.Module):
    """Embeddings side by side through a dense module.

    Args:
        dense_module: Takes [B, sum of all columns].
    """

    def __init__(self, dense_module: nn.Module) -> None:
        """Take in the module."""
        super().__init__()
        self.dense_module = dense_module

    def forward(self, embeddings: Sequence[Float[Tensor, "B ..."]]) -> Float[Tensor, "B ..."]:
        """Join the embeddings, each flattened to one row per sample, and apply the module.

        Raises:
            ValueError: There are none, or they have different numbers of samples.
        """
        _check_samples(self, embeddings)
        result: Tensor = self.dense_module(torch.cat([e.flatten(1) for e in embeddings], dim=1))
        return result


class FactorizationMachine(nn.Module):
    """Sum of the products of all pairs: half of (square of the sum - sum of the squares).

    Args:
        per_dimension: Pair vectors by their dot product, as Rendle (2010) does; all embeddings
            then end in one width. Otherwise, as TorchRec does, pair all the scalars of a sample.
    """

    def __init__(self, *, per_dimension: bool = False) -> None:
        """Note what is paired."""
        super().__init__()
        self.per_dimension = per_dimension

    def forward(self, embeddings: Sequence[Float[Tensor, "B ..."]]) -> Float[Tensor, "B 1"]:
        """Give one number per sample.

        Args:
            embeddings: [B, D], or [B, n, D] for n vectors.

        Raises:
            ValueError: There are none, or their samples, or where it matters their widths, differ.
        """
        _check_samples(self, embeddings)
        if self.per_dimension:
            vectors = torch.cat(_as_vectors(embeddings), dim=1)  # (B, n, D)
        else:
            vectors = torch.cat([e.flatten(1) for e in embeddings], dim=1).unsqueeze(2)
        pairs = vectors.sum(1).square() - vectors.square().sum(1)
        return 0.5 * pairs.sum(1, keepdim=True)


def _as_vectors(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Give each embedding as [B, n, D]."""
    width = embeddings[0].shape[-1]
    for i, embedding in enumerate(embeddings):
        if embedding.dim() < 2 or embedding.shape[-1] != width:
            raise ValueError(
                f"FactorizationMachine: embedding {i} has shape {list(embedding.shape)}, embedding "
                f"0 {list(embeddings[0].shape)}; per dimension all must end in the same width"
            )
    return [embedding.flatten(1).unflatten(1, (-1, width)) for embedding in embeddings]


def _check_samples(module: nn.Module, embeddings: Sequence[Tensor]) -> None:
    name = type(module).__name__
    if not embeddings:
        raise ValueError(f"{name}: got no embeddings; it needs at least one")
    for i, embedding in enumerate(embeddings):
        if embedding.shape[0] != embeddings[0].shape[0]:
            raise ValueError(
                f"{name}: embedding {i} has {embedding.shape[0]} samples, embedding 0 "
                f"{embeddings[0].shape[0]}; all must have the same number"
            )
