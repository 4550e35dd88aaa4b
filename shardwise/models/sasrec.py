"""SASRec: a sequence of items to the next one, by causal self-attention.

W.-C. Kang, J. McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018 (arXiv:1808.09781),
with a softmax over items in place of one negative per positive.

Sequences stay jagged: embeddings, norms and linear layers see one row per item, and only attention
pads, on the right, where the causal mask hides the padding from every item.
"""

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor
from shardwise.nn.sampled_softmax import sampled_softmax_loss
from shardwise.tables import EmbeddingCollection


class CausalAttention(nn.Module):
    """Multi-head self-attention in which an item sees itself and what came before it.

    Args:
        width: D, columns of the input and the output.
        num_heads: Divides D.
        device: Where the parameters lie.

    Raises:
        ValueError: The heads do not divide the width.
    """

    def __init__(
        self, width: int, num_heads: int, device: torch.device | str | None = None
    ) -> None:
        """Make the projections."""
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"CausalAttention: {num_heads} heads do not divide a width of {width}")
        self.num_heads = num_heads
        self.project_in = nn.Linear(width, 3 * width, device=device)
        self.project_out = nn.Linear(width, width, device=device)

    def forward(
        self, items: Float[Tensor, "V D"], slots: Int[Tensor, " V"], shape: tuple[int, int]
    ) -> Float[Tensor, "V D"]:
        """Mix each sequence's items.

        Args:
            items: One row per item.
            slots: Where each item lies among sequences padded on the right to one length.
            shape: Number of sequences, and the length.
        """
        width = items.shape[1]
        padded = items.new_zeros(shape[0] * shape[1], 3 * width)
        padded = padded.index_copy(0, slots, self.project_in(items))
        heads = padded.view(*shape, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        rows = mixed.transpose(1, 2).reshape(-1, width).index_select(0, slots)
        projected: Tensor = self.project_out(rows)
        return projected


class SASRecBlock(nn.Module):
    """Attention, then a layer per item; each is normalised before, and added to what it read.

    Args:
        width: D.
        num_heads: Divides D.
        dropout: Share of each addend that training zeroes.
        device: Where the parameters lie.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dropout: float,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, device=device)
        self.attention = CausalAttention(width, num_heads, device)
        self.item_norm = nn.LayerNorm(width, device=device)
        self.item_layers = nn.Sequential(
            nn.Linear(width, width, device=device),
            nn.ReLU(),
            nn.Linear(width, width, device=device),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, items: Float[Tensor, "V D"], slots: Int[Tensor, " V"], shape: tuple[int, int]
    ) -> Float[Tensor, "V D"]:
        """Give the next block's items; arguments as of `CausalAttention`."""
        items = items + self.dropout(self.attention(self.attention_norm(items), slots, shape))
        mixed: Tensor = self.dropout(self.item_layers(self.item_norm(items)))
        return items + mixed


class SASRec(nn.Module):
    """Sequences of items to one state per item, whose dot product with an item scores it as next.

    Args:
        embedding_collection: Two tables of one feature each: the items', and the positions', which
            has a row for each place of the longest sequence. Place 0 is the oldest item.
        num_blocks: Blocks of attention and item layers.
        num_heads: Heads of attention; divides the tables' width.
        dropout: Share of the embeddings and of each block's addends that training zeroes.
        dense_device: Where the parameters lie, other than the tables'.

    Raises:
        ValueError: The collection has other tables, or the heads do not divide the width.
    """

    def __init__(
        self,
        embedding_collection: EmbeddingCollection,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        dense_device: torch.device | str | None = None,
    ) -> None:
        """Make the blocks."""
        super().__init__()
        tables = embedding_collection.embedding_configs()
        features = {table.name: table.feature_names or [table.name] for table in tables}
        if len(tables) != 2 or any(len(names) != 1 for names in features.values()):
            raise ValueError(
                "SASRec: wants a table of items and one of positions, with one feature each; got "
                f"tables with features {features}"
            )
        self.keys = [name for (name,) in features.values()]
        self.num_items, self.max_length = (table.num_embeddings for table in tables)
        self.embedding_collection = embedding_collection
        width = embedding_collection.embedding_dim()
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SASRecBlock(width, num_heads, dropout, dense_device) for _ in range(num_blocks)
        )
        self.last_norm = nn.LayerNorm(width, device=dense_device)

    def forward(self, features: KeyedJaggedTensor) -> Float[Tensor, "B D"]:
        """Give the state after the last item of each sequence, zeros where there is none.

        Args:
            features: The sequences, oldest item first, under the item table's feature.

        Raises:
            KeyError: The key is missing.
            IndexError: An item is outside its table, or a sequence has more items than there are
                positions.
        """
        items = self.sequences(features)
        states, _ = self.encode(items)
        return _last_states(items, states)

    def score(self, features: KeyedJaggedTensor) -> Float[Tensor, "B R"]:
        """Score every item as the next one of each sequence; the rest is as of `forward`."""
        items = self.sequences(features)
        every = torch.arange(self.num_items, device=items.values().device)
        # Looked up as any others are, since a part of the table may lie elsewhere.
        states, vectors = self.encode(items, every.to(items.values().dtype))
        return _last_states(items, states) @ vectors.T

    def sequences(self, features: KeyedJaggedTensor) -> JaggedTensor:
        """Give the key that the model reads; where it is the only one, without a look at lengths.

        Raises:
            KeyError: The key is missing.
        """
        if features.keys() != self.keys[:1]:
            return features[self.keys[0]]
        return JaggedTensor(features.values(), lengths=features.lengths().view(-1))

    def encode(
        self, items: JaggedTensor, others: Int[Tensor, " C"] | None = None
    ) -> tuple[Float[Tensor, "V D"], Float[Tensor, "C D"]]:
        """Give the state after every item, and the vectors of any other items.

        All are looked up at once, so that an update rule in backward meets each row once.

        Args:
            items: The sequences, V items in all.
            others: The other items; None is no item.

        Raises:
            IndexError: As of `forward`.
        """
        ids, lengths = items.values(), items.lengths()
        others = ids.new_empty(0) if others is None else others
        num_items, num_sequences = ids.shape[0], lengths.shape[0]
        owners = torch.arange(num_sequences, device=ids.device)
        owners = owners.repeat_interleave(lengths, output_size=num_items)
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(num_items, device=ids.device) - starts.index_select(0, owners)
        vectors, places = self._look_up(ids, others, positions, lengths)
        length = self._padded_length(lengths)
        states = self.dropout(vectors[:num_items] * math.sqrt(vectors.shape[1]) + places)
        for block in self.blocks:
            states = block(states, owners * length + positions, (num_sequences, length))
        return self.last_norm(states), vectors[num_items:]

    def _look_up(
        self, ids: Tensor, others: Tensor, positions: Tensor, lengths: Tensor
    ) -> list[Tensor]:
        """Look up items and positions; the other items are one more sequence without positions."""
        ends = [lengths.new_tensor([count]) for count in (others.shape[0], 0)]
        features = KeyedJaggedTensor(
            self.keys,
            torch.cat([ids, others, positions.to(ids.dtype)]),
            lengths=torch.cat([lengths, ends[0], lengths, ends[1]]),
            length_per_key=[ids.shape[0] + others.shape[0], ids.shape[0]],
        )
        found = self.embedding_collection(features)
        return [found[key].values() for key in self.keys]

    def _padded_length(self, lengths: Tensor) -> int:
        if torch.compiler.is_compiling():  # a shape that does not depend on the data
            return self.max_length
        return int(lengths.max()) if lengths.numel() else 0


