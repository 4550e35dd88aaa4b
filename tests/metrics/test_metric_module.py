"""The metric module: settings, schedule, throughput, what is refused, what a batch may be."""

import math
import pickle

import pytest
import torch

from shardwise.metrics import (
    AUCMetric,
    BatchSizeStage,
    CTRMetric,
    DefaultMetricsConfig,
    MetricsConfig,
    MulticlassRecallMetric,
    NDCGMetric,
    NEMetric,
    RecComputeMode,
    RecMetricDef,
    RecMetricEnum,
    RecMetricModule,
    RecTaskInfo,
    SegmentedNEMetric,
    SessionMetricDef,
    StateMetricEnum,
    TensorWeightedAvgMetric,
    ThroughputDef,
    ThroughputMetric,
    TowerQPSMetric,
    generate_metric_module,
)
from shardwise.metrics import metric_module as metric_module_file
from shardwise.metrics import throughput as throughput_file

CPU = torch.device("cpu")
CLICK, LIKE = RecTaskInfo("click"), RecTaskInfo("like", "liked")


def batch(count=4, rate=0.5):
    return {
        "prediction": torch.full((count,), 0.5),
        "label": (torch.arange(count) < rate * count).float(),
        "liked": torch.ones(count),
    }


def generate(batch_size=4, world_size=1, rank=0, states=None, stages=None, **settings):
    config = MetricsConfig(**settings)
    arguments = (config, batch_size, world_size, rank, states or {}, CPU, None, stages)
    return generate_metric_module(RecMetricModule, *arguments)


