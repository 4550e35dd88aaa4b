"""2-D parallelism: the tables of one plan on several groups of ranks, each holding all of them.

Ids and vectors stay within a group. The groups are kept equal in one of two ways. Their gradients
are added at every step: then each block of the plan lies on one rank of every group as a replica,
and training is exact (`sync_gradients=True`). Or each group trains by itself, and `sync` averages
rows and what update rules keep, in messages of at most 16 MB between ranks that hold the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.sharding.environment import Hosts, ShardingEnv, equal_hosts, get_local_size
from shardwise.sharding.model_parallel import DataParallelWrapper, DistributedModelParallel
from shardwise.sharding.parameter_sharding import EnumerableShardingSpec, ParameterSharding
from shardwise.sharding.plan import EmbeddingModuleShardingPlan, ShardingPlan
from shardwise.sharding.reshard import ReshardReport
from shardwise.sharding.shard import sharded_collections
from shardwise.sharding.sharders import ModuleSharder
from shardwise.sharding.wire import Wire
from shardwise.tables.store import Store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ELEMENTS_AT_ONCE = 2**22

AllReduce = Callable[[list[Tensor]], None]
"""Puts the mean over the groups into each of some tensors, in place."""


def group_ranks(
    world_size: int, sharding_group_size: int, *, is_contiguous: bool = False
) -> list[list[int]]:
    """Give the ranks of each group.

    Args:
        world_size: Ranks there are.
        sharding_group_size: Ranks of a group, which together hold all tables.
        is_contiguous: Whether a group is a run of ranks, so that replicas lie on different hosts;
            otherwise it is every n-th rank, so that replicas lie next to one another.

    Raises:
        ValueError: The ranks do not divide into such groups.
    """
    if sharding_group_size < 1 or world_size % sharding_group_size:
        raise ValueError(
            f"{world_size} ranks do not divide into groups of {sharding_group_size}; take a "
            f"sharding_group_size that divides {world_size}"
        )
    ranks = np.arange(world_size)
    if is_contiguous:
        return ranks.reshape(-1, sharding_group_size).tolist()
    return ranks.reshape(sharding_group_size, -1).T.tolist()


def replicate_plan(plan: ShardingPlan, groups: Sequence[Sequence[int]]) -> ShardingPlan:
    """Put every block of a plan for one group on the same rank of each group.

    Args:
        plan: Its ranks are numbered within a group.
        groups: The ranks of each group, as of `group_ranks`.
    """
    return ShardingPlan(
        {
            path: EmbeddingModuleShardingPlan(
                {table: _replicate(sharding, groups) for table, sharding in own.items()}
            )
            for path, own in plan.plan.items()
        }
    )


def _replicate(sharding: ParameterSharding, groups: Sequence[Sequence[int]]) -> ParameterSharding:
    own = sharding.ranks
    ranks = None if own is None else [group[rank] for group in groups for rank in own]
    spec = sharding.sharding_spec
    if spec is not None:
        lines = np.tile(spec.lines, (len(groups), 1))
        lines[:, 4] = np.array(groups)[:, spec.lines[:, 4]].reshape(-1)
        spec = EnumerableShardingSpec.from_lines(lines, spec.devices * len(groups))
    return replace(sharding, ranks=ranks, sharding_spec=spec)


@dataclass(frozen=True)
class ShardingEnv2D:
    """The ranks of a model whose tables lie on several groups, seen from one of them.

    Attributes:
        sharding_pg: The process group of this rank's group.
        global_pg: That of all ranks.
        device_mesh: All ranks [groups, ranks of a group], dimensions `replicate` and `shard`.
        node_group_size: Ranks of a group that share a host; None finds out by `get_local_size`.
        use_inter_host_allreduce: Whether a group is a run of ranks, see `group_ranks`.
    """

    sharding_pg: dist.ProcessGroup
    global_pg: dist.ProcessGroup
    device_mesh: "DeviceMesh"
    node_group_size: int | None = None
    use_inter_host_allreduce: bool = False

    @property
    def world_size(self) -> int:
        """All ranks there are."""
        return dist.get_world_size(self.global_pg)

    @property
    def rank(self) -> int:
        """This one among all."""
        return dist.get_rank(self.global_pg)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group of all ranks."""
        return self.global_pg

    def num_sharding_groups(self) -> int:
        """Give the number of groups."""
        return self.world_size // dist.get_world_size(self.sharding_pg)

    def of_all(self) -> ShardingEnv:
        """Give all ranks as one environment."""
        return ShardingEnv.from_process_group(self.global_pg)

    def of_group(self) -> ShardingEnv:
        """Give this rank's group as an environment of its own.

        Raises:
            ValueError: `node_group_size` does not divide the group.
        """
        size, rank = dist.get_world_size(self.sharding_pg), dist.get_rank(self.sharding_pg)
        if self.node_group_size is not None:
            hosts = equal_hosts(size, self.node_group_size)
        else:
            hosts = self._hosts_of_group()
        return ShardingEnv(size, rank, self.sharding_pg, hosts=hosts)

    def _hosts_of_group(self) -> Hosts:
        own = dist.get_process_group_ranks(self.sharding_pg)
        everyone = equal_hosts(self.world_size, get_local_size(self.world_size))
        shared = [tuple(own.index(rank) for rank in host if rank in own) for host in everyone]
        return tuple(host for host in shared if host)


