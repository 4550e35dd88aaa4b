"""What to measure: tasks, metrics and their settings, when to compute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class SessionMetricDef:
    """How a task's examples form sessions.

    Attributes:
        session_var_name: The model output that holds session ids.
        top_threshold: How many of a session, by prediction, count as predicted positive.
        run_ranking_of_labels: Whether labels are numbers, of which the highest `top_threshold` of
            a session are the positive ones.
    """

    session_var_name: str
    top_threshold: int
    run_ranking_of_labels: bool = False

    def __post_init__(self) -> None:
        """Check."""
        if self.top_threshold < 1:
            raise ValueError(
                f"SessionMetricDef {self.session_var_name!r}: top_threshold must be at least 1, "
                f"got {self.top_threshold}"
            )


@dataclass(frozen=True)
class RecTaskInfo:
    """A task: which of a model's outputs it reads.

    Attributes:
        name: Part of the metric's key.
        label_name: Of the labels; NaN means missing.
        prediction_name: Of the predicted probabilities, or numbers.
        weight_name: Of the weights; may be absent from the outputs: all 1.
        session_metric_def: For recall and precision of sessions.
        is_negative_task: Refused: it would change no number.
        tensor_name: Of the output that `TensorWeightedAvgMetric` and `OutputMetric` read.
        weighted: Whether `TensorWeightedAvgMetric` weighs it.
    """

    name: str = "DefaultTask"
    label_name: str = "label"
    prediction_name: str = "prediction"
    weight_name: str = "weight"
    session_metric_def: SessionMetricDef | None = None
    is_negative_task: bool = False
    tensor_name: str | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        """Check."""
        if self.is_negative_task:
            raise ValueError(
                f"task {self.name!r}: is_negative_task changes no metric; leave it False and give "
                "labels and predictions of one event"
            )


class RecMetricEnum(StrEnum):
    """The metrics, by the first part of their keys."""

    NE = "ne"
    SEGMENTED_NE = "segmented_ne"
    CALIBRATION = "calibration"
    CTR = "ctr"
    AUC = "auc"
    AUPRC = "auprc"
    GAUC = "gauc"
    XAUC = "xauc"
    NDCG = "ndcg"
    MSE = "mse"
    NMSE = "nmse"
    MAE = "mae"
    ACCURACY = "accuracy"
    PRECISION = "precision"
    RECALL = "recall"
    PRECISION_SESSION_LEVEL = "precision_session_level"
    RECALL_SESSION_LEVEL = "recall_session_level"
    MULTICLASS_RECALL = "multiclass_recall"
    MULTI_LABEL_PRECISION = "multi_label_precision"
    AVERAGE = "average"
    WEIGHTED_AVG = "weighted_avg"
    TENSOR_WEIGHTED_AVG = "tensor_weighted_avg"
    SCALAR = "scalar"
    OUTPUT = "output"
    NUM_POSITIVE_SAMPLES = "num_positive_samples"
    NUM_MISSING_LABELS = "num_missing_labels"
    SUM_WEIGHTS = "sum_weights"
    WEIGHTED_SUM_PREDICTIONS = "weighted_sum_predictions"
    TOWER_QPS = "tower_qps"


class RecComputeMode(Enum):
    """Whether tasks are computed together. Here they always are, and no number depends on it."""

    UNFUSED_TASKS_COMPUTATION = "unfused_tasks"
    FUSED_TASKS_COMPUTATION = "fused_tasks"


class StateMetricEnum(StrEnum):
    """Parts of training, other than the model's outputs, that have numbers to show."""

    OPTIMIZERS = "optimizers"
    MODEL_CONFIGURATOR = "model_configurator"


@runtime_checkable
class StateMetric(Protocol):
    """A part of training that has numbers to show."""

    def get_metrics(self) -> Mapping[str, Any]:
        """Give them by name."""


