"""Write the checkpoints of TorchRec that tests read, and beside them what is in them, gathered.

Needs torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0; run it anywhere with the folder to write to:

    python tests/checkpoint/write_torchrec_fixtures.py tests/checkpoint/torchrec

Each `<case>/` is a folder of torch's distributed checkpoint, saved by two or four ranks after three
steps.
`<case>.npz` has whole tables and optimizer state under the names of this project. A row state of a
table whose columns are cut is `<name>/blocks` [blocks, rows], in the order of the columns, with
`<name>/widths`.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

TABLES = [("a", 11, 8), ("b", 7, 16)]
WIDE = [("a", 5, 256), ("b", 3, 256)]  # TorchRec's grids cut columns at 128 and not before
HOST = 2  # ranks of a host
# name: (sharding, optimizer, whether DTensors, whether an embedding per id)
CASES = {
    "table_wise": ("table_wise", "RowWiseAdagrad", False, False),
    "row_wise": ("row_wise", "RowWiseAdagrad", False, False),
    "column_wise": ("column_wise", "RowWiseAdagrad", False, False),
    "column_wise_merged": ("column_wise_merged", "RowWiseAdagrad", False, False),
    "row_wise_dtensor": ("row_wise", "RowWiseAdagrad", True, False),
    "column_wise_dtensor": ("column_wise", "RowWiseAdagrad", True, False),
    "grid_shard": ("grid_shard", "RowWiseAdagrad", False, False),
    "row_wise_sequence": ("row_wise", "Adagrad", False, True),
    "column_wise_adagrad": ("column_wise", "Adagrad", False, False),
    "table_wise_sgd": ("table_wise", "SGD", False, False),
}


def world_size(name):
    return 2 * HOST if CASES[name][0] == "grid_shard" else HOST


def tables(sharding):
    return WIDE if sharding == "grid_shard" else TABLES


def builders(sharding):
    from torchrec.distributed import sharding_plan as plans

    return {
        "table_wise": lambda i: plans.table_wise(rank=i % HOST),
        "row_wise": lambda i: plans.row_wise(),
        "column_wise": lambda i: plans.column_wise(ranks=[0, 1]),
        "column_wise_merged": lambda i: plans.column_wise(ranks=[1, 0] if i == 0 else [0, 0, 1, 0]),
        "grid_shard": lambda i: plans.grid_shard(host_indexes=[0, 1]),
    }[sharding]


def build(case, world):
    import torchrec
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    sharding, optimizer, _, is_sequence = case
    config = torchrec.EmbeddingConfig if is_sequence else torchrec.EmbeddingBagConfig
    width = 8 if is_sequence else None
    configs = [
        config(num_embeddings=r, embedding_dim=width or d, name=n, feature_names=[f"f_{n}"])
        for n, r, d in tables(sharding)
    ]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            kind = torchrec.EmbeddingCollection if is_sequence else torchrec.EmbeddingBagCollection
            self.sparse = kind(tables=configs)
            self.over = torch.nn.Linear(3, 1)

        def forward(self, features):
            out = self.sparse(features)
            if is_sequence:
                loss = sum((v.values() * torch.arange(1, 9)).sum() for v in out.values())
            else:
                values = out.values()
                loss = (values * torch.arange(1, values.shape[1] + 1)).square().sum()
            return loss + self.over(torch.ones(3)).sum()

    class Sharder(EmbeddingCollectionSharder if is_sequence else EmbeddingBagCollectionSharder):
        def sharding_types(self, device_type):
            return ["table_wise", "row_wise", "column_wise", "grid_shard"]

    torch.manual_seed(1)
    model = Model()
    classes = {"RowWiseAdagrad": RowWiseAdagrad}
    classes |= {n: getattr(torch.optim, n) for n in ("Adagrad", "SGD")}
    apply_optimizer_in_backward(classes[optimizer], model.sparse.parameters(), {"lr": 0.1})
    sharder, builder = Sharder(), builders(sharding)
    plan = construct_module_sharding_plan(
        model.sparse,
        {c.name: builder(i) for i, c in enumerate(configs)},
        sharder=sharder,
        local_size=HOST,
        world_size=world,
        device_type="cpu",
    )
    return model, sharder, plan


def train(model, rank, sizes):
    import torchrec

    for step in range(3):
        torch.manual_seed(10 * step + rank)
        values = torch.cat([torch.randint(0, rows, (12,)) for _, rows, _ in sizes])
        lengths = torch.full((8,), 3, dtype=torch.int32)
        model(torchrec.KeyedJaggedTensor(["f_a", "f_b"], values, lengths=lengths)).backward()


def shards(value):
    """(offsets, tensor) of the blocks of a value here."""
    if type(value).__name__ == "ShardedTensor":
        return [(tuple(s.metadata.shard_offsets), s.tensor) for s in value.local_shards()]
    if type(value).__name__ == "DTensor":
        local = value.to_local()
        return list(zip(map(tuple, local.local_offsets()), local.local_shards(), strict=True))
    return [((0,) * value.dim(), value)]


def gather(rank, names_and_values):
    """Give all blocks of all ranks by name, to rank 0."""
    mine = {name: (tuple(v.shape), shards(v)) for name, v in names_and_values.items()}
    mine = {n: (s, [(o, t.detach().clone()) for o, t in b]) for n, (s, b) in mine.items()}
    everyone = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(mine, everyone)
    if rank:
        return {}
    found = {}
    for one in everyone:
        for name, (shape, blocks) in one.items():
            whole, _ = found.setdefault(name, (torch.full(shape, torch.nan), []))
            for offsets, tensor in blocks:
                whole[
                    tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
                ] = tensor
                found[name][1].append((offsets, tuple(tensor.shape)))
    return found


def describe(rank, state):
    """Give rank 0 the whole tables and states, by the names that tests know."""
    model = gather(rank, state["model"])
    kept = {name: whole for name, (whole, _) in model.items()}
    flat = {
        f"{parameter}//{key}": value
        for parameter, values in state["optimizer"]["state"].items()
        for key, value in values.items()
    }
    for name, (whole, _) in gather(rank, flat).items():
        parameter = name.partition("//")[0]
        rows = model[parameter][0].shape[0]
        if whole.dim() == 1 and whole.shape[0] != rows:
            columns = {(offsets[1], sizes[1]) for offsets, sizes in model[parameter][1]}
            kept[f"{name}/blocks"] = whole.view(-1, rows)
            kept[f"{name}/widths"] = torch.tensor([width for _, width in sorted(columns)])
        else:
            kept[name] = whole
    return {name: tensor.numpy() for name, tensor in kept.items()}


def run(rank, folder, name, port, world):
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ["LOCAL_WORLD_SIZE"] = str(HOST)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model, sharder, plan = build(CASES[name], world)
    env = ShardingEnv(
        world_size=world, rank=rank, pg=dist.group.WORLD, output_dtensor=CASES[name][2]
    )
    device = torch.device("cpu")
    model = DistributedModelParallel(
        model, env=env, device=device, plan=ShardingPlan({"sparse": plan}), sharders=[sharder]
    )
    train(model, rank, tables(CASES[name][0]))
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder / name)
    whole = describe(rank, state)
    if rank == 0:
        np.savez_compressed(folder / f"{name}.npz", **whole)
        print(name, sorted(whole))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # what TorchRec leaves running aborts at a regular end


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(sys.argv[2:] or CASES):
        shutil.rmtree(target / case, ignore_errors=True)
        world = world_size(case)
        mp.spawn(run, (target, case, 29700 + number, world), nprocs=world)
