"""Put a model's tables onto many ranks, in place.

Every rank calls `shard` with the same plan; digests of it are compared first. Tables that are
initialised are cut from each rank's own copy, and blocks with replicas are then sent from their
first rank to the others. Tables on `meta` are drawn slice by slice from a seed of rank 0, so that
no rank ever holds more than its slices.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn

from shardwise.optim.in_backward import is_owned, table_holders
from shardwise.optim.slices import SliceOwner, own, retire
from shardwise.sharding.agreement import check_equal_plans
from shardwise.sharding.codecs import Codecs
from shardwise.sharding.environment import ShardingEnv, get_local_rank
from shardwise.sharding.exchange import Exchange
from shardwise.sharding.many_ranks import ManyRanks, keep_whole_state
from shardwise.sharding.parameter_sharding import ParameterSharding
from shardwise.sharding.placement import Placement, Slice
from shardwise.sharding.plan import ShardingPlan, place_tables, table_configs
from shardwise.sharding.replicas import equalize
from shardwise.sharding.wire import Wire
from shardwise.tables import EmbeddingBagCollection
from shardwise.tables.collection import TableCollection
from shardwise.tables.store import Store

Module = TypeVar("Module", bound=nn.Module)
CollectionPlan: TypeAlias = Mapping[str, ParameterSharding] | Sequence[Slice]


@runtime_checkable
class Sharder(Protocol):
    """Options for the collections that are sharded."""

    def codecs(self, *, is_pooled: bool) -> Codecs:
        """Give how vectors of pooled tables, or of sequences, travel."""

    def tag_tables(self, module: nn.Module) -> None:
        """Give tables that have no update rule one."""


def shard(
    module: Module,
    plan: ShardingPlan | CollectionPlan,
    env: ShardingEnv | None = None,
    device: torch.device | None = None,
    sharder: Sharder | None = None,
) -> Module:
    """Put the tables of a model, or of one collection, where a plan says.

    The module keeps its class, its outputs and the keys of its state dict; its parameters become
    this rank's slices, `<table>.weight` the first of a table and `<table>.<n>.weight` further ones.
    A table of which nothing lies here has a slice without rows. Update rules bound before go along
    with their state; plain optimizers must be made afterwards, as the parameters are new.

    `DistributedDataParallel` must not touch the slices: they are put on its list of what to ignore.

    Args:
        module: Changed in place.
        plan: For a model a `ShardingPlan`; collections that it does not name stay as they are. For
            one collection its module plan, or slices that tile all its tables.
        env: The ranks; None takes the default process group, or one rank where there is none.
        device: Where the slices lie; None leaves them where the tables are, and takes the CPU, or
            this rank's GPU under NCCL, for tables on `meta`.
        sharder: Has codecs and optimizer options for the collections; None takes none.

    Returns:
        The module.

    Raises:
        ValueError: The plan does not fit the tables, or differs between ranks.
    """
    shard_planned(module, plan, env or default_env(), device, lambda path: sharder)
    return module


def shard_planned(
    module: nn.Module,
    plan: ShardingPlan | CollectionPlan,
    env: ShardingEnv,
    device: torch.device | None,
    sharder_of: Callable[[str], Sharder | None],
) -> None:
    """Do what `shard` does, with a sharder for each path in the plan."""
    wire = Wire(env.process_group, name="shard", hosts=env.hosts)
    found: dict[str, tuple[TableCollection, Codecs]] = {}
    placements: dict[str, list[Placement]] = {}
    with wire.together("shard"):
        for planned_path, path, collection, own_plan in planned_collections(module, plan):
            sharder = sharder_of(planned_path)
            is_pooled = isinstance(collection, EmbeddingBagCollection)
            if sharder is not None:
                sharder.tag_tables(collection)
            codecs = sharder.codecs(is_pooled=is_pooled) if sharder else Codecs()
            found[path] = collection, codecs
            placements[path] = place_tables(
                table_configs(collection),
                own_plan,
                world_size=env.world_size,
                is_pooled=is_pooled,
            )
    check_equal_plans(placements, wire, {path: str(codecs) for path, (_, codecs) in found.items()})
    for path, (collection, codecs) in found.items():
        exchange = Exchange(collection.features, placements[path], wire, path=path, codecs=codecs)
        _move(collection, ManyRanks(exchange, placements[path], wire), device)
    hide_from_ddp(module, sharded_names(module))


def default_env() -> ShardingEnv:
    """Give the ranks of the default process group; a single one where there is none."""
    if not dist.is_initialized():
        return ShardingEnv.from_local(1, 0)
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is initialised"
    return ShardingEnv.from_process_group(group)


def planned_collections(
    module: nn.Module, plan: ShardingPlan | CollectionPlan, *, are_sharded: bool = False
) -> Iterator[tuple[str, str, TableCollection, CollectionPlan]]:
    """Give, for each path in the plan, the path of its collection, that collection and its plan.

    Raises:
        ValueError: A path is not of one collection, one is sharded already, or not yet, or one that
            has an update rule is not named.
    """
    holders = dict(table_holders(module))
    plans = plan.plan if isinstance(plan, ShardingPlan) else {"": plan}
    planned = set()
    for path, own_plan in plans.items():
        inside = [p for p in holders if not path or f"{p}.".startswith(f"{path}.")]
        if len(inside) != 1:
            raise ValueError(
                f"the plan names module {path!r}, in which there are {len(inside)} collections of "
                f"tables; it must name one of {list(holders)}"
            )
        collection = holders[inside[0]]
        assert isinstance(collection, TableCollection), "other modules hold no tables"
        if isinstance(collection.layout, ManyRanks) != are_sharded:
            fault = (
                "is not sharded; call `shard`"
                if are_sharded
                else "is sharded already; call `reshard`"
            )
            raise ValueError(f"collection {inside[0]!r} {fault}")
        planned.add(inside[0])
        yield path, inside[0], collection, own_plan
    if are_sharded:
        return
    for path, holder in holders.items():
        if path not in planned and any(map(is_owned, holder.table_parameters().values())):
            raise ValueError(
                f"collection {path!r} has an update rule and no plan: its copies would drift "
                f"apart; plan it, data-parallel for a copy on every rank"
            )


@torch.no_grad()
def _move(collection: TableCollection, layout: ManyRanks, device: torch.device | None) -> None:
    """Put this rank's slices in the place of a collection's tables."""
    wholes, seed = collection.stores, layout.agree(collection.seed)
    is_drawn = all(whole.weight.is_meta for whole in wholes)
    stores = []
    for cell in layout.exchange.cells:
        whole = wholes[cell.table]
        place = device or (_default_device() if is_drawn else whole.weight.device)
        store = Store(whole.config, cell.table, place, cell.part)
        if whole.weight.is_meta:
            store.fill(seed)
        else:
            store.weight.copy_(store.cut(whole.weight))
        stores.append(store)
    collection.seed = seed
    collection.move(stores, layout)
    for whole in wholes:
        retire(whole.weight, f"table {whole.config.name!r} as it was before `shard` cut it")
    own_slices(stores, layout)
    keep_whole_state(collection)
    if not is_drawn:
        equalize(stores, layout.placements, layout.wire)


def own_slices(stores: Sequence[Store], layout: ManyRanks) -> None:
    """Tell optimizers whose the slices here are."""
    exchange = layout.exchange
    for number, (store, cell) in enumerate(zip(stores, exchange.cells, strict=True)):
        is_counted = cell.replicas[0] == layout.wire.rank
        parts = [other.weight for other in stores if other.key == store.key]
        join = partial(layout.whole, store.key)
        own(
            store.weight,
            SliceOwner(layout.wire, is_counted, number, exchange.whole_rows, parts, join),
        )


def _default_device() -> torch.device:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", get_local_rank())
    return torch.device("cpu")


def sharded_collections(module: nn.Module) -> Iterator[tuple[str, TableCollection]]:
    """Find the collections whose tables lie in slices, with their paths."""
    for path, holder in table_holders(module):
        if isinstance(holder, TableCollection) and isinstance(holder.layout, ManyRanks):
            yield path, holder


def sharded_names(module: nn.Module) -> set[str]:
    """Name the parameters and buffers that belong to sharded collections."""
    return {
        f"{path}.{name}" if path else name
        for path, collection in sharded_collections(module)
        for name in (*dict(collection.named_parameters()), *dict(collection.named_buffers()))
    }


def sharded_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Give the slices of all tables: the `ignored_params` of `fully_shard`."""
    return {p for _, collection in sharded_collections(module) for p in collection.parameters()}


def hide_from_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Set what `DistributedDataParallel` of the module ignores."""
    ddp: Any = nn.parallel.DistributedDataParallel  # torch does not annotate this
    hide = ddp._set_params_and_buffers_to_ignore_for_model
    hide(module, sorted(names))
