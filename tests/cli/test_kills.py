"""Kill -9 at any moment: what is left goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tyro")  # the extra is there as a whole or not

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import TCPStore

from shardwise.checkpoint import Checkpoints, list_checkpoints
from shardwise.cli import main
from shardwise.cli.trainer import Trainer

pytestmark = pytest.mark.slow

# So that a start takes a fork, not seconds of imports.
PRELOAD = ["shardwise.cli.train", "torch._dynamo", "torch.utils.tensorboard", __name__]


def kill_in(phase: str, number: int, delay_s: float) -> None:
    """End this process some time after it has begun, so many times, to do what it says."""
    owner, name = {
        "training": (Trainer, "step"),
        "saving": (Checkpoints, "save"),
        "loading": (Checkpoints, "load"),
    }[phase]
    call, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            kill = threading.Timer(delay_s, os.kill, [os.getpid(), signal.SIGKILL])
            kill.daemon = True
            kill.start()
        return call(*arguments, **options)

    setattr(owner, name, counted)


def note_samples(path: Path) -> None:
    """Write down what each step sees, before it does."""
    step = Trainer.step

    def noted(trainer, batch):
        rows = getattr(batch, "dense_features", None)
        seen = [] if rows is None else sorted(map(str, rows.tolist()))
        with path.open("a") as file:
            file.write(json.dumps([trainer.num_steps + 1, seen]) + "\n")
        step(trainer, batch)

    Trainer.step = noted


def be_rank(environment: dict[str, str], options: list[str], notes: Path, kill) -> None:
    os.environ.update(environment)
    log = os.open(notes.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    # The sooner the others give up, the sooner they are started again.
    dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=20))
    note_samples(notes)
    if kill is not None:
        kill_in(*kill)
    sys.exit(main(options))


class Run:
    """A run and the times that it was started."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.num_starts = folder, 0
        (folder / "notes").mkdir(parents=True)
        folders = (
            "--checkpoint.folder",
            str(folder / "run"),
            "--log.tensorboard",
            str(self.events),
        )
        self.options = ["train", *options, *folders, "--log.every-steps", "1", "--train.resume"]

    @property
    def events(self) -> Path:
        return self.folder / "events"

    def start(self, count: int, victim: int = 0, kill: tuple | None = None) -> list[int]:
        """Start it with so many ranks, and give how they ended."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        common |= {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        common |= {"GLOO_SOCKET_IFNAME": "lo"}
        self.num_starts += 1
        processes = []
        for rank in range(count):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            notes = self.folder / "notes" / f"{self.num_starts:03}_{rank}"
            own = kill if rank == victim else None
            arguments = (environment if count > 1 else {}, self.options, notes, own)
            processes.append(context.Process(target=be_rank, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes

    def disturb(self, draw: random.Random, count: int, phase: str) -> None:
        """Start it and kill one rank; the others must end by themselves."""
        victim = draw.randrange(count)
        number = 1 if phase == "loading" else draw.randrange(1, 4 if phase == "saving" else 8)
        codes = self.start(count, victim, (phase, number, draw.uniform(0, 0.02)))
        assert codes[victim] == -signal.SIGKILL, self.log()
        others = codes[:victim] + codes[victim + 1 :]
        assert all(code == 1 for code in others), f"{codes}\n{self.log()}"

    def finish(self, count: int) -> None:
        codes = self.start(count)
        assert codes == [0] * count, f"{codes}\n{self.log()}"

    def log(self) -> str:
        paths = sorted((self.folder / "notes").glob(f"{self.num_starts:03}_*.log"))
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in paths)

    def curve(self, name: str = "train/loss") -> list[tuple[int, float]]:
        found = EventAccumulator(str(self.events), size_guidance={"scalars": 0})
        found.Reload()
        return [(event.step, event.value) for event in found.Scalars(name)]

    def samples(self) -> dict[int, list[str]]:
        """What the last start that took a step saw in it, on all ranks."""
        seen: dict[int, tuple[str, list[str]]] = {}
        for path in sorted((self.folder / "notes").glob("???_?")):
            start = path.name[:3]
            for line in path.read_text().splitlines():
                step, rows = json.loads(line)
                before = seen[step][1] if step in seen and seen[step][0] == start else []
                seen[step] = (start, sorted([*before, *rows]))
        return {step: rows for step, (_, rows) in sorted(seen.items())}


@pytest.fixture
def clicks(tmp_path, rows) -> list[str]:
    config = tmp_path / "clicks.toml"
    config.write_text(f"""
        model = {{embedding_dim = 4, dense_layers = [4], over_layers = [4, 1]}}
        checkpoint = {{every_steps = 3}}
        [data]
        source = "criteo-kaggle"
        path = "{rows}"
        train_rows = 200
        validation_rows = 50
        test_rows = 50
        hash_size = 50
        [train]
        epochs = 3
        batch_size = 9
        table_lr = 0.1
        dense_lr = 0.01
        lr_falls = true
        evaluate_every = 7
        patience = 50
        sharding = "row_wise"
    """)
    return [str(config)]


@pytest.fixture
def walks(tmp_path) -> list[str]:
    path, config = tmp_path / "walks.txt", tmp_path / "walks.toml"
    items = [[user % 7 + step for step in range(1, 5 + user % 4)] for user in range(99)]
    lines = [f"{user} {' '.join(map(str, taken))}" for user, taken in enumerate(items, 1)]
    path.write_text("\n".join([*lines, ""]))
    config.write_text(f"""
        data = {{source = "sequences", path = "{path}", max_length = 6}}
        model = {{kind = "sasrec", embedding_dim = 8, dropout = 0.3, num_negatives = 5}}
        train = {{epochs = 6, batch_size = 10, table_rule = "adam", table_lr = 0.01}}
        checkpoint = {{every_steps = 4}}
    """)
    return [str(config)]


def phases(draw: random.Random, count: int) -> Iterator[str]:
    """As many of each kind as can be, in random order; nothing can be loaded at first."""
    kinds = [["training", "saving", "loading"][number % 3] for number in range(count)]
    draw.shuffle(kinds)
    first = kinds.index("saving")
    kinds[0], kinds[first] = kinds[first], kinds[0]
    yield from kinds


def goes_on(run: Run, draw: random.Random, phase: str, count: int) -> None:
    is_empty = not list_checkpoints(run.folder / "run")
    run.disturb(draw, count, "training" if is_empty and phase == "loading" else phase)


@pytest.mark.parametrize(("model", "count", "num_kills"), [("clicks", 2, 6), ("walks", 3, 5)])
def test_killed_run_goes_on_exactly(request, tmp_path, model, count, num_kills):
    options = request.getfixturevalue(model)
    whole, broken = Run(tmp_path / "whole", *options), Run(tmp_path / "broken", *options)
    whole.finish(count)
    draw = random.Random(f"{model}")
    for phase in phases(draw, num_kills):
        goes_on(broken, draw, phase, count)
    broken.finish(count)
    assert broken.curve() == whole.curve()
    if model == "clicks":
        assert broken.curve("train/NE") == whole.curve("train/NE")
        assert broken.curve("validation/NE") == whole.curve("validation/NE")
    assert broken.samples() == whole.samples()


def test_killed_run_goes_on_with_other_ranks_and_loses_no_sample(clicks, tmp_path):
    whole, broken = Run(tmp_path / "whole", *clicks), Run(tmp_path / "broken", *clicks)
    whole.finish(1)
    draw = random.Random(1)
    for phase in phases(draw, 6):
        goes_on(broken, draw, phase, draw.randrange(1, 4))
    broken.finish(3)
    assert broken.samples() == whole.samples()
    ours, theirs = (torch.tensor(run.curve()) for run in (broken, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