@dataclass
class RecMetricDef:
    """One metric's tasks, window and settings.

    Attributes:
        rec_tasks: Its tasks; with neither these nor indices, all tasks of the config.
        rec_task_indices: Its tasks as places in the config's `rec_tasks`.
        window_size: Examples in the window, over all ranks.
        arguments: What the metric takes beside, by name; see its class.
    """

    rec_tasks: list[RecTaskInfo] = field(default_factory=list)
    rec_task_indices: list[int] = field(default_factory=list)
    window_size: int = 10_000_000
    arguments: dict[str, Any] | None = None

    def tasks_of(self, all_tasks: list[RecTaskInfo]) -> list[RecTaskInfo]:
        """Give its tasks.

        Raises:
            ValueError: Tasks and indices are both given, or an index is past the end.
        """
        if self.rec_tasks and self.rec_task_indices:
            raise ValueError("RecMetricDef: give rec_tasks or rec_task_indices, not both")
        wrong = [i for i in self.rec_task_indices if not 0 <= i < len(all_tasks)]
        if wrong:
            raise ValueError(
                f"RecMetricDef: rec_task_indices {wrong} are not among {len(all_tasks)} tasks"
            )
        return self.rec_tasks or [all_tasks[i] for i in self.rec_task_indices] or all_tasks


@dataclass
class ThroughputDef:
    """That throughput is measured, over the latest `window_size` seconds."""

    window_size: int = 100


@dataclass(frozen=True)
class BatchSizeStage:
    """A batch size, and for how many steps it holds; None: to the end."""

    batch_size: int
    max_iters: int | None = None


@dataclass
class MetricsConfig:
    """What a metric module measures and when.

    Attributes:
        rec_tasks: The tasks.
        rec_metrics: The metrics.
        throughput_metric: Measures examples per second; None: not.
        rec_compute_mode: Either; tasks are computed together.
        fused_update_limit: Most batches held before they are added up; 0: as many as together have
            less than 65,536 examples. No number depends on it.
        state_metrics: Other parts to show.
        compute_interval_steps: `should_compute` is true after each so many updates,
        min_compute_interval: or after as many as take at least these seconds,
        max_compute_interval: and at most these, judged by the pace between the last two computes.
        compute_on_all_ranks: Whether ranks other than 0 get the numbers, or an empty dict.
        should_validate_update: Refused: examples without weight never count.
        enable_pt2_compile: Refused: updates are a few operations on many batches.
        should_clone_update_inputs: Either; what is held is always a copy.
    """

    rec_tasks: list[RecTaskInfo] = field(default_factory=list)
    rec_metrics: dict[RecMetricEnum, RecMetricDef] = field(default_factory=dict)
    throughput_metric: ThroughputDef | None = None
    rec_compute_mode: RecComputeMode = RecComputeMode.UNFUSED_TASKS_COMPUTATION
    fused_update_limit: int = 0
    state_metrics: list[StateMetricEnum] = field(default_factory=list)
    compute_interval_steps: int = 100
    min_compute_interval: float = 0.0
    max_compute_interval: float = math.inf
    compute_on_all_ranks: bool = False
    should_validate_update: bool = False
    enable_pt2_compile: bool = False
    should_clone_update_inputs: bool = False

    def __post_init__(self) -> None:
        """Check."""
        for name in ("should_validate_update", "enable_pt2_compile"):
            if getattr(self, name):
                raise ValueError(f"MetricsConfig: {name} would change nothing here; leave it False")
        if self.compute_interval_steps < 1 or self.fused_update_limit < 0:
            raise ValueError(
                "MetricsConfig: compute_interval_steps must be at least 1 and fused_update_limit "
                f"at least 0, got {self.compute_interval_steps} and {self.fused_update_limit}"
            )
        if not 0 <= self.min_compute_interval <= self.max_compute_interval:
            raise ValueError(
                "MetricsConfig: min_compute_interval must be from 0 to max_compute_interval, got "
                f"{self.min_compute_interval} and {self.max_compute_interval}"
            )


DefaultTaskInfo = RecTaskInfo()
DefaultMetricsConfig = MetricsConfig(
    rec_tasks=[DefaultTaskInfo],
    rec_metrics={RecMetricEnum.NE: RecMetricDef(rec_tasks=[DefaultTaskInfo])},
    throughput_metric=ThroughputDef(),
)
