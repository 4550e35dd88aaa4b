"""What `shardwise train` and `shardwise evaluate` can be told, and what each part accepts.

Each field stands in the TOML file under its section, and on the command line as
`--section.field`. The `Attributes` sections below are the text of `--help`.
"""

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which ratings to learn from, and what to make of them.

    Attributes:
        root: Folder of the MovieLens edition; empty: look in $SHARDWISE_DATA, then take the copy
            shipped with the project.
        edition: Name of the edition's folder, used when root is empty.
        train_fraction: Share of the ratings to train on, the earliest; the others are held out.
        history_length: Most movies in a bag of liked or disliked ones, the latest.
        max_tags: Most tags in a bag, the latest.
    """

    root: str = ""
    edition: str = "ml-latest-small"
    train_fraction: float = 0.8
    history_length: int = 20
    max_tags: int = 10

    def __post_init__(self) -> None:
        """Check each field."""
        fraction = self.train_fraction
        _require("data.train_fraction", fraction, 0 < fraction < 1, "over 0 and under 1")
        _require("data.edition", self.edition, bool(self.edition), "the name of a folder")
        _require_least("data.history_length", self.history_length, 1)
        _require_least("data.max_tags", self.max_tags, 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The DLRM.

    Attributes:
        embedding_dim: Columns of every embedding table.
        dense_layers: Widths of the layers over the dense features; the last is embedding_dim.
        over_layers: Widths of the layers over the interactions, two or more; the last is 1.
        pooling: How the rows of a bag become one vector.
    """

    embedding_dim: int = 8
    dense_layers: tuple[int, ...] = (64, 8)
    over_layers: tuple[int, ...] = (64, 32, 1)
    pooling: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Check each field, and that the layers fit together."""
        _require_least("model.embedding_dim", self.embedding_dim, 1)
        dim, dense, over = self.embedding_dim, self.dense_layers, self.over_layers
        is_right = bool(dense) and min(dense) >= 1 and dense[-1] == dim
        wanted = f"widths of which the last is embedding_dim, {dim}"
        _require("model.dense_layers", list(dense), is_right, wanted)
        is_right = len(over) >= 2 and min(over) >= 1 and over[-1] == 1
        _require("model.over_layers", list(over), is_right, "two widths or more, the last 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        seed: Of the model's start and of the order of the samples.
        epochs: Times that each training sample is seen.
        batch_size: Samples per step.
        table_lr: Learning rate of the tables: row-wise Adagrad, run inside backward.
        table_eps: Added to the root of the tables' mean squared gradients.
        dense_lr: Learning rate of everything else: Adam.
        num_threads: Threads that share the work of one operator. Small steps lose time with more
            than one, a lot if the machine is busy; 0: as many as PyTorch chooses.
        resume: Go on from the latest checkpoint in checkpoint.folder.
    """

    seed: int = 0
    epochs: int = 1
    batch_size: int = 128
    table_lr: float = 0.001
    table_eps: float = 1e-10
    dense_lr: float = 0.002
    num_threads: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("epochs", "batch_size"):
            _require_least(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "num_threads"):
            _require_least(f"train.{name}", getattr(self, name), 0)
        for name in ("table_lr", "table_eps", "dense_lr"):
            number = getattr(self, name)
            _require(f"train.{name}", number, 0 < number < float("inf"), "over 0 and finite")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What to keep of a run.

    Attributes:
        folder: Where to write checkpoints, as step_<n>; empty: write none.
        every_steps: Steps between two checkpoints; 0: only one at the end of each epoch.
        keep: How many checkpoints to keep, the latest ones.
    """

    folder: str = ""
    every_steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        """Check each field."""
        _require_least("checkpoint.every_steps", self.every_steps, 0)
        _require_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What to show of a run.

    Attributes:
        tensorboard: Folder for TensorBoard events; empty: write none.
        every_steps: Steps between two sets of figures, on the progress bar and in TensorBoard.
        window: Samples that training NE and AUC are taken over, the latest.
    """

    tensorboard: str = ""
    every_steps: int = 20
    window: int = 10_000

    def __post_init__(self) -> None:
        """Check each field."""
        _require_least("log.every_steps", self.every_steps, 1)
        _require_least("log.window", self.window, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run can be told.

    Attributes:
        data: Which ratings to learn from, and what to make of them.
        model: The DLRM.
        train: How to train.
        checkpoint: What to keep of a run.
        log: What to show of a run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        """Check what sections ask of one another."""
        if self.train.resume and not self.checkpoint.folder:
            raise ConfigError(
                "train.resume is set but checkpoint.folder is empty; name the folder to go on from"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `shardwise evaluate` can be told: `Config`, as far as it matters there.

    Attributes:
        checkpoint: Folder of a checkpoint, or of a run's checkpoints, to take the latest. It must
            be given.
        data: Which ratings to learn from, and what to make of them.
        model: The DLRM.
    """

    checkpoint: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


def _require(name: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, wanted: {wanted}")


def _require_least(name: str, value: int, least: int) -> None:
    _require(name, value, value >= least, f"at least {least}")
