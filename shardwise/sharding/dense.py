"""The dense part of a sharded model, copied to every rank or cut by FSDP2.

Both average gradients over ranks as the tables do, and start from the weights of rank 0. Neither
touches the slices of tables.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

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
        return nn.parallel.DistributedDataParallel(model, process_group=group, **options)
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
