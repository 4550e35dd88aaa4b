"""Sharded collections as modules whose results are waited for at their first use.

What `shard` makes keeps its class and gives its result at once. The classes here are those
collections with the steps of an exchange as methods, for `DistributedModelParallel` and sharders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor, KeyedTensor
from shardwise.sharding.awaitable import Awaitable, Deferred, LazyAwaitable, NoWait
from shardwise.sharding.exchange import Exchange, Passage
from shardwise.sharding.many_ranks import ManyRanks
from shardwise.sharding.owners import SlicesWay
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    FeatureProcessedEmbeddingBagCollection,
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
)
from shardwise.tables.collection import Prepared, TableCollection


@dataclass
class Context:
    """What the steps of one call hand on.

    Attributes:
        prepared: The input as it is looked up.
        tables: The slices here.
        way: How gradients reach them.
    """

    prepared: Prepared | None = None
    tables: Sequence[Tensor] = ()
    way: SlicesWay | None = None


class ShardedModule(nn.Module):
    """A module with tables in slices on many ranks.

    A call takes its steps in order: `input_dist`, `compute`, `output_dist`, each with one context.
    """

    result_type: type[Any] = KeyedTensor

    def _tables(self) -> TableCollection:
        """Give the collection that is sharded."""
        assert isinstance(self, TableCollection), "others override this"
        return self

    def _process(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Change the input before it is looked up."""
        return features

    def create_context(self) -> Context:
        """Give the context of one call."""
        return Context()

    def _exchange(self) -> Exchange:
        layout = self._tables().layout
        assert isinstance(layout, ManyRanks), "as `make_lazy` wants it"
        return layout.exchange

    def input_dist(
        self, context: Context, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[Passage]]:
        """Send the ids to where their rows are, in the background of what follows.

        Returns:
            To be waited for twice: until it is known what will come, and until that is under way.
        """
        prepared = self._tables().prepare_on_all_ranks(self._process(features))
        call, shape, tables, way, explain = self._tables().arguments(prepared)
        assert isinstance(way, SlicesWay), "it is of the exchange's `plan_backward`"
        context.prepared, context.tables, context.way = prepared, tables, way
        exchange = self._exchange()
        passage = exchange.start(call, shape, tables, way, explain)

        def send() -> Awaitable[Passage]:
            exchange.send(passage)
            return NoWait(passage)

        return Deferred(send)

    def prefetch(
        self, dist_input: Passage, forward_stream: Any = None, ctx: Context | None = None
    ) -> None:
        """Do nothing: tables lie wholly in the memory of their device, so all rows are there."""

    def compute(self, context: Context, dist_input: Passage) -> Tensor:
        """Look up what has arrived, and put together what comes back."""
        assert context.way is not None, "`input_dist` comes first"
        return self._exchange().finish(dist_input, context.tables, context.way)

    def output_dist(self, context: Context, output: Tensor) -> LazyAwaitable[Any]:
        """Give the result, in the form of the plain collection's, when it is used."""
        tables, prepared = self._tables(), context.prepared
        assert prepared is not None, "`input_dist` comes first"
        return LazyAwaitable(lambda: tables.finish(output, prepared), self.result_type)

    def compute_and_output_dist(self, context: Context, dist_input: Passage) -> LazyAwaitable[Any]:
        """Take the last two steps at once, when the result is used."""
        return LazyAwaitable(
            lambda: self.output_dist(context, self.compute(context, dist_input)).wait(),
            self.result_type,
        )

    def forward(self, features: KeyedJaggedTensor) -> Any:  # a LazyAwaitable
        """Take all steps.

        Args:
            features: As the plain collection takes it.
        """
        context = self.create_context()
        dist_input = self.input_dist(context, features).wait().wait()
        return self.compute_and_output_dist(context, dist_input)


class ShardedEmbeddingBagCollection(ShardedModule, EmbeddingBagCollection):
    """A sharded `EmbeddingBagCollection`."""


class ShardedFusedEmbeddingBagCollection(ShardedModule, FusedEmbeddingBagCollection):
    """A sharded `FusedEmbeddingBagCollection`."""


class ShardedEmbeddingCollection(ShardedModule, EmbeddingCollection):
    """A sharded `EmbeddingCollection`."""

    result_type = dict


class ShardedFusedEmbeddingCollection(ShardedModule, FusedEmbeddingCollection):
    """A sharded `FusedEmbeddingCollection`."""

    result_type = dict


class ShardedFeatureProcessedEmbeddingBagCollection(
    ShardedModule, FeatureProcessedEmbeddingBagCollection
):
    """A `FeatureProcessedEmbeddingBagCollection` around a sharded collection."""

    def _tables(self) -> TableCollection:
        return self._embedding_bag_collection

    def _process(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        processed: KeyedJaggedTensor = self._feature_processors(features)
        return processed


_SHARDED = {
    plain: sharded
    for sharded in (
        ShardedEmbeddingBagCollection,
        ShardedFusedEmbeddingBagCollection,
        ShardedEmbeddingCollection,
        ShardedFusedEmbeddingCollection,
        ShardedFeatureProcessedEmbeddingBagCollection,
    )
    for plain in (sharded.__bases__[1],)
}


def make_lazy(module: nn.Module) -> ShardedModule:
    """Turn a collection that `shard` has placed into its sharded class, in place."""
    module.__class__ = _SHARDED[type(module)]
    assert isinstance(module, ShardedModule), "as just made"
    return module
