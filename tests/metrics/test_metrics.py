"""Metrics equal scikit-learn or a few lines of NumPy; windows, tasks, ranks, checkpoints."""

import math

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
    assert ctr.window.shape[0] <= 1001
    assert ctr.compute()["ctr-DefaultTask|window_ctr"] == 1.0


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


def test_state_survives_a_checkpoint():
    module, other = RecMetricModule(METRICS), RecMetricModule(METRICS)
    for seed in range(3):
        p, y, w = examples(30, seed)
        module.update({"prediction": p, "label": y, "weight": w})
    other.load_state_dict(module.state_dict())
    assert other.compute() == module.compute()


def reduced(rank: int, world_size: int) -> dict[str, float]:
    module = RecMetricModule(METRICS, group=dist.group.WORLD)
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
