"""Learnt weights for ids, before their rows are pooled."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from shardwise.tables.configs import EmbeddingBagConfig
from shardwise.tables.embedding_bag_collection import EmbeddingBagCollection


def positions(lengths: Int[Tensor, " B"], offsets: Int[Tensor, " P"]) -> Int[Tensor, " V"]:
    """Number the ids within their bag, from 0."""
    starts = torch.repeat_interleave(offsets[:-1].long(), lengths.long())
    return torch.arange(starts.shape[0], device=starts.device) - starts


def _weights_at(
    weight: Float[Tensor, " N"], feature: JaggedTensor, name: str
) -> Float[Tensor, " V"]:
    lengths = feature.lengths()
    if not torch.compiler.is_compiling() and lengths.numel():
        longest = int(lengths.max())
        if longest > weight.shape[0]:
            raise IndexError(
                f"{name}: a bag has {longest} ids, but there are weights for {weight.shape[0]} "
                f"positions; enlarge max_feature_length or cut the bag"
            )
    return weight[positions(lengths, feature.offsets())]


class PositionWeightedModule(nn.Module):
    """Weight the ids of one feature by their position in the bag.

    Args:
        max_feature_length: Most ids of a bag.
        device: Where the weights lie.
    """

    def __init__(self, max_feature_length: int, device: torch.device | None = None) -> None:
        """Start with weight 1 at every position."""
        super().__init__()
        self.position_weight = nn.Parameter(torch.ones(max_feature_length, device=device))

    def reset_parameters(self) -> None:
        """Set all weights to 1."""
        nn.init.ones_(self.position_weight)

    def forward(self, features: JaggedTensor) -> JaggedTensor:
        """Give the bags with a weight per id.

        Raises:
            IndexError: A bag is longer than `max_feature_length`.
        """
        weights = _weights_at(self.position_weight, features, "position weights")
        return JaggedTensor(
            features.values(),
            weights=weights,
            lengths=features.lengths(),
            offsets=features.offsets(),
        )


class PositionWeightedModuleCollection(nn.Module):
    """Weight the ids of several features by their position in the bag.

    Args:
        max_feature_lengths: Most ids of a bag, by feature.
        device: Where the weights lie.
    """

    def __init__(
        self, max_feature_lengths: Mapping[str, int], device: torch.device | None = None
    ) -> None:
        """Start with weight 1 at every position."""
        super().__init__()
        for name, length in max_feature_lengths.items():
            if length < 1:
                raise ValueError(f"feature {name!r}: max_feature_length must be above 0: {length}")
        self.max_feature_lengths = dict(max_feature_lengths)
        self.position_weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.ones(length, device=device))
                for name, length in max_feature_lengths.items()
            }
        )

    def reset_parameters(self) -> None:
        """Set all weights to 1."""
        for weight in self.position_weights.values():
            nn.init.ones_(weight)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Give the input with a weight per id; ids of other features keep 1.

        Raises:
            IndexError: A bag is longer than its feature's maximum.
        """
        parts = []
        for key in list(features.keys()):
            feature = features[key]
            if key in self.position_weights:
                parts.append(_weights_at(self.position_weights[key], feature, f"feature {key!r}"))
            else:
                parts.append(torch.ones(feature.values().shape[0], device=features.device()))
        return _with_weights(features, torch.cat(parts))


class FeatureProcessorsCollection(nn.Module):
    """One processor per feature, each from `JaggedTensor` to a weighted one.

    Args:
        feature_processors: By feature.
    """

    def __init__(self, feature_processors: Mapping[str, nn.Module]) -> None:
        """Keep the processors."""
        super().__init__()
        self.processors = nn.ModuleDict(dict(feature_processors))

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Give the input with the processors' weights; ids of other features keep theirs, or 1."""
        weights = []
        for key in list(features.keys()):
            feature = features[key]
            if key in self.processors:
                feature = self.processors[key](feature)
            own = feature.weights_or_none()
            values = feature.values()
            ones = torch.ones(values.shape[0], device=values.device)
            weights.append(ones if own is None else own)
        return _with_weights(features, torch.cat(weights))


class FeatureProcessedEmbeddingBagCollection(nn.Module):
    """A weighted bag collection whose weights come from learnt processors.

    Args:
        embedding_bag_collection: A weighted collection.
        feature_processors: One module per feature, or one for the whole input.

    Raises:
        ValueError: The collection is not weighted, or a processor's feature is not in it.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        feature_processors: Mapping[str, nn.Module] | nn.Module,
    ) -> None:
        """Put the processors before the collection."""
        super().__init__()
        if not embedding_bag_collection.is_weighted():
            raise ValueError(
                "feature processors give weights: make the collection with is_weighted=True"
            )
        if isinstance(feature_processors, Mapping):
            known = {
                feature
                for config in embedding_bag_collection.embedding_bag_configs()
                for feature in config.feature_names or [config.name]
            }
            unknown = sorted(set(feature_processors) - known)
            if unknown:
                raise ValueError(f"processors for features {unknown}; known are {sorted(known)}")
            feature_processors = FeatureProcessorsCollection(feature_processors)
        self._feature_processors = feature_processors
        self._embedding_bag_collection = embedding_bag_collection

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in order."""
        return self._embedding_bag_collection.embedding_bag_configs()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Weight the ids, then look up and pool."""
        result: KeyedTensor = self._embedding_bag_collection(self._feature_processors(features))
        return result


def _with_weights(features: KeyedJaggedTensor, weights: Tensor) -> KeyedJaggedTensor:
    is_variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=weights,
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if is_variable else None,
        inverse_indices=features.inverse_indices_or_none(),
    )
