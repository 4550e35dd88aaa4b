"""Lookups and DLRM on one GPU beside `torch.nn.EmbeddingBag` and the copy bandwidth of the device.

* per id (pooling 0): 10 tables of 1 M rows of 128, fp32, 1.05 M ids, Zipf 1.05; forward, and
  training steps with SGD, row-wise Adagrad and Adam. EmbeddingBag has bags of one id there.
* pooled: 26 tables of 1 M rows of 128, batches of 8,192 and 65,536, bags of 1, 20 and 100 ids.
* DLRM: 26 tables and 13 dense numbers, a batch of 65,536 from pinned memory: samples per second,
  and the time of each part.

The share of the copy bandwidth counts the bytes of the distinct rows, once, and of the result.
Times are those of the device, between two events, and include gaps in which it waits for the host.

Without a GPU the kernels run under Triton's interpreter at toy size: this shows that the script
runs and measures nothing. Rows go to benchmarks/results/gpu.csv, of a GPU only.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ |= {"TRITON_INTERPRET": "1", "SHARDWISE_OPS": "reference"}

import triton  # noqa: E402  # after the choice of its interpreter
from torch import Tensor  # noqa: E402

from shardwise import (  # noqa: E402
    DLRM,
    DLRMTrain,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from shardwise.bench.contenders import LR, MAKERS, Contender, Tables, make_ours  # noqa: E402
from shardwise.bench.contenders import RULES as CONTEST_RULES  # noqa: E402
from shardwise.bench.results import OURS, RESULTS, Results  # noqa: E402
from shardwise.bench.timing import Times  # noqa: E402
from shardwise.data.batch import Batch  # noqa: E402
from shardwise.jagged import KeyedJaggedTensor  # noqa: E402
from shardwise.ops import library  # noqa: E402
from shardwise.optim import RowWiseAdagrad, in_backward  # noqa: E402
from shardwise.tables.collection import Prepared  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ZIPF_EXPONENT = 1.05
NUM_BATCHES = 4  # taken in turn, so that no round finds its rows in the cache
RULES = ("sgd", "row_wise_adagrad", "adam")
ROWS, WIDTH = (1_000_000, 128) if HAS_GPU else (50, 8)
PER_ID = (10, 105_000) if HAS_GPU else (2, 9)  # tables, ids of each
POOLED = list(product((8192, 65_536), (1, 20, 100))) if HAS_GPU else [(4, 3)]
NUM_POOLED, DLRM_BATCH = (26, 65_536) if HAS_GPU else (2, 4)


def main() -> None:
    """Measure all, and say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20 if HAS_GPU else 2)
    options = parser.parse_args()
    results = Results(RESULTS / "gpu.csv" if HAS_GPU else None, "ms")
    torch.set_default_device(DEVICE)
    place = describe_device()
    bandwidth = measure_copy(options.repeats)
    print(f"{place}\ncopies read and write {bandwidth / 1e9:.0f} GB/s together")
    for what, times in (*lookups(bandwidth, options.repeats), *dlrm(options.repeats)):
        results.add({**what, **place}, times)


def describe_device() -> dict[str, object]:
    """Name the device, its driver and Triton."""
    if not HAS_GPU:
        for name, module in library.GPU_VERSIONS.items():
            version = getattr(__import__(module, fromlist=[name]), name)
            torch.library.impl(f"shardwise::{name}", "CPU")(version)
        return {"device": "none (interpreter)", "driver": "none", "triton": triton.__version__}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    name = torch.cuda.get_device_name()
    return {"device": name, "driver": driver, "triton": triton.__version__}


def time_on_device(run: Callable[[int], object], repeats: int, warmups: int = 3) -> Times:
    """Time a function of the number of the round, by events of the device where there is one."""
    seconds = []
    for i in range(warmups + repeats):
        if HAS_GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(i)
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) / 1e3
        else:
            before = time.perf_counter()
            run(i)
            elapsed = time.perf_counter() - before
        seconds.append(elapsed)
    return Times(seconds[warmups:])


