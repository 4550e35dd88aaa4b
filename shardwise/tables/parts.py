"""The parts of a collection's tables that lie in this process, and the rules bound to them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shardwise.ops.lookup import Update
from shardwise.optim.in_backward import Binding
from shardwise.optim.rules import BoundRule
from shardwise.tables.layout import Layout
from shardwise.tables.store import Store, allocate

_NO_FEATURES = torch.empty(0, 4, dtype=torch.int64)


class Parts:
    """Parts of tables in the order of the lookup, their rules, and the layout they belong to.

    Every table has at least one part here, without rows where the layout put nothing here, so
    that names, rules and optimizers are of the same tables in every process.

    Attributes:
        stores: The parts.
        layout: What looks them up.
        names: The parts' parameter names: `<prefix>.<table>.weight` for the first part of a table
            here, `<prefix>.<table>.<n>.weight` for the n-th further one.
        bindings: The rules with their state, in the order in which they were bound.
        way: How gradients reach the parts.
    """

    def __init__(
        self, stores: Sequence[Store], layout: Layout, *, prefix: str, is_sparse: bool
    ) -> None:
        """Take the parts, which no rule owns."""
        self.bindings: list[Binding] = []
        self._prefix = prefix
        self._is_sparse = is_sparse
        self._take(stores, layout)

    def _take(self, stores: Sequence[Store], layout: Layout) -> None:
        self.stores, self.layout = list(stores), layout
        self._first: dict[int, int] = {}
        self.names = []
        counts: dict[int, int] = {}
        for position, store in enumerate(stores):
            self._first.setdefault(store.key, position)
            count = counts.get(store.key, 0)
            place = f".{count}" if count else ""
            self.names.append(f"{self._prefix}.{store.config.name}{place}.weight")
            counts[store.key] = count + 1
            vars(store.weight)["is_table"] = True  # for `apply_optimizer_in_backward`
            vars(store.weight)["is_further_part"] = count > 0
        self._plan()

    def _plan(self) -> None:
        updates = [binding.update for binding in self.bindings]
        self.way = self.layout.plan_backward(updates, is_sparse=self._is_sparse)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Give the parts' parameters by name, in the order of the tables, alike in all layouts."""
        pairs = zip(self.names, self.stores, strict=True)
        return {name: s.weight for name, s in sorted(pairs, key=lambda pair: pair[1].key)}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Give what rules keep for each part here, by its name: `step`, and values per row."""
        found = {n: dict(s.states) for n, s in zip(self.names, self.stores, strict=True)}
        for update in (binding.update for binding in self.bindings):
            for position, step in zip(update.tables, update.steps, strict=True):
                found[self.names[position]]["step"] = step
        return found

    def move(self, stores: Sequence[Store], layout: Layout) -> None:
        """Put parts in the place of those here; their rules go along.

        Args:
            stores: The new parts, their rows filled. What rules keep of one that has no states
                is cut from the whole table here.
            layout: What they belong to from now on.
        """
        wholes = {store.key: store for store in self.stores}
        steps = [
            {
                self.stores[table].key: int(step)
                for table, step in zip(u.tables, u.steps, strict=True)
            }
            for u in (binding.update for binding in self.bindings)
        ]
        for store in stores:
            notes = vars(wholes[store.key].weight).items()
            vars(store.weight).update(note for note in notes if note[0] != "delta_store")
            store.weight.requires_grad_(wholes[store.key].weight.requires_grad)
        bindings, self.bindings = self.bindings, []
        self._take(stores, layout)
        for binding, own_steps in zip(bindings, steps, strict=True):
            for store in stores:
                if store.key in own_steps and not store.states:
                    store.states = _cut_states(wholes[store.key], store, binding.rule)
            self._attach(binding, own_steps)
        self.bindings = bindings
        self._plan()

    def bind(
        self, rule: BoundRule, lr: Tensor, *, in_backward: bool, parameters: Iterable[str]
    ) -> Binding:
        """Let a rule update some tables from now on; allocates its state.

        Raises:
            ValueError: A table has a rule already, or only some of its parts are named.
        """
        keys = self._tables_of(set(parameters))
        seed = int(torch.randint(2**62, (), device="cpu")) if rule.rounds_stochastically else -1
        for store in self.stores:
            if store.key in keys:
                store.states = make_states(store, rule)
        update = Update(
            rule=rule.rule,
            settings=rule.settings,
            tables=(),
            features=_NO_FEATURES,
            states=[],
            steps=torch.empty(0, dtype=torch.int64),
            slots=torch.empty(0, 4, dtype=torch.int64),
            lr=lr,
            seed=seed,
            in_backward=in_backward,
        )
        binding = Binding(rule=rule, update=update)
        self._attach(binding, dict.fromkeys(keys, 0))
        self.bindings.append(binding)
        self._plan()
        return binding

    def _tables_of(self, names: set[str]) -> list[int]:
        """Give the tables of parameters; all parts of one must be named, and have no rule."""
        chosen = [
            store.key for store, name in zip(self.stores, self.names, strict=True) if name in names
        ]
        owned = {self.stores[t].key for b in self.bindings for t in b.update.tables}
        for store, name in zip(self.stores, self.names, strict=True):
            if store.key in chosen and store.key in owned:
                raise ValueError(
                    f"table {store.config.name!r} has an update rule already; it can have one"
                )
            if store.key in chosen and name not in names:
                raise ValueError(
                    f"table {store.config.name!r}: a rule must be given all its parts here, "
                    f"{name!r} is missing"
                )
        return sorted(set(chosen))

    def _attach(self, binding: Binding, steps: dict[int, int]) -> None:
        """Point a binding to the parts of some tables, whose states are there."""
        positions = [i for i, store in enumerate(self.stores) if store.key in steps]
        stores = [self.stores[i] for i in positions]
        kinds = [name for name, _ in binding.rule.rule.states]
        update = replace(
            binding.update,
            seed=self.layout.agree(binding.update.seed),
            complete=None,  # `at_step` gives that of the layout
            tables=tuple(positions),
            states=[store.states[kind] for store in stores for kind in kinds],
            steps=torch.tensor([steps[store.key] for store in stores], dtype=torch.int64),
            slots=torch.tensor(
                [store.slot for store in stores], dtype=torch.int64, device="cpu"
            ).view(-1, 4),
        )
        binding.update = self.layout.at_step(update)
        binding.parameters = {self.names[i]: self.stores[i].weight for i in positions}
        binding.first_parts = [positions.index(self._first[store.key]) for store in stores]
        binding.states = {}
        for key in sorted(steps):
            local = [store.states for store in stores if store.key == key]
            values = {kind: self.layout.whole(key, [own[kind] for own in local]) for kind in kinds}
            place = positions.index(self._first[key])
            values["step"] = update.steps[place]
            binding.states[self.names[self._first[key]]] = values
        binding.changed()


def make_states(store: Store, rule: BoundRule) -> dict[str, Tensor]:
    """Allocate what a rule keeps for a part, by name, at its start."""
    states = {}
    for name, shape in rule.rule.states:
        size = store.weight.shape[:1] if shape == "row" else store.weight.shape
        state = allocate(size, torch.float32, store.weight.device)
        states[name] = state.fill_(rule.initial_state if name == "sum" else 0.0)
    return states


def _cut_states(whole: Store, part: Store, rule: BoundRule) -> dict[str, Tensor]:
    states = make_states(part, rule)
    for name, state in states.items():
        if not whole.states[name].is_meta:
            state.copy_(part.cut(whole.states[name]))
    return states
