"""`shardwise train`: the loop around `Trainer`, and what it shows and keeps."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch

from shardwise.checkpoint import list_checkpoints
from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config
from shardwise.cli.interrupt import deferred_interrupt
from shardwise.cli.launch import end_with_launcher, launch
from shardwise.cli.problem import Figures, compare, show
from shardwise.cli.progress import Progress
from shardwise.cli.ranks import has_launcher, joined_ranks
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
    if config.train.resume:
        path = trainer.resume()
        if is_first:
            print(f"going on from {path}")
    with _threads(config.train.num_threads), deferred_interrupt() as interrupted:
        figures = train(trainer, interrupted)
    if not is_first:
        return int(figures is None)
    if figures is None:
        hint = "go on with --train.resume" if config.checkpoint.folder else "nothing was saved"
        print(f"shardwise: interrupted after step {trainer.num_steps}; {hint}", file=sys.stderr)
        return 1
    print(compare(figures, trainer.problem))
    return 0


def train(trainer: Trainer, interrupted: Event) -> Figures | None:
    """Train for the epochs that are left, with a progress bar, events and checkpoints.

    After each epoch the model is judged on the validation part, or where there is none on the test
    part; at the end the last one, or with `train.patience` the best one, on the test part.

    Args:
        trainer: What to train; saved at the end of each epoch, and when interrupted.
        interrupted: When set in any of the processes, training ends after the step in work.

    Returns:
        The figures on the test part, or None if interrupted before the end.
    """
    config, loader, problem = trainer.config, trainer.loader, trainer.problem
    num_epochs, figures = config.train.epochs, None
    part = "held out" if problem.validation is None else "validation"
    with Progress(
        total=num_epochs * len(loader.samples),
        start=trainer.num_samples,
        num_steps=trainer.num_steps,
        tensorboard=config.log.tensorboard,
        is_silent=not trainer.ranks.is_first,
    ) as progress:
        while not trainer.is_finished:
            epoch = loader.epoch
            is_interrupted = _train_epoch(trainer, progress, interrupted)
            if loader.epoch > epoch:
                figures = trainer.judge(problem.validation or problem.test)
                trainer.note(figures)
                progress.record(part.replace(" ", "_"), trainer.num_steps, figures)
                progress.say(f"epoch {loader.epoch} of {num_epochs}, {part}: {show(figures)}")
            if config.checkpoint.folder:
                progress.say(f"saved {trainer.save()}")
            if is_interrupted:
                return None
    if figures is not None and problem.validation is None:
        return figures
    trainer.take_best()
    return trainer.judge(problem.test)


def _train_epoch(trainer: Trainer, progress: Progress, interrupted: Event) -> bool:
    """Take the steps left in the epoch; say whether it was interrupted."""
    config, steps_per_epoch = trainer.config, len(trainer.loader)
    for batch in trainer.loader:
        trainer.step(batch)
        progress.reach(trainer.num_samples)
        is_last = trainer.num_steps % steps_per_epoch == 0
        if is_last or trainer.num_steps % config.log.every_steps == 0:
            progress.show(trainer.num_steps, trainer.figures())
        if trainer.ranks.any(interrupted.is_set(), "the end of a step"):
            return True
        every_steps = config.checkpoint.every_steps
        if every_steps and not is_last and trainer.num_steps % every_steps == 0:
            progress.say(f"saved {trainer.save()}")
    return False


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let operators use this many threads meanwhile; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_folder(config: Config) -> None:
    """Refuse to mix a new run's checkpoints with those of another."""
    folder = config.checkpoint.folder
    found = list_checkpoints(Path(folder)) if folder else []
    if found and not config.train.resume:
        raise ConfigError(
            f"checkpoint.folder is {folder!r}, which holds {found[-1].name} of an earlier run; go "
            "on from it with --train.resume, or name another folder"
        )
