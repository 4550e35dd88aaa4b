"""Contenders of the lookup benchmark: many tables looked up, pooled by sum, and trained.

Each holds its own tables and gets the same ids, laid out beforehand as it wants them. A forward
gives one tensor [batch, tables * width]; a training step is forward, backward from a given gradient
of that tensor, and an update of the touched rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import DataType, EmbeddingBagCollection, EmbeddingBagConfig

LR = 0.01
EPS = 1e-8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RULES: dict[str, tuple[type, type, dict[str, Any], str]] = {
    "row_wise_adagrad": (RowWiseAdagrad, RowWiseAdagrad, {"eps": EPS}, "EXACT_ROWWISE_ADAGRAD"),
    "sgd": (torch.optim.SGD, torch.optim.SGD, {}, "EXACT_SGD"),
    "adagrad": (torch.optim.Adagrad, torch.optim.Adagrad, {"eps": EPS}, "EXACT_ADAGRAD"),
    "adam": (torch.optim.Adam, torch.optim.SparseAdam, {"eps": EPS}, "ADAM"),
}
"""By name: our rule, torch's optimizer of row-sparse gradients, settings of both, FBGEMM's rule."""


@dataclass(frozen=True)
class Tables:
    """Tables of one size, and the rule that trains them."""

    num_tables: int
    rows: int
    width: int
    dtype: str
    rule: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, and of the rule's state per element."""
        states = {"adagrad": 1, "adam": 2}.get(self.rule, 0)
        element = DTYPES[self.dtype].itemsize + 4 * states
        return self.num_tables * self.rows * self.width * element


@dataclass(frozen=True)
class Contender:
    """One way to look up and train.

    Attributes:
        weights: The tables [rows, width], to be set alike for all contenders.
        prepare: Lays out ids [tables, batch, pooling]; not timed.
        forward: Gives [batch, tables * width] for what `prepare` gave, without autograd.
        train: Runs a step on it, with a float32 gradient of the result.
    """

    weights: list[Tensor]
    prepare: Callable[[Tensor], Any]
    forward: Callable[[Any], Tensor]
    train: Callable[[Any, Tensor], None]


def make_ours(tables: Tables) -> Contender:
    """`EmbeddingBagCollection`, the rule in backward."""
    names = [f"t{i}" for i in range(tables.num_tables)]
    data_type = DataType[tables.dtype.upper()]
    configs = [EmbeddingBagConfig(tables.rows, tables.width, name, data_type) for name in names]
    collection = EmbeddingBagCollection(configs)
    rule, _, settings, _ = RULES[tables.rule]
    optimizer = in_backward(collection, rule, lr=LR, **settings)

    def prepare(ids: Tensor) -> KeyedJaggedTensor:
        features = KeyedJaggedTensor(names, ids.flatten(), lengths=_lengths(ids))
        features.offsets()  # computed once and kept
        return features

    def train(features: KeyedJaggedTensor, grad: Tensor) -> None:
        optimizer.zero_grad()
        collection(features).values().backward(grad)
        optimizer.step()

    weights = [weight.data for weight in collection.parameters()]
    return Contender(weights, prepare, lambda features: collection(features).values(), train)


def make_embedding_bags(tables: Tables) -> Contender:
    """One `torch.nn.EmbeddingBag` per table, results joined by `torch.cat`.

    Gradients are row-sparse and an optimizer of such gradients steps: for row-wise Adagrad, which
    torch does not have, the one of `shardwise.optim`, written in plain torch.
    """
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns unless it is told
    shape, dtype = (tables.rows, tables.width), DTYPES[tables.dtype]
    bags = [
        nn.EmbeddingBag(
            *shape,
            mode="sum",
            sparse=True,
            include_last_offset=True,
            _weight=torch.zeros(shape, dtype=dtype),
        )
        for _ in range(tables.num_tables)
    ]
    weights = [bag.weight for bag in bags]
    _, rule, settings, _ = RULES[tables.rule]
    optimizer = rule(weights, lr=LR, **settings)

    def prepare(ids: Tensor) -> tuple[list[Tensor], Tensor]:
        _, batch, pooling = ids.shape
        offsets = torch.arange(0, batch * pooling + 1, pooling)
        return [table.flatten() for table in ids], offsets

    def forward(call: tuple[list[Tensor], Tensor]) -> Tensor:
        ids, offsets = call
        return torch.cat([bag(i, offsets) for bag, i in zip(bags, ids, strict=True)], dim=1)

    def train(call: tuple[list[Tensor], Tensor], grad: Tensor) -> None:
        optimizer.zero_grad()
        forward(call).backward(grad.to(dtype))
        optimizer.step()

    return Contender([weight.data for weight in weights], prepare, forward, train)


def make_fbgemm(tables: Tables) -> Contender:
    """FBGEMM's batched tables on CPU, the rule in backward.

    Raises:
        ImportError: `fbgemm_gpu` is not installed.
        AssertionError: It has no such rule on CPU.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched: Any = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
        configs: Any = import_module("fbgemm_gpu.split_embedding_configs")
        place = (batched.EmbeddingLocation.HOST, batched.ComputeDevice.CPU)
        module = batched.SplitTableBatchedEmbeddingBagsCodegen(
            [(tables.rows, tables.width, *place)] * tables.num_tables,
            weights_precision=configs.SparseType.from_dtype(DTYPES[tables.dtype]),
            optimizer=getattr(batched.OptimType, RULES[tables.rule][3]),
            learning_rate=LR,
            eps=EPS,
        )

    def prepare(ids: Tensor) -> tuple[Tensor, Tensor]:
        lengths = _lengths(ids)
        return ids.flatten(), nn.functional.pad(lengths.cumsum(0), (1, 0))

    def forward(call: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = module(*call)
        return result

    def train(call: tuple[Tensor, Tensor], grad: Tensor) -> None:
        forward(call).backward(grad)

    weights = [weight.data for weight in module.split_embedding_weights()]
    return Contender(weights, prepare, forward, train)


MAKERS = {"torch": make_embedding_bags, "fbgemm": make_fbgemm}
"""Makers of our peers, by name."""


def _lengths(ids: Tensor) -> Tensor:
    count, batch, pooling = ids.shape
    return torch.full((count * batch,), pooling)
