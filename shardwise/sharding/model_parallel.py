"""`DistributedModelParallel`: a model with its tables in slices and its dense part copied."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.optim import CombinedOptimizer, KeyedOptimizer
from shardwise.sharding.balance import balanced_plan
from shardwise.sharding.dense import dense_parallel
from shardwise.sharding.environment import ShardingEnv
from shardwise.sharding.parameter_sharding import ParameterSharding
from shardwise.sharding.plan import EmbeddingModuleShardingPlan, ShardingPlan
from shardwise.sharding.reshard import ReshardReport, reshard
from shardwise.sharding.shard import default_env, shard_planned, sharded_collections, sharded_names
from shardwise.sharding.sharded_modules import make_lazy
from shardwise.sharding.sharders import ModuleSharder, get_default_sharders
from shardwise.tables import ModelDeltaTracker, ModelTrackerConfig

_PRECISIONS = ("fp16", "bf16")


class DataParallelWrapper(abc.ABC):
    """Makes the dense part of a model parallel."""

    @abc.abstractmethod
    def wrap(self, dmp: "DistributedModelParallel", env: ShardingEnv, device: torch.device) -> None:
        """Replace the model that `dmp` runs, `dmp._dmp_wrapped_module`, by a wrapped one."""


class DefaultDataParallelWrapper(DataParallelWrapper):
    """Wraps the model in `DistributedDataParallel`, which leaves the tables alone.

    Args:
        bucket_cap_mb: Megabytes of gradients per collective.
        static_graph: Whether every step uses the same parameters.
        find_unused_parameters: Whether a step may leave some unused.
        allreduce_comm_precision: "fp16", or under NCCL "bf16", to send gradients so; None sends
            them as they are.
        params_to_ignore: Names of more parameters to leave alone.
        ddp_kwargs: More options of `DistributedDataParallel`.

    Raises:
        ValueError: There is no such precision.
    """

    def __init__(
        self,
        bucket_cap_mb: int = 25,
        static_graph: bool = True,
        find_unused_parameters: bool = False,
        allreduce_comm_precision: str | None = None,
        params_to_ignore: Sequence[str] | None = None,
        ddp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the options."""
        if allreduce_comm_precision not in (None, *_PRECISIONS):
            raise ValueError(
                f"allreduce_comm_precision {allreduce_comm_precision!r}; wants one of "
                f"{_PRECISIONS}, or None"
            )
        self._precision = allreduce_comm_precision
        self._ignored = list(params_to_ignore or ())
        self._options = {
            "bucket_cap_mb": bucket_cap_mb,
            "static_graph": static_graph,
            "find_unused_parameters": find_unused_parameters,
            "gradient_as_bucket_view": True,
            **(ddp_kwargs or {}),
        }

    def wrap(self, dmp: "DistributedModelParallel", env: ShardingEnv, device: torch.device) -> None:
        """Wrap the model, unless it has nothing dense to train."""
        module = dmp._dmp_wrapped_module.to(device)
        wrapped = dense_parallel(
            module, "ddp", env.process_group, ignore=self._ignored, **self._options
        )
        if self._precision and isinstance(wrapped, nn.parallel.DistributedDataParallel):
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # heavy

            hook = getattr(default_hooks, f"{self._precision}_compress_hook")
            wrapped.register_comm_hook(env.process_group, hook)
        dmp._dmp_wrapped_module = wrapped


