"""Metrics equal scikit-learn or a few lines of NumPy; windows, tasks, ranks, checkpoints."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from shardwise.metrics import (
    AUCMetric,
    CalibrationMetric,
    CTRMetric,
    NEMetric,
    RecMetricModule,
    RecTaskInfo,
    auc,
    calibration,
    log_loss,
    normalized_entropy,
)

METRICS = [NEMetric, CalibrationMetric, CTRMetric, AUCMetric]


def examples(count: int, seed=0, with_missing=False):
    """Predictions with ties, labels that follow them, weights with zeros."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randint(1, 20, (count,), generator=generator) / 20
    y = (torch.rand(count, generator=generator) < p).float()
    w = torch.randint(0, 4, (count,), generator=generator).float()
    if with_missing:
        y[torch.rand(count, generator=generator) < 0.2] = math.nan
    return p, y, w


def present(p, y, w):
    keep = ~y.isnan()
    return p[keep].double().numpy(), y[keep].double().numpy(), w[keep].double().numpy()


def test_normalized_entropy_of_a_known_example():
    value = normalized_entropy(torch.tensor([0.8, 0.3, 0.6]), torch.tensor([1.0, 0.0, 1.0]))
    assert value.item() == pytest.approx(0.5712, abs=5e-5)


@pytest.mark.parametrize("with_missing", [False, True])
@pytest.mark.parametrize("count", [10, 63, 1000])
def test_functions_equal_scikit_learn_and_numpy(count, with_missing):
    given = examples(count, with_missing=with_missing)
    p, y, w = present(*given)
    bits = sklearn_log_loss(y, p, sample_weight=w) / math.log(2)
    rate = np.average(y, weights=w)
    base = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate))
    assert log_loss(*given).item() == pytest.approx(bits)
    assert normalized_entropy(*given).item() == pytest.approx(bits / base)
    assert calibration(*given).item() == pytest.approx((w * p).sum() / (w * y).sum())
    assert auc(*given).item() == pytest.approx(roc_auc_score(y, p, sample_weight=w))


def test_auc_counts_ties_half():
    assert auc(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item() == 0.5


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], []])
def test_auc_without_both_classes_is_a_half(labels):
    assert auc(torch.full((len(labels),), 0.3), torch.tensor(labels)).item() == 0.5


def test_metrics_of_batches_equal_functions_of_all_examples():
    module = RecMetricModule(METRICS)
    whole = [examples(50, seed) for seed in range(4)]
    for p, y, w in whole:
        module.update({"prediction": p, "label": y, "weight": w})
    p, y, w = (torch.cat(parts) for parts in zip(*whole, strict=True))
    result = module.compute()
    for prefix in ("lifetime_", "window_"):
        assert result[f"ne-DefaultTask|{prefix}ne"] == pytest.approx(
            normalized_entropy(p, y, w).item()
        )
        assert result[f"ne-DefaultTask|{prefix}logloss"] == pytest.approx(log_loss(p, y, w).item())
        assert result[f"calibration-DefaultTask|{prefix}calibration"] == pytest.approx(
            calibration(p, y, w).item()
        )
        assert result[f"ctr-DefaultTask|{prefix}ctr"] == pytest.approx(np.average(y, weights=w))
    assert result["auc-DefaultTask|window_auc"] == pytest.approx(auc(p, y, w).item())


def test_window_holds_the_latest_examples():
    ne, roc = NEMetric(window_size=100), AUCMetric(window_size=100)
    batches = [examples(50, seed) for seed in range(5)]
    for batch in batches:
        ne.update(*batch)
        roc.update(*batch)
    latest = [torch.cat(parts) for parts in zip(*batches[-2:], strict=True)]
    assert ne.compute()["ne-DefaultTask|window_ne"] == pytest.approx(
        normalized_entropy(*latest).item()
    )
    assert roc.compute()["auc-DefaultTask|window_auc"] == pytest.approx(auc(*latest).item())


def test_window_of_many_small_batches_keeps_few_chunks():
    ctr = CTRMetric(window_size=5000)
    for step in range(3000):
        ctr.update(torch.zeros(10), torch.full((10,), float(step >= 2500)))
    assert len(ctr.window.chunks) <= 1001
    assert ctr.compute()["ctr-DefaultTask|window_ctr"] == 1.0


@pytest.mark.parametrize("window_size", [999, 1000, 1001, 1999, 2500])
def test_window_has_at_most_1001_chunks(window_size):
    ctr = CTRMetric(window_size=window_size)
    for step in range(3000):
        ctr.update(torch.zeros(1), torch.tensor([float(step >= 3000 - window_size)]))
    assert len(ctr.window.chunks) <= 1001
    assert ctr.compute()["ctr-DefaultTask|window_ctr"] == 1.0


