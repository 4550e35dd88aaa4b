"""Pooled tables: bags of ids to one vector per feature and sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from shardwise.jagged import KeyedJaggedTensor, KeyedTensor
from shardwise.ops.lookup import BadIds, Pooling
from shardwise.tables.collection import EQUAL_BAGS, Prepared, TableCollection
from shardwise.tables.configs import EmbeddingBagConfig, PoolingType


class EmbeddingBagCollection(TableCollection):
    """Many tables, looked up in one call and pooled to a `KeyedTensor` [B, sum of widths].

    Columns follow the tables in config order, and for each table its features; a feature that
    several tables read is named `feature@table` in the output. The result is float32. Parameters
    are `embedding_bags.<table>.weight`.

    Args:
        tables: The tables.
        is_weighted: Multiply each row by its id's weight; the input must have weights then. A mean
            divides by the number of ids, not by the sum of weights.
        device: Where the tables lie; `meta` only describes them.
        bad_ids: What to do with an id outside its table.
        sparse: Make the gradients of tables that have no update rule row-sparse.

    Raises:
        ValueError: Two tables have one name, or a table cannot be made.
    """

    stores_name = "embedding_bags"

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        *,
        bad_ids: BadIds = BadIds.RAISE,
        sparse: bool = False,
    ) -> None:
        """Make the tables and draw their start."""
        for table in tables:
            if table.pooling == PoolingType.NONE:
                raise ValueError(
                    f"table {table.name!r}: a bag collection pools by SUM or MEAN; "
                    f"use an EmbeddingCollection for one vector per id"
                )
        poolings = [Pooling[table.pooling.value] for table in tables]
        super().__init__(tables, poolings, device=device, bad_ids=bad_ids, sparse=sparse)
        self._bag_configs = list(tables)
        self._is_weighted = is_weighted
        self._output_names = [output.name for output in self._outputs]
        self._output_widths = [output.width for output in self._outputs]
        self._total_width = sum(self._output_widths)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, in order."""
        return self._bag_configs

    def is_weighted(self) -> bool:
        """Whether rows are multiplied by weights."""
        return self._is_weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool every feature.

        Args:
            features: One key per feature, in any order. Where the keys' batches vary, inverse
                indices must say which sample of a key each sample of the full batch shares.

        Returns:
            Float32 [B, sum of widths], keyed by output name.

        Raises:
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
            ValueError: Lengths, values or weights contradict each other, or weights are missing.
        """
        prepared = self.prepare_on_all_ranks(features)
        return self.finish(self.look_up(prepared), prepared)

    def prepare(self, features: KeyedJaggedTensor) -> Prepared:
        """Bring an input into the form in which it is looked up; see `forward`."""
        features = self.in_order(features)
        weights = self._weights(features)
        is_variable = features.variable_stride_per_key()
        if is_variable and features.inverse_indices_or_none() is None:
            self._check_lined_up(features)
        shape, bags = (features.stride(), self._total_width), EQUAL_BAGS
        if is_variable:
            rows = [features.stride_per_key()[i] for i in self._input_of_output]
            size = sum(n * width for n, width in zip(rows, self._output_widths, strict=True))
            shape, bags = (size, 1), torch.tensor(features.stride_per_key())[:, None]
        return Prepared(
            features=features, shape=shape, columns=not is_variable, bags=bags, weights=weights
        )

    def finish(self, values: Float[Tensor, "rows width"], prepared: Prepared) -> KeyedTensor:
        """Make the result of what was looked up."""
        if not prepared.columns:
            values = self._expand(values, prepared.features)
        return KeyedTensor(self._output_names, self._output_widths, values)

    def _weights(self, features: KeyedJaggedTensor) -> Tensor | None:
        if not self._is_weighted:
            return None
        weights = features.weights_or_none()
        if weights is None:
            raise ValueError(
                f"collection of tables {[c.name for c in self._configs]} is weighted, but the "
                f"input has no weights; give one per value"
            )
        return weights

    def _check_lined_up(self, features: KeyedJaggedTensor) -> None:
        counts = dict(zip(self._input_names, features.stride_per_key(), strict=True))
        for feature, n in counts.items():
            if n != max(counts.values()):
                raise ValueError(
                    f"feature {feature!r} has {n} samples, others {max(counts.values())}: a "
                    f"variable batch needs inverse_indices to line its samples up"
                )

    def _expand(
        self, flat: Float[Tensor, "N 1"], features: KeyedJaggedTensor
    ) -> Float[Tensor, "B D"]:
        """Copy each key's own samples to the samples that share them."""
        strides = features.stride_per_key()
        counts = [strides[i] for i in self._input_of_output]
        sizes = [n * output.width for n, output in zip(counts, self._outputs, strict=True)]
        inverse = features.inverse_indices_or_none()
        columns = []
        for output, n, block in zip(self._outputs, counts, flat.view(-1).split(sizes), strict=True):
            rows = block.view(n, output.width)
            if inverse is not None:
                keys, indices = inverse
                rows = rows[indices[keys.index(output.feature)].long()]
            columns.append(rows)
        return torch.cat(columns, dim=1)
