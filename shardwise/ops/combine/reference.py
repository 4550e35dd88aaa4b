"""The definition of `combine` and its gradients, in plain PyTorch.

A *stripe* is one feature's share of one column block: (split, pooling, feature, first column within
the feature, width, first base, width of the feature). The vector of an entry (slot, position) of
its split begins at bases[first base + slot] + position * width of the answer. An entry whose slot
is -1 has none.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwise.ops.lookup.reference import MEAN, NONE
from shardwise.ops.route.reference import ROWS, bags_of


class Call(NamedTuple):
    """The arguments that all three operators share, in their order."""

    bases: Tensor
    entries: Tensor
    entry_offsets: Tensor
    offsets: Tensor
    weights: Tensor
    is_weighted: bool
    bags: Tensor
    splits: Tensor
    stripes: Tensor
    columns: bool


class Terms(NamedTuple):
    """Which vectors of the answer one stripe adds to which elements of the output."""

    vectors: Tensor  # [E, width], elements of the answer
    targets: Tensor  # [E, width], elements of the output
    scale: Tensor  # [E], the weight over a mean's count
    ids: Tensor  # [E], positions of the ids of weighted rows; empty for others
    divisor: Tensor  # [E]


def combine(answer: Tensor, *arguments: Any) -> Tensor:
    """Add the vectors of an answer up: [rows, width], or blocks of as many elements."""
    *call, rows, width = arguments
    out: Tensor = torch.zeros(rows, width, device=answer.device)
    for terms in _terms(Call(*call), width):
        values = answer[terms.vectors] * terms.scale[:, None]
        out.view(-1).index_add_(0, terms.targets.flatten(), values.flatten())
    return out


def combine_grad(grad: Tensor, *arguments: Any) -> Tensor:
    """Give the gradient of the answer, flat, times `scale`."""
    *call, numel, scale = arguments
    result: Tensor = torch.zeros(numel, device=grad.device)
    flat = grad.contiguous().view(-1)
    for terms in _terms(Call(*call), grad.shape[1]):
        values = flat[terms.targets] * terms.scale[:, None] * scale
        result.index_add_(0, terms.vectors.flatten(), values.flatten())
    return result


def combine_weight_grads(grad: Tensor, answer: Tensor, *arguments: Any) -> Tensor:
    """Give the gradient of the weights [V] that were multiplied here: those of rows."""
    call = Call(*arguments)
    result = torch.zeros(call.weights.numel(), device=grad.device)
    flat = grad.contiguous().view(-1)
    for terms in _terms(call, grad.shape[1]):
        if terms.ids.numel():
            product = (answer[terms.vectors] * flat[terms.targets]).sum(1) / terms.divisor
            result.index_add_(0, terms.ids, product)
    return result


def _terms(call: Call, width: int) -> Iterator[Terms]:
    device = call.entries.device
    splits, stripes = call.splits.tolist(), call.stripes.tolist()
    num_bags = [int(call.bags[split[0]].sum()) for split in splits]
    firsts = [sum(num_bags[:p]) for p in range(len(splits))]
    starts = _row_starts(call, width)
    for p, pooling, feature, column, columns, first_base, _ in stripes:
        key, mode = splits[p][:2]
        own = bags_of(call.offsets, call.bags, key)
        limits = call.entry_offsets[firsts[p] : firsts[p] + num_bags[p] + 1]
        slot, position = call.entries[int(limits[0]) : int(limits[-1])].long().unbind(1)
        bag = torch.arange(num_bags[p], device=device)
        bag = torch.repeat_interleave(bag, limits.diff(), output_size=slot.numel())
        row = torch.arange(slot.numel(), device=device) if pooling == NONE else bag
        divisor = torch.ones(slot.numel(), device=device)
        if pooling == MEAN:
            divisor = own.lengths.clamp(min=1)[bag].float()
        is_weighted = call.is_weighted and mode == ROWS
        there = slot >= 0
        weights = call.weights[own.positions].float() if is_weighted else torch.ones_like(divisor)
        step = torch.arange(columns, device=device)
        base = call.bases.to(device)[first_base + slot[there]] + position[there] * columns
        yield Terms(
            base[:, None] + step,
            (starts[feature][row[there]] + column)[:, None] + step,
            (weights / divisor)[there],
            own.positions[there] if is_weighted else slot[:0],
            divisor[there],
        )


def _row_starts(call: Call, width: int) -> list[Tensor]:
    """Give, for each feature, where in the output each of its rows begins."""
    features = {stripe[2]: stripe for stripe in call.stripes.tolist()}
    device = call.entries.device
    starts: list[list[Tensor]] = [[] for _ in features]
    first = 0
    for source in range(call.bags.shape[1]):
        for feature in sorted(features):
            split, pooling, _, _, _, _, columns = features[feature]
            key = int(call.splits[split, 0])
            rows = int(call.bags[key, source])
            if pooling == NONE:
                before = int(call.bags[:, :source].sum()) + int(call.bags[:key, source].sum())
                rows = int(call.offsets[before + rows] - call.offsets[before])
            stride = width if call.columns else columns
            starts[feature].append(first + torch.arange(rows, device=device) * stride)
            first += columns if call.columns else rows * columns
    return [torch.cat(each) for each in starts]