class DistributedModelParallel(nn.Module):
    """A model whose tables lie in slices on many ranks and whose dense part is on all of them.

    Its names of parameters and its state dict are those of the model. Collections give results that
    are waited for at their first use.

    Args:
        module: The model; changed in place.
        env: The ranks; None takes the default process group.
        device: Where this rank's part lies; None takes the CPU.
        plan: Where tables lie; None takes `balanced_plan`.
        sharders: Which collections are sharded; None takes `get_default_sharders()`.
        init_data_parallel: Wrap the dense part now; otherwise call `init_data_parallel` later.
        init_parameters: Draw the start of dense parts that are on `meta`. Tables always are drawn.
        data_parallel_wrapper: What makes the dense part parallel; None takes the default.
        model_tracker_config: Track which rows change; None does not.

    Raises:
        ValueError: The plan does not fit the model, or the tracker's options do not.
    """

    def __init__(  # noqa: PLR0913
        self,
        module: nn.Module,
        env: ShardingEnv | None = None,
        device: torch.device | None = None,
        plan: ShardingPlan | None = None,
        sharders: list[ModuleSharder] | None = None,
        init_data_parallel: bool = True,
        init_parameters: bool = True,
        data_parallel_wrapper: DataParallelWrapper | None = None,
        model_tracker_config: ModelTrackerConfig | None = None,
    ) -> None:
        """Shard the tables and wrap the dense part."""
        super().__init__()
        self._env = self._dense_env = env or default_env()
        self.device = torch.device("cpu") if device is None else torch.device(device)
        sharders = sharders or get_default_sharders()
        types = {sharder.module_type for sharder in sharders}
        self._plan = plan or balanced_plan(module, self._env, types, self.device.type)
        self._wrapper = data_parallel_wrapper or DefaultDataParallelWrapper()
        self._is_wrapped = False
        self._fused_optimizer: CombinedOptimizer | None = None
        self._dmp_wrapped_module: nn.Module = shard_modules(
            module, self._env, self.device, self._plan, sharders, init_parameters
        )
        if init_data_parallel:
            self.init_data_parallel()
        self._model_tracker: ModelDeltaTracker | None = None
        if (config := model_tracker_config) is not None:
            self._model_tracker = ModelDeltaTracker(
                self,
                config.consumers,
                config.delete_on_read,
                config.auto_compact,
                config.tracking_mode,
                config.fqns_to_skip,
            )

    def get_model_tracker(self) -> ModelDeltaTracker:
        """Give what tracks which rows change.

        Raises:
            ValueError: The model was made without `model_tracker_config`.
        """
        if self._model_tracker is None:
            raise ValueError("nothing is tracked; give the model a model_tracker_config")
        return self._model_tracker

    @property
    def module(self) -> nn.Module:
        """The model, without wrappers."""
        return get_unwrapped_module(self._dmp_wrapped_module)

    @property
    def plan(self) -> ShardingPlan:
        """Where the tables lie."""
        return self._plan

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """The optimizers of all tables that are tagged with one, as one."""
        if self._fused_optimizer is None:
            self._fused_optimizer = CombinedOptimizer(
                [
                    (path, optimizer)
                    for path, collection in sharded_collections(self.module)
                    for optimizer in collection.fused_optimizers
                ]
            )
        return self._fused_optimizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self._dmp_wrapped_module(*args, **kwargs)

    def init_data_parallel(self) -> None:
        """Wrap the dense part, once."""
        if not self._is_wrapped and self._dense_env.world_size > 1:
            self._wrapper.wrap(self, self._dense_env, self.device)
        self._is_wrapped = True

    def reshard(
        self, sharded_module_fqn: str, changed_shard_to_params: Mapping[str, ParameterSharding]
    ) -> ReshardReport:
        """Move some tables of one collection, see `shardwise.sharding.reshard`.

        Args:
            sharded_module_fqn: The collection's path in the plan.
            changed_shard_to_params: Where those tables are to lie, by name.

        Raises:
            ValueError: The plan has no such collection, or no such table.
        """
        plan = self._plan.plan.get(sharded_module_fqn, EmbeddingModuleShardingPlan())
        unknown = sorted(set(changed_shard_to_params) - set(plan))
        if unknown or not plan:
            raise ValueError(
                f"reshard: the plan has collections {sorted(self._plan.plan)}, that of "
                f"{sharded_module_fqn!r} has no tables {unknown}"
            )
        changed = EmbeddingModuleShardingPlan({**plan, **changed_shard_to_params})
        report = reshard(self.module, ShardingPlan({sharded_module_fqn: changed}))
        self._plan = ShardingPlan({**self._plan.plan, sharded_module_fqn: changed})
        return report

    def bare_named_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are no slices of tables."""
        hidden = sharded_names(self.module)
        for name, parameter in self.module.named_parameters("", recurse):
            if name not in hidden:
                yield f"{prefix}.{name}" if prefix else name, parameter

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters under its own names."""
        yield from self.module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's buffers under its own names."""
        yield from self.module.named_buffers(prefix, recurse, remove_duplicate)

    def sparse_grad_parameter_names(
        self, destination: list[str] | None = None, prefix: str = ""
    ) -> list[str]:
        """Add the names of tables whose gradient is row-sparse to a list, and give it."""
        names = [] if destination is None else destination
        for path, collection in sharded_collections(self.module):
            names += [f"{prefix}{path}.{name}" for name in collection.sparse_names()]
        return names

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the model's state under its own names; tables are whole, as `SlicedTensor`s."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` gave, or whole tensors under the same names."""
        return self.module.load_state_dict(state_dict, strict, assign)


