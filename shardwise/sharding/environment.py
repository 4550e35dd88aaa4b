"""The ranks that train together, and which of them share a host."""

import os
from dataclasses import dataclass
from typing import TypeAlias

import torch.distributed as dist

Hosts: TypeAlias = tuple[tuple[int, ...], ...]
"""The ranks of each host; every rank is on one."""

# As set by torchrun, Open MPI, MVAPICH2 and other MPIs.
_LOCAL_SIZE_NAMES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
_LOCAL_RANK_NAMES = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
)
_USUAL_LOCAL_SIZE = 8


def get_local_size(world_size: int | None = None) -> int:
    """Give the number of ranks per host, from what the launcher has set.

    Args:
        world_size: Ranks there are; None asks the default process group.

    Returns:
        What the launcher says, or else 8; `world_size` where that does not divide into it.
    """
    world_size = dist.get_world_size() if world_size is None else world_size
    size = _from_launcher(_LOCAL_SIZE_NAMES)
    size = _USUAL_LOCAL_SIZE if size is None else size
    return size if size > 0 and world_size % size == 0 else world_size


def get_local_rank(world_size: int | None = None, rank: int | None = None) -> int:
    """Give the rank's number on its host, from what the launcher has set.

    Args:
        world_size: Ranks there are; None asks the default process group.
        rank: This rank; None asks the default process group.

    Returns:
        What the launcher says, or else the rank modulo the number of ranks per host.
    """
    local_rank = _from_launcher(_LOCAL_RANK_NAMES)
    if local_rank is not None:
        return local_rank
    rank = dist.get_rank() if rank is None else rank
    return rank % get_local_size(world_size)


def _from_launcher(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), None)


def equal_hosts(world_size: int, local_size: int) -> Hosts:
    """Give hosts of equally many ranks each, in rank order.

    Raises:
        ValueError: The ranks do not divide into such hosts.
    """
    if local_size < 1 or world_size % local_size:
        raise ValueError(f"{world_size} ranks do not divide into hosts of {local_size}")
    return tuple(
        tuple(range(first, first + local_size)) for first in range(0, world_size, local_size)
    )


@dataclass(frozen=True)
class ShardingEnv:
    """The ranks of a sharded module.

    Attributes:
        world_size: Ranks there are.
        rank: This one.
        pg: The process group they talk through; None for one rank without any.
        output_dtensor: Must be False: a state dict holds one kind of value.
        hosts: The ranks of each host; () takes equal ones in rank order, of the size that
            `get_local_size` gives.
    """

    world_size: int
    rank: int
    pg: dist.ProcessGroup | None = None
    output_dtensor: bool = False
    hosts: Hosts = ()

    def __post_init__(self) -> None:
        """Check the rank and the hosts."""
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        if self.output_dtensor:
            raise ValueError("output_dtensor=True is not available; leave it at False")
        if not self.hosts:
            hosts = equal_hosts(self.world_size, get_local_size(self.world_size))
            object.__setattr__(self, "hosts", hosts)
        listed = sorted(rank for host in self.hosts for rank in host)
        if listed != list(range(self.world_size)) or () in self.hosts:
            raise ValueError(
                f"hosts {self.hosts}: want each of ranks 0 to {self.world_size - 1} once, and "
                f"no host without ranks"
            )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group, under the name it goes by elsewhere."""
        return self.pg

    @classmethod
    def from_process_group(
        cls, pg: dist.ProcessGroup, output_dtensor: bool = False
    ) -> "ShardingEnv":
        """Take the ranks of a process group."""
        return cls(dist.get_world_size(pg), dist.get_rank(pg), pg, output_dtensor)

    @classmethod
    def from_local(cls, world_size: int, rank: int) -> "ShardingEnv":
        """Take ranks that need not talk, such as a single one."""
        return cls(world_size, rank)
