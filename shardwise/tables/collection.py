"""What every collection of tables does: features to tables, rules to tables, ids to rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.ops.lookup import (
    BadIds,
    Ids,
    Pooling,
    Update,
    count_bad_ids,
    lookup,
    plan_backward,
    restrict,
)
from shardwise.optim.in_backward import Binding, TableOptimizer, read_tags
from shardwise.optim.rules import BoundRule, bind_rule
from shardwise.tables.configs import BaseEmbeddingConfig, check_config
from shardwise.tables.store import Store, allocate

_NO_TENSOR = torch.empty(0)
_EQUAL_BAGS = torch.empty(0, dtype=torch.int64)
_BAD_ID = re.compile(r"feature (\d+), bag (\d+): id (-?\d+) is outside table (\d+) of (\d+) rows")


@dataclass(frozen=True)
class Output:
    """One block of a collection's result: one feature read from one table."""

    name: str
    feature: str
    table: int
    width: int


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


class TableCollection(nn.Module):
    """Tables with the features that read them. `stores` keeps one `Store` per table.

    The name under which a subclass registers `stores` is part of the parameters' names.
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
        stores = [Store(config, key, self._device) for key, config in enumerate(configs)]
        self.add_module(
            self.stores_name,
            nn.ModuleDict({config.name: s for config, s in zip(configs, stores, strict=True)}),
        )
        self._stores = stores
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
        ).view(-1, 4)
        ignored = torch.zeros(len(outputs), dtype=torch.int64, device="cpu")
        self.register_buffer("_ignored", ignored, persistent=False)
        self._updates: list[Update] = []
        self._fused_optimizers: list[TableOptimizer] = []
        self._is_sparse = sparse
        self._way = plan_backward(self._features, len(stores), is_sparse=sparse)
        self._has_read_tags = False
        for store in stores:
            vars(store.weight)["is_table"] = True  # for `apply_optimizer_in_backward`
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables' start anew, from a seed of PyTorch's default generator."""
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        for store in self._stores:
            store.fill(seed)

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self._stores[0].weight.device if self._stores else self._device

    @property
    def num_ignored_ids(self) -> dict[str, int]:
        """Ids left out so far under `BadIds.IGNORE`, by output."""
        counts: list[int] = self.get_buffer("_ignored").tolist()
        return {o.name: count for o, count in zip(self._outputs, counts, strict=True)}

    # ---- rules

    def table_parameters(self) -> dict[str, nn.Parameter]:
        """The tables' parameters, by their name in the collection."""
        return {f"{self.stores_name}.{s.config.name}.weight": s.weight for s in self._stores}

    def bind_rule(
        self, rule: BoundRule, lr: Tensor, *, in_backward: bool, parameters: Iterable[str]
    ) -> Binding:
        """Let a rule update some tables from now on; allocates its state.

        Raises:
            ValueError: A table has a rule already.
        """
        names = list(self.table_parameters())
        tables = tuple(sorted(names.index(parameter) for parameter in parameters))
        owned = {table for update in self._updates for table in update.tables}
        for table in tables:
            if table in owned:
                name = self._configs[table].name
                raise ValueError(f"table {name!r} has an update rule already; it can have one")
        stores = [self._stores[table] for table in tables]
        steps = torch.zeros(len(tables), dtype=torch.int64)
        update = Update(
            rule=rule.rule,
            settings=rule.settings,
            tables=tables,
            features=restrict(self._features, tables),
            states=[state for store in stores for state in _make_states(store, rule)],
            steps=steps,
            slots=torch.tensor([store.slot for store in stores], dtype=torch.int64),
            lr=lr,
            seed=_draw_seed() if rule.rounds_stochastically else -1,
            in_backward=in_backward,
        )
        self._updates.append(update)
        self._way = plan_backward(
            self._features, len(self._stores), self._updates, is_sparse=self._is_sparse
        )
        self._has_read_tags = True
        return Binding(
            update=update,
            parameters={names[t]: self._stores[t].weight for t in tables},
            states={
                names[t]: {**self._stores[t].states, "step": steps[i]} for i, t in enumerate(tables)
            },
        )

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

    def look_up(
        self,
        features: KeyedJaggedTensor,
        shape: tuple[int, int],
        *,
        columns: bool,
        bags: Tensor = _EQUAL_BAGS,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Run the lookup of all tables on an input in the collection's order.

        Raises:
            IndexError: An id is outside its table; names feature, sample, id and table.
            ValueError: Lengths, values or weights contradict each other.
        """
        if not self._has_read_tags:
            self.bind_tagged()
        call = Ids(
            features.values().contiguous(),
            features.offsets(),
            _NO_TENSOR if weights is None else weights.float().contiguous(),
            weights is not None,
            self._features,
            bags,
            columns,
            self._bad_ids,
        )
        tables = [store.weight for store in self._stores]
        if self._bad_ids == BadIds.IGNORE:
            self.get_buffer("_ignored").add_(count_bad_ids(tables, call, shape))
        if torch.compiler.is_compiling():
            return lookup(tables, call, shape, way=self._way)
        try:
            return lookup(tables, call, shape, way=self._way)
        except RuntimeError as error:
            raise self._explain(error, features) from None

    def _explain(self, error: RuntimeError, features: KeyedJaggedTensor) -> Exception:
        found = _BAD_ID.search(str(error))
        if found:
            output, bag, bad_id, table, rows = map(int, found.groups())
            feature, name = self._outputs[output].feature, self._configs[table].name
            return IndexError(
                f"feature {feature!r}, sample {bag}: id {bad_id} is outside table {name!r}, which "
                f"has ids 0 to {rows - 1}; enlarge num_embeddings, map the ids, or choose another "
                f"policy by bad_ids"
            )
        features.validate()  # names the key and the sample
        return ValueError(str(error))


def _make_states(store: Store, rule: BoundRule) -> list[Tensor]:
    """Allocate what a rule keeps for a table, and note it in the store."""
    rows, width = store.weight.shape
    for name, shape in rule.rule.states:
        size = (rows,) if shape == "row" else (rows, width)
        state = allocate(size, torch.float32, store.weight.device)
        store.states[name] = state.fill_(rule.initial_state if name == "sum" else 0.0)
    return [store.states[name] for name, _ in rule.rule.states]


def _draw_seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))
