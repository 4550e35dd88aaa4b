"""DeepFM: dense features and table rows that meet in a factorization machine and in a deep part.

Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction" (2017,
arXiv:1703.04247). Parameters have the names they have in TorchRec, so that its state dicts load.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models.dlrm import SparseArch, check_vectors
from shardwise.nn import DeepFM, FactorizationMachine
from shardwise.tables import EmbeddingBagCollection


class FMInteractionArch(nn.Module):
    """The dense vector, a deep part over all vectors, and their factorization machine.

    Args:
        fm_in_features: Columns of all vectors, (F + 1) D.
        sparse_feature_names: Names of the F sparse vectors.
        deep_fm_dimension: Columns of the deep part: one layer with ReLU.
        device: Where the parameters lie.
        per_dimension: Pair vectors in the factorization machine, as in the paper, and not scalars.
    """

    def __init__(
        self,
        fm_in_features: int,
        sparse_feature_names: list[str],
        deep_fm_dimension: int,
        *,
        device: torch.device | str | None = None,
        per_dimension: bool = False,
    ) -> None:
        """Make the deep part."""
        super().__init__()
        self.sparse_feature_names = sparse_feature_names
        layer = nn.Linear(fm_in_features, deep_fm_dimension, device=device)
        self.deep_fm = DeepFM(nn.Sequential(layer, nn.ReLU()))
        self.fm = FactorizationMachine(per_dimension=per_dimension)

    def forward(
        self, dense_features: Float[Tensor, "B D"], sparse_features: Float[Tensor, "B F D"]
    ) -> Float[Tensor, "B columns"]:
        """Give the dense vector, the deep part and the factorization machine, side by side.

        Raises:
            ValueError: The number of sparse vectors, or their width, is another.
        """
        check_vectors(self, len(self.sparse_feature_names), dense_features, sparse_features)
        vectors = [dense_features, sparse_features]
        return torch.cat([dense_features, self.deep_fm(vectors), self.fm(vectors)], dim=1)


class SimpleDeepFMNN(nn.Module):
    """Score samples of dense features and bags of ids, by DeepFM; gives probabilities.

    Args:
        num_dense_features: Number of dense features.
        embedding_bag_collection: The tables, all of one width.
        hidden_layer_size: Width of the layer between the dense features and their vector.
        deep_fm_dimension: Columns of the deep part.
        dense_device: Where the parameters lie, other than the tables'.
        per_dimension: Pair vectors in the factorization machine, as in the paper, and not scalars.
        gives_logits: Leave the sigmoid at the end out; `DLRMTrain` wants logits.

    Raises:
        ValueError: A number is not positive, there are no tables, or their widths differ.
    """

    def __init__(
        self,
        num_dense_features: int,
        embedding_bag_collection: EmbeddingBagCollection,
        hidden_layer_size: int,
        deep_fm_dimension: int,
        *,
        dense_device: torch.device | str | None = None,
        per_dimension: bool = False,
        gives_logits: bool = False,
    ) -> None:
        """Make the dense parts."""
        super().__init__()
        for name, size in {
            "num_dense_features": num_dense_features,
            "hidden_layer_size": hidden_layer_size,
            "deep_fm_dimension": deep_fm_dimension,
        }.items():
            if size < 1:
                raise ValueError(f"SimpleDeepFMNN: {name} must be at least 1, got {size}")
        self.sparse_arch = SparseArch(embedding_bag_collection)
        width = self.sparse_arch.embedding_dim
        names = self.sparse_arch.sparse_feature_names
        hidden = nn.Linear(num_dense_features, hidden_layer_size, device=dense_device)
        embed = nn.Linear(hidden_layer_size, width, device=dense_device)
        score = nn.Linear(width + deep_fm_dimension + 1, 1, device=dense_device)
        self.dense_arch = _Layers(hidden, nn.ReLU(), embed, nn.ReLU())
        self.inter_arch = FMInteractionArch(
            (len(names) + 1) * width,
            names,
            deep_fm_dimension,
            device=dense_device,
            per_dimension=per_dimension,
        )
        self.over_arch = _Layers(score, nn.Identity() if gives_logits else nn.Sigmoid())
        self._num_dense_features = num_dense_features

    def forward(
        self, dense_features: Float[Tensor, "B dense"], sparse_features: KeyedJaggedTensor
    ) -> Float[Tensor, "B 1"]:
        """Give the probabilities, or the logits if asked for.

        Args:
            dense_features: One row per sample.
            sparse_features: The bags of the same samples, one key per feature.

        Raises:
            ValueError: The dense features have another number of columns, or of samples than the
                sparse ones.
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        if dense_features.shape[1] != self._num_dense_features:
            raise ValueError(
                f"SimpleDeepFMNN: dense_features have {dense_features.shape[1]} columns, the model "
                f"was made for {self._num_dense_features}"
            )
        dense = self.dense_arch(dense_features)
        sparse = self.sparse_arch(sparse_features)
        if dense.shape[0] != sparse.shape[0]:
            raise ValueError(
                f"SimpleDeepFMNN: dense_features have {dense.shape[0]} samples, sparse_features "
                f"{sparse.shape[0]}"
            )
        scores: Tensor = self.over_arch(self.inter_arch(dense, sparse))
        return scores


class _Layers(nn.Module):
    """Layers one after another, whose parameters' names begin with `model`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B wide"]) -> Float[Tensor, "B narrow"]:
        result: Tensor = self.model(x)
        return result
