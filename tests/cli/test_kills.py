"""Kill -9 at any moment: what is left goes on as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
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


def living(mark: str) -> list[int]:
    """The processes that were started with a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark.encode() in path.read_bytes() else []
        except OSError:  # another user's, or just ended
            continue
    return found


def await_that(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a command; give it and the mark of all processes that come of it."""
    mark = f"SHARDWISE_TEST_MARK={uuid.uuid4()}"
    environment = os.environ | dict([mark.split("=")]) | {"OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file), mark


def test_launcher_that_is_killed_leaves_no_process_and_its_run_goes_on(clicks, tmp_path):
    whole, broken = Run(tmp_path / "whole", *clicks), Run(tmp_path / "broken", *clicks)
    whole.finish(2)
    command = [sys.executable, "-m", "shardwise", *broken.options, "--processes", "2"]
    draw, log = random.Random(3), tmp_path / "log"
    for _ in range(3):
        before = list_checkpoints(broken.folder / "run")[-1:]
        launcher, mark = start(command, log)
        await_that(lambda before=before: list_checkpoints(broken.folder / "run")[-1:] != before)
        time.sleep(draw.uniform(0, 0.2))
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL
        await_that(lambda mark=mark: not living(mark))
    broken.finish(2)
    assert broken.curve() == whole.curve()


def test_launcher_passes_sigterm_on_and_gives_its_status(clicks, tmp_path):
    run = Run(tmp_path / "run", *clicks)
    command = [sys.executable, "-m", "shardwise", *run.options, "--processes", "2"]
    launcher, mark = start(command, tmp_path / "log")
    await_that(lambda: bool(list_checkpoints(run.folder / "run")))
    launcher.terminate()
    assert launcher.wait(60) == 143
    assert "interrupted by SIGTERM after step" in (tmp_path / "log").read_text()
    assert not living(mark)


DYING = """
import os, signal, sys
from shardwise.cli import main
from shardwise.cli.trainer import Trainer
step = Trainer.step
def dying(trainer, batch):
    if trainer.num_steps == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if trainer.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    step(trainer, batch)
Trainer.step = dying
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun_starts_the_run_again_and_it_goes_on(clicks, tmp_path):
    whole, broken = Run(tmp_path / "whole", *clicks), Run(tmp_path / "broken", *clicks)
    whole.finish(2)
    (tmp_path / "dying.py").write_text(DYING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [option for option in broken.options if option != "--train.resume"]
    agent, mark = start(
        [*torchrun, "--max-restarts=1", str(tmp_path / "dying.py"), *options], tmp_path / "log"
    )
    assert agent.wait(90) == 0, (tmp_path / "log").read_text()
    assert not living(mark)
    assert "going on from" in (tmp_path / "log").read_text()
    assert broken.curve() == whole.curve()


def test_torchrun_goes_on_with_the_machines_that_are_left(clicks, tmp_path):
    whole, broken = Run(tmp_path / "whole", *clicks), Run(tmp_path / "broken", *clicks)
    whole.finish(1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--max-restarts=3"]
    timing = "is_host=false,join_timeout=60,last_call_timeout=2,keep_alive_interval=1"
    torchrun += ["--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-conf={timing}"]
    torchrun += [
        f"--rdzv-endpoint=127.0.0.1:{store.port}",
        "--rdzv-id=run",
        "--local-addr=127.0.0.1",
    ]
    command = [*torchrun, "-m", "shardwise", *broken.options]
    agents = [start(command, tmp_path / f"log_{number}") for number in range(2)]
    await_that(lambda: len(list_checkpoints(broken.folder / "run")) > 1)
    for process in living(agents[1][1]):  # the second machine is gone
        os.kill(process, signal.SIGKILL)
    assert agents[0][0].wait(120) == 0, (tmp_path / "log_0").read_text()
    agents[1][0].wait()
    assert "going on from" in (tmp_path / "log_0").read_text() + (tmp_path / "log_1").read_text()
    ours, theirs = (torch.tensor(run.curve()) for run in (broken, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
