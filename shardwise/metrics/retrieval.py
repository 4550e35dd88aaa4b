"""Metrics of retrieval by full ranking: where the relevant items land among all items.

`rank_relevant` turns scores into ranks once; the metrics are short functions of ranks.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.jagged import JaggedTensor


def rank_relevant(
    scores: Float[Tensor, "B R"],
    relevant: JaggedTensor,
    excluded: JaggedTensor | None = None,
) -> JaggedTensor:
    """Rank each sample's relevant items among all items, best first from 1.

    Ties count against the model: of equal scores a relevant item comes last, so a model that scores
    all items alike finds nothing. NaN comes after everything. Costs V·R comparisons for V relevant
    items, and memory for as many scores.

    Args:
        scores: Of every item, for each sample. Not modified.
        relevant: The items to be found, in B bags, each item once per bag.
        excluded: Items that are no candidates, such as those already seen, in B bags. One that is
            relevant, too, ranks last.

    Returns:
        The ranks, ascending in each bag, in bags of the lengths of `relevant`.

    Raises:
        ValueError: The bags are not one per sample.
    """
    num_samples, num_items = scores.shape
    for name, bags in (("relevant", relevant), ("excluded", excluded)):
        if bags is not None and len(bags.lengths()) != num_samples:
            raise ValueError(
                f"rank_relevant: got {len(bags.lengths())} bags of {name} items for {num_samples} "
                "samples; wants one each"
            )
    worst = scores.new_tensor(float("-inf"))
    if excluded is not None:
        scores = scores.index_put((_sample_of_value(excluded), excluded.values().long()), worst)
    samples = _sample_of_value(relevant)
    own = scores[samples, relevant.values().long()]
    # (V,), itself and ties among them; nothing is below NaN, and NaN is not below anything
    not_below = (~(scores[samples] < own.unsqueeze(1))).sum(1)
    # Sorted by sample and count. Relevant items that tie have one count, the rank of their last.
    order = (samples * (num_items + 1) + not_below).sort().values
    _, group, sizes = order.unique_consecutive(return_inverse=True, return_counts=True)
    behind = sizes.cumsum(0)[group] - 1 - torch.arange(len(order), device=order.device)
    return JaggedTensor(order % (num_items + 1) - behind, lengths=relevant.lengths())


def hit_rate_at(ranks: JaggedTensor, cutoff: int) -> Float[Tensor, " B"]:
    """Say, as 0 or 1, whether one of the first `cutoff` items is relevant; NaN if no item is."""
    return _found(ranks, cutoff).clamp(max=1) / ranks.lengths().clamp(max=1)


def recall_at(ranks: JaggedTensor, cutoff: int) -> Float[Tensor, " B"]:
    """Give the share of the relevant items among the first `cutoff`; NaN if no item is."""
    return _found(ranks, cutoff) / ranks.lengths()


def ndcg_at(ranks: JaggedTensor, cutoff: int) -> Float[Tensor, " B"]:
    """Give the discounted gain of the first `cutoff` items over the best there could be.

    An item at rank r gains 1 / log2(r + 1) if it is relevant. NaN if no item is.
    K. Järvelin, J. Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
    """
    values = ranks.values()
    gains = torch.where(values <= cutoff, 1 / (values + 1).double().log2(), 0.0)
    places = torch.arange(cutoff + 1, dtype=torch.float64, device=values.device)
    ideal = torch.where(places > 0, 1 / (places + 1).log2(), 0.0).cumsum(0)
    return _sum_bags(ranks, gains) / ideal[ranks.lengths().clamp(max=cutoff).long()]


def reciprocal_rank(ranks: JaggedTensor) -> Float[Tensor, " B"]:
    """Give 1 / rank of the first relevant item; its mean is the MRR. NaN if no item is."""
    inverse = 1 / ranks.values().double()
    starts = torch.where(ranks.lengths() > 0, ranks.offsets()[:-1], len(inverse))
    return torch.cat([inverse, inverse.new_tensor([math.nan])])[starts.long()]


class RetrievalMetrics(nn.Module):
    """Means of the retrieval metrics over samples, batch by batch.

    Samples without a relevant item count nothing.

    Args:
        cutoffs: How many items are retrieved, one or more numbers.
        process_group: Ranks to add up over; None is this process alone.

    Raises:
        ValueError: A cutoff is below 1.
    """

    sums: Tensor
    count: Tensor

    def __init__(
        self, cutoffs: Sequence[int] = (10,), process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Start with no samples."""
        super().__init__()
        if any(cutoff < 1 for cutoff in cutoffs):
            raise ValueError(f"RetrievalMetrics: cutoffs must be at least 1, got {list(cutoffs)}")
        self._metrics = {
            f"{name}@{cutoff}": partial(metric, cutoff=cutoff)
            for name, metric in (("hr", hit_rate_at), ("recall", recall_at), ("ndcg", ndcg_at))
            for cutoff in cutoffs
        } | {"mrr": reciprocal_rank}
        self._process_group = process_group
        sums = torch.zeros(len(self._metrics), dtype=torch.float64)
        self.register_buffer("sums", sums)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        scores: Float[Tensor, "B R"],
        relevant: JaggedTensor,
        excluded: JaggedTensor | None = None,
    ) -> None:
        """Add samples; arguments and errors as of `rank_relevant`."""
        ranks = rank_relevant(scores, relevant, excluded)
        values = torch.stack([metric(ranks) for metric in self._metrics.values()])
        self.sums += values.nansum(1)
        self.count += (ranks.lengths() > 0).sum()

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Give the means by key, such as `ndcg@10` and `mrr`; NaN without samples.

        Over the ranks of the group: each of them must call it.
        """
        both = torch.cat([self.sums, self.count[None]])
        if self._process_group is not None:
            dist.all_reduce(both, group=self._process_group)
        return dict(zip(self._metrics, (both[:-1] / both[-1]).tolist(), strict=True))


def _sample_of_value(bags: JaggedTensor) -> Tensor:
    """Give the sample of each value."""
    lengths = bags.lengths()
    samples = torch.arange(len(lengths), device=lengths.device)
    return samples.repeat_interleave(lengths, output_size=len(bags.values()))


def _sum_bags(bags: JaggedTensor, numbers: Tensor) -> Tensor:
    sums = numbers.new_zeros(len(bags.lengths()))
    return sums.index_add(0, _sample_of_value(bags), numbers)


def _found(ranks: JaggedTensor, cutoff: int) -> Tensor:
    return _sum_bags(ranks, (ranks.values() <= cutoff).double())
