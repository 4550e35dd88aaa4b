"""`shardwise train`: the loop around `Trainer`, and what it shows and keeps."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch

from shardwise.cli.checkpoint import list_checkpoints
from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config
from shardwise.cli.interrupt import deferred_interrupt
from shardwise.cli.problem import Figures, compare, show
from shardwise.cli.progress import Progress
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
    trainer = Trainer(config, load_problem(config.data))
    if config.train.resume:
        print(f"going on from {trainer.resume()}")
    with _threads(config.train.num_threads), deferred_interrupt() as interrupted:
        figures = train(trainer, interrupted)
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
        interrupted: When set, training ends after the step in work.

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
    ) as progress:
        while not trainer.is_finished:
            epoch = loader.epoch
            _train_epoch(trainer, progress, interrupted)
            if loader.epoch > epoch:
                figures = problem.judge(trainer.model, problem.validation or problem.test)
                trainer.note(figures)
                progress.record(part.replace(" ", "_"), trainer.num_steps, figures)
                progress.say(f"epoch {loader.epoch} of {num_epochs}, {part}: {show(figures)}")
            if config.checkpoint.folder:
                progress.say(f"saved {trainer.save()}")
            if interrupted.is_set():
                return None
    if figures is not None and problem.validation is None:
        return figures
    trainer.take_best()
    return problem.judge(trainer.model, problem.test)


def _train_epoch(trainer: Trainer, progress: Progress, interrupted: Event) -> None:
    """Take the steps left in the epoch, or as many as it takes to be interrupted."""
    config, steps_per_epoch = trainer.config, len(trainer.loader)
    for batch in trainer.loader:
        trainer.step(batch)
        progress.reach(trainer.num_samples)
        is_last = trainer.num_steps % steps_per_epoch == 0
        if is_last or trainer.num_steps % config.log.every_steps == 0:
            progress.show(trainer.num_steps, trainer.figures())
        if interrupted.is_set():
            return
        every_steps = config.checkpoint.every_steps
        if every_steps and not is_last and trainer.num_steps % every_steps == 0:
            progress.say(f"saved {trainer.save()}")


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