def test_batch_beyond_the_window_is_kept_whole_by_sums():
    ctr = CTRMetric(window_size=2)
    ctr.update(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert ctr.compute()["ctr-DefaultTask|window_ctr"] == 0.25


@pytest.mark.parametrize("absence", ["no label", "no weight"])
def test_absent_example_counts_nothing_whatever_it_holds(absence):
    p, y, w = examples(30)
    p_more, y_more, w_more = (torch.cat([t, t.new_ones(1)]) for t in (p, y, w))
    p_more[-1] = math.nan
    (y_more if absence == "no label" else w_more)[-1] = math.nan if absence == "no label" else 0.0
    ours, wanted = RecMetricModule(METRICS), RecMetricModule(METRICS)
    ours.update({"prediction": p_more, "label": y_more, "weight": w_more})
    wanted.update({"prediction": p, "label": y, "weight": w})
    assert ours.compute() == pytest.approx(wanted.compute())
    assert not any(math.isnan(value) for value in ours.compute().values())


def test_each_task_has_its_own_numbers():
    tasks = [RecTaskInfo("click", "l0", "p0", "w0"), RecTaskInfo("like", "l1", "p1", "w1")]
    module = RecMetricModule(METRICS, tasks)
    a, b = examples(40, 1), examples(40, 2)
    outputs = {f"{n}{i}": t for i, ex in enumerate((a, b)) for n, t in zip("plw", ex, strict=True)}
    module.update(outputs)
    result = module.compute()
    assert result["auc-click|window_auc"] == pytest.approx(auc(*a).item())
    assert result["auc-like|window_auc"] == pytest.approx(auc(*b).item())
    assert result["ne-like|lifetime_ne"] == pytest.approx(normalized_entropy(*b).item())


def test_missing_output_is_named():
    with pytest.raises(KeyError, match=r"outputs \['label'\]"):
        RecMetricModule(METRICS).update({"prediction": torch.rand(3)})


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"ne: wants \[tasks, examples\] with 1 tasks"):
        NEMetric().update(torch.rand(3), torch.rand(4))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("function", [normalized_entropy, log_loss, calibration, auc])
def test_functions_do_not_broadcast(function):
    with pytest.raises(ValueError, match=r"must have one shape, got \[\[3, 1\], \[3\]\]"):
        function(torch.rand(3, 1), torch.ones(3))


@pytest.mark.parametrize("names", [[], ["a", "b", "a"]])
def test_tasks_need_names_that_differ(names):
    with pytest.raises(ValueError, match="ne: tasks need names that differ, got"):
        NEMetric([RecTaskInfo(name) for name in names])


def test_metric_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"each metric may come once, got \['ne', 'ne'\]"):
        RecMetricModule([NEMetric, NEMetric])


def test_state_survives_a_checkpoint():
    module, other = RecMetricModule(METRICS), RecMetricModule(METRICS)
    for seed in range(3):
        p, y, w = examples(30, seed)
        module.update({"prediction": p, "label": y, "weight": w})
    other.load_state_dict(module.state_dict())
    assert other.compute() == module.compute()


def reduced(rank: int, world_size: int) -> dict[str, float]:
    module = RecMetricModule(METRICS, process_group=dist.group.WORLD)
    for seed in range(rank + 1):  # ranks have different numbers of examples
        p, y, w = examples(20 + rank, 10 * rank + seed)
        module.update({"prediction": p, "label": y, "weight": w})
    return module.compute()


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_together_equal_one_process(ranks, world_size):
    module = RecMetricModule(METRICS)
    for rank in range(world_size):
        for seed in range(rank + 1):
            p, y, w = examples(20 + rank, 10 * rank + seed)
            module.update({"prediction": p, "label": y, "weight": w})
    for result in ranks(world_size, reduced):
        assert result == pytest.approx(module.compute())


def windowed(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Train on for longer than the window, which is 30 examples on each of 3 ranks."""
    metrics = [CTRMetric, AUCMetric]
    module = RecMetricModule(metrics, window_size=88, process_group=dist.group.WORLD)
    for step in range(5):
        p, y, w = examples(10, seed=10 * rank + step)
        module.update({"prediction": p, "label": y, "weight": w})
    return module.compute(), module.local_compute()


def test_each_rank_keeps_its_share_of_the_window(ranks):
    latest = [[examples(10, 10 * rank + step) for step in (2, 3, 4)] for rank in range(3)]
    together = [torch.cat(parts) for parts in zip(*chain(*latest), strict=True)]
    for rank, (everywhere, here) in enumerate(ranks(3, windowed)):
        own = [torch.cat(parts) for parts in zip(*latest[rank], strict=True)]
        for result, (p, y, w) in ((everywhere, together), (here, own)):
            assert result["auc-DefaultTask|window_auc"] == pytest.approx(auc(p, y, w).item())
            rate = np.average(y, weights=w)
            assert result["ctr-DefaultTask|window_ctr"] == pytest.approx(rate)
