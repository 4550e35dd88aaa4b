"""One exchange of ids for vectors among some ranks: its stages, on the way out and back.

Out: *route* turns a call's ids into one message per rank. Every rank sends every other the counts
of its channels, 8 bytes each, and then the message; it looks up what arrived, in the order in which
it goes back, and sends the vectors; *combine* makes the result of them. Back: the result's gradient
becomes that of the vectors and returns to where they came from. That of the ids' weights, when some
rank asks for it, makes one more way home.

What is to go by relay is handed to a second hop among the ranks of the host, as a call of its own
whose sources are the ranks that sent it.

Before all this the ranks have met, see `Wire.meet`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shardwise.ops.combine import Call, combine, combine_grad, combine_weight_grads
from shardwise.ops.lookup import BadIds, Ids, Way, lookup
from shardwise.ops.route import ROWS, Routed, route, unpack
from shardwise.sharding.codecs import Codec, Codecs
from shardwise.sharding.layout import HopLayout, Region
from shardwise.sharding.wire import Lane, Pending, Wire

BringBack = Callable[[Region, Tensor, Ids, bool], Tensor | None]
"""Takes the gradient of a lookup to the slices; gives that of the weights if it is asked for."""

Slices = Callable[[Region], tuple[Sequence[Tensor], Way]]
"""Gives the slices of a region, and how gradients reach them."""


@dataclass(eq=False)
class Trip:
    """One call on its way; each stage adds what later ones need.

    Attributes:
        call: The ids.
        bags: Bags per input and source.
        routed: What the ids became.
        vectors: How many vectors each channel answers to this rank [C].
        counts: Bags and ids of each channel to this rank, from each [W, channels, 2].
        arrived: The ids that this rank looks up for others.
        owned_sizes: Elements that this rank sends each other one from its own slices [W].
        relayed_sizes: And from those of others on its host.
        answer_sizes: Elements that each rank sends this one.
        put: How the answer is put together, as the operators take it.
        answer: The vectors, where their values are needed on the way back.
        second: The trip through the second hop.
    """

    call: Ids
    bags: Tensor
    routed: Routed
    vectors: Tensor
    counts: Tensor = field(init=False)
    arrived: Ids = field(init=False)
    owned_sizes: Tensor = field(init=False)
    relayed_sizes: Tensor = field(init=False)
    answer_sizes: list[int] = field(init=False)
    put: Call = field(init=False)
    answer: Tensor | None = None
    second: "Trip | None" = None


class Hop:
    """Runs the stages of an exchange among some ranks.

    Args:
        layout: What the messages hold.
        region: The slices that are read here.
        wire: Connects the ranks.
        name: Of the collection, for tags.
        codecs: How vectors are written.
        second: What takes apart ids that came by relay.
    """

    def __init__(
        self,
        layout: HopLayout,
        region: Region,
        wire: Wire,
        name: str,
        codecs: Codecs,
        second: "Hop | None" = None,
    ) -> None:
        """Prepare what is the same for every call."""
        self._layout, self._region, self._wire, self._second = layout, region, wire, second
        self._name, self._codecs = name, codecs
        self._common_width = math.gcd(*layout.stripes[:, 4].tolist())
        first = layout.routes.first_channel
        self._count_sizes: list[int] = first.diff().tolist()
        owned = torch.tensor([(c, d) for c, _, _, d in layout.owned], dtype=torch.int64)
        relayed = torch.tensor([(c, s.columns[1]) for c, s in layout.relayed], dtype=torch.int64)
        self._owned, self._relayed = owned.view(-1, 2), relayed.view(-1, 2)
        self._has_rows = bool((layout.routes.splits[:, 1] == ROWS).any())
        self._id_bytes = 8 if layout.is_wide else 4
        self._sent_bytes = torch.zeros(layout.num_channels, dtype=torch.int64)
        self._sent_vectors = torch.zeros(layout.num_channels, dtype=torch.int64)

    # ---- out

    def start(self, call: Ids, bags: Int[Tensor, "K S"]) -> Trip:
        """Route the ids of a call.

        Raises:
            RuntimeError: An id is outside its table.
        """
        layout = self._layout
        weighted = (call.weights, call.is_weighted)
        routed = route(
            call.ids, call.offsets, *weighted, bags, layout.routes, call.bad_ids, layout.is_wide
        )
        vectors = _num_vectors(routed.counts)
        self._sent_bytes += self._channel_bytes(routed.counts, call.is_weighted)
        self._sent_vectors += vectors
        return Trip(call, bags, routed, vectors)

    def send_counts(self, trip: Trip) -> Pending:
        """Tell every rank what it will get."""
        sizes = self._count_sizes, [self._count_sizes[self._wire.rank]] * self._wire.world_size
        return self._send(trip.routed.counts.int(), *sizes, "counts", "ids")

    def take_counts(self, trip: Trip, pending: Pending) -> None:
        """Note what each rank will send."""
        counts = pending.wait().cpu().long()
        trip.counts = counts.view(self._wire.world_size, -1, 2)

    def send_ids(self, trip: Trip) -> Pending:
        """Send the ids."""
        sizes = self._channel_bytes(trip.counts, trip.call.is_weighted).sum(1)
        receive_sizes = (sizes + (-sizes) % 8).tolist()
        return self._send(
            trip.routed.message, trip.routed.sizes.tolist(), receive_sizes, "ids", "ids"
        )

    def finish(
        self, trip: Trip, ids: Pending, slices: Slices, shape: tuple[int, int], keeps_answer: bool
    ) -> Float[Tensor, "rows width"]:
        """Look up what arrived, send the vectors, and combine those that come back.

        Args:
            trip: Whose counts and ids are under way.
            ids: The ids.
            slices: What is read.
            shape: Of the result.
            keeps_answer: Whether gradients of weights will be asked for.
        """
        vectors = self._look_up(trip, ids.wait(), slices)
        layout, call = self._layout, trip.call
        sizes = trip.vectors[layout.piece_channels] * layout.piece_widths
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        trip.answer_sizes = starts[layout.first_piece].diff().tolist()
        send_sizes = (trip.owned_sizes + trip.relayed_sizes).tolist()
        answer = self._carry(
            vectors, send_sizes, trip.answer_sizes, "answers", self._codecs.forward
        )
        routed = trip.routed
        trip.put = Call(
            bases=starts[layout.slot_pieces],
            entries=routed.entries,
            entry_offsets=routed.entry_offsets,
            offsets=call.offsets,
            weights=call.weights,
            is_weighted=call.is_weighted,
            bags=trip.bags,
            splits=layout.routes.splits,
            stripes=layout.stripes,
            columns=call.columns,
        )
        trip.answer = answer if keeps_answer and call.is_weighted and self._has_rows else None
        result: Tensor = combine(answer, *trip.put, *shape)
        return result

    def _look_up(self, trip: Trip, message: Tensor, slices: Slices) -> Tensor:
        """Give the vectors of the ids in a message, as [source][piece]."""
        layout, counts, is_weighted = self._layout, trip.counts, trip.call.is_weighted
        ids, offsets, weights = unpack(message, counts, layout.modes, is_weighted, layout.is_wide)
        bags = torch.where(layout.modes == ROWS, 1, counts[..., 0]).t().contiguous()
        features, bad_ids = self._region.features, int(BadIds.RAISE)
        trip.arrived = Ids(ids, offsets, weights, is_weighted, features, bags, False, bad_ids)
        vectors = _num_vectors(counts)
        trip.owned_sizes = vectors[:, self._owned[:, 0]] @ self._owned[:, 1]
        trip.relayed_sizes = vectors[:, self._relayed[:, 0]] @ self._relayed[:, 1]
        tables, way = slices(self._region)
        owned = lookup(tables, trip.arrived, (int(trip.owned_sizes.sum()), 1), way=way).view(-1)
        if self._second is None:
            return owned
        trip.second = self._second.start(trip.arrived, bags)
        self._second.take_counts(trip.second, self._second.send_counts(trip.second))
        pending, shape = self._second.send_ids(trip.second), (int(trip.relayed_sizes.sum()), 1)
        relayed = self._second.finish(trip.second, pending, slices, shape, False).view(-1)
        return _interleave(owned, relayed, trip)

    # ---- back

    def bring_back(
        self,
        trip: Trip,
        grad: Float[Tensor, "rows width"],
        scale: float,
        to_slices: BringBack,
        wants_weights: bool,
    ) -> Float[Tensor, " V"] | None:
        """Take the gradient of a result to the slices.

        Args:
            trip: That of the result.
            grad: Of the result.
            scale: What gradients of slices are multiplied by.
            to_slices: Takes the gradient of a lookup to its slices.
            wants_weights: Whether any rank asks for gradients of weights.

        Returns:
            The gradient of the call's weights if asked for; it is not scaled.
        """
        numel = sum(trip.answer_sizes)
        flat = combine_grad(grad.contiguous(), *trip.put, numel, scale)
        sizes = (trip.owned_sizes + trip.relayed_sizes).tolist()
        back = self._carry(flat, trip.answer_sizes, sizes, "gradients", self._codecs.backward)
        owned, relayed = _part(back, trip) if self._second is not None else (back, None)
        weights = to_slices(self._region, owned[:, None], trip.arrived, wants_weights)
        if self._second is not None and relayed is not None and trip.second is not None:
            further = self._second.bring_back(
                trip.second, relayed[:, None], 1.0, to_slices, wants_weights
            )
            weights = weights + further if weights is not None and further is not None else None
        if not wants_weights or weights is None:
            return None
        home = self._send_weights_home(trip, weights / scale)
        if trip.answer is not None:
            home += combine_weight_grads(grad.contiguous(), trip.answer, *trip.put)
        return home

    def _send_weights_home(self, trip: Trip, grads: Tensor) -> Tensor:
        """Send the gradients of weights that arrived to where they came from."""
        is_partial = trip.counts[..., 0] > 0
        sizes = (trip.counts[..., 1] * is_partial).sum(1).tolist()
        if self._has_rows:
            grads = grads[is_partial.flatten().repeat_interleave(trip.counts[..., 1].flatten())]
        counts = trip.routed.counts
        starts = torch.cat([counts.new_zeros(1), (counts[:, 1] * (counts[:, 0] > 0)).cumsum(0)])
        back_sizes = starts[self._layout.routes.first_channel].diff().tolist()
        back = self._send(grads, sizes, back_sizes, "gradients of weights", "answers").wait()
        home = torch.zeros(trip.call.ids.numel(), device=back.device)
        return home.index_add_(0, trip.routed.origins, back)

    def _carry(
        self, flat: Tensor, sizes: list[int], receive_sizes: list[int], what: str, codec: Codec
    ) -> Tensor:
        """Exchange vectors."""
        width = self._common_width
        received = self._send(
            codec.encode(flat, sizes, width),
            codec.encoded_sizes(sizes, width),
            codec.encoded_sizes(receive_sizes, width),
            what,
            "answers",
        )
        return codec.decode(received.wait(), receive_sizes, width)

    def _send(
        self,
        send: Tensor,
        sizes: Sequence[int],
        receive_sizes: Sequence[int],
        what: str,
        lane: Lane,
    ) -> Pending:
        tag = f"{what} of {self._name}"
        return self._wire.all_to_all(send, sizes, receive_sizes, tag=tag, lane=lane, is_agreed=True)

    # ---- bytes

    def _channel_bytes(self, counts: Tensor, is_weighted: bool) -> Tensor:
        """Give the bytes of each channel's part in a message, from its bags and ids [..., 2]."""
        bags, ids = counts.unbind(-1)
        bytes_each = ids * self._id_bytes + 4 * bags * (bags != ids)
        return bytes_each + 4 * ids * (bags > 0) if is_weighted else bytes_each

    def traffic(self, num_tables: int) -> Int[Tensor, "tables 2"]:
        """Give, by table, bytes of ids sent to other ranks so far, and of float32 vectors got."""
        layout, rank = self._layout, self._wire.rank
        own = slice(*layout.routes.first_channel[rank:][:2].tolist())
        sent, vectors = self._sent_bytes.clone(), self._sent_vectors.clone()
        sent[own] = vectors[own] = 0
        got = vectors[layout.piece_channels] * layout.piece_widths * 4
        result = torch.zeros(num_tables, 2, dtype=torch.int64)
        result[:, 0].index_add_(0, torch.from_numpy(layout.channel_tables), sent)
        result[:, 1].index_add_(0, torch.from_numpy(layout.piece_tables), got)
        return result


def _num_vectors(counts: Tensor) -> Tensor:
    """Give how many vectors answer a channel: one per bag, or per id where there are no bags."""
    bags, ids = counts.unbind(-1)
    return torch.where(bags > 0, bags, ids)


def _interleave(owned: Tensor, relayed: Tensor, trip: Trip) -> Tensor:
    """Lay each source's vectors from here and from the second hop side by side."""
    if not owned.numel() or not relayed.numel():  # where every table is relayed, or none
        return relayed if relayed.numel() else owned
    pairs = zip(
        owned.split(trip.owned_sizes.tolist()),
        relayed.split(trip.relayed_sizes.tolist()),
        strict=True,
    )
    return torch.cat([piece for pair in pairs for piece in pair])


def _part(both: Tensor, trip: Trip) -> tuple[Tensor, Tensor]:
    """Undo `_interleave`."""
    sizes = torch.stack([trip.owned_sizes, trip.relayed_sizes], 1)
    num_owned, num_relayed = sizes.sum(0).tolist()
    if not num_owned or not num_relayed:
        return both[:num_owned], both[num_owned:]
    pieces = both.split(sizes.flatten().tolist())
    return torch.cat(pieces[::2]), torch.cat(pieces[1::2])