class Clock:
    """Stands in for a module's `time`."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (metric_module_file, throughput_file):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_default_config_measures_normalized_entropy_and_throughput():
    module = generate_metric_module(RecMetricModule, DefaultMetricsConfig, 4, 1, 0, {}, CPU)
    module.update(batch())
    assert set(module.compute()) == {
        "ne-DefaultTask|lifetime_ne",
        "ne-DefaultTask|lifetime_logloss",
        "ne-DefaultTask|window_ne",
        "ne-DefaultTask|window_logloss",
        "throughput-throughput|total_examples",
    }


@pytest.mark.parametrize(
    ("definition", "names"),
    [
        (RecMetricDef(), {"click", "like"}),
        (RecMetricDef(rec_task_indices=[1]), {"like"}),
        (RecMetricDef(rec_tasks=[CLICK]), {"click"}),
    ],
)
def test_metric_has_the_tasks_of_its_definition(definition, names):
    module = generate(rec_tasks=[CLICK, LIKE], rec_metrics={RecMetricEnum.CTR: definition})
    module.update(batch())
    assert {key.split("|")[0] for key in module.compute()} == {f"ctr-{name}" for name in names}


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (RecMetricDef([CLICK], [0]), "give rec_tasks or rec_task_indices, not both"),
        (RecMetricDef(rec_task_indices=[2]), r"rec_task_indices \[2\] are not among 2 tasks"),
        (RecMetricDef(window_size=3), "ctr: window_size 3 is less than a step's 4 examples"),
        (RecMetricDef(arguments={"k": 3}), r"ctr: takes the arguments \[\], got \['k'\]"),
    ],
)
def test_definition_that_means_nothing_is_refused(definition, message):
    with pytest.raises(ValueError, match=message):
        generate(rec_tasks=[CLICK, LIKE], rec_metrics={RecMetricEnum.CTR: definition})


@pytest.mark.parametrize(
    "settings",
    [
        {"should_validate_update": True},
        {"enable_pt2_compile": True},
        {"compute_interval_steps": 0},
        {"fused_update_limit": -1},
        {"min_compute_interval": 2.0, "max_compute_interval": 1.0},
    ],
)
def test_config_that_means_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=f"MetricsConfig: .*{next(iter(settings))}"):
        MetricsConfig(**settings)


def test_negative_task_is_refused():
    with pytest.raises(ValueError, match="task 'hide': is_negative_task changes no metric"):
        RecTaskInfo("hide", is_negative_task=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecMetricModule([TensorWeightedAvgMetric]), "needs a tensor_name"),
        (lambda: SessionMetricDef("session_id", 0), "top_threshold must be at least 1, got 0"),
        (lambda: CTRMetric(window_size=0), "ctr: window_size must be at least 1, got 0"),
        (lambda: generate(world_size=1, rank=1), "got rank 1 of 1, the process group has rank 0"),
        (
            lambda: generate(state_metrics=[StateMetricEnum.OPTIMIZERS]),
            "state_metrics_mapping lacks",
        ),
    ],
)
def test_what_a_metric_needs_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("metric", "given", "message"),
    [
        (
            NEMetric,
            {"prediction": torch.rand(4, 1)},
            r"wants output 'prediction' as \[examples\]",
        ),
        (NEMetric, {"prediction": torch.rand(3)}, r"got \[3\] beside \[4\] examples"),
        (MulticlassRecallMetric, {}, r"'prediction' as \[examples, classes\], got \[4\]"),
        (NDCGMetric, {"session_id": torch.zeros(4, 2)}, "wants output 'session_id'"),
    ],
)
def test_outputs_of_a_wrong_shape_are_named(metric, given, message):
    with pytest.raises(ValueError, match=message):
        RecMetricModule([metric]).update(batch() | given)


def test_group_out_of_range_is_named():
    metric = SegmentedNEMetric(arguments={"num_groups": 2})
    with pytest.raises(ValueError, match="groups must be from 0 to 1, got 0 to 2"):
        metric.update(torch.rand(3), torch.ones(3), extra=torch.arange(3))


def test_group_of_an_absent_example_may_be_any():
    metric = SegmentedNEMetric(arguments={"num_groups": 2})
    metric.update(torch.rand(3), torch.tensor([1.0, 0.0, math.nan]), extra=torch.tensor([0, 0, -9]))
    assert metric.compute()["segmented_ne-DefaultTask|window_segmented_ne_0"] > 0


def test_class_out_of_range_is_named():
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got 0 to 3"):
        MulticlassRecallMetric().update(torch.rand(2, 3), torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_held_batches_change_no_number(limit):
    module = generate(
        rec_tasks=[CLICK, LIKE],
        rec_metrics={RecMetricEnum.CTR: RecMetricDef(window_size=8)},
        fused_update_limit=limit,
        rec_compute_mode=RecComputeMode.FUSED_TASKS_COMPUTATION,
    )
    for rate, count in [(1, 4), (0, 4), (0.5, 4), (0.5, 2)]:  # the last is of another size
        module.update(batch(count, rate))
    assert module.compute() == {
        "ctr-click|lifetime_ctr": 0.5,
        "ctr-like|lifetime_ctr": 1.0,
        "ctr-click|window_ctr": 0.5,
        "ctr-like|window_ctr": 1.0,
    }


def test_outputs_may_change_after_update():
    module, given = RecMetricModule([CTRMetric]), batch(rate=1)
    module.update(given)
    given["label"].zero_()
    assert module.compute()["ctr-DefaultTask|lifetime_ctr"] == 1.0


def test_held_batches_are_bounded():
    module = RecMetricModule([CTRMetric])
    for _ in range(9):
        module.update(batch(count=30_000))
        assert sum(len(held["label"]) for held in module._pending.batches) < 65_536


def test_examples_window_grows_to_its_size_only():
    metric = AUCMetric(window_size=100)
    for _ in range(50):
        metric.update(torch.rand(7), torch.ones(7))
        assert metric.window.rows.shape[-1] <= 100


@pytest.mark.parametrize("window_size", [30, 100])
def test_a_window_of_another_size_takes_a_saved_one(window_size):
    saved, other = AUCMetric(window_size=100), AUCMetric(window_size=window_size)
    wanted = AUCMetric(window_size=window_size)
    for _ in range(23):
        p, y = torch.rand(10), torch.rand(10).round()
        saved.update(p, y)
        wanted.update(p, y)
    other.load_state_dict(saved.state_dict())
    assert other.compute() == wanted.compute()


def test_state_without_a_window_is_refused():
    state = CTRMetric().state_dict()
    del state["window.chunks"]
    with pytest.raises(RuntimeError, match=r"Missing key.*window\.chunks"):
        CTRMetric().load_state_dict(state)


def test_module_can_be_copied():
    module = RecMetricModule([NEMetric, AUCMetric])
    module.update(batch())
    assert pickle.loads(pickle.dumps(module)).compute() == module.compute()


def test_compute_is_due_each_so_many_updates():
    module = generate(compute_interval_steps=3)
    due = []
    for _ in range(7):
        module.update({})
        due.append(module.should_compute())
        if due[-1]:
            module.compute()
    assert due == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("limits", "steps"), [((5.0, math.inf), 50), ((0.0, 0.25), 2), ((0.0, 0.01), 1)]
)
def test_interval_follows_the_pace_of_steps(clock, limits, steps):
    at_least, at_most = limits
    module = generate(
        compute_interval_steps=10, min_compute_interval=at_least, max_compute_interval=at_most
    )
    computed = []
    for step in range(1, 121):
        clock.now += 0.1
        module.update({})
        if module.should_compute():
            module.compute()
            computed.append(step)
    assert computed[1] - computed[0] == steps


class Rate:
    def get_metrics(self):
        return {"lr": 0.25}


def test_state_metrics_are_shown():
    names = [StateMetricEnum.OPTIMIZERS]
    module = generate(state_metrics=names, states={StateMetricEnum.OPTIMIZERS: Rate()})
    assert module.compute() == {"optimizers-optimizers|lr": 0.25}


def on_rank(rank, world_size):
    metrics = {RecMetricEnum.CTR: RecMetricDef(), RecMetricEnum.TOWER_QPS: RecMetricDef()}
    module = generate(4, world_size, rank, rec_tasks=[CLICK], rec_metrics=metrics)
    module.update(batch())
    paced = generate(4, world_size, rank, compute_interval_steps=2, max_compute_interval=1e-9)
    paced.update({})
    paced.compute()
    paced.update({})
    return module.compute(), list(module.local_compute()), paced.should_compute()


def test_rank_0_alone_gets_the_numbers(ranks):
    (first, local, due), *others = ranks(3, on_rank)
    assert first["ctr-click|lifetime_ctr"] == 0.5
    assert "ctr-click|lifetime_ctr" in local
    assert due
    assert others == [({}, local, True)] * 2


# ---- throughput


def test_throughput_is_of_a_window_after_warm_up(clock):
    metric = ThroughputMetric(batch_size=5, world_size=2, window_seconds=10, warmup_steps=3)
    for step in range(1, 104):
        clock.now += 100.0 if step <= 3 else 1.0 if step <= 53 else 0.5
        metric.update()
    assert metric.compute() == {
        "throughput-throughput|total_examples": 1030.0,
        "throughput-throughput|lifetime_throughput": pytest.approx(1000 / 75),
        "throughput-throughput|window_throughput": pytest.approx(20.0),
    }
    assert len(metric._marks) <= 1001


def test_throughput_keeps_few_moments(clock):
    metric = ThroughputMetric(batch_size=1, world_size=1, window_seconds=10, warmup_steps=0)
    for _ in range(20_000):
        clock.now += 0.001
        metric.update()
    assert len(metric._marks) <= 1002
    rate = metric.compute()["throughput-throughput|window_throughput"]
    assert rate == pytest.approx(1000)


def test_throughput_counts_by_stages_across_a_checkpoint():
    stages = [BatchSizeStage(2, 3), BatchSizeStage(4, 2), BatchSizeStage(8)]
    one, other = (
        generate(throughput_metric=ThroughputDef(), stages=stages).throughput_metric
        for _ in range(2)
    )
    for _ in range(4):
        one.update()
    other.load_state_dict(one.state_dict())
    for _ in range(2):
        other.update()
    assert other.compute() == {"throughput-throughput|total_examples": 2 * 3 + 4 * 2 + 8}


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_seconds": 7201},
        {"window_seconds": 0},
        {"batch_size": 0},
        {"warmup_steps": -1},
        {"batch_size_stages": [BatchSizeStage(2, 3)]},
        {"batch_size_stages": [BatchSizeStage(2), BatchSizeStage(2)]},
    ],
)
def test_throughput_refuses_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="throughput:"):
        ThroughputMetric(**{"batch_size": 1, "world_size": 1, "window_seconds": 9} | wrong)


def test_examples_per_second_of_a_task_leave_out_warm_up_and_missing_labels(clock):
    metric = TowerQPSMetric([LIKE], arguments={"warmup_steps": 2})
    module = RecMetricModule([metric])
    for _ in range(6):
        clock.now += 2.0
        module.update(batch() | {"liked": torch.tensor([1.0, 0.0, 1.0, math.nan])})
    numbers = module.compute()
    assert numbers["tower_qps-like|lifetime_qps"] == pytest.approx(1.5)
    assert numbers["tower_qps-like|window_total_examples"] == 12
