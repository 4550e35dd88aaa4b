"""Gradient clipping that knows row-sparse gradients and parameters that lie on several ranks.

The norm is over all ranks: of parameters that lie in slices, each rank adds up its slices and one
number per set of ranks is summed over these. Others are counted once. Slices of sharded tables are
known by a note on the parameter; for others the process groups must be given.
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from shardwise.optim.keyed import KeyedOptimizer
from shardwise.optim.slices import Ranks, owner_of
from shardwise.optim.wrappers import OptimizerWrapper

Groups = Mapping[Tensor, Sequence[dist.ProcessGroup]]


class GradientClipping(enum.Enum):
    """What is clipped: nothing, the norm of all gradients, or each element."""

    NONE = "none"
    NORM = "norm"
    VALUE = "value"


class GradientClippingOptimizer(OptimizerWrapper):
    """Clip the gradients before each step.

    Parameters that are updated in backward have no gradient left and are not clipped; use the
    `max_gradient` of their rule, or `when="step"`.

    Args:
        optimizer: Takes the steps.
        clipping: What is clipped.
        max_gradient: The largest norm, or size of an element.
        norm_type: Of which norm; may be infinity.
        enable_global_grad_clip: Take the norm over all ranks; if not, over those parameters and
            slices that lie on this one.
        param_to_pgs: The process groups over which the slices of a parameter lie; see
            `clip_grad_norm_`. Read only with `enable_global_grad_clip`.

    Raises:
        ValueError: `max_gradient` is negative, or `norm_type` not positive.
    """

    def __init__(
        self,
        optimizer: KeyedOptimizer,
        clipping: GradientClipping = GradientClipping.NONE,
        max_gradient: float = 0.1,
        norm_type: float | str = 2.0,
        enable_global_grad_clip: bool = False,
        param_to_pgs: Mapping[Any, Sequence[dist.ProcessGroup]] | None = None,
    ) -> None:
        """Wrap an optimizer."""
        super().__init__(optimizer)
        _check("GradientClippingOptimizer: max_gradient", max_gradient, float(norm_type))
        self._clipping = clipping
        self._max_gradient = max_gradient
        self._norm_type = float(norm_type)
        self._groups: Groups | None = param_to_pgs if enable_global_grad_clip else None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip the gradients, of `closure` where there is one, and take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        if self._clipping is GradientClipping.NORM:
            clip_grad_norm_(params, self._max_gradient, self._norm_type, groups=self._groups)
        elif self._clipping is GradientClipping.VALUE:
            _clip_values(params, self._max_gradient)
        self._optimizer.step()
        return loss


@torch.no_grad()
def clip_grad_norm_(
    parameters: Shaped[Tensor, "..."] | Iterable[Shaped[Tensor, "..."]],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    groups: Groups | None = None,
) -> Float[Tensor, ""]:
    """Scale all gradients together so that their norm is at most `max_norm`.

    Gradients are multiplied by max_norm / (norm + 1e-6) where that is below 1. In a row-sparse
    gradient the entries of one row are summed first, so it counts and is scaled as if dense. A norm
    that is not finite makes the gradients so.

    Args:
        parameters: Those without a gradient are left out of the norm.
        max_norm: The largest norm.
        norm_type: Of which norm; may be infinity.
        groups: For parameters of which each rank holds a slice, the process groups to sum over, one
            after the other; sharded tables need none. Others are taken to be equal on all ranks.
            Where there are slices, every rank must call this, with the parameters in the same
            order, those without a gradient included.

    Returns:
        The norm before clipping, in float32 or wider, on the device of the first parameter.

    Raises:
        ValueError: `max_norm` is negative, or `norm_type` not positive.
    """
    _check("clip_grad_norm_: max_norm", max_norm, norm_type)
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not params:
        return torch.zeros(())
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for param in params:
        owner = owner_of(param)
        owners = () if groups is None else tuple(map(_Group, groups.get(param, ())))
        buckets.setdefault(owners or ((owner.ranks,) if owner else ()), []).append(param)
    device = params[0].device
    norms = [_bucket_norm(bucket, norm_type, owners) for owners, bucket in buckets.items()]
    norm = _norm([part.to(device) for part in norms], norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in _grads(params):
        grad.mul_(scale.to(grad.device))
    return norm


def _grads(params: Iterable[Tensor]) -> list[Tensor]:
    """The elements of all gradients, for reading and writing; empty ones are left out."""
    grads = []
    for param in params:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            param.grad = param.grad.coalesce()
            grads.append(param.grad.values())
        else:
            grads.append(param.grad)
    return [grad for grad in grads if grad.numel()]


@dataclass(frozen=True)
class _Group:
    """A process group as `Ranks`."""

    group: dist.ProcessGroup

    def all_reduce(self, tensor: Tensor, *, op: Literal["sum", "max"], tag: str) -> Tensor:
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(tensor, kind, group=self.group)
        return tensor


def _bucket_norm(params: Sequence[Tensor], norm_type: float, owners: Sequence[Ranks]) -> Tensor:
    device = params[0].device
    counted = [p for p in params if (owner := owner_of(p)) is None or owner.is_counted]
    norms = [_grad_norm(grad, norm_type).to(device) for grad in _grads(counted)]
    norm = _norm(norms, norm_type) if norms else torch.zeros((), device=device)
    if norm_type == float("inf"):
        for ranks in owners:
            norm = ranks.all_reduce(norm, op="max", tag="gradient norm")
        return norm
    power = norm**norm_type
    for ranks in owners:
        power = ranks.all_reduce(power, op="sum", tag="gradient norm")
    return power ** (1 / norm_type) if owners else norm


def _grad_norm(grad: Tensor, norm_type: float) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    norm = torch.linalg.vector_norm(grad, norm_type, dtype=dtype)
    # A DTensor gives its norm in parts, one on each rank.
    full_tensor: Callable[[], Tensor] = getattr(norm, "full_tensor", lambda: norm)
    return full_tensor()


def _norm(norms: list[Tensor], norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


@torch.no_grad()
def _clip_values(params: Iterable[Tensor], max_value: float) -> None:
    for grad in _grads(params):
        grad.clamp_(-max_value, max_value)


def _check(what: str, limit: float, norm_type: float) -> None:
    if not limit >= 0:
        raise ValueError(f"{what} must be at least 0, got {limit}")
    if not norm_type > 0:
        raise ValueError(f"{what.split(':')[0]}: norm_type must be above 0, got {norm_type}")