def measure_copy(repeats: int) -> float:
    """Give bytes read and written per second when 1 GiB is copied on the device."""
    source = torch.empty((1 << 30 if HAS_GPU else 1 << 16) // 4)
    target = torch.empty_like(source)
    times = time_on_device(lambda _: target.copy_(source), repeats)
    return 2 * source.numel() * 4 / times.median


def draw_ids(num_tables: int, batch: int, pooling: int, ids: str, seed: int) -> Tensor:
    """Draw ids [tables, batch, pooling]; under zipf every table has hot rows of its own."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (batch, pooling)
    tables = []
    for _ in range(num_tables):
        if ids == "uniform":
            tables.append(torch.randint(0, ROWS, shape, generator=generator))
            continue
        shares = torch.arange(1, ROWS + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
        totals = (shares / shares.sum()).cumsum(0)
        draws = torch.rand(shape, dtype=torch.float64, generator=generator)
        ranks = torch.searchsorted(totals, draws).clamp_(max=ROWS - 1)
        tables.append(torch.randperm(ROWS, generator=generator)[ranks])
    return torch.stack(tables)


def lookups(bandwidth: float, repeats: int) -> Iterator[tuple[dict[str, object], dict[str, Times]]]:
    """Time every workload with every rule; the forward only with the first one."""
    num_tables, num_ids = PER_ID
    for rule in RULES:
        tables = Tables(num_tables, ROWS, WIDTH, "fp32", rule)
        yield from time_lookups(tables, num_ids, 0, "zipf", bandwidth, repeats)
    tables = Tables(NUM_POOLED, ROWS, WIDTH, "fp32", "row_wise_adagrad")
    for batch, pooling in POOLED:
        yield from time_lookups(tables, batch, pooling, "uniform", bandwidth, repeats)


def time_lookups(
    tables: Tables, batch: int, pooling: int, ids: str, bandwidth: float, repeats: int
) -> Iterator[tuple[dict[str, object], dict[str, Times]]]:
    """Time forward and training step of ours and of torch's modules, one after the other."""
    drawn = [
        draw_ids(tables.num_tables, batch, max(pooling, 1), ids, i) for i in range(NUM_BATCHES)
    ]
    num_vectors = tables.num_tables * batch
    grad = torch.randn(batch, tables.num_tables * tables.width)
    num_rows = sum(table.unique().numel() for table in drawn[0])
    times: dict[str, dict[str, Times]] = {"forward": {}, "train": {}}
    ours = make_ours if pooling else make_ours_per_id
    for name, make in {OURS: ours, "torch": MAKERS["torch"]}.items():
        if name == "torch" and not HAS_GPU:
            continue  # its times under an interpreter of ours would say nothing
        contender = make(tables)
        for step, run in passes(contender, drawn, grad).items():
            times[step][name] = time_on_device(run, repeats)
        del contender
    what = {**vars(tables), "batch": batch, "pooling": pooling, "ids": ids}
    num_bytes = (num_rows + num_vectors) * tables.width * 4
    share = num_bytes / times["forward"][OURS].median / bandwidth
    yield {**what, "pass": "forward", "of_copy_bandwidth": f"{share:.3f}"}, times["forward"]
    yield {**what, "pass": "train", "of_copy_bandwidth": ""}, times["train"]


def make_ours_per_id(tables: Tables) -> Contender:
    """`EmbeddingCollection`, the rule in backward; all vectors as one tensor [ids, width]."""
    names = [f"t{i}" for i in range(tables.num_tables)]
    collection = EmbeddingCollection([EmbeddingConfig(tables.rows, tables.width, n) for n in names])
    rule, _, settings, _ = CONTEST_RULES[tables.rule]
    optimizer = in_backward(collection, rule, lr=LR, **settings)

    def prepare(ids: Tensor) -> Prepared:
        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        return collection.prepare(KeyedJaggedTensor(names, ids.flatten(), lengths=lengths))

    def train(prepared: Prepared, grad: Tensor) -> None:
        optimizer.zero_grad()
        collection.look_up(prepared).backward(grad.view(-1, tables.width))
        optimizer.step()

    weights = [weight.data for weight in collection.parameters()]
    return Contender(weights, prepare, collection.look_up, train)


def passes(
    contender: Contender, drawn: list[Tensor], grad: Tensor
) -> dict[str, Callable[[int], object]]:
    """Give forward and training step of one contender, by the number of the round."""
    calls = [contender.prepare(ids) for ids in drawn]

    def forward(i: int) -> None:
        with torch.no_grad():
            contender.forward(calls[i % NUM_BATCHES])

    return {
        "forward": forward,
        "train": lambda i: contender.train(calls[i % NUM_BATCHES], grad),
    }


def dlrm(repeats: int) -> Iterator[tuple[dict[str, object], dict[str, Times]]]:
    """Time a training step of DLRM from pinned memory, whole and by part."""
    names = [f"t{i}" for i in range(NUM_POOLED)]
    configs = [EmbeddingBagConfig(ROWS, WIDTH, name) for name in names]
    arches = ([512, 256, WIDTH], [1024, 1024, 512, 256, 1]) if HAS_GPU else ([8, WIDTH], [8, 1])
    model = DLRMTrain(DLRM(EmbeddingBagCollection(configs), 13, *arches))
    tables = in_backward(model, RowWiseAdagrad, lr=0.01)
    dense = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.SGD(dense, lr=0.01)
    batches = [make_batch(names, seed) for seed in range(NUM_BATCHES)]
    marks = dict.fromkeys(("copy", "forward", "backward", "optimizers"), 0.0)
    moved = batches[0].to(DEVICE)
    loss = model(moved)[0]

    def copy(i: int) -> None:
        nonlocal moved
        moved = batches[i % NUM_BATCHES].to(DEVICE, non_blocking=True)

    def run_forward(_: int) -> None:
        nonlocal loss
        loss = model(moved)[0]

    def run_backward(_: int) -> None:
        optimizer.zero_grad()
        loss.backward(retain_graph=False)

    def step(_: int) -> None:
        optimizer.step()
        tables.step()

    parts = dict(zip(marks, (copy, run_forward, run_backward, step), strict=True))

    def run(i: int) -> None:
        for part in parts.values():
            part(i)

    whole = time_on_device(run, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(repeats):
        for name, part in parts.items():
            seconds[name] += time_on_device(lambda _, part=part, i=i: part(i), 1, warmups=0).seconds
    what = {**vars(Tables(NUM_POOLED, ROWS, WIDTH, "fp32", "row_wise_adagrad"))}
    what |= {"batch": DLRM_BATCH, "pooling": 1, "ids": "uniform"}
    for name, times in {"step": whole, **{k: Times(v) for k, v in seconds.items()}}.items():
        yield {**what, "pass": f"DLRM {name}", "of_copy_bandwidth": ""}, {OURS: times}
    print(f"DLRM: {DLRM_BATCH / whole.median:,.0f} samples/s")


def make_batch(names: list[str], seed: int) -> Batch:
    """Make a batch in memory from which the device can copy in the background."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.device("cpu"):
        ids = torch.randint(0, ROWS, (len(names) * DLRM_BATCH,), generator=generator)
        lengths = torch.ones(len(names) * DLRM_BATCH, dtype=torch.int64)
        batch = Batch(
            torch.randn(DLRM_BATCH, 13, generator=generator),
            KeyedJaggedTensor(names, ids, lengths=lengths),
            torch.randint(0, 2, (DLRM_BATCH,), generator=generator).float(),
        )
    return batch.pin_memory() if HAS_GPU else batch


if __name__ == "__main__":
    main()
