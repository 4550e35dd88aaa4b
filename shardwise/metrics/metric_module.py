"""Several metrics that read one model's outputs.

`update` only copies a batch's outputs; metrics add up many batches at once, since for small batches
the price of a metric is that of its operations, not of its examples.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.metrics import averages, click, ranking, regression
from shardwise.metrics.metrics_config import (
    BatchSizeStage,
    MetricsConfig,
    RecMetricEnum,
    RecTaskInfo,
    StateMetric,
    StateMetricEnum,
)
from shardwise.metrics.rec_metric import Examples, RecMetric, prepare_examples
from shardwise.metrics.throughput import ThroughputMetric

_MOST_PENDING = 65_536
"""Examples held before they are added up: few megabytes, and enough to share the price."""


@dataclass
class _Pending:
    """Batches that wait, all of the same shapes; apart, since a module's attributes set slowly."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    batch_size: int = 0
    num_updates: int = 0


class RecMetricModule(nn.Module):
    """Metrics updated together.

    Memory is bounded: each metric's window, and less than 65,536 examples beside.

    Args:
        metrics: Metrics, or their classes, which are made with the next three.
        tasks: Which outputs of the model they read.
        window_size: Examples in the window, over all ranks.
        process_group: Ranks to reduce over; None is this process alone.
        throughput_metric: Counts each update as a step.
        state_metrics: Other parts of training whose numbers are shown, by name.
        config: When to compute and who gets the numbers; without one every rank gets them.

    Raises:
        ValueError: There are no tasks, two have one name, or a metric comes twice.
    """

    def __init__(
        self,
        metrics: Sequence[type[RecMetric] | RecMetric],
        tasks: Sequence[RecTaskInfo] = (RecTaskInfo(),),
        *,
        window_size: int = 10_000_000,
        process_group: dist.ProcessGroup | None = None,
        throughput_metric: ThroughputMetric | None = None,
        state_metrics: Mapping[str, StateMetric] | None = None,
        config: MetricsConfig | None = None,
    ) -> None:
        """Make the metrics."""
        super().__init__()
        namespaces = [metric.namespace for metric in metrics]
        if len(set(namespaces)) < len(namespaces):
            raise ValueError(f"RecMetricModule: each metric may come once, got {namespaces}")
        self._metrics = [
            metric
            if isinstance(metric, RecMetric)
            else metric(tasks, window_size=window_size, process_group=process_group)
            for metric in metrics
        ]
        self.rec_metrics = nn.ModuleDict({metric.namespace: metric for metric in self._metrics})
        self.throughput_metric = throughput_metric
        self.state_metrics = dict(state_metrics or {})
        self._config = config or MetricsConfig(compute_on_all_ranks=True)
        self._process_group = process_group
        self._extra_names = {m.namespace: [m.extra_name(t) for t in m.tasks] for m in self._metrics}
        all_tasks = [task for metric in self._metrics for task in metric.tasks]
        read = [n for task in all_tasks for n in (task.prediction_name, task.label_name)]
        read += [name for names in self._extra_names.values() for name in names if name is not None]
        self._required = list(dict.fromkeys(read))
        weights = dict.fromkeys(task.weight_name for task in all_tasks)
        self._names = [*self._required, *(name for name in weights if name not in read)]
        self._pending = _Pending()
        self._interval_steps = self._config.compute_interval_steps
        self._last_compute = (time.perf_counter(), 0)

    def update(self, model_out: Mapping[str, Tensor]) -> None:
        """Add a batch: predictions, labels and, where there are any, weights by their names.

        Args:
            model_out: The outputs. Those that are read are copied. [examples] each, or
                [examples, classes] where a metric is of classes.

        Raises:
            KeyError: An output that a task reads is missing.
            ValueError: An output has another shape than its metrics want.
        """
        missing = [name for name in self._required if name not in model_out]
        if missing:
            raise KeyError(f"metrics want outputs {missing}, the model gave {sorted(model_out)}")
        given = {name: model_out[name] for name in self._names if name in model_out}
        shapes = {name: tensor.shape for name, tensor in given.items()}
        pending = self._pending
        if shapes != pending.shapes:
            self._check_shapes(shapes)
            self._settle()
            pending.shapes = shapes
            pending.batch_size = max((shape[0] for shape in shapes.values()), default=1)
        pending.batches.append({name: tensor.detach().clone() for name, tensor in given.items()})
        pending.moments.append(time.perf_counter())
        pending.num_updates += 1
        is_full = len(pending.batches) == self._config.fused_update_limit
        if is_full or len(pending.batches) * pending.batch_size >= _MOST_PENDING:
            self._settle()
        if self.throughput_metric is not None:
            self.throughput_metric.update()

    def _check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        count = shapes[self._metrics[0].tasks[0].label_name][:1] if self._metrics else ()
        for metric in self._metrics:
            for task, extra in zip(metric.tasks, self._extra_names[metric.namespace], strict=True):
                wanted = {task.weight_name: 1, task.label_name: 1 + metric.has_label_classes}
                wanted |= {task.prediction_name: 1 + metric.has_classes}
                wanted |= {} if extra is None else {extra: 1}
                for name, num_dims in wanted.items():
                    shape = shapes.get(name, count)
                    if len(shape) != num_dims or shape[:1] != count:
                        raise ValueError(
                            f"{metric.namespace}: wants output {name!r} as "
                            f"[examples{', classes' * (num_dims - 1)}], got {list(shape)} beside "
                            f"{list(count)} examples"
                        )

    @torch.no_grad()
    def _settle(self) -> None:
        """Add the pending batches, which are alike, to all metrics."""
        pending, moments = self._pending.batches, self._pending.moments
        if not pending:
            return
        self._pending.batches, self._pending.moments = [], []
        outputs = {name: torch.stack([batch[name] for batch in pending]) for name in pending[0]}
        prepared: dict[tuple[RecTaskInfo, ...], Examples] = {}
        for metric in self._metrics:
            if metric.tasks not in prepared:
                prepared[metric.tasks] = _prepare(metric.tasks, outputs, moments)
            names = [name for name in self._extra_names[metric.namespace] if name is not None]
            extra = torch.stack([outputs[name] for name in names]) if names else None
            metric.add(prepared[metric.tasks], extra)

    def should_compute(self) -> bool:
        """Tell whether it is time: the same on all ranks, which must compute together."""
        since = self._pending.num_updates - self._last_compute[1]
        return since > 0 and since % self._interval_steps == 0

    def compute(self) -> dict[str, float]:
        """Give all numbers over all ranks of the group, by key; a collective call.

        Ranks other than 0 get none unless the config has `compute_on_all_ranks`.
        """
        self._settle()
        numbers = {
            key: value for metric in self._metrics for key, value in metric.compute().items()
        }
        self._pace()
        group = self._process_group
        if group is not None and group.rank() > 0 and not self._config.compute_on_all_ranks:
            return {}
        return numbers | self._others()

    def local_compute(self) -> dict[str, float]:
        """Give all numbers of this rank's examples, by key."""
        self._settle()
        numbers = {k: v for metric in self._metrics for k, v in metric.local_compute().items()}
        return numbers | self._others()

    def _others(self) -> dict[str, float]:
        numbers = {} if self.throughput_metric is None else self.throughput_metric.compute()
        for name, part in self.state_metrics.items():
            found = part.get_metrics().items()
            numbers |= {f"{name}-{name}|{key}": float(value) for key, value in found}
        return numbers

    def _pace(self) -> None:
        """Set the steps between computes by the time that steps take on the slowest rank."""
        config, (before, num_updates) = self._config, self._last_compute
        now = time.perf_counter()
        self._last_compute = (now, self._pending.num_updates)
        if config.min_compute_interval == 0 and config.max_compute_interval == math.inf:
            return
        step_s = torch.tensor((now - before) / max(self._pending.num_updates - num_updates, 1))
        if self._process_group is not None:
            step_s = step_s.to(next(self.buffers(), step_s).device)
            dist.all_reduce(step_s, op=dist.ReduceOp.MAX, group=self._process_group)
        at_least, at_most = (
            seconds / max(step_s.item(), 1e-9)
            for seconds in (config.min_compute_interval, config.max_compute_interval)
        )
        steps = min(max(config.compute_interval_steps, math.ceil(at_least)), at_most)
        self._interval_steps = max(int(steps), 1)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As of any module; pending batches are in the metrics then."""
        self._settle()
        return super().state_dict(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Forget pending batches: they are from before."""
        self._pending.batches, self._pending.moments = [], []
        super()._load_from_state_dict(*arguments)


