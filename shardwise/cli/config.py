"""What `shardwise train` and `shardwise evaluate` can be told.

Each field stands in the TOML file under its section, and on the command line as
`--section.field`. The `Attributes` sections here, in `data_config` and in `model_config` are the
text of `--help`.
"""

from dataclasses import dataclass, field
from typing import Literal

from shardwise.cli.checks import ConfigError, require, require_least, require_positive
from shardwise.cli.data_config import DataConfig, MovieLensConfig, SequencesConfig
from shardwise.cli.model_config import DLRMConfig, ModelConfig, SASRecConfig

PLACEMENTS = ("auto", "table_wise", "row_wise", "column_wise", "data_parallel")
"""What `train.sharding` can be beside the file of a plan."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        seed: Of the model's start and of the order of the samples.
        epochs: Times that each training sample is seen.
        batch_size: Samples per step, of all processes together.
        table_rule: How the tables are updated, inside backward.
        table_lr: Learning rate of the tables.
        table_eps: What their rule adds to the root of mean squared gradients.
        dense_lr: Learning rate of everything else: Adam.
        lr_falls: Let both rates fall to 0 in a straight line, step by step.
        evaluate_every: Steps between two judgements within an epoch; 0: only at the end of each.
        patience: Stop after this many judgements without better figures on the validation part, and
            take the model that was best; 0: train for all epochs and take the last.
        sharding: Where tables lie when several processes train. auto: one larger than an equal
            share of all bytes by rows on all processes, the others each on the one with the fewest
            bytes so far; table_wise: each on one, in turn; row_wise or column_wise: a block of each
            on all; data_parallel: a copy on all; else a JSON file that ShardingPlan.save wrote. One
            process holds all tables, whatever this says.
        dense: How several processes share the layers that are no tables: ddp, a copy in each; or
            fsdp2, a part in each.
        num_threads: Threads that share the work of one operator, in each process. Small steps lose
            time with more than one, a lot if the machine is busy; 0: as many as PyTorch chooses.
        resume: Go on from the latest checkpoint in checkpoint.folder, if there is one. A run that
            torchrun starts again does so anyway.
    """

    seed: int = 0
    epochs: int = 1
    batch_size: int = 128
    table_rule: Literal["rowwise_adagrad", "adam"] = "rowwise_adagrad"
    table_lr: float = 0.001
    table_eps: float = 1e-10
    dense_lr: float = 0.002
    lr_falls: bool = False
    evaluate_every: int = 0
    patience: int = 0
    sharding: str = "auto"
    dense: Literal["ddp", "fsdp2"] = "ddp"
    num_threads: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("epochs", "batch_size"):
            require_least(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "evaluate_every", "patience", "num_threads"):
            require_least(f"train.{name}", getattr(self, name), 0)
        for name in ("table_lr", "table_eps", "dense_lr"):
            require_positive(f"train.{name}", getattr(self, name))
        is_right = self.sharding in PLACEMENTS or self.sharding.endswith(".json")
        wanted = f"one of {list(PLACEMENTS)}, or the name of a .json file"
        require("train.sharding", self.sharding, is_right, wanted)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What to keep of a run.

    Attributes:
        folder: Where to write checkpoints, as step_<n>; empty: write none.
        every_steps: Steps between two checkpoints; 0: only one at the end of each epoch. They are
            written beside training.
        keep: How many checkpoints to keep, the latest ones; the one that was best on the validation
            part stays as well.
    """

    folder: str = ""
    every_steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        """Check each field."""
        require_least("checkpoint.every_steps", self.every_steps, 0)
        require_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What to show of a run.

    Attributes:
        tensorboard: Folder for TensorBoard events; empty: write none.
        every_steps: Steps between two sets of figures, on the progress bar and in TensorBoard.
        window: Samples that training NE and AUC are taken over, the latest.
    """

    tensorboard: str = ""
    every_steps: int = 100
    window: int = 5_000

    def __post_init__(self) -> None:
        """Check each field."""
        require_least("log.every_steps", self.every_steps, 1)
        require_least("log.window", self.window, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run can be told.

    Attributes:
        data: What to learn from.
        model: What to train.
        train: How to train.
        checkpoint: What to keep of a run.
        log: What to show of a run.
        processes: Processes on this machine that train together; leave it at 1 under torchrun,
            which starts them itself.
    """

    data: DataConfig = field(default_factory=MovieLensConfig)
    model: ModelConfig = field(default_factory=DLRMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    processes: int = 1

    def __post_init__(self) -> None:
        """Check what sections ask of one another."""
        check_fit(self.data, self.model)
        require_least("processes", self.processes, 1)
        if self.train.resume and not self.checkpoint.folder:
            raise ConfigError(
                "train.resume is set but checkpoint.folder is empty; name the folder to go on from"
            )
        if self.train.patience and not self.data.has_validation:
            raise ConfigError(
                f"train.patience is {self.train.patience}, but data.source {self.data.source!r} as "
                "it is set has no validation part; give it one, or set train.patience to 0"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `shardwise evaluate` can be told: `Config`, as far as it matters there.

    Attributes:
        checkpoint: Folder of a checkpoint, or of a run's checkpoints. It must be given.
        which: Of a run's checkpoints, latest, best or the number of a step; empty: the best if it
            trained with patience, else the latest.
        data: What to learn from.
        model: What to train.
    """

    checkpoint: str = ""
    which: str = ""
    data: DataConfig = field(default_factory=MovieLensConfig)
    model: ModelConfig = field(default_factory=DLRMConfig)

    def __post_init__(self) -> None:
        """Check what sections ask of one another."""
        check_fit(self.data, self.model)
        is_right = self.which in ("", "latest", "best") or self.which.isdecimal()
        require("which", self.which, is_right, "latest, best or the number of a step")


def check_fit(data: DataConfig, model: ModelConfig) -> None:
    """Raise `ConfigError` unless the model can learn from the data."""
    reads_sequences = isinstance(model, SASRecConfig)
    if reads_sequences != isinstance(data, SequencesConfig):
        wanted = "another" if reads_sequences else "'sasrec'"
        raise ConfigError(
            f"model.kind is {model.kind!r}, wanted with data.source {data.source!r}: {wanted}"
        )
