"""The dense part of a sharded model, copied to every rank or cut by FSDP2.

Both average gradients over ranks as the tables do, and start from the weights of rank 0. Neither
touches the slices of tables.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.sharding.shard import hide_from_ddp, sharded_names


def dense_parallel(
    model: nn.Module,
    how: Literal["ddp", "fsdp2"] = "ddp",
    group: dist.ProcessGroup | None = None,
    ignore: Iterable[str] = (),
    **options: Any,
) -> nn.Module:
    """Train the dense part of a sharded model on all ranks.

    Args:
        model: A model whose tables `shard` has placed; its dense part lies on one device.
        how: "ddp" wraps the model in `DistributedDataParallel`; "fsdp2" applies `fully_shard` to it
            in place.
        group: The ranks; None takes the default process group.
        ignore: Names of more parameters to leave alone.
        options: For the constructor of DDP, or for `fully_shard`.

    Returns:
        The model to call. One that has nothing dense to train is given back as it is.
    """
    hidden = sharded_names(model) | set(ignore)
    dense = {name: p for name, p in model.named_parameters() if name not in hidden}
    if not any(parameter.requires_grad for parameter in dense.values()):
        return model
    if how == "ddp":
        hide_from_ddp(model, hidden)
        copied = nn.parallel.DistributedDataParallel(model, process_group=group, **options)
        _settle_buckets(copied, [one for one in dense.values() if one.requires_grad])
        return copied
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialised"
    buffers = [buffer for name, buffer in model.named_buffers() if name not in hidden]
    ignored = {p for name, p in model.named_parameters() if name in hidden}
    for tensor in (*dense.values(), *buffers):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    # Imported on use: they take most of a second.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    kind = next(iter(dense.values())).device.type
    options.setdefault("mesh", DeviceMesh.from_group(group, kind))
    fully_shard(model, ignored_params=ignored, **options)
    return model


class _Nothing(nn.Module):
    """Gives 0, and each parameter a gradient of 0, the last one first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._parameters_of_others = parameters

    def forward(self) -> Tensor:
        return torch.stack([one.sum() for one in self._parameters_of_others]).sum() * 0


def _settle_buckets(copied: nn.parallel.DistributedDataParallel, dense: list[nn.Parameter]) -> None:
    """Let DDP choose now how it joins gradients to messages, which it does after a first backward.

    Where in a message a gradient lies decides in which order three ranks or more are added up; so a
    run that goes on from a checkpoint would else differ in the last digit from one that never
    stopped.
    """
    copied.module, model = _Nothing(dense), copied.module
    copied.require_forward_param_sync = False  # it would look for the model's buffers
    copied().backward()
    copied.module, copied.require_forward_param_sync = model, True
    for parameter in dense:
        parameter.grad = None
