"""Which rows of a model's tables have changed since somebody last asked.

`ModelDeltaTracker` has one byte per row that lies here, whatever the number of consumers and of
updates between two reads: the number of the read before which the row last changed. A row that
changes often is written often and never listed twice, so nothing is ever to be compacted.

What training changes is counted where it changes: updates of rules tell their rows (`ops.lookup`),
and the step of any other optimizer is followed by a look at the gradient. Loading a state, or
writing to a table by hand, is not counted: give consumers a full copy then, or `record_lookup`.
Nothing is sent between ranks: each knows the slices that lie on it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim.in_backward import table_holders
from shardwise.optim.keyed import KeyedOptimizer
from shardwise.optim.rowwise_adagrad import RowWiseAdagrad
from shardwise.optim.slices import owner_of
from shardwise.tables.collection import TableCollection
from shardwise.tables.store import Store

_LAST_READ = 255
_PIECE_ROWS = 2**22  # looked through at a time, so that a read needs little memory
_BY_ROW = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam, RowWiseAdagrad)
"""Optimizers that change no row without a gradient, if they have no momentum or weight decay."""


class TrackingMode(Enum):
    """What is given of a changed row: its id; its values too; what its update rule keeps too."""

    ID_ONLY = "id_only"
    EMBEDDING = "embedding"
    OPTIMIZER_STATE = "optimizer_state"


@dataclass(frozen=True, kw_only=True)
class ModelTrackerConfig:
    """The options of a `ModelDeltaTracker`, for `DistributedModelParallel`."""

    tracking_mode: TrackingMode = TrackingMode.ID_ONLY
    consumers: list[str] | None = None
    delete_on_read: bool = True
    auto_compact: bool = False
    fqns_to_skip: Sequence[str] = ()


class DeltaStore:
    """Remembers for each row of a part before which read it last changed.

    Reads are numbered from 1, up to 255; then those that no consumer tells apart get one number.

    Args:
        num_rows: Rows of the part.
        consumers: Who reads, at most 127.
        device: Of the rows.
    """

    def __init__(self, num_rows: int, consumers: Iterable[str], device: torch.device) -> None:
        """Begin with no row changed."""
        self.stamps = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self._now, self._is_marked = 1, False
        self._since = dict.fromkeys(consumers, 1)

    def mark(self, rows: Int[Tensor, " N"] | None) -> None:
        """Count rows of the part as changed now, None all of them; rows may repeat."""
        self._is_marked = True
        if rows is None:
            self.stamps.fill_(self._now)
        else:
            self.stamps.index_fill_(0, rows.to(self.stamps.device, torch.int64), self._now)

    def changed(self, consumer: str) -> Int[Tensor, " N"]:
        """Give the rows that changed since the consumer's last read, ascending."""
        since = self._since[consumer]
        found = [
            (piece >= since).nonzero()[:, 0] + number * _PIECE_ROWS
            for number, piece in enumerate(self.stamps.split(_PIECE_ROWS))
        ]
        return torch.cat(found)

    def clear(self, consumer: str) -> None:
        """Count what is marked so far as read by the consumer."""
        self._now += self._is_marked
        self._is_marked = False
        self._since[consumer] = self._now
        if self._now == _LAST_READ:
            self._renumber()

    def _renumber(self) -> None:
        """Number reads anew, by how many consumers' last reads they do not precede."""
        told_apart = sorted(set(self._since.values()))
        marks = torch.tensor(told_apart, device=self.stamps.device)
        for piece in self.stamps.split(_PIECE_ROWS):
            piece.copy_(torch.bucketize(piece, marks, right=True))
        self._since = {c: told_apart.index(since) + 1 for c, since in self._since.items()}
        self._now = len(told_apart)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaRows:
    """The rows of a part of a table that have changed.

    Attributes:
        key: The whole table's in the model's state dict.
        ids: Row numbers in the whole table, ascending, none twice.
        states: Their values now, of the columns that lie here; None under `ID_ONLY`.
        first_column: Of these columns in the whole table.
        optimizer_states: Under `OPTIMIZER_STATE`, what the table's rule keeps for these rows, by
            its name, and the number of its updates as `step`.
    """

    key: str
    ids: Int[Tensor, " N"]
    states: Float[Tensor, "N D"] | None = None
    first_column: int = 0
    optimizer_states: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def apply_to(
        self,
        tables: Mapping[str, Tensor],
        optimizer_states: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write the rows into an older copy of the whole model.

        Args:
            tables: Whole tables by their name in the state dict.
            optimizer_states: Of whole tables, as `state_dict()["state"]` of the tables' optimizer
                has them, by the same names.

        Raises:
            ValueError: There are no values, as only ids were tracked.
        """
        if self.states is None:
            raise ValueError(f"delta of {self.key!r}: has ids only; track TrackingMode.EMBEDDING")
        self._write(tables[self.key], self.states)
        if optimizer_states is not None:
            for kind, value in self.optimizer_states.items():
                self._write(optimizer_states[self.key][kind], value)

    def _write(self, whole: Tensor, value: Tensor) -> None:
        if value.dim() == 0:
            whole.copy_(value)
        elif value.dim() == 1:
            whole[self.ids] = value
        else:
            columns = slice(self.first_column, self.first_column + value.shape[1])
            whole[self.ids, columns] = value


@dataclass(frozen=True, eq=False)
class _Tracked:
    """A part of a table, the collection it is of, and what remembers its changes."""

    name: str  # of the parameter in its collection
    key: str  # of the whole table in the state dict
    collection: TableCollection
    part: Store
    changes: DeltaStore


class ModelDeltaTracker:
    """Tells each of several consumers which rows have changed since it last asked.

    A row has changed when an update ran on it, not when it was looked up. Optimizers other than
    the tables' rules change rows without a gradient too, unless they are SGD, Adagrad or
    SparseAdam without momentum and weight decay: their step counts as a change of the whole table.

    On many ranks each tells of its slices; of replicas the first holder speaks, so all ranks
    together tell each row and column once. A tracker made later takes the place of this one, and
    tables that are cut anew need a new one; the reads of one without its tables raise.

    Args:
        model: Plain, sharded, or a `DistributedModelParallel`.
        consumers: Their names; None has the one that reads without a name.
        delete_on_read: Taken for TorchRec's sake, as is `auto_compact`: they say when lists of ids
            are shortened, and there are none.
        mode: What reads give beside ids. Values are those at the time of the read.
        fqns_to_skip: Tables to leave out, by name, path, or the path of a module around them.

    Attributes:
        curr_batch_idx: Batches so far, counted by `step`.
        per_consumer_batch_idx: The first batch that the next read of a consumer covers.

    Raises:
        ValueError: There are no tables, more than 127 consumers, or nothing of a name to skip.
    """

    DEFAULT_CONSUMER = "default"

    def __init__(
        self,
        model: nn.Module,
        consumers: list[str] | None = None,
        delete_on_read: bool = True,
        auto_compact: bool = False,
        mode: TrackingMode = TrackingMode.ID_ONLY,
        fqns_to_skip: Iterable[str] = (),
    ) -> None:
        """Watch the tables from now on."""
        consumers = consumers or [self.DEFAULT_CONSUMER]
        if len(consumers) > _LAST_READ // 2:
            raise ValueError(f"at most 127 consumers of changes, got {len(consumers)}")
        self._mode = mode
        self.curr_batch_idx = 0
        self.per_consumer_batch_idx = dict.fromkeys(consumers, 0)
        model = getattr(model, "_dmp_wrapped_module", model)
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._tracked = dict(_tables_here(model, consumers, list(fqns_to_skip)))
        for one in self._tracked.values():
            vars(one.part.weight)["delta_store"] = one.changes
        _watch_steps()

    @property
    def num_bytes(self) -> int:
        """Memory of the tracker: a byte per row that is tracked here."""
        return sum(one.changes.stamps.numel() for one in self._tracked.values())

    def step(self) -> None:
        """Count a batch."""
        self.curr_batch_idx += 1

    def record_lookup(
        self, kjt: KeyedJaggedTensor, states: Any = None, emb_module: nn.Module | None = None
    ) -> None:
        """Count the rows of a batch as changed that something else than training has changed.

        Args:
            kjt: Ids in the whole tables' numbering; each rank counts those that lie on it.
            states: Not used: values are taken from the tables when they are read.
            emb_module: The collection whose rows have changed; None means all.
        """
        for one in self._tracked.values():
            if emb_module in (None, one.collection):
                config, part = one.part.config, one.part.part
                for feature in {*(config.feature_names or [config.name])} & {*kjt.keys()}:
                    rows = kjt[feature].values() - part.first_row
                    one.changes.mark(rows[(rows >= 0) & (rows < part.num_rows)])

    def get_delta_ids(self, consumer: str | None = None) -> dict[str, Tensor]:
        """Give the ids of `get_delta`; like it, a read."""
        return {name: rows.ids for name, rows in self._read(consumer, TrackingMode.ID_ONLY).items()}

    def get_delta(self, consumer: str | None = None) -> dict[str, DeltaRows]:
        """Give the rows here that have changed since the consumer's last read.

        Returns:
            By the path of the table, as in `model.ebc.embedding_bags.<table>`; where several parts
            of a table lie here, `.1` and so on follows for further ones.

        Raises:
            KeyError: There is no such consumer.
            RuntimeError: The tables are another tracker's, or cut anew.
        """
        return self._read(consumer, self._mode)

    get_unique, get_unique_ids = get_delta, get_delta_ids  # as of TorchRec 1.4

    def clear(self, consumer: str | None = None) -> None:
        """Count all changes so far as read, by one consumer or, with None, by all."""
        names = self.per_consumer_batch_idx if consumer is None else [self._known(consumer)]
        for name in names:
            for one in self._tracked.values():
                one.changes.clear(name)
            self.per_consumer_batch_idx[name] = self.curr_batch_idx

    def _known(self, consumer: str | None) -> str:
        name = self.DEFAULT_CONSUMER if consumer is None else consumer
        if name not in self.per_consumer_batch_idx:
            known = [*self.per_consumer_batch_idx]
            raise KeyError(f"no consumer {name!r} of changes; there are {known}")
        return name

    def _read(self, consumer: str | None, mode: TrackingMode) -> dict[str, DeltaRows]:
        consumer = self._known(consumer)
        found = {path: _delta(one, consumer, mode) for path, one in self._tracked.items()}
        self.clear(consumer)
        return found


def _tables_here(
    model: nn.Module, consumers: Sequence[str], skipped: Sequence[str]
) -> Iterator[tuple[str, _Tracked]]:
    """Find the parts that this rank speaks for, by their path."""
    unknown, is_any = set(skipped), False
    for place, holder in table_holders(model):
        assert isinstance(holder, TableCollection), "other modules hold no tables"
        names = {weight: name for name, weight in holder.table_parameters().items()}
        for part in holder.stores:
            is_any, prefix = True, f"{place}." if place else ""
            key = f"{prefix}{holder.stores_name}.{part.config.name}.weight"
            table = key.removesuffix(".weight")
            hits = {s for s in skipped if s in table.split(".") or f"{table}.".startswith(f"{s}.")}
            unknown -= hits
            owner = owner_of(part.weight)
            if hits or part.num_embeddings == 0 or (owner is not None and not owner.is_counted):
                continue
            changes = DeltaStore(part.num_embeddings, consumers, part.weight.device)
            name = names[part.weight]
            path = prefix + name.removesuffix(".weight")
            yield path, _Tracked(name, key, holder, part, changes)
    if unknown or not is_any:
        raise ValueError(
            f"{type(model).__name__}: no tables to track"
            + (f" are named {sorted(unknown)}, as fqns_to_skip says" if unknown else "")
        )


@torch.no_grad()
def _delta(one: _Tracked, consumer: str, mode: TrackingMode) -> DeltaRows:
    part = one.part
    is_held = any(part is store for store in one.collection.stores)
    if not is_held or getattr(part.weight, "delta_store", None) is not one.changes:
        raise RuntimeError(
            f"table {part.config.name!r} was cut anew, or given to another tracker, since this one "
            "was made; read from a new one, whose consumers have a full copy"
        )
    rows = one.changes.changed(consumer)
    ids = rows + part.part.first_row
    if mode == TrackingMode.ID_ONLY:
        return DeltaRows(key=one.key, ids=ids)
    states = {}
    if mode == TrackingMode.OPTIMIZER_STATE:
        for kind, state in one.collection.part_states()[one.name].items():
            states[kind] = state[rows] if state.dim() else state.clone()
    return DeltaRows(
        key=one.key,
        ids=ids,
        states=part.weight.detach()[rows],
        first_column=part.part.first_column,
        optimizer_states=states,
    )


@cache
def _watch_steps() -> None:
    register_optimizer_step_post_hook(_mark_steps)


def _mark_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count what an optimizer of gradients has changed; rules count by themselves."""
    if isinstance(optimizer, KeyedOptimizer):  # of rules, or around one that comes by itself
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            changes: DeltaStore | None = getattr(param, "delta_store", None)
            if changes is None or param.grad is None:
                continue
            grad = param.grad
            if type(optimizer) not in _BY_ROW or group.get("momentum") or group.get("weight_decay"):
                changes.mark(None)
            elif grad.is_sparse:
                changes.mark(grad._indices()[0])
            else:
                changes.mark(grad.ne(0).any(1).nonzero()[:, 0])