def _prepare(
    tasks: Sequence[RecTaskInfo], outputs: Mapping[str, Tensor], moments: Sequence[float]
) -> Examples:
    """Stack what tasks read, and prepare it."""
    predictions, labels = (
        torch.stack([outputs[getattr(task, name)] for task in tasks])
        for name in ("prediction_name", "label_name")
    )
    ones = torch.ones(labels.shape[1:3], device=labels.device)
    weights = torch.stack([outputs.get(task.weight_name, ones) for task in tasks])
    return prepare_examples(predictions, labels, weights, moments)


_METRICS: dict[str, type[RecMetric]] = {
    metric.namespace: metric
    for room in (averages, click, ranking, regression)
    for metric in vars(room).values()
    if isinstance(metric, type) and issubclass(metric, RecMetric) and hasattr(metric, "namespace")
}


def generate_metric_module(  # noqa: PLR0913
    metric_class: type[RecMetricModule],
    metrics_config: MetricsConfig,
    batch_size: int,
    world_size: int,
    my_rank: int,
    state_metrics_mapping: Mapping[StateMetricEnum, StateMetric],
    device: torch.device,
    process_group: dist.ProcessGroup | None = None,
    batch_size_stages: Sequence[BatchSizeStage] | None = None,
) -> RecMetricModule:
    """Make the metric module that a config describes.

    Args:
        metric_class: The class of the module.
        metrics_config: What it measures.
        batch_size: Examples of a step, on each rank.
        world_size: Ranks.
        my_rank: This one.
        state_metrics_mapping: The parts that the config's `state_metrics` name.
        device: Where the metrics keep their state.
        process_group: Ranks to reduce over; None with more than one rank is all of them.
        batch_size_stages: Batch sizes that take turns, for throughput.

    Raises:
        ValueError: The group is not of these ranks, a window is smaller than a step's examples, a
            state metric is not given, or the config is wrong.
    """
    if process_group is None and world_size > 1:
        process_group = dist.group.WORLD
    here = (0, 1) if process_group is None else (process_group.rank(), process_group.size())
    if here != (my_rank, world_size):
        raise ValueError(
            f"generate_metric_module: got rank {my_rank} of {world_size}, the process group has "
            f"rank {here[0]} of {here[1]}"
        )
    missing = [name for name in metrics_config.state_metrics if name not in state_metrics_mapping]
    if missing:
        raise ValueError(f"generate_metric_module: state_metrics_mapping lacks {missing}")
    largest = max([batch_size, *(stage.batch_size for stage in batch_size_stages or ())])
    metrics = []
    for kind, definition in metrics_config.rec_metrics.items():
        if definition.window_size < largest * world_size:
            raise ValueError(
                f"{RecMetricEnum(kind).value}: window_size {definition.window_size} is less than a "
                f"step's {largest * world_size} examples"
            )
        metrics.append(
            _METRICS[RecMetricEnum(kind).value](
                definition.tasks_of(metrics_config.rec_tasks),
                window_size=definition.window_size,
                process_group=process_group,
                arguments=definition.arguments,
            )
        )
    throughput = None
    if metrics_config.throughput_metric is not None:
        throughput = ThroughputMetric(
            batch_size=batch_size,
            world_size=world_size,
            window_seconds=metrics_config.throughput_metric.window_size,
            batch_size_stages=batch_size_stages,
        )
    return metric_class(
        metrics,
        metrics_config.rec_tasks,
        process_group=process_group,
        throughput_metric=throughput,
        state_metrics={
            name.value: state_metrics_mapping[name] for name in metrics_config.state_metrics
        },
        config=metrics_config,
    ).to(device)
