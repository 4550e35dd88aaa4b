"""Two towers: queries and candidates to vectors whose dot product is the score of a pair."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor, KeyedTensor
from shardwise.models.loss import LabeledBatch, LossAndScores, binary_loss
from shardwise.nn import MLP
from shardwise.tables import EmbeddingBagCollection
from shardwise.tables.collection import list_outputs


class TwoTower(nn.Module):
    """Embed queries and candidates, each by its own features and layers, in one space.

    Layers have ReLU between them and none after the last, so that scores have either sign.

    Args:
        embedding_bag_collection: The tables of both towers.
        layer_sizes: Widths of the layers of each tower; the last is that of the vectors.
        device: Where the layers' parameters lie.
        query_tables: Names of the tables of the query's tower, the others being the candidate's;
            None is the first table.

    Raises:
        ValueError: A query table is unknown, a tower has no table, the towers share a feature, or
            there are no layers.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        layer_sizes: list[int],
        device: torch.device | str | None = None,
        *,
        query_tables: Sequence[str] | None = None,
    ) -> None:
        """Make the layers."""
        super().__init__()
        configs = embedding_bag_collection.embedding_bag_configs()
        names = [config.name for config in configs]
        chosen = list(names[:1] if query_tables is None else query_tables)
        if not chosen or not set(chosen) < set(names):
            raise ValueError(
                f"TwoTower: query_tables {chosen} must be some, not all, of the tables {names}"
            )
        self.ebc = embedding_bag_collection
        outputs = list_outputs(configs)
        query = [output for output in outputs if names[output.table] in chosen]
        candidate = [output for output in outputs if names[output.table] not in chosen]
        self._query_features = list(dict.fromkeys(output.feature for output in query))
        self._candidate_features = list(dict.fromkeys(output.feature for output in candidate))
        shared = [name for name in self._query_features if name in self._candidate_features]
        if shared:
            raise ValueError(f"TwoTower: both towers read {shared}; each needs its own features")
        self._query_outputs = [output.name for output in query]
        self._candidate_outputs = [output.name for output in candidate]
        self.query_proj = _make_layers(sum(o.width for o in query), layer_sizes, device)
        self.candidate_proj = _make_layers(sum(o.width for o in candidate), layer_sizes, device)

    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Embed the query and the candidate of each sample.

        Raises:
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        pooled: KeyedTensor = self.ebc(features)
        query, candidate = KeyedTensor.regroup(
            [pooled], [self._query_outputs, self._candidate_outputs]
        )
        return self.query_proj(query), self.candidate_proj(candidate)

    def embed_queries(self, features: KeyedJaggedTensor) -> Float[Tensor, "B D"]:
        """Embed queries alone.

        Args:
            features: The keys of the query's features; others are not needed, unless the keys'
                batches vary.

        Raises:
            ValueError: The keys' batches vary, and not all are there.
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        pooled = self.ebc(_add_empty(features, self._query_features, self._candidate_features))
        vectors: Tensor = self.query_proj(KeyedTensor.regroup([pooled], [self._query_outputs])[0])
        return vectors

    def embed_candidates(self, features: KeyedJaggedTensor) -> Float[Tensor, "B D"]:
        """Embed candidates alone, as an index of them needs.

        Args:
            features: The keys of the candidate's features; others are not needed, unless the keys'
                batches vary.

        Raises:
            ValueError: The keys' batches vary, and not all are there.
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        pooled = self.ebc(_add_empty(features, self._candidate_features, self._query_features))
        (candidate,) = KeyedTensor.regroup([pooled], [self._candidate_outputs])
        vectors: Tensor = self.candidate_proj(candidate)
        return vectors


class TwoTowerTrainTask(nn.Module):
    """Two towers and their loss: binary cross-entropy of the scores, the mean over the batch.

    Args:
        two_tower: Gives a query and a candidate vector for each sample.
    """

    def __init__(self, two_tower: nn.Module) -> None:
        """Take in the towers."""
        super().__init__()
        self.two_tower = two_tower

    def forward(self, batch: LabeledBatch) -> LossAndScores:
        """Score the pairs of a batch and compare with its labels.

        Args:
            batch: Labels [B] are in [0, 1]; dense features are not read.

        Returns:
            The loss, and (loss, scores as logits, labels) without gradient.

        Raises:
            ValueError: The labels are not one per sample.
        """
        query, candidate = self.two_tower(batch.sparse_features)
        return binary_loss("TwoTowerTrainTask", (query * candidate).sum(1), batch.labels)


def _make_layers(
    in_size: int, layer_sizes: list[int], device: torch.device | str | None
) -> nn.Module:
    return MLP(in_size, layer_sizes, device=device, activation_on_last=False)


def _add_empty(
    features: KeyedJaggedTensor, wanted: list[str], others: list[str]
) -> KeyedJaggedTensor:
    """Add empty bags for the features of the other tower, which the collection asks for too."""
    keys = list(features.keys())
    missing = [name for name in wanted if name not in keys]
    if missing:
        raise KeyError(f"TwoTower: wants features {wanted}, got {keys}; missing {missing}")
    absent = [name for name in others if name not in keys]
    if not absent:
        return features
    if features.variable_stride_per_key():
        raise ValueError(
            f"TwoTower: the keys' batches vary, so {absent} cannot be filled in; give all keys"
        )
    lengths = features.lengths()
    return KeyedJaggedTensor(
        keys + absent,
        features.values(),
        features.weights_or_none(),
        torch.cat([lengths, lengths.new_zeros(len(absent) * features.stride())]),
    )
