"""DLRM: dense features and table rows that meet in dot products.

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems"
(2019, arXiv:1906.00091). Attribute names give the parameters the names they have in TorchRec, so
that its state dicts load.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models.loss import LabeledBatch, LossAndScores, binary_loss
from shardwise.nn import MLP
from shardwise.ops.interaction import interaction as multiply_pairs
from shardwise.tables import EmbeddingBagCollection
from shardwise.tables.collection import list_outputs


class SparseArch(nn.Module):
    """Bags of ids to one vector per feature.

    Args:
        embedding_bag_collection: All its tables have one width.

    Raises:
        ValueError: There are no tables, or their widths differ.
    """

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection) -> None:
        """Take in the collection."""
        super().__init__()
        configs = embedding_bag_collection.embedding_bag_configs()
        if not configs:
            raise ValueError("SparseArch: the collection has no tables; it needs at least one")
        self.embedding_dim: int = configs[0].embedding_dim
        for config in configs:
            if config.embedding_dim != self.embedding_dim:
                raise ValueError(
                    f"SparseArch: table {config.name!r} has embedding_dim {config.embedding_dim}, "
                    f"table {configs[0].name!r} {self.embedding_dim}; all must have the same"
                )
        self.embedding_bag_collection = embedding_bag_collection
        self._sparse_feature_names = [output.name for output in list_outputs(configs)]

    @property
    def sparse_feature_names(self) -> list[str]:
        """Features in the order of the output; `feature@table` where several tables read one."""
        return self._sparse_feature_names

    def forward(self, features: KeyedJaggedTensor) -> Float[Tensor, "B F D"]:
        """Look up and pool every feature.

        Raises:
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        pooled: Tensor = self.embedding_bag_collection(features).values()
        return pooled.reshape(-1, len(self._sparse_feature_names), self.embedding_dim)


