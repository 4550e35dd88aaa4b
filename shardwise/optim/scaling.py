"""Loss scaling for fp16 when gradients of tables lie in slices on many ranks."""

from typing import Any

import torch
from torch import Tensor

from shardwise.optim.slices import owner_of


class GradScaler(torch.amp.GradScaler):
    """PyTorch's `GradScaler`, with one answer on all ranks to whether a gradient overflowed.

    A gradient of a table that is not finite is seen only by the ranks of that slice; all must skip
    the step, and lower the scale, together. Every rank must unscale the same optimizers in the same
    order. Optimizers without sharded tables are treated as PyTorch does.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, *rest: Any
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, *rest)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        owners = {id(owner.ranks): owner.ranks for p in params if (owner := owner_of(p))}
        if not owners:
            return found
        device = inv_scale.device
        total = torch.stack([part.to(device) for part in (found_inf, *found.values())]).max()
        for ranks in owners.values():
            total = ranks.all_reduce(total, op="max", tag="found inf")
        return {device: total}