class DMPCollection(DistributedModelParallel):
    """A `DistributedModelParallel` whose tables lie on several groups of ranks.

    The dense part is trained on all ranks together. Tables are kept equal by `sync`, to be called
    by all ranks every so many steps; with `sync_gradients` they always are. Groups start equal.

    Averaging after every step of SGD is, but for rounding, what SGD on all ranks together does;
    of other rules, and with more steps in between, it is another algorithm.

    Args:
        module: The model; changed in place.
        device: Where this rank's part lies.
        plan: Where tables lie within a group, ranks numbered from 0 there.
        world_size: Ranks of `global_pg`, which must be all of the default process group.
        sharding_group_size: Ranks of a group; divides `world_size`.
        global_pg: All ranks.
        node_group_size: Ranks of a group that share a host; None finds out.
        sharders: Which collections are sharded; None takes `get_default_sharders()`.
        init_data_parallel: Wrap the dense part now; otherwise call `init_data_parallel` later.
        init_parameters: Draw the start of dense parts that are on `meta`.
        data_parallel_wrapper: What makes the dense part parallel; None takes the default.
        use_inter_host_allreduce: Make groups of runs of ranks, so that replicas lie on different
            hosts; otherwise replicas lie next to one another.
        custom_all_reduce: See `set_all_reduce_hook`.
        submodule_configs: Must be empty: all collections have groups of one size. A collection that
            wants other replicas has them in its plan, by `Slice(..., ranks)`.
        sync_gradients: Add the gradients of all groups up at every step, in place of `sync`.

    Attributes:
        device_mesh: All ranks [groups, ranks of a group], dimensions `replicate` and `shard`.

    Raises:
        ValueError: The ranks do not divide into groups, or the plan does not fit.
    """

    def __init__(  # noqa: PLR0913
        self,
        module: nn.Module,
        device: torch.device,
        plan: ShardingPlan,
        world_size: int,
        sharding_group_size: int,
        global_pg: dist.ProcessGroup,
        node_group_size: int | None = None,
        sharders: list[ModuleSharder] | None = None,
        init_data_parallel: bool = True,
        init_parameters: bool = True,
        data_parallel_wrapper: DataParallelWrapper | None = None,
        use_inter_host_allreduce: bool = False,
        custom_all_reduce: AllReduce | None = None,
        submodule_configs: Sequence[object] | None = None,
        *,
        sync_gradients: bool = False,
    ) -> None:
        """Make the groups, shard the tables, wrap the dense part and make the groups equal."""
        if submodule_configs:
            raise ValueError(
                f"DMPCollection: got {len(submodule_configs)} submodule_configs; give all "
                f"collections one sharding_group_size, or name replicas in the plan"
            )
        if not world_size == dist.get_world_size(global_pg) == dist.get_world_size():
            raise ValueError(
                f"DMPCollection: world_size {world_size}, {dist.get_world_size(global_pg)} ranks "
                f"in global_pg and {dist.get_world_size()} in all; they must be the same"
            )
        groups = group_ranks(
            world_size, sharding_group_size, is_contiguous=use_inter_host_allreduce
        )
        env = _make_env(groups, device, global_pg, node_group_size, use_inter_host_allreduce)
        super().__init__(
            module,
            env.of_all() if sync_gradients else env.of_group(),
            device,
            replicate_plan(plan, groups) if sync_gradients else plan,
            sharders,
            False,
            init_parameters,
            data_parallel_wrapper,
        )
        self._dense_env = env.of_all()
        self.device_mesh = env.device_mesh
        self._all_reduce = custom_all_reduce
        self._between_groups: Wire | None = None
        if not sync_gradients:
            peers = env.device_mesh.get_group("replicate")
            self._between_groups = Wire(peers, name="2-D", hosts=None)
            for _, tensor in self._shared(include_optimizer_state=True):
                self._between_groups.broadcast(tensor, source=0, tag="start of the groups")
        if init_data_parallel:
            self.init_data_parallel()

    def set_all_reduce_hook(self, reduce_hook: AllReduce) -> None:
        """Let a function of the user do what `sync` sends.

        Args:
            reduce_hook: Puts the mean over the groups into each of the tensors it is given, in
                place; they are rows, and states, in the order of the tables.
        """
        self._all_reduce = reduce_hook

    @torch.no_grad()
    def sync(self, include_optimizer_state: bool = True) -> None:
        """Put the mean over the groups into the rows of all tables; all ranks must call this.

        Nothing is to be done, nor sent, with `sync_gradients`. Sums are kept in float32.

        Args:
            include_optimizer_state: Average what the tables' update rules keep as well.
        """
        if self._between_groups is None:
            return
        shared = list(self._shared(include_optimizer_state))
        if self._all_reduce is not None:
            self._all_reduce([tensor for _, tensor in shared])
        else:
            for name, tensor in shared:
                _average(tensor, self._between_groups, f"mean of table {name!r}")
        for store in self._stores():
            if (changes := getattr(store.weight, "delta_store", None)) is not None:
                changes.mark(None)

    def _stores(self) -> list[Store]:
        found = (collection.stores for _, collection in sharded_collections(self.module))
        return [store for stores in found for store in stores]

    def _shared(self, include_optimizer_state: bool) -> list[tuple[str, Tensor]]:
        """Give what ranks of the same place in their groups hold alike, with the table's name."""
        return [
            (store.config.name, tensor)
            for store in self._stores()
            for tensor in (
                store.weight.detach(),
                *(store.states.values() if include_optimizer_state else ()),
            )
        ]

    def reshard(
        self, sharded_module_fqn: str, changed_shard_to_params: Mapping[str, ParameterSharding]
    ) -> ReshardReport:
        """Move some tables of one collection within each group.

        Args:
            sharded_module_fqn: The collection's path in the plan.
            changed_shard_to_params: Where those tables are to lie, by name, ranks numbered from 0
                in a group.

        Raises:
            ValueError: The plan has no such collection, or no such table.
        """
        changed = changed_shard_to_params
        if self._between_groups is None:
            groups = self.device_mesh.mesh.tolist()
            changed = {table: _replicate(one, groups) for table, one in changed.items()}
        return super().reshard(sharded_module_fqn, changed)


def _make_env(
    groups: list[list[int]],
    device: torch.device,
    global_pg: dist.ProcessGroup,
    node_group_size: int | None,
    is_contiguous: bool,
) -> ShardingEnv2D:
    from torch.distributed.device_mesh import DeviceMesh  # takes most of a second

    mesh = DeviceMesh(
        torch.device(device).type, torch.tensor(groups), mesh_dim_names=("replicate", "shard")
    )
    own = mesh.get_group("shard")
    return ShardingEnv2D(own, global_pg, mesh, node_group_size, is_contiguous)


def _average(tensor: Tensor, wire: Wire, tag: str) -> None:
    for piece in tensor.view(-1).split(_ELEMENTS_AT_ONCE):
        total = wire.all_reduce(piece.to(torch.float32, copy=True), tag=tag)
        piece.copy_(total.div_(wire.world_size))