class DenseArch(nn.Module):
    """Dense features to one vector, by an MLP with ReLU after every layer.

    Args:
        in_features: Number of dense features.
        layer_sizes: Widths of the layers; the last is that of the tables.
        device: Where the parameters lie.
    """

    def __init__(
        self, in_features: int, layer_sizes: list[int], device: torch.device | str | None = None
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.model = MLP(in_features, layer_sizes, device=device)

    def forward(self, features: Float[Tensor, "B dense"]) -> Float[Tensor, "B D"]:
        """Embed the dense features.

        Raises:
            ValueError: Their number is not `in_features`.
        """
        embedded: Tensor = self.model(features)
        return embedded


class InteractionArch(nn.Module):
    """Dot products of all pairs among the dense vector and the sparse ones.

    Vector 0 is the dense one. After the dense vector itself come the products of the pairs (0, 1),
    (0, 2), …, (1, 2), …

    Args:
        num_sparse_features: F, the number of sparse vectors; with none, only the dense one is left.
    """

    def __init__(self, num_sparse_features: int) -> None:
        """Note the number of vectors."""
        super().__init__()
        self.num_sparse_features = num_sparse_features

    def forward(
        self, dense_features: Float[Tensor, "B D"], sparse_features: Float[Tensor, "B F D"]
    ) -> Float[Tensor, "B dots"]:
        """Give the dense vector and the products, D + F(F + 1)/2 columns.

        Raises:
            ValueError: The number of sparse vectors, or their width, is another.
        """
        if self.num_sparse_features <= 0:
            return dense_features
        check_vectors(self, self.num_sparse_features, dense_features, sparse_features)
        return multiply_pairs(dense_features, sparse_features)


def check_vectors(
    interaction: nn.Module,
    num_sparse: int,
    dense_features: Float[Tensor, "B D"],
    sparse_features: Float[Tensor, "B F D_"],
) -> None:
    """Check that an interaction gets its number of sparse vectors, as wide as the dense one.

    Raises:
        ValueError: Their number or width is another.
    """
    width = dense_features.shape[1]
    if sparse_features.shape[1:] != (num_sparse, width):
        raise ValueError(
            f"{type(interaction).__name__}: got {sparse_features.shape[1]} sparse vectors of width "
            f"{sparse_features.shape[2]}, wants {num_sparse} of the dense one's, {width}"
        )


def _dot_products(num_sparse: int, width: int) -> tuple[nn.Module, int]:
    return InteractionArch(num_sparse), width + num_sparse * (num_sparse + 1) // 2


class OverArch(nn.Module):
    """Interactions to logits: an MLP with ReLU after every layer but the last.

    Args:
        in_features: Columns of the input.
        layer_sizes: Widths of the layers, at least two; the last is the number of logits.
        device: Where the parameters lie.

    Raises:
        ValueError: There are fewer than two layers.
    """

    def __init__(
        self, in_features: int, layer_sizes: list[int], device: torch.device | str | None = None
    ) -> None:
        """Make the layers."""
        super().__init__()
        if len(layer_sizes) < 2:
            raise ValueError(f"OverArch: layer_sizes needs at least two widths, got {layer_sizes}")
        self.model = nn.Sequential(
            MLP(in_features, layer_sizes[:-1], device=device),
            nn.Linear(layer_sizes[-2], layer_sizes[-1], device=device),
        )

    def forward(self, features: Float[Tensor, "B dots"]) -> Float[Tensor, "B logits"]:
        """Give the logits."""
        logits: Tensor = self.model(features)
        return logits


class DLRM(nn.Module):
    """Score samples of dense features and bags of ids.

    Args:
        embedding_bag_collection: The tables, all of one width D.
        dense_in_features: Number of dense features.
        dense_arch_layer_sizes: Widths of the layers over the dense features; the last is D.
        over_arch_layer_sizes: Widths of the layers over the interactions, at least two; the last is
            the number of logits, usually 1.
        dense_device: Where the parameters lie, other than the tables'.
        interaction: Makes the interaction of F sparse vectors of width D, from (F, D): a module of
            dense [B, D] and sparse [B, F, D], and its number of columns; None is dot products.
        compile_dense: Run all parts but the tables by `torch.compile`, made at their first use.

    Raises:
        ValueError: The widths do not fit together.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dense_device: torch.device | str | None = None,
        *,
        interaction: Callable[[int, int], tuple[nn.Module, int]] | None = None,
        compile_dense: bool = False,
    ) -> None:
        """Make the dense parts."""
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection)
        width = self.sparse_arch.embedding_dim
        if list(dense_arch_layer_sizes[-1:]) != [width]:
            raise ValueError(
                f"{type(self).__name__}: dense_arch_layer_sizes {dense_arch_layer_sizes} must end "
                f"in the tables' embedding_dim, {width}"
            )
        num_sparse = len(self.sparse_arch.sparse_feature_names)
        self.dense_arch = DenseArch(dense_in_features, dense_arch_layer_sizes, dense_device)
        self.inter_arch, num_columns = (interaction or _dot_products)(num_sparse, width)
        self.over_arch = OverArch(num_columns, over_arch_layer_sizes, dense_device)
        if compile_dense:
            for part in (self.dense_arch, self.inter_arch, self.over_arch):
                part.compile()

    def forward(
        self, dense_features: Float[Tensor, "B dense"], sparse_features: KeyedJaggedTensor
    ) -> Float[Tensor, "B logits"]:
        """Give the logits.

        Args:
            dense_features: One row per sample.
            sparse_features: The bags of the same samples, one key per feature.

        Raises:
            ValueError: The dense features have another number of columns, or of samples than the
                sparse ones.
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        dense = self.dense_arch(dense_features)
        sparse = self.sparse_arch(sparse_features)
        if dense.shape[0] != sparse.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: dense_features have {dense.shape[0]} samples, "
                f"sparse_features {sparse.shape[0]}"
            )
        logits: Tensor = self.over_arch(self.inter_arch(dense, sparse))
        return logits


class DLRMTrain(nn.Module):
    """A DLRM and its loss: binary cross-entropy of the logits, the mean over the batch.

    Args:
        dlrm_module: Gives logits for dense and sparse features.
    """

    def __init__(self, dlrm_module: nn.Module) -> None:
        """Take in the model."""
        super().__init__()
        self.model = dlrm_module

    def forward(self, batch: LabeledBatch) -> LossAndScores:
        """Score a batch and compare with its labels.

        Args:
            batch: Labels are in [0, 1]: [B], or [B, k] for a model of k > 1 logits.

        Returns:
            The loss, and (loss, logits, labels) without gradient; one logit per sample is [B].

        Raises:
            ValueError: The labels have another shape than the logits.
        """
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        return binary_loss("DLRMTrain", logits, batch.labels)