def _last_states(items: JaggedTensor, states: Tensor) -> Tensor:
    """Give the state after the last item of each sequence, zeros where there is none."""
    before_first = states.new_zeros(1, states.shape[1])
    ends = torch.where(items.lengths() > 0, items.lengths().cumsum(0), 0)
    return torch.cat([before_first, states]).index_select(0, ends)


class SASRecTrain(nn.Module):
    """A SASRec and its loss: -log of the softmax of each next item.

    The items it is compared with are the same for the whole batch: uniform draws, the targets of
    the batch, or both (J. Yang et al., "Mixed Negative Sampling", WWW 2020), corrected for how
    often they come.

    Args:
        sasrec: The model.
        num_negatives: Uniform draws per step. None takes every item once: the softmax itself.
        item_counts: How often each item is a target in the training data. With it, the targets of
            the batch are negatives of each other, too.

    Raises:
        ValueError: There is nothing to compare with, or the counts are not one per item.
    """

    item_shares: Tensor | None

    def __init__(
        self,
        sasrec: SASRec,
        num_negatives: int | None = 1024,
        item_counts: Num[Tensor, " R"] | None = None,
    ) -> None:
        """Take in the model."""
        super().__init__()
        if num_negatives is None and item_counts is not None:
            raise ValueError("SASRecTrain: item_counts need a num_negatives; None takes all items")
        if num_negatives == 0 and item_counts is None:
            raise ValueError("SASRecTrain: num_negatives 0 needs item_counts to compare with")
        if item_counts is not None and item_counts.shape[0] != sasrec.num_items:
            raise ValueError(
                f"SASRecTrain: got {item_counts.shape[0]} item_counts for {sasrec.num_items} items"
            )
        self.model = sasrec
        self.num_negatives = num_negatives
        shares = None if item_counts is None else item_counts / item_counts.sum()
        self.register_buffer("item_shares", shares, persistent=False)

    def forward(
        self, features: KeyedJaggedTensor, targets: Int[Tensor, " V"]
    ) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, ""], Float[Tensor, "V D"]]]:
        """Compare the state after each item with the item that came next.

        Args:
            features: The sequences, as for `SASRec`, V items in all.
            targets: What came after each of them.

        Returns:
            The mean loss in nats, and (loss, states) without gradient.

        Raises:
            ValueError: The targets are not one per item.
        """
        items = self.model.sequences(features)
        num_targets = targets.shape[0]
        if items.values().shape[0] != num_targets:
            raise ValueError(
                f"SASRecTrain: got {num_targets} targets for {items.values().shape[0]} items; "
                "wants one each"
            )
        others = torch.cat([targets, self._draw(targets)])
        states, vectors = self.model.encode(items, others)
        first = num_targets if self.item_shares is None else 0
        losses = sampled_softmax_loss(
            states,
            vectors[:num_targets],
            vectors[first:],
            targets,
            others[first:],
            self._expected_counts(others[first:], num_targets).log(),
        )
        loss = losses.sum() / max(num_targets, 1)
        return loss, (loss.detach(), states.detach())

    def _draw(self, targets: Tensor) -> Tensor:
        if self.num_negatives is None:
            items = torch.arange(self.model.num_items, device=targets.device)
        else:
            shape = (self.num_negatives,)
            items = torch.randint(self.model.num_items, shape, device=targets.device)
        return items.to(targets.dtype)

    def _expected_counts(self, ids: Tensor, num_targets: int) -> Tensor:
        draws = self.model.num_items if self.num_negatives is None else self.num_negatives
        counts = torch.full(ids.shape, draws / self.model.num_items, device=ids.device)
        if self.item_shares is not None:
            counts = counts + num_targets * self.item_shares.index_select(0, ids)
        return counts
