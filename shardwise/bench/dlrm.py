"""A DLRM, ours or TorchRec's: both are made by the same calls, since the names agree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Ids of the 26 categorical columns of Criteo's Kaggle set, at most a million of each.
CARDINALITIES = [
    *(1460, 583, 1_000_000, 1_000_000, 305, 24, 12517, 633, 3, 93145, 5683, 1_000_000, 3194),
    *(27, 14992, 1_000_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 286181, 105, 142572),
]
MOST_ROWS = 1_000_000
MOST_ROWS = 1_000_000
WIDTH = 64
NUM_DENSE = 13
LAYERS = ([512, 256, WIDTH], [512, 512, 256, 1])
NAMES = [f"t{i}" for i in range(len(CARDINALITIES))]
PLACEMENTS = (
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "grid",
    "data_parallel",
)

Batch = tuple[Tensor, Tensor, Tensor]
"""Dense features [B, 13], ids [26, B], labels [B]."""


@dataclass(frozen=True)
class Library:
    """Where the names of one library are found."""

    tables: Any
    models: Any
    sparse: Any
    optim: Any
    sharding: Any
    parallel: Any
    row_wise_adagrad: type


def ours() -> Library:
    """Find the names of shardwise."""
    found = import_module("shardwise")
    rule = import_module("shardwise.optim").RowWiseAdagrad
    sharding = import_module("shardwise.sharding")
    return Library(found, found, found, import_module("shardwise.optim"), sharding, sharding, rule)


def torchrec() -> Library:
    """Find the names of TorchRec.

    Raises:
        ImportError: It is not installed.
    """
    found = import_module("torchrec")
    return Library(
        tables=found,
        models=import_module("torchrec.models.dlrm"),
        sparse=found,
        optim=import_module("torchrec.optim.apply_optimizer_in_backward"),
        sharding=import_module("torchrec.distributed.sharding_plan"),
        parallel=import_module("torchrec.distributed.model_parallel"),
        row_wise_adagrad=import_module("torchrec.optim.rowwise_adagrad").RowWiseAdagrad,
    )


LIBRARIES: dict[str, Callable[[], Library]] = {"shardwise": ours, "torchrec": torchrec}


def make_step(library: Library, placement: str, world_size: int) -> Callable[[Batch], float]:
    """Shard a DLRM over all ranks, and give a function that trains it on this rank's batch.

    MLPs 512-256-64 and 512-512-256-1; the tables by row-wise Adagrad in backward where the library
    fuses it, the rest by SGD; the dense part in DDP.
    """
    bags = make_bags(library, torch.device("meta"))
    net = library.models.DLRM(bags, NUM_DENSE, *LAYERS)
    sharders = [permissive(kind()) for kind in sharder_types(library)]
    plan = library.sharding.construct_module_sharding_plan(
        bags,
        {name: builder(library, placement, i, world_size) for i, name in enumerate(NAMES)},
        sharder=sharders[0],
        local_size=world_size,
        world_size=world_size,
        device_type="cpu",
    )
    path = next(name for name, module in net.named_modules() if module is bags)
    types = (
        import_module(f"{library.parallel.__name__.split('.')[0]}.distributed.types")
        if (library.parallel.__name__.startswith("torchrec"))
        else library.sharding
    )
    model = library.parallel.DistributedModelParallel(
        net, device=torch.device("cpu"), plan=types.ShardingPlan({path: plan}), sharders=sharders
    )
    return train(library, model, set(dict(model.fused_optimizer.params)))


def make_bags(library: Library, device: torch.device, most_rows: int = MOST_ROWS) -> Any:
    """Make the tables, their rule to be run in backward."""
    torch.manual_seed(0)
    tables = [
        library.tables.EmbeddingBagConfig(
            num_embeddings=min(rows, most_rows),
            embedding_dim=WIDTH,
            name=name,
            feature_names=[name],
        )
        for name, rows in zip(NAMES, CARDINALITIES, strict=True)
    ]
    bags = library.tables.EmbeddingBagCollection(tables, device=device)
    library.optim.apply_optimizer_in_backward(
        library.row_wise_adagrad, bags.parameters(), {"lr": 0.01, "eps": 1e-8}
    )
    return bags


def train(library: Library, model: nn.Module, owned: set[str]) -> Callable[[Batch], float]:
    """Give a training step; SGD steps the parameters that are not `owned` by another optimizer."""
    dense = [p for name, p in model.named_parameters() if name not in owned]
    optimizer = torch.optim.SGD(dense, lr=0.01)
    loss_of = nn.BCEWithLogitsLoss()
    batch_lengths: dict[int, Tensor] = {}

    def step(batch: Batch) -> float:
        numbers, ids, labels = batch
        size = len(NAMES) * labels.numel()
        lengths = batch_lengths.setdefault(size, torch.ones(size, dtype=torch.int32))
        features = library.sparse.KeyedJaggedTensor(NAMES, ids.flatten(), lengths=lengths)
        optimizer.zero_grad()
        loss = loss_of(model(numbers, features).squeeze(-1), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def sharder_types(library: Library) -> list[Any]:
    """The sharder of bag collections."""
    if hasattr(library.sharding, "EmbeddingBagCollectionSharder"):
        return [library.sharding.EmbeddingBagCollectionSharder]
    return [import_module("torchrec.distributed.embeddingbag").EmbeddingBagCollectionSharder]


def permissive(sharder: Any) -> Any:
    """Let a sharder take every placement on CPU, where TorchRec's refuses some."""
    kinds = ["table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]
    sharder.sharding_types = lambda device: [*kinds, "data_parallel", "table_column_wise"]
    return sharder


def builder(library: Library, placement: str, table: int, world_size: int) -> Any:
    """Give the placement of one table."""
    make = library.sharding
    if placement == "table_wise":
        return make.table_wise(rank=table % world_size)
    if placement == "column_wise":
        return make.column_wise(ranks=list(range(world_size)))
    if placement == "table_row_wise":
        return make.table_row_wise(host_index=0)
    if placement == "grid":
        return make.grid_shard(host_indexes=[0])
    return getattr(make, placement)()


def draw(batch: int, seed: int, most_rows: int = MOST_ROWS) -> Batch:
    """Draw a batch: one uniform id of each table."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(rows, most_rows) for rows in CARDINALITIES]
    columns = [torch.randint(0, rows, (batch,), generator=generator) for rows in sizes]
    numbers = torch.rand(batch, NUM_DENSE, generator=generator)
    labels = torch.randint(0, 2, (batch,), generator=generator).float()
    return numbers, torch.stack(columns).int(), labels


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count what this rank sends to others, whoever calls the collective, in a list of one.

    Of an all-reduce, what a ring sends: 2 (W - 1) / W of the tensor. DDP's own are not seen.
    """
    sent = [0]
    rank, world = dist.get_rank(), dist.get_world_size()
    before = {
        name: getattr(dist, name)
        for name in ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")
    }

    def all_to_all_single(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        names = ("output_split_sizes", "input_split_sizes")
        splits = dict(zip(names, args, strict=False)) | options
        sizes = splits.get("input_split_sizes") or [input.shape[0] // world] * world
        row = input[:1].numel() if input.dim() > 1 and input.shape[0] else 1
        others = sum(size for peer, size in enumerate(sizes) if peer != rank)
        sent[0] += others * row * input.element_size()
        return before["all_to_all_single"](output, input, *args, **options)

    def reduce_scatter_tensor(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        sent[0] += input.nbytes * (world - 1) // world
        return before["reduce_scatter_tensor"](output, input, *args, **options)

    def all_gather_into_tensor(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        sent[0] += input.nbytes * (world - 1)
        return before["all_gather_into_tensor"](output, input, *args, **options)

    replacements = (all_to_all_single, reduce_scatter_tensor, all_gather_into_tensor)
    for function in replacements:
        setattr(dist, function.__name__, function)
    try:
        yield sent
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
