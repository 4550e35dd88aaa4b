"""`Trainer`: all that changes while a run trains, and how it goes to a checkpoint and back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.cli.checkpoint import (
    copy_tensors,
    find_checkpoint,
    read_state,
    read_tensors,
    save_checkpoint,
)
from shardwise.cli.config import Config
from shardwise.cli.problem import Figures, Problem
from shardwise.cli.recipe import build_loss, build_model, build_optimizer
from shardwise.data import SampleLoader
from shardwise.metrics import RecMetricModule

_MAY_DIFFER = {"data.root", "data.path", "train.epochs", "train.num_threads", "train.resume"}


class Trainer:
    """A model in training: weights, optimizer, position in the data, training metrics, step.

    With `train.patience` the weights of the best epoch so far are kept, too.

    Args:
        config: What to train and how.
        problem: What to train on.
    """

    def __init__(self, config: Config, problem: Problem) -> None:
        """Make the model and start at the first sample."""
        torch.manual_seed(config.train.seed)
        self.config = config
        self.problem = problem
        self.model = build_model(config.model, problem)
        self.loader = SampleLoader(problem.train, config.train.batch_size, seed=config.train.seed)
        num_steps = config.train.epochs * len(self.loader)
        self.optimizer = build_optimizer(config.train, self.model, num_steps)
        metrics = list(problem.metrics.values())
        self.metrics = RecMetricModule(metrics, window_size=config.log.window)
        self.num_steps = 0
        self.loss = math.nan
        self.best: Figures | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._epochs_since_best = 0
        self._loss_of = build_loss(config.model, self.model, problem)

    def step(self, batch: Any) -> None:
        """Train on one batch.

        Raises:
            ValueError: The batch is damaged, or the loss is not finite; no weight has changed.
        """
        self.optimizer.zero_grad()
        loss, outputs = self._loss_of(batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"step {self.num_steps + 1}: the loss is {loss.item()}; training has diverged, "
                "lower train.table_lr or train.dense_lr"
            )
        loss.backward()
        self.optimizer.step()
        if self.problem.metrics:
            self.metrics.update(outputs)
        self.num_steps += 1
        self.loss = loss.item()

    @property
    def num_samples(self) -> int:
        """How many samples were trained on so far."""
        position, size = self.loader.state_dict(), len(self.loader.samples)
        in_epoch = position["next_batch"] * self.loader.batch_size
        return int(position["epoch"] * size + min(in_epoch, size))

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or as many as allowed without a better one."""
        config = self.config.train
        has_waited = config.patience > 0 and self._epochs_since_best >= config.patience
        return has_waited or self.loader.epoch >= config.epochs

    def figures(self) -> Figures:
        """Give the loss of the last step, and the metrics over the window, by the shown names."""
        computed = self.metrics.local_compute()
        names = {shown: metric.namespace for shown, metric in self.problem.metrics.items()}
        windows = {s: computed[f"{n}-DefaultTask|window_{n}"] for s, n in names.items()}
        return {"loss": self.loss, **windows}

    def note(self, figures: Figures) -> None:
        """Take note of the figures after an epoch; keep the weights if they are the best so far."""
        if not self.config.train.patience:
            return
        self._epochs_since_best += 1
        if self.best is None or self.problem.is_better(figures, self.best):
            self.best, self._epochs_since_best = figures, 0
            self._best_weights = {n: t.clone() for n, t in model_tensors(self.model).items()}

    def take_best(self) -> None:
        """Go back to the weights of the best epoch, where they were kept."""
        if self.best is not None:
            with torch.no_grad():
                for name, tensor in model_tensors(self.model).items():
                    tensor.copy_(self._best_weights[name])

    def save(self) -> Path:
        """Write a checkpoint to the folder that the config names."""
        state = {
            "config": asdict(self.config),
            "position": self.loader.state_dict(),
            "num_steps": self.num_steps,
            "best": self.best,
            "epochs_since_best": self._epochs_since_best,
        }
        config = self.config.checkpoint
        return save_checkpoint(
            Path(config.folder), self.num_steps, self._tensors(), state, keep=config.keep
        )

    def resume(self) -> Path:
        """Go on from the latest checkpoint in the folder that the config names.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or of another model, other data or another way to train.
        """
        path = find_checkpoint(Path(self.config.checkpoint.folder))
        state = read_state(path)
        check_config(path, state, asdict(self.config), ("data", "model", "train"))
        self.optimizer.init_state()
        saved = read_tensors(path)
        torch.set_rng_state(saved.pop("random"))
        self.metrics.load_state_dict(_take_out("metrics.", saved))
        self._best_weights = _take_out("best.", saved)
        copy_tensors(path, saved, self._weights_and_state())
        self.optimizer.post_load_state_dict()
        self.loader.load_state_dict(state["position"])
        self.num_steps = state["num_steps"]
        self.best, self._epochs_since_best = state["best"], state["epochs_since_best"]
        return path

    def _tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the run."""
        metrics = {f"metrics.{name}": tensor for name, tensor in self.metrics.state_dict().items()}
        best = {f"best.{name}": tensor for name, tensor in self._best_weights.items()}
        random = {"random": torch.get_rng_state()}
        return self._weights_and_state() | metrics | best | random

    def _weights_and_state(self) -> dict[str, Tensor]:
        """Name the tensors of the model and of the optimizer; they are their own, not copies."""
        optimizer = {
            f"optimizer.state.{parameter}.{name}": tensor
            for parameter, state in self.optimizer.state_dict()["state"].items()
            for name, tensor in state.items()
        }
        return model_tensors(self.model) | optimizer


def _take_out(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out the tensors whose names begin with a prefix, and leave it off."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Name a model's tensors as a checkpoint does."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def check_config(
    path: Path, state: Mapping[str, Any], config: Mapping[str, Any], sections: Iterable[str]
) -> None:
    """Check that a checkpoint was saved by a run like this one.

    Args:
        path: The checkpoint, for the message.
        state: What `read_state` gave.
        config: The sections of this run's config.
        sections: Those that must agree; where the data lies, how long to train (unless rates fall)
            and on how many threads may differ.

    Raises:
        ValueError: A field differs.
    """
    # Rates that fall reach 0 with the last epoch.
    fixed = {"train.epochs"} if config.get("train", {}).get("lr_falls") else set()
    may_differ = _MAY_DIFFER - fixed
    for section in sections:
        for name, here in config[section].items():
            there = state["config"][section].get(name, here)
            here = list(here) if isinstance(here, tuple) else here
            if f"{section}.{name}" not in may_differ and there != here:
                raise ValueError(
                    f"checkpoint {path}: it was saved with {section}.{name} {there!r}, this run "
                    f"has {here!r}; set it to {there!r}"
                )
