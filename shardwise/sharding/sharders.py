"""Sharders: which collections are sharded, and with which codecs and optimizer options."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.optim import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RowWiseAdagrad,
)
from shardwise.optim.in_backward import is_owned, table_holders, tag
from shardwise.sharding.codecs import Codecs, read_registry
from shardwise.sharding.environment import ShardingEnv
from shardwise.sharding.parameter_sharding import (
    EmbeddingComputeKernel,
    ParameterSharding,
    ShardingType,
)
from shardwise.sharding.shard import shard
from shardwise.sharding.sharded_modules import ShardedModule, make_lazy
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    FeatureProcessedEmbeddingBagCollection,
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
)

_RULES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
    "lamb": LAMB,
    "partial_rowwise_lamb": PartialRowWiseLAMB,
    "lars_sgd": LarsSGD,
}


def read_fused_params(
    params: Mapping[str, Any],
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Give the optimizer class and its options that `fused_params` of a sharder name.

    Args:
        params: `optimizer`, a class that `in_backward` takes or the name of a rule such as
            "exact_row_wise_adagrad", as text or as the value of an enumeration; SGD if left out.
            The other entries are options of the rule; `weight_decay_mode` is 0 (none), 1 (L2) or 2
            (decoupled), and `max_gradient` holds with `gradient_clipping`.

    Raises:
        ValueError: There is no such rule, or weight decay of no such kind.
    """
    options = dict(params)
    named = options.pop("optimizer", "sgd")
    if not isinstance(named, type):
        text = str(named.value if isinstance(named, Enum) else named).lower()
        rule = text.removeprefix("exact_").replace("row_wise", "rowwise")
        if rule not in _RULES:
            raise ValueError(f"fused_params: optimizer {text!r}; there are {list(_RULES)}")
        named = _RULES[rule]
    mode = options.pop("weight_decay_mode", None)
    mode = mode.value if isinstance(mode, Enum) else mode
    if mode not in (None, 0, 1, 2):
        raise ValueError(f"fused_params: weight_decay_mode {mode!r}; wants 0, 1 or 2")
    if mode == 0:
        options.pop("weight_decay", None)
    elif mode is not None:
        options["decoupled"] = mode == 2
    if not options.pop("gradient_clipping", True):
        options.pop("max_gradient", None)
    options["lr"] = options.pop("learning_rate", options.get("lr", 0.01))
    return named, options


class ModuleSharder:
    """Shards the collections of one type.

    Args:
        fused_params: Optimizer options for tables that have no rule; see `read_fused_params`.
        qcomm_codecs_registry: How messages are compressed; see `get_qcomm_codecs_registry`.
    """

    module_type: type[nn.Module] = nn.Module

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
    ) -> None:
        """Keep the options."""
        self.fused_params = fused_params
        self.qcomm_codecs_registry = qcomm_codecs_registry

    def codecs(self, *, is_pooled: bool) -> Codecs:
        """Give how vectors of pooled tables, or of sequences, travel."""
        return read_registry(self.qcomm_codecs_registry, is_pooled=is_pooled)

    def shard(
        self,
        module: nn.Module,
        params: Mapping[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedModule:
        """Shard a collection in place; its results are waited for at their first use.

        Args:
            module: The collection.
            params: How each table is sharded.
            env: The ranks.
            device: Where the slices lie; see `shard`.
            module_fqn: The collection's path in its model, for messages.

        Returns:
            The module, which is a `ShardedModule` from now on.
        """
        return make_lazy(shard(module, params, env, device, self))

    def tag_tables(self, module: nn.Module) -> None:
        """Give tables that have no rule the one of `fused_params`."""
        if not self.fused_params:
            return
        optimizer_class, options = read_fused_params(self.fused_params)
        for _, holder in table_holders(module):
            free = [p for p in holder.table_parameters().values() if not is_owned(p)]
            tag(free, optimizer_class, options)

    def shardable_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Give the parameters of the tables, by table name."""
        return {
            name.split(".")[1]: parameter
            for _, holder in table_holders(module)
            for name, parameter in holder.table_parameters().items()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Name the ways to cut tables: all of them, on every device."""
        return [one.value for one in ShardingType]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Name the kernels: all, for every sharding type and device."""
        return [one.value for one in EmbeddingComputeKernel]

    def storage_usage(
        self, tensor: Tensor, compute_device_type: str, compute_kernel: str
    ) -> dict[str, int]:
        """Give the bytes of a table by kind of memory, "hbm" on GPUs, else "ddr"."""
        kind = "hbm" if compute_device_type == "cuda" else "ddr"
        return {kind: tensor.numel() * tensor.element_size()}


class EmbeddingBagCollectionSharder(ModuleSharder):
    """Shards `EmbeddingBagCollection`s."""

    module_type = EmbeddingBagCollection


class FusedEmbeddingBagCollectionSharder(ModuleSharder):
    """Shards `FusedEmbeddingBagCollection`s."""

    module_type = FusedEmbeddingBagCollection


class FeatureProcessedEmbeddingBagCollectionSharder(ModuleSharder):
    """Shards the collections within `FeatureProcessedEmbeddingBagCollection`s."""

    module_type = FeatureProcessedEmbeddingBagCollection


class EmbeddingCollectionSharder(ModuleSharder):
    """Shards `EmbeddingCollection`s.

    Args:
        fused_params: See `ModuleSharder`.
        qcomm_codecs_registry: See `ModuleSharder`.
        use_index_dedup: Holds either way: repeated ids of a table that is answered by rows, as
            these all are, travel once.
    """

    module_type = EmbeddingCollection

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, Any] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        """Keep the options."""
        super().__init__(fused_params, qcomm_codecs_registry)


class FusedEmbeddingCollectionSharder(ModuleSharder):
    """Shards `FusedEmbeddingCollection`s."""

    module_type = FusedEmbeddingCollection


def get_default_sharders() -> list[ModuleSharder]:
    """Give a sharder for every type of collection."""
    return [
        EmbeddingBagCollectionSharder(),
        FusedEmbeddingBagCollectionSharder(),
        FeatureProcessedEmbeddingBagCollectionSharder(),
        EmbeddingCollectionSharder(),
        FusedEmbeddingCollectionSharder(),
    ]
