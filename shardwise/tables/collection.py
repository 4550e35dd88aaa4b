"""What every collection of tables does: features to tables, rules to tables, ids to rows."""

import abc
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.ops.lookup import BadIds, Ids, Pooling, Way, count_bad_ids
from shardwise.optim.in_backward import Binding, TableOptimizer, read_tags
from shardwise.optim.rules import BoundRule, bind_rule
from shardwise.tables.configs import BaseEmbeddingConfig, check_config
from shardwise.tables.layout import Explain, Layout, OneProcess
from shardwise.tables.parts import Parts
from shardwise.tables.store import Store

_NO_TENSOR = torch.empty(0)
_NO_WIDTH = torch.tensor([1, 1, 1, 0])
EQUAL_BAGS = torch.empty(0, dtype=torch.int64)
_BAD_ID = re.compile(r"feature (\d+), bag (\d+): id (-?\d+) is outside table (\d+) of (\d+) rows")


@dataclass(frozen=True)
class Output:
    """One block of a collection's result: one feature read from one table."""

    name: str
    feature: str
    table: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An input as it is looked up.

    Attributes:
        features: In the collection's order.
        shape: Of the lookup's result.
        columns: Whether the result has a column block per output, or lies block after block.
        bags: Samples per input [K, 1]; empty where all have as many.
        weights: Per id, if rows are multiplied by weights.
    """

    features: KeyedJaggedTensor
    shape: tuple[int, int]
    columns: bool
    bags: Tensor
    weights: Tensor | None


def list_outputs(configs: Sequence[BaseEmbeddingConfig]) -> list[Output]:
    """Give the outputs in config order; a feature of several tables is named feature@table.

    Raises:
        ValueError: Two tables have one name, or a table cannot be made.
    """
    names = [config.name for config in configs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"table names must differ, got several named {repeated}")
    outputs = []
    every = [feature for config in configs for feature in config.feature_names or [config.name]]
    for index, config in enumerate(configs):
        check_config(config)
        for feature in config.feature_names or [config.name]:
            name = f"{feature}@{config.name}" if every.count(feature) > 1 else feature
            outputs.append(Output(name, feature, index, config.embedding_dim))
    return outputs


class TableCollection(nn.Module, abc.ABC):
    """Tables with the features that read them.

    The name under which a subclass registers its stores is part of the parameters' names.
    """

    stores_name: str

    def __init__(
        self,
        configs: Sequence[BaseEmbeddingConfig],
        poolings: Sequence[Pooling],
        *,
        device: torch.device | str | None,
        bad_ids: BadIds,
        sparse: bool,
        repeats_inputs: bool = False,
    ) -> None:
        """Make the tables and draw their start, seeded by PyTorch's default generator.

        With `repeats_inputs` a feature that several tables read comes once for each of them.
        """
        super().__init__()
        outputs = list_outputs(configs)
        self._configs = list(configs)
        self._bad_ids = bad_ids
        self._device = torch.device(device) if device is not None else torch.get_default_device()
        self._outputs = outputs
        self._input_names = list(dict.fromkeys(output.feature for output in outputs))
        self._input_of_output = [self._input_names.index(output.feature) for output in outputs]
        inputs = range(len(outputs)) if repeats_inputs else self._input_of_output
        self._features = torch.tensor(
            [
                (i, o.table, poolings[o.table], o.width)
                for i, o in zip(inputs, outputs, strict=True)
            ],
            dtype=torch.int64,
            device="cpu",  # read on the host, to lay lookups out
        ).view(-1, 4)
        counted_on = "cpu" if self._device.type == "meta" else self._device
        ignored = torch.zeros(len(outputs), dtype=torch.int64, device=counted_on)
        self.register_buffer("_ignored", ignored, persistent=False)
        # What bad ids are counted against, wherever the rows lie: whole tables without columns.
        self._row_ranges = [torch.empty(config.num_embeddings, 0) for config in configs]
        self._fused_optimizers: list[TableOptimizer] = []
        self._has_read_tags = False
        stores = [Store(config, key, self._device) for key, config in enumerate(configs)]
        layout = OneProcess(self._features, len(stores))
        self._parts = Parts(stores, layout, prefix=self.stores_name, is_sparse=sparse)
        self._register_parts()
        self.reset_parameters()

    def _register_parts(self) -> None:
        """Make a table's first part its module, and the further ones modules within that."""
        firsts: dict[int, Store] = {}
        for store in self.stores:
            store._modules.clear()
        for store in self.stores:
            first = firsts.setdefault(store.key, store)
            if first is not store:
                first.add_module(str(len(first._modules) + 1), store)
        modules = {config.name: firsts[key] for key, config in enumerate(self._configs)}
        self.add_module(self.stores_name, nn.ModuleDict(modules))

    def reset_parameters(self) -> None:
        """Draw the tables' start anew, from a seed of PyTorch's default generator."""
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self.seed = self.layout.agree(seed)
        for store in self.stores:
            store.fill(self.seed)

    def move(self, stores: Sequence[Store], layout: Layout) -> None:
        """Hold these parts from now on; rules go along.

        Args:
            stores: The parts that lie here, with their rows filled; at least one of each table.
            layout: What looks them up.
        """
        self._parts.move(stores, layout)
        self._register_parts()

    @property
    def stores(self) -> list[Store]:
        """The parts of the tables that lie here, in the order of the lookup."""
        return self._parts.stores

    @property
    def layout(self) -> Layout:
        """What looks the tables up."""
        return self._parts.layout

    @property
    def features(self) -> Tensor:
        """What the lookup reads: a row (input, table, pooling, width) per output."""
        return self._features

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.stores[0].weight.device if self.stores else self._device

    @property
    def num_ignored_ids(self) -> dict[str, int]:
        """Ids left out so far under `BadIds.IGNORE`, by output."""
        counts: list[int] = self.get_buffer("_ignored").tolist()
        return {o.name: count for o, count in zip(self._outputs, counts, strict=True)}

    # ---- rules

    def table_parameters(self) -> dict[str, nn.Parameter]:
        """The tables' parameters, by their name in the collection."""
        return self._parts.parameters()

    def part_states(self) -> dict[str, dict[str, Tensor]]:
        """Give what rules keep for the part of a table here, by its parameter's name."""
        return self._parts.states()

    def sparse_names(self) -> list[str]:
        """Name the parameters whose gradient is row-sparse."""
        return [self._parts.names[position] for position in self._parts.way.sparse]

    def bind_rule(
        self, rule: BoundRule, lr: Tensor, *, in_backward: bool, parameters: Iterable[str]
    ) -> Binding:
        """Let a rule update some tables from now on; allocates its state.

        Raises:
            ValueError: A table has a rule already.
        """
        self._has_read_tags = True
        return self._parts.bind(rule, lr, in_backward=in_backward, parameters=parameters)

    def bind_tagged(self) -> None:
        """Bind the rules that parameters are tagged with; `fused_optimizers` holds their state."""
        self._has_read_tags = True
        tags = read_tags(self.table_parameters())
        if tags and torch.compiler.is_compiling():
            raise RuntimeError(
                "tables are tagged with optimizers not bound yet, which tracing cannot do: "
                "read `fused_optimizers` of the collection, or run it once, before compiling"
            )
        for optimizer_class, options, names in tags:
            rule = bind_rule(optimizer_class, **options)
            lr = torch.tensor(rule.lr, dtype=torch.float32)
            binding = self.bind_rule(rule, lr, in_backward=True, parameters=names)
            self._fused_optimizers.append(TableOptimizer({"": binding}, rule, lr))

    @property
    def fused_optimizers(self) -> list[TableOptimizer]:
        """The optimizers of tagged tables, one per class and options."""
        if not self._has_read_tags:
            self.bind_tagged()
        return self._fused_optimizers

    # ---- lookup

    @abc.abstractmethod
    def prepare(self, features: KeyedJaggedTensor) -> Prepared:
        """Bring an input into the form in which it is looked up.

        Raises:
            KeyError: A key is missing or unknown.
            ValueError: Weights are missing, or samples of a variable batch do not line up.
        """

    @abc.abstractmethod
    def finish(self, values: Tensor, prepared: Prepared) -> Any:
        """Make the result of what was looked up."""

    def in_order(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Give the input with the keys in the collection's order.

        Raises:
            KeyError: A key is missing, or the collection does not know it.
        """
        keys = list(features.keys())
        if keys == self._input_names:
            return features
        missing = [name for name in self._input_names if name not in keys]
        unknown = [key for key in keys if key not in self._input_names]
        if missing or unknown or len(keys) != len(self._input_names):
            tables = [config.name for config in self._configs]
            raise KeyError(
                f"collection of tables {tables}: wants features {self._input_names}, got {keys}; "
                f"missing {missing}, unknown {unknown}"
            )
        return features.permute([keys.index(name) for name in self._input_names])

    def prepare_on_all_ranks(self, features: KeyedJaggedTensor) -> Prepared:
        """Prepare an input; an error of one rank is raised on all that share the tables."""
        if not self._has_read_tags:
            self.bind_tagged()
        if torch.compiler.is_compiling():
            return self.prepare(features)
        try:
            return self.prepare(features)
        except Exception as error:
            self.layout.refuse(error)

    def look_up(self, prepared: Prepared) -> Tensor:
        """Run the lookup of all tables.

        Raises:
            IndexError: An id is outside its table; names feature, sample, id and table.
            ValueError: Lengths, values or weights contradict each other.
        """
        return self.layout.look_up(*self.arguments(prepared))

    def arguments(
        self, prepared: Prepared
    ) -> tuple[Ids, tuple[int, int], list[Tensor], Way, Explain]:
        """Give what the layout's lookup takes."""
        features, weights = prepared.features, prepared.weights
        call = Ids(
            features.values().contiguous(),
            features.offsets(),
            _NO_TENSOR if weights is None else weights.float().contiguous(),
            weights is not None,
            self._features,
            prepared.bags,
            prepared.columns,
            self._bad_ids,
        )
        if self._bad_ids == BadIds.IGNORE:
            narrow = call._replace(features=self._features * _NO_WIDTH)
            counts = count_bad_ids(self._row_ranges, narrow, (prepared.shape[0], 0))
            self.get_buffer("_ignored").add_(counts)
        tables: list[Tensor] = [store.weight for store in self.stores]
        return call, prepared.shape, tables, self._parts.way, partial(self._explain, features)

    def _explain(self, features: KeyedJaggedTensor, error: RuntimeError) -> Exception:
        found = _BAD_ID.search(str(error))
        if found:
            output, bag, bad_id, table, rows = map(int, found.groups())
            feature, name = self._outputs[output].feature, self._configs[table].name
            return IndexError(
                f"feature {feature!r}, sample {bag}: id {bad_id} is outside table {name!r}, which "
                f"has ids 0 to {rows - 1}; enlarge num_embeddings, map the ids, or choose another "
                f"policy by bad_ids"
            )
        try:
            features.validate()  # names the key and the sample
        except ValueError as named:
            return named
        return ValueError(str(error))
