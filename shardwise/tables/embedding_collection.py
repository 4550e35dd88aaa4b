"""Tables read id by id: one vector per id, for sequences."""

import torch
from jaxtyping import Float
from torch import Tensor

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor
from shardwise.ops.lookup import BadIds, Pooling
from shardwise.tables.collection import Prepared, TableCollection
from shardwise.tables.configs import EmbeddingConfig


class EmbeddingCollection(TableCollection):
    """Many tables, looked up in one call to one vector per id.

    A feature that several tables read is named `feature@table` in the output. Vectors are float32.
    Parameters are `embeddings.<table>.weight`.

    Args:
        tables: The tables, all of one `embedding_dim`.
        device: Where the tables lie; `meta` only describes them.
        need_indices: Give the ids, too, in the place of the result's weights.
        bad_ids: What to do with an id outside its table.
        sparse: Make the gradients of tables that have no update rule row-sparse.

    Raises:
        ValueError: Two tables have one name, their widths differ, or a table cannot be made.
    """

    stores_name = "embeddings"

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device | str | None = None,
        need_indices: bool = False,
        *,
        bad_ids: BadIds = BadIds.RAISE,
        sparse: bool = False,
    ) -> None:
        """Make the tables and draw their start."""
        widths = {table.name: table.embedding_dim for table in tables}
        if len(set(widths.values())) > 1:
            raise ValueError(f"all tables must have one embedding_dim, got {widths}")
        super().__init__(
            tables,
            [Pooling.NONE] * len(tables),
            device=device,
            bad_ids=bad_ids,
            sparse=sparse,
            repeats_inputs=True,
        )
        self._embedding_configs = list(tables)
        self._need_indices = need_indices
        self._embedding_dim = tables[0].embedding_dim if tables else 0
        # Vectors of an output lie together, in order, so a shared feature's ids are repeated.
        self._has_shared = len(self._outputs) > len(self._input_names)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The tables, in order."""
        return self._embedding_configs

    def need_indices(self) -> bool:
        """Whether the result has the ids."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Columns of every table."""
        return self._embedding_dim

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Look up every id of every feature.

        Args:
            features: One key per feature, in any order; the keys' batches may vary.

        Returns:
            By output name, the vectors [ids of the feature, width] with the feature's lengths, and
            its ids as weights if asked for.

        Raises:
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
            ValueError: Lengths and values contradict each other.
        """
        prepared = self.prepare_on_all_ranks(features)
        return self.finish(self.look_up(prepared), prepared)

    def prepare(self, features: KeyedJaggedTensor) -> Prepared:
        """Bring an input into the form in which it is looked up; see `forward`."""
        features = self.in_order(features)
        if self._has_shared:
            features = features.permute(self._input_of_output)
        bags = torch.tensor(features.stride_per_key())[:, None]
        shape = (features.values().shape[0], self._embedding_dim)
        return Prepared(features=features, shape=shape, columns=False, bags=bags, weights=None)

    def finish(self, values: Float[Tensor, "V D"], prepared: Prepared) -> dict[str, JaggedTensor]:
        """Make the result of what was looked up."""
        features, ids = prepared.features, prepared.features.values()
        counts = features.length_per_key()
        result = {}
        lengths = features.lengths().view(-1).split(features.stride_per_key())
        pieces = zip(self._outputs, values.split(counts), ids.split(counts), lengths, strict=True)
        for output, vectors, own_ids, own_lengths in pieces:
            weights = own_ids if self._need_indices else None
            result[output.name] = JaggedTensor(vectors, weights=weights, lengths=own_lengths)
        return result
