"""`Trainer`: all that changes while a run trains, and how it goes to a checkpoint and back."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.checkpoint import (
    Checkpoints,
    PendingSave,
    PerRank,
    RandomState,
    find_checkpoint,
    list_checkpoints,
    read_values,
)
from shardwise.cli.config import Config
from shardwise.cli.placing import make_plan
from shardwise.cli.problem import Figures, Problem
from shardwise.cli.ranks import Ranks
from shardwise.cli.recipe import (
    add_loss,
    bind_tables,
    build_loss,
    build_model,
    build_optimizer,
    check_batch,
)
from shardwise.data import SampleLoader
from shardwise.metrics import RecMetricModule
from shardwise.sharding.dense import dense_parallel
from shardwise.sharding.many_ranks import ManyRanks
from shardwise.sharding.plan import ShardingPlan
from shardwise.sharding.shard import shard, sharded_collections

_MAY_DIFFER = {
    "data.root",
    "data.path",
    "train.dense",
    "train.epochs",
    "train.evaluate_every",
    "train.num_threads",
    "train.resume",
    "train.sharding",
}


class Trainer:
    """A model in training: weights, optimizer, position in the data, training metrics, step.

    Of several ranks each takes its share of every batch, and a batch counts as that of one process
    does: gradients are averaged over its samples, whatever the shares. Each rank gets the
    predictions and labels of the whole batch, 8 bytes per sample, so that the metrics of training
    are those of a single process and a checkpoint's do not depend on how many ranks there are. Only
    what is drawn at random differs: each rank draws its own.

    Args:
        config: What to train and how.
        problem: What to train on.
        ranks: Who trains; None: this process alone.
    """

    def __init__(self, config: Config, problem: Problem, ranks: Ranks | None = None) -> None:
        """Make the model and start at the first sample."""
        torch.manual_seed(config.train.seed)
        self.config = config
        self.problem = problem
        self.ranks = ranks or Ranks()
        self.model = build_model(config.model, problem)
        tables = bind_tables(config.train, self.model)
        self.plan: ShardingPlan | None = None
        if self.ranks.count > 1:
            self.plan = self._shard()
            torch.manual_seed(config.train.seed + 1_000_003 * self.ranks.rank)
        self.loader = SampleLoader(
            problem.train,
            config.train.batch_size,
            seed=config.train.seed,
            rank=self.ranks.rank,
            num_ranks=self.ranks.count,
        )
        self._with_loss = add_loss(config.model, self.model)
        if self.ranks.count > 1:
            self._with_loss = dense_parallel(self._with_loss, config.train.dense)
        self._loss_of = build_loss(config.model, self._with_loss)
        num_steps = config.train.epochs * len(self.loader)
        self.optimizer = build_optimizer(config.train, self.model, tables, num_steps)
        metrics = list(problem.metrics.values())
        self.metrics = RecMetricModule(metrics, window_size=config.log.window)
        self.num_steps = 0
        self.loss = math.nan
        self.best: Figures | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._judged_since_best = 0
        self._best_at = self._judged_at = self._saved_at = 0  # steps
        self.checkpoints: Checkpoints | None = None
        if config.checkpoint.folder:
            self.checkpoints = Checkpoints(config.checkpoint.folder, keep=config.checkpoint.keep)

    def _shard(self) -> ShardingPlan:
        """Put the tables where the config says, and talk through what connects them from now on.

        One connection for all lets a rank that waits for ids hear that another one has failed.
        """
        with self.ranks.together("planning"):
            plan = make_plan(self.config.train.sharding, self.model)
        shard(self.model, plan)
        layouts = [collection.layout for _, collection in sharded_collections(self.model)]
        self.ranks = Ranks(next(one.wire for one in layouts if isinstance(one, ManyRanks)))
        return plan

    def step(self, batch: Any) -> None:
        """Train on one batch.

        Raises:
            ValueError: The batch is damaged, or the loss is not finite; no weight has changed.
        """
        with self.ranks.together(
            "checking a batch"
        ):  # else others wait for this one in the forward
            check_batch(batch, self.problem)
        self.optimizer.zero_grad()
        loss, outputs, count = self._loss_of(batch)
        mean, share, outputs = self._join(loss, outputs, count)
        if not math.isfinite(mean):
            raise ValueError(
                f"step {self.num_steps + 1}: the loss is {mean}; training has diverged, "
                "lower train.table_lr or train.dense_lr"
            )
        (loss * share).backward()
        self.optimizer.step()
        if self.problem.metrics:
            self.metrics.update(outputs)
        self.num_steps += 1
        self.loss = mean

    def _join(
        self, loss: Tensor, outputs: Mapping[str, Tensor], count: int
    ) -> tuple[float, float, Mapping[str, Tensor]]:
        """Join the ranks' shares of a batch.

        Returns:
            The mean loss; what to multiply this rank's by, so that the mean over ranks, which
            backward takes, is that of the batch; what metrics read, of all samples.
        """
        if self.ranks.count == 1:
            return loss.item(), 1.0, outputs
        total = loss.item() * count if count else 0.0  # the mean over nothing is no number
        own = torch.tensor([total, count], dtype=torch.float64)
        message = torch.cat([own, *(output.double() for output in outputs.values())])
        shares, k = self.loader.shares, len(outputs)
        sizes = [2 + k * share for share in shares]
        parts = self.ranks.gather(message, sizes, "losses and predictions").split(sizes)
        total, num_all = torch.stack([part[:2] for part in parts]).sum(0).tolist()
        rows = [part[2:].view(k, share) for part, share in zip(parts, shares, strict=True)]
        joined = dict(zip(outputs, torch.cat(rows, 1).float(), strict=True))
        return total / num_all, count * self.ranks.count / num_all, joined

    def judge(self, samples: Any) -> Figures:
        """Judge the model on some samples; each rank judges its share."""
        cut: Any = self._with_loss if hasattr(self._with_loss, "unshard") else None  # by FSDP2
        if cut is not None:
            cut.unshard()
        figures = self.problem.judge(self.model, samples, self.ranks)
        if cut is not None:
            cut.reshard()
        return figures

    @property
    def num_samples(self) -> int:
        """How many samples were trained on so far."""
        position, size = self.loader.state_dict(), len(self.loader.samples)
        in_epoch = position["next_batch"] * self.loader.batch_size
        return int(position["epoch"] * size + min(in_epoch, size))

    @property
    def is_epoch_end(self) -> bool:
        """Whether the latest step was the last of an epoch."""
        return self.num_steps > 0 and self.num_steps % len(self.loader) == 0

    @property
    def must_judge(self) -> bool:
        """Whether the model is to be judged as of this step, and was not yet."""
        every = self.config.train.evaluate_every
        is_due = self.is_epoch_end or (every > 0 and self.num_steps % every == 0)
        return is_due and self._judged_at < self.num_steps

    @property
    def must_save(self) -> bool:
        """Whether a checkpoint of this step is to be written, and was not yet."""
        every, is_best = self.config.checkpoint.every_steps, self._best_at == self.num_steps
        is_due = self.is_epoch_end or (every > 0 and self.num_steps % every == 0) or is_best
        is_missing = self._saved_at < self.num_steps
        return self.checkpoints is not None and is_missing and (is_due or self.is_finished)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or as many judgements as allowed without a better one."""
        config = self.config.train
        has_waited = config.patience > 0 and self._judged_since_best >= config.patience
        return has_waited or self.loader.epoch >= config.epochs

    def batches(self) -> Iterator[Any]:
        """Give the batches that are left, epoch after epoch, without end."""
        while True:
            yield from self.loader

    def figures(self) -> Figures:
        """Give the loss of the last step, and the metrics over the window, by the shown names."""
        computed = self.metrics.local_compute()
        names = {shown: metric.namespace for shown, metric in self.problem.metrics.items()}
        windows = {s: computed[f"{n}-DefaultTask|window_{n}"] for s, n in names.items()}
        return {"loss": self.loss, **windows}

    def note(self, figures: Figures) -> None:
        """Take note of what the model was judged to be, and of whether that is the best so far.

        There is no best one without a validation part: it would be chosen by the test part. The
        weights of the best are those of its checkpoint, or are kept where there are none.
        """
        self._judged_at, self._judged_since_best = self.num_steps, self._judged_since_best + 1
        if self.problem.validation is None:
            return
        if self.best is None or self.problem.is_better(figures, self.best):
            self.best, self._best_at, self._judged_since_best = figures, self.num_steps, 0
            if self.checkpoints is None and self.config.train.patience:
                state = self.model.state_dict()
                self._best_weights = {name: tensor.clone() for name, tensor in state.items()}

    def take_best(self) -> None:
        """With patience, go back to the weights that were best."""
        if self.best is None or not self.config.train.patience:
            return
        if self.checkpoints is not None:
            self.checkpoints.load({"model": self.model}, "best")
        else:
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(self._best_weights[name])

    def save(self) -> PendingSave:
        """Begin to write a checkpoint to the folder that the config names."""
        assert self.checkpoints is not None, "the config names a folder"
        self._saved_at, is_best = self.num_steps, self._best_at == self.num_steps
        return self.checkpoints.save(self.num_steps, self._state(), is_best=is_best, wait=False)

    def resume(self) -> Path | None:
        """Go on from the latest checkpoint in the folder that the config names, if there is one.

        Raises:
            ValueError: It is damaged, or of another model, other data or another way to train.
        """
        folder = Path(self.config.checkpoint.folder)
        if self.checkpoints is None or not list_checkpoints(folder):
            return None
        path = find_checkpoint(folder)
        values = read_values(path)
        check_config(path, values, asdict(self.config), ("data", "model", "train"))
        state = self._state()
        self.checkpoints.load({name: state[name] for name in state.keys() - values.keys()})
        self.loader.load_state_dict(values["position"])
        self.num_steps = self._saved_at = values["num_steps"]
        self.best, self._best_at = values["best"], values["best_at"]
        self._judged_at = values["judged_at"]
        self._judged_since_best = values["judged_since_best"]
        return path

    def _state(self) -> dict[str, Any]:
        """Name all that goes to a checkpoint."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "metrics": self.metrics,
            "random": PerRank(RandomState()),
            "config": asdict(self.config),
            "position": self.loader.state_dict(),
            "num_steps": self.num_steps,
            "best": self.best,
            "best_at": self._best_at,
            "judged_at": self._judged_at,
            "judged_since_best": self._judged_since_best,
        }


def check_config(
    path: Path, state: Mapping[str, Any], config: Mapping[str, Any], sections: Iterable[str]
) -> None:
    """Check that a checkpoint was saved by a run like this one.

    Args:
        path: The checkpoint, for the message.
        state: What `read_values` gave.
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
            if f"{section}.{name}" not in may_differ and there != here:
                raise ValueError(
                    f"checkpoint {path}: it was saved with {section}.{name} {there!r}, this run "
                    f"has {here!r}; set it to {there!r}"
                )
