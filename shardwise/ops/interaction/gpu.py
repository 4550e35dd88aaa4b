"""The interaction on the GPU: one program per sample holds its vectors and all their products."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardwise.ops.interaction import reference

MOST_ELEMENTS = 1 << 14  # of the vectors of a sample, padded; more would not stay in registers


def _tile(dense: Tensor, sparse: Tensor) -> dict[str, int]:
    """Choose powers of two that hold the vectors and their columns; products take 16 at least."""
    vectors = max(16, triton.next_power_of_2(sparse.shape[1] + 1))
    return {"VECTORS": vectors, "COLUMNS": max(16, triton.next_power_of_2(dense.shape[1]))}


def _fits(tile: dict[str, int]) -> bool:
    return tile["VECTORS"] * max(tile.values()) <= MOST_ELEMENTS


def interaction(dense: Tensor, sparse: Tensor) -> Tensor:
    """Give the dense vector and the dot products of all pairs of vectors."""
    tile, num_sparse = _tile(dense, sparse), sparse.shape[1]
    if not _fits(tile):
        return reference.interaction(dense, sparse)
    batch, width = dense.shape
    out = dense.new_empty(batch, width + num_sparse * (num_sparse + 1) // 2)
    if batch:
        _forward[(batch,)](dense, sparse, out, num_sparse + 1, width, **tile)
    return out


def interaction_grad(grad: Tensor, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a gradient of the result to the dense vector and the sparse ones."""
    tile = _tile(dense, sparse)
    if not _fits(tile):
        return reference.interaction_grad(grad, dense, sparse)
    grads = torch.empty_like(dense), torch.empty_like(sparse)
    if len(dense):
        _backward[(len(dense),)](
            *(grad, dense, sparse, *grads, sparse.shape[1] + 1, dense.shape[1]), **tile
        )
    return grads


@triton.jit
@no_type_check
def _load_vectors(dense, sparse, sample, num_vectors, width, vectors, columns):
    """Load the vectors of a sample [VECTORS, COLUMNS], the dense one first."""
    is_column = (columns < width)[None, :]
    first = tl.load(dense + sample * width + columns, mask=columns < width, other=0.0)
    place = (sample * (num_vectors - 1) + vectors - 1)[:, None] * width + columns[None, :]
    is_sparse = ((vectors > 0) & (vectors < num_vectors))[:, None] & is_column
    others = tl.load(sparse + place, mask=is_sparse, other=0.0)
    return tl.where((vectors == 0)[:, None], first[None, :], others), place, is_sparse


@triton.jit
@no_type_check
def _pairs(vectors, num_vectors):
    """Give the place of each pair among the products, of which those with i < j exist."""
    i = tl.minimum(vectors[:, None], vectors[None, :])
    j = tl.maximum(vectors[:, None], vectors[None, :])
    return i * (2 * num_vectors - i - 1) // 2 + j - i - 1, (i != j) & (j < num_vectors)


@triton.jit
@no_type_check
def _forward(dense, sparse, out, num_vectors, width, VECTORS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    vectors, columns = tl.arange(0, VECTORS), tl.arange(0, COLUMNS)
    values, _, _ = _load_vectors(dense, sparse, sample, num_vectors, width, vectors, columns)
    products = tl.dot(values, tl.trans(values), input_precision="ieee")
    start = out + sample * (width + num_vectors * (num_vectors - 1) // 2)
    first = tl.load(dense + sample * width + columns, mask=columns < width, other=0.0)
    tl.store(start + columns, first, mask=columns < width)
    pairs, is_pair = _pairs(vectors, num_vectors)
    is_pair = is_pair & (vectors[:, None] < vectors[None, :])
    tl.store(start + width + pairs, products, mask=is_pair)


@triton.jit
@no_type_check
def _backward(
    grad, dense, sparse, dense_grad, sparse_grad, num_vectors, width,
    VECTORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    vectors, columns = tl.arange(0, VECTORS), tl.arange(0, COLUMNS)
    values, place, is_sparse = _load_vectors(
        dense, sparse, sample, num_vectors, width, vectors, columns
    )
    start = grad + sample * (width + num_vectors * (num_vectors - 1) // 2)
    pairs, is_pair = _pairs(vectors, num_vectors)
    products = tl.load(start + width + pairs, mask=is_pair, other=0.0)
    grads = tl.dot(products, values, input_precision="ieee")
    tl.store(sparse_grad + place, grads, mask=is_sparse)
    own = tl.sum(tl.where((vectors == 0)[:, None], grads, 0.0), 0)
    own += tl.load(start + columns, mask=columns < width, other=0.0)
    tl.store(dense_grad + sample * width + columns, own, mask=columns < width)
