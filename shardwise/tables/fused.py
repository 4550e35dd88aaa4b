"""Collections whose tables are updated in backward from the start."""

from typing import Any

import torch
from torch import nn

from shardwise.ops.lookup import BadIds
from shardwise.optim.in_backward import TableOptimizer, in_backward
from shardwise.tables.configs import EmbeddingBagConfig, EmbeddingConfig
from shardwise.tables.embedding_bag_collection import EmbeddingBagCollection
from shardwise.tables.embedding_collection import EmbeddingCollection


def _refuse_location(location: object) -> None:
    if location is not None:
        raise ValueError(f"location={location!r}: tables lie on `device`; leave location at None")


class FusedEmbeddingBagCollection(EmbeddingBagCollection):
    """An `EmbeddingBagCollection` with an update rule in backward.

    Args:
        tables: The tables.
        optimizer_type: Names the rule, as for `in_backward`.
        optimizer_kwargs: Its options, `lr` among them.
        is_weighted: Multiply each row by its id's weight.
        device: Where the tables lie.
        location: Must be None: tables lie on `device`.
        bad_ids: What to do with an id outside its table.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        location: object | None = None,
        *,
        bad_ids: BadIds = BadIds.RAISE,
    ) -> None:
        """Make the tables and bind the rule."""
        _refuse_location(location)
        super().__init__(tables, is_weighted, device, bad_ids=bad_ids)
        self._optimizer = in_backward(self, optimizer_type, **optimizer_kwargs)

    @property
    def fused_optimizer(self) -> TableOptimizer:
        """The learning rate and state of the tables."""
        return self._optimizer


class FusedEmbeddingCollection(EmbeddingCollection):
    """An `EmbeddingCollection` with an update rule in backward.

    Args:
        tables: The tables.
        optimizer_type: Names the rule, as for `in_backward`.
        optimizer_kwargs: Its options, `lr` among them.
        device: Where the tables lie.
        need_indices: Give the ids, too, in the place of the result's weights.
        location: Must be None: tables lie on `device`.
        bad_ids: What to do with an id outside its table.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | str | None = None,
        need_indices: bool = False,
        location: object | None = None,
        *,
        bad_ids: BadIds = BadIds.RAISE,
    ) -> None:
        """Make the tables and bind the rule."""
        _refuse_location(location)
        super().__init__(tables, device, need_indices, bad_ids=bad_ids)
        self._optimizer = in_backward(self, optimizer_type, **optimizer_kwargs)

    @property
    def fused_optimizer(self) -> TableOptimizer:
        """The learning rate and state of the tables."""
        return self._optimizer


def fuse_embedding_optimizer(
    model: nn.Module,
    optimizer_type: type[torch.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    device: torch.device | None = None,
    location: object | None = None,
) -> nn.Module:
    """Let a rule update all tables of a model in backward; the model is changed in place.

    Args:
        model: A model with collections of tables.
        optimizer_type: Names the rule, as for `in_backward`.
        optimizer_kwargs: Its options.
        device: Move the model there first; None leaves it.
        location: Must be None: tables lie on `device`.

    Returns:
        The model.
    """
    _refuse_location(location)
    if device is not None:
        model.to(device)
    in_backward(model, optimizer_type, **optimizer_kwargs)
    return model
