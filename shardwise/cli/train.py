"""`shardwise train`: the loop around `Trainer`, and what it shows and keeps."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from shardwise.checkpoint import PendingSave, list_checkpoints
from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config
from shardwise.cli.interrupt import noted_signals
from shardwise.cli.launch import end_with_launcher, launch
from shardwise.cli.problem import Figures, compare, show
from shardwise.cli.progress import Progress
from shardwise.cli.ranks import has_launcher, joined_ranks, num_restarts
from shardwise.cli.recipe import load_problem
from shardwise.cli.settings import read_options
from shardwise.cli.trainer import Trainer

_ABOUT = (
    "Train a model and show what it gains over simple predictions on the samples held out. What an "
    "option does not set is as CONFIG.toml says, or else the default shown. The fields of data "
    "depend on --data.source, those of model on --model.kind."
)


def main(options: Sequence[str]) -> int:
    """Run `shardwise train` with what follows it on the command line; give the exit status."""
    config = read_options("train", options, _ABOUT, lambda config: config)
    _check_folder(config)
    if config.processes > 1 and not has_launcher():
        return launch(config.processes, [sys.executable, "-m", "shardwise", "train", *options])
    end_with_launcher()
    with joined_ranks() as ranks:
        if config.processes not in (1, ranks.count):
            raise ConfigError(f"processes is {config.processes}, but {ranks.count} were started")
        with ranks.together("reading the data"):
            problem = load_problem(config.data)
        trainer = Trainer(config, problem, ranks)
        with trainer.ranks.together("training"):
            return _run(trainer)


def _run(trainer: Trainer) -> int:
    """Train and show what came out; give the exit status."""
    config, is_first = trainer.config, trainer.ranks.is_first
    if trainer.plan is not None and is_first:
        print(f"{trainer.ranks.count} processes\n{trainer.plan}")
    if _resumes(config):
        path = trainer.resume()
        if is_first:
            print(
                "starting, as there is no checkpoint yet"
                if path is None
                else f"going on from {path}"
            )
    with _threads(config.train.num_threads), noted_signals() as noted:
        result = train(trainer, noted)
    if isinstance(result, signal.Signals):
        if is_first:
            hint = "go on with --train.resume" if config.checkpoint.folder else "nothing was saved"
            what = f"interrupted by {result.name} after step {trainer.num_steps}"
            print(f"shardwise: {what}; {hint}", file=sys.stderr)
        return 128 + result
    if is_first:
        print(compare(result, trainer.problem))
    return 0


def train(trainer: Trainer, noted: Sequence[int]) -> Figures | signal.Signals:
    """Train for the epochs that are left, with a progress bar, events and checkpoints.

    After each epoch, and where asked for within it, the model is judged on the validation part, or
    where there is none on the test part; at the end the last one, or with `train.patience` the best
    one, on the test part.

    Args:
        trainer: What to train; saved at the end of each epoch, and when interrupted.
        noted: When it holds the number of a signal in any of the processes, training ends after the
            step in work.

    Returns:
        The figures on the test part, or the signal that ended training.
    """
    config, figures, batches = trainer.config, None, trainer.batches()
    with _shown(trainer) as progress, _saved(trainer, progress) as save:
        while True:
            number = trainer.ranks.largest(max(noted, default=0), "the end of a step")
            if number:
                if trainer.checkpoints is not None:
                    save()
                return signal.Signals(number)
            if trainer.must_judge:
                figures = _judge(trainer, progress)
            if trainer.must_save:
                save()
            if trainer.is_finished:
                break
            trainer.step(next(batches))
            progress.reach(trainer.num_samples)
            if trainer.is_epoch_end or trainer.num_steps % config.log.every_steps == 0:
                progress.show(trainer.num_steps, trainer.figures())
    if figures is not None and trainer.problem.validation is None:
        return figures
    trainer.take_best()
    return trainer.judge(trainer.problem.test)


def _judge(trainer: Trainer, progress: Progress) -> Figures:
    """Judge the model as of this step, and show and note the figures."""
    problem, epoch = trainer.problem, trainer.loader.epoch
    part = "held out" if problem.validation is None else "validation"
    figures = trainer.judge(problem.validation or problem.test)
    trainer.note(figures)
    progress.record(part.replace(" ", "_"), trainer.num_steps, figures)
    is_end, epochs = trainer.is_epoch_end, trainer.config.train.epochs
    when = f"epoch {epoch} of {epochs}" if is_end else f"step {trainer.num_steps}"
    progress.say(f"{when}, {part}: {show(figures)}")
    return figures


def _shown(trainer: Trainer) -> Progress:
    return Progress(
        total=trainer.config.train.epochs * len(trainer.loader.samples),
        start=trainer.num_samples,
        num_steps=trainer.num_steps,
        tensorboard=trainer.config.log.tensorboard,
        is_silent=not trainer.ranks.is_first,
    )


@contextmanager
def _saved(trainer: Trainer, progress: Progress) -> Iterator[Callable[[], None]]:
    """Give a function that begins to save; at the end what was begun is written, or that failed."""
    pending: list[PendingSave] = []

    def finish() -> None:
        while pending:
            progress.say(f"saved {pending.pop().result()}")

    def save() -> None:
        finish()
        progress.flush()
        pending.append(trainer.save())

    try:
        yield save
    except BaseException:
        with suppress(Exception):  # that of training says more
            finish()
        raise
    finish()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let operators use this many threads meanwhile; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resumes(config: Config) -> bool:
    return config.train.resume or num_restarts() > 0


def _check_folder(config: Config) -> None:
    """Refuse to mix a new run's checkpoints with those of another."""
    folder = config.checkpoint.folder
    found = list_checkpoints(Path(folder)) if folder else []
    if found and not _resumes(config):
        raise ConfigError(
            f"checkpoint.folder is {folder!r}, which holds {found[-1].name} of an earlier run; go "
            "on from it with --train.resume, or name another folder"
        )
