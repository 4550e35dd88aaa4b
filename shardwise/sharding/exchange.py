"""The lookup of tables that lie in slices on many ranks: ids out, vectors back, in one exchange.

`Exchange` does what `ops.lookup.lookup` does, on every rank with its own ids, for any placement.
Tables of which every rank has all are looked up here; the ids for the others travel through a
`Hop`. All ranks take part in every collective in both directions, whatever they hold or ask for.

Backward is one function of autograd, so its collectives run in one order: gradients travel, the
lookups' rules run or leave gradients, then slices with replicas or of cut rows are brought to an
end together (see `owners`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwise.ops.lookup import Ids, Pooling, RowGrads, Update, Way, lookup
from shardwise.ops.lookup.reference import bag_counts
from shardwise.optim.slices import WholeRows
from shardwise.sharding.codecs import Codecs
from shardwise.sharding.hop import Hop, Trip
from shardwise.sharding.layout import Cell, Region, lay_out
from shardwise.sharding.owners import Owners, SlicesWay
from shardwise.sharding.placement import Placement
from shardwise.sharding.routes import Ranks
from shardwise.sharding.wire import Meeting, Pending, Wire
from shardwise.tables.layout import Explain

_BAD_ID = re.compile(r"(split|feature) (\d+), bag (\d+): id (-?\d+) is outside .* of (\d+) rows")
_NAMED = 4  # tables that messages name
_WANTS_WEIGHTS, _FAULT = 1, 2
"""Words that ranks send each other: gradients of weights are asked for; this rank has failed."""


@dataclass(eq=False)
class Passage:
    """One call on its way through all stages.

    Attributes:
        call: The ids.
        shape: Of the result.
        trip: Through the hop; None where nothing travels.
        local_call: The lookup of tables that are everywhere, and
        local: its result; None where there is no such table.
        splits: Sizes of the runs of the result that come from here and from others, in turn.
        meeting: Where the ranks tell one another whether they have failed.
        pending: What was sent last.
        wants_weights: Whether any rank asks for gradients of weights.
    """

    call: Ids
    shape: tuple[int, int]
    splits: list[int]
    trip: Trip | None = None
    local_call: Ids | None = None
    local: Tensor | None = None
    meeting: Meeting | None = None
    pending: Pending | None = None
    wants_weights: bool = False


@dataclass(eq=False)
class Found:
    """What backward has brought to the slices, by the number of the cell.

    Attributes:
        grads: Gradients that stay with the slice.
        touched: Distinct rows and their gradients, of slices that need more.
    """

    grads: dict[int, Tensor] = field(default_factory=dict)
    touched: dict[int, RowGrads] = field(default_factory=dict)


class Exchange:
    """Looks up the tables of one collection, of which each rank holds slices.

    Args:
        features: Of the plain lookup: (input, table, pooling, width).
        placements: Where each table lies.
        wire: Connects the ranks.
        path: Of the collection in its model, for messages.
        codecs: How vectors are written into messages; not those between ranks of one host after
            a relay, and not gradients between replicas.

    Attributes:
        cells: The slices that lie here, in the order in which calls take them; of a table that
            has none here, one without rows.
        codecs: How vectors are written into messages.
    """

    def __init__(
        self,
        features: Int[Tensor, "F 4"],
        placements: Sequence[Placement],
        wire: Wire,
        *,
        path: str = "",
        codecs: Codecs | None = None,
    ) -> None:
        """Lay the exchange out; every rank must."""
        self._features, self._wire = features, wire
        self.codecs = codecs or Codecs()
        self._layout = layout = lay_out(features, placements, Ranks(wire.rank, wire.hosts))
        self.cells: list[Cell] = layout.cells
        self._tables = [placement.table for placement in placements]
        more = f" and {len(self._tables) - _NAMED} more" if len(self._tables) > _NAMED else ""
        named = f"{', '.join(self._tables[:_NAMED])}{more}"
        self._name = name = f"{path or 'the collection'} (tables {named})"
        self._hop: Hop | None = None
        self._hops: list[Hop] = []
        host = wire.within_host() if layout.has_relay else wire
        if layout.hop is not None:
            second = None
            if layout.relay is not None:
                second = Hop(layout.relay, layout.relayed, host, f"relay of {name}", Codecs())
            self._hop = Hop(layout.hop, layout.owned, wire, name, self.codecs, second)
            self._hops = [self._hop] if second is None else [self._hop, second]
        self._owners = Owners(layout, placements, wire, name)
        is_local = torch.tensor(layout.is_everywhere, dtype=torch.bool)
        self._local_outputs = is_local.nonzero()[:, 0].tolist()
        self._far_outputs = (~is_local).nonzero()[:, 0].tolist()

    def plan_backward(self, updates: Sequence[Update], *, is_sparse: bool = False) -> SlicesWay:
        """Choose each slice's way of backward.

        Args:
            updates: Rules, each for all slices here of some tables; `features` is not read.
            is_sparse: Row-sparse gradients for slices without a rule.
        """
        return self._owners.plan_backward(updates, is_sparse=is_sparse)

    def at_step(self, update: Update) -> Update:
        """Give an update that adds up over ranks what it needs when it runs by itself."""
        return self._owners.complete(update)

    @property
    def whole_rows(self) -> WholeRows | None:
        """What completes row sums of slices for plain optimizers; None if all rows are whole."""
        return self._owners.whole_rows

    def __call__(
        self,
        call: Ids,
        shape: tuple[int, int],
        tables: Sequence[Tensor],
        way: Way,
        explain: Explain,
    ) -> Float[Tensor, "rows width"]:
        """Look up whole tables; every rank calls it, with its own ids.

        Args:
            call: This rank's ids, of one source.
            shape: Of the result.
            tables: The slices of `cells`.
            way: How gradients reach them.
            explain: Makes a fault of this rank's ids a better error.

        Raises:
            Exception: A rank has failed; the same on all.
        """
        assert isinstance(way, SlicesWay), "it is of this exchange's `plan_backward`"
        passage = self.start(call, shape, tables, way, explain)
        self.send(passage)
        return self.finish(passage, tables, way)

    # ---- stages

    @torch.no_grad()
    def start(
        self,
        call: Ids,
        shape: tuple[int, int],
        tables: Sequence[Tensor],
        way: SlicesWay,
        explain: Explain,
    ) -> Passage:
        """Route the ids, look up what is everywhere, and tell the others what will come."""
        try:
            bags = bag_counts(self._features, call.bags, call.offsets)
            passage = Passage(call, shape, self._splits(call, bags))
            if self._hop is not None:
                far = call._replace(weights=call.weights.detach())
                passage.trip = self._hop.start(far, bags)
            self._look_up_here(passage, bags, tables, way)
        except RuntimeError as error:
            self.refuse(_explained(explain, self._translate(error)))
        except (ValueError, IndexError) as error:  # offsets that do not fit the inputs
            self.refuse(_explained(explain, RuntimeError(str(error))))
        wants = call.is_weighted and call.weights.requires_grad
        passage.meeting = self._wire.meet(f"ids of {self._name}", _WANTS_WEIGHTS * wants)
        return passage

    @torch.no_grad()
    def send(self, passage: Passage) -> None:
        """Learn what will come, and send the ids."""
        assert passage.meeting is not None, "a passage is sent once it is started"
        word = max(passage.meeting.wait())
        if word == _FAULT:
            self._wire.raise_together(None)
        passage.wants_weights = word == _WANTS_WEIGHTS
        if self._hop is not None and passage.trip is not None:
            self._hop.take_counts(passage.trip, self._hop.send_counts(passage.trip))
            passage.pending = self._hop.send_ids(passage.trip)

    def finish(
        self, passage: Passage, tables: Sequence[Tensor], way: SlicesWay
    ) -> Float[Tensor, "rows width"]:
        """Look up what arrives, and put together what comes back."""
        requires_grad = passage.wants_weights or any(table.requires_grad for table in tables)
        if not (torch.is_grad_enabled() and requires_grad):
            with torch.no_grad():
                return self._finish(passage, tables, way, False)
        anchor = torch.empty(0, requires_grad=True)
        function = cast(Any, _Exchange)
        weights = passage.call.weights
        result: Tensor = function.apply(self, passage, way, anchor, weights, *tables)
        return result

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error found before the ids could be sent on every rank.

        Raises:
            Exception: The error of the first rank that has one.
        """
        if self._wire.world_size > 1:
            self._wire.meet(f"ids of {self._name}", _FAULT, error).wait()
            self._wire.raise_together(error)
        raise error

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Give, by table, the bytes of ids that this rank has sent to others, and of vectors got.

        Ids that several tables read are counted for the first of them. Vectors count 4 bytes per
        number, as if no codec made them shorter; as much goes back as gradients in training.
        """
        count = len(self._tables)
        none = torch.zeros(count, 2, dtype=torch.int64)
        totals = sum((hop.traffic(count) for hop in self._hops), none).tolist()
        pairs = zip(self._tables, totals, strict=True)
        return {table: (ids, vectors) for table, (ids, vectors) in pairs}

    def _translate(self, error: RuntimeError) -> RuntimeError:
        """Name the feature and the table of the plain lookup in a fault."""
        found = _BAD_ID.search(str(error))
        if found is None:
            return error
        number, bag, bad_id, rows = map(int, found.groups()[1:])
        output = self._local_outputs[number] if found[1] == "feature" else -1
        if found[1] == "split" and self._layout.hop is not None:
            output = self._far_outputs[self._layout.hop.split_features[number]]
        table = int(self._features[output, 1])
        return RuntimeError(
            f"shardwise: feature {output}, bag {bag}: id {bad_id} is outside table {table} of "
            f"{rows} rows"
        )

    # ---- what is here, and what is not

    def _splits(self, call: Ids, bags: Tensor) -> list[int]:
        """Give the size of each output: its width where they are columns, else its elements."""
        widths = self._features[:, 3]
        if call.columns:
            return widths.tolist()
        firsts = torch.cat([bags.new_zeros(1), bags[:, 0].cumsum(0)])
        is_sequence = self._features[:, 2] == Pooling.NONE
        ids = call.offsets.cpu()[firsts].diff() if bool(is_sequence.any()) else bags[:, 0]
        inputs = self._features[:, 0]
        return (torch.where(is_sequence, ids[inputs], bags[inputs, 0]) * widths).tolist()

    def _size(self, passage: Passage, outputs: Sequence[int]) -> tuple[int, int]:
        """Give the shape of a part of the result."""
        size = sum(passage.splits[output] for output in outputs)
        return (passage.shape[0], size) if passage.call.columns else (size, 1)

    def _look_up_here(
        self, passage: Passage, bags: Tensor, tables: Sequence[Tensor], way: SlicesWay
    ) -> None:
        """Look up the tables that are everywhere."""
        if not self._local_outputs:
            return
        region = self._layout.everywhere
        passage.local_call = passage.call._replace(
            weights=passage.call.weights.detach(), features=region.features, bags=bags
        )
        own, own_way = tables[region.first : region.last], way.of(region).way
        shape = self._size(passage, self._local_outputs)
        passage.local = lookup(own, passage.local_call, shape, way=own_way)

    def _merge(self, passage: Passage, far: Tensor | None) -> Tensor:
        """Lay the outputs from here and from others side by side."""
        if far is None or passage.local is None:
            result = passage.local if far is None else far
            assert result is not None, "a collection has outputs"
            return result.view(passage.shape)
        dim = int(passage.call.columns)
        pieces = [torch.empty(0)] * len(passage.splits)
        for outputs, value in ((self._local_outputs, passage.local), (self._far_outputs, far)):
            flat = value if dim else value.view(-1)
            sizes = [passage.splits[output] for output in outputs]
            for output, piece in zip(outputs, flat.split(sizes, dim), strict=True):
                pieces[output] = piece
        return torch.cat(pieces, dim).view(passage.shape)

    def _parts(self, passage: Passage, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Undo `_merge`."""
        if passage.local is None:
            return None, grad
        if passage.trip is None:
            return grad, None
        dim = int(passage.call.columns)
        pieces = (grad if dim else grad.view(-1)).split(passage.splits, dim)
        local = torch.cat([pieces[o] for o in self._local_outputs], dim)
        far = torch.cat([pieces[o] for o in self._far_outputs], dim)
        return (local, far) if dim else (local[:, None], far[:, None])

    # ---- both ways

    def _finish(
        self, passage: Passage, tables: Sequence[Tensor], way: SlicesWay, keeps_answer: bool
    ) -> Tensor:
        far = None
        if self._hop is not None and passage.trip is not None and passage.pending is not None:
            far = self._hop.finish(
                passage.trip,
                passage.pending,
                lambda region: (tables[region.first : region.last], way.of(region).way),
                self._size(passage, self._far_outputs),
                keeps_answer,
            )
        return self._merge(passage, far)

    def _bring_back(
        self, passage: Passage, grad: Tensor, tables: Sequence[Tensor], way: SlicesWay
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Give the gradient of the weights, if asked for, and of the slices that keep one."""
        found, scale = Found(), 1 / self._wire.world_size

        def to_slices(region: Region, grad: Tensor, call: Ids, wants: bool) -> Tensor | None:
            own = tables[region.first : region.last]
            weights, grads, touched = way.of(region).bring_back(grad, call, own, wants)
            found.grads |= {region.first + cell: one for cell, one in grads.items()}
            found.touched |= {region.first + cell: one for cell, one in touched.items()}
            return weights

        if self._wire.world_size > 1:
            self._wire.meet(f"gradients of {self._name}").wait()
        local, far = self._parts(passage, grad.contiguous())
        wants, weights = passage.wants_weights, None
        if self._hop is not None and passage.trip is not None and far is not None:
            weights = self._hop.bring_back(passage.trip, far, scale, to_slices, wants)
        if local is not None and passage.local_call is not None:
            scaled = local * scale if self._wire.world_size > 1 else local
            own = to_slices(self._layout.everywhere, scaled, passage.local_call, wants)
            own = own / scale if own is not None else None
            weights = own if weights is None else weights + own if own is not None else weights
        found.grads |= self._owners.finish(found.touched, tables, way)
        return weights, found.grads


def _explained(explain: Explain, error: RuntimeError) -> Exception:
    """Give what `explain` gives or, on finding another fault, raises."""
    try:
        return explain(error)
    except Exception as found:
        return found


class _Exchange(torch.autograd.Function):
    """An exchange, differentiable; tables are attributes of `ctx` as in the plain lookup."""

    @staticmethod
    def forward(
        ctx: Any,
        exchange: Exchange,
        passage: Passage,
        way: SlicesWay,
        anchor: Tensor,
        weights: Tensor,
        *tables: Tensor,
    ) -> Tensor:
        ctx.exchange, ctx.passage, ctx.way, ctx.tables = exchange, passage, way, tables
        return exchange._finish(passage, tables, way, passage.wants_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, by_cell = ctx.exchange._bring_back(ctx.passage, grads[0], ctx.tables, ctx.way)
        weights = weights if ctx.needs_input_grad[4] else None
        return None, None, None, None, weights, *map(by_cell.get, range(len(ctx.tables)))