def get_module(model: nn.Module) -> nn.Module:
    """Give the model within a `DistributedModelParallel`, wrapped in DDP as it may be."""
    return model._dmp_wrapped_module if isinstance(model, DistributedModelParallel) else model


def get_unwrapped_module(model: nn.Module) -> nn.Module:
    """Give the model without `DistributedModelParallel` and DDP."""
    while isinstance(model, DistributedModelParallel | nn.parallel.DistributedDataParallel):
        model = get_module(model) if isinstance(model, DistributedModelParallel) else model.module
    return model


def get_unsharded_module_names(model: nn.Module) -> list[str]:
    """Name the outermost modules without a sharded table in them, wrappers looked through."""
    return list(_without_slices("", get_unwrapped_module(model)))


def _without_slices(path: str, module: nn.Module) -> Iterator[str]:
    sharded = dict(sharded_collections(module))
    if not sharded:
        yield path
    elif "" not in sharded:
        for name, child in module.named_children():
            yield from _without_slices(f"{path}.{name}" if path else name, child)


def shard_modules(
    module: nn.Module,
    env: ShardingEnv | None = None,
    device: torch.device | None = None,
    plan: ShardingPlan | None = None,
    sharders: Sequence[ModuleSharder] | None = None,
    init_params: bool = False,
) -> nn.Module:
    """Shard the collections of a model in place, with results waited for at their first use.

    Args:
        module: The model.
        env: The ranks; None takes the default process group, or one rank where there is none.
        device: Where the slices lie; see `shard`.
        plan: Where tables lie; None takes `balanced_plan`.
        sharders: One per type of collection; None takes `get_default_sharders()`.
        init_params: Draw the start of other parts that are on `meta`, by their
            `reset_parameters()`.

    Returns:
        The model; the collection's sharded form where `module` is one.

    Raises:
        ValueError: The plan does not fit, or names a module for which there is no sharder.
    """
    env = env or default_env()
    by_type = {one.module_type: one for one in sharders or get_default_sharders()}
    device_type = "cpu" if device is None else torch.device(device).type
    plan = plan or balanced_plan(module, env, set(by_type), device_type)
    planned = {path: module.get_submodule(path) for path in plan.plan}
    for path, found in planned.items():
        if type(found) not in by_type:
            raise ValueError(
                f"the plan names module {path!r}, a {type(found).__name__}; there are sharders of "
                f"{[one.__name__ for one in by_type]}"
            )
    shard_planned(module, plan, env, device, lambda path: by_type[type(planned[path])])
    for found in planned.values():
        make_lazy(found)
    if init_params:
        _draw_dense(module, device or torch.device("cpu"))
    return module


def _draw_dense(module: nn.Module, device: torch.device) -> None:
    """Give what is on `meta` memory, and its start by the nearest `reset_parameters` around it."""
    owners: dict[nn.Module, None] = {}

    def visit(part: nn.Module, owner: nn.Module | None) -> None:
        owner = part if hasattr(part, "reset_parameters") else owner
        tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        if any(tensor.is_meta for tensor in tensors):
            if owner is None:
                raise ValueError(
                    f"{type(part).__name__} is on meta and neither it nor a module around it has "
                    f"reset_parameters(); make it on {device.type}"
                )
            part.to_empty(device=device, recurse=False)
            owners[owner] = None
        for child in part.children():
            visit(child, owner)

    visit(module, None)
    for owner in owners:
        owner.reset_parameters()  # type: ignore[operator]  # a method, as was asked above
