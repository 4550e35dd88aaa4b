"""Each metric of the enum equals scikit-learn or a few lines of NumPy, on 1 and 3 ranks.

The examples have ties, weights with zeros, missing labels, and sessions that end with their batch.
"""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from shardwise.metrics import (
    MetricsConfig,
    RecMetricDef,
    RecMetricEnum,
    RecMetricModule,
    RecTaskInfo,
    SessionMetricDef,
    auc,
    auprc,
    generate_metric_module,
    xauc,
)

CLICK = RecTaskInfo("click")
SESSION = RecTaskInfo("click", session_metric_def=SessionMetricDef("session_id", 2))
RANKED = RecTaskInfo("click", "stars", session_metric_def=SessionMetricDef("session_id", 2, True))
STARS = RecTaskInfo("click", "stars")
TENSOR = RecTaskInfo("click", tensor_name="tensor")
CLASSES = RecTaskInfo("click", "class", "scores")
LABELS = RecTaskInfo("click", "events", "scores")


def outputs(seed, count=40):
    """A model's outputs; predictions and labels have few values, so many ties."""
    r = np.random.default_rng(seed)
    p = r.integers(1, 10, count) / 10
    out = {
        "prediction": p,
        "label": (r.random(count) < p).astype(float),
        "stars": r.integers(1, 6, count).astype(float),
        "class": r.integers(0, 4, count).astype(float),
        "events": r.integers(0, 2, (count, 4)).astype(float),
        "scores": r.integers(0, 5, (count, 4)) / 5,
        "weight": r.integers(0, 4, count) / 2,
        "session_id": r.integers(0, 8, count),
        "grouping_keys": r.integers(0, 3, count),
        "tensor": r.normal(size=count),
    }
    for name in ("label", "stars", "class"):
        out[name][r.random(count) < 0.1] = math.nan
    out["events"][r.random((count, 4)) < 0.1] = math.nan
    return {name: torch.tensor(value) for name, value in out.items()}


def present(batches, task):
    """Predictions, labels, weights and the rest of the examples that count, and their batch."""
    batches = [b | {"batch": torch.full_like(b["session_id"], i)} for i, b in enumerate(batches)]
    d = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    p, y, w = d[task.prediction_name], d[task.label_name], d["weight"]
    if y.ndim > 1:  # each label of an example counts by itself
        p, y, w = p.flatten(), y.flatten(), w.repeat(y.shape[1])
    keep = ~np.isnan(y) & (w > 0)
    if len(y) > len(d["weight"]):
        return p[keep], y[keep], w[keep], {}
    d = {name: value[keep] for name, value in d.items()}
    d["session"] = d["batch"] * 1000 + d["session_id"]
    return d[task.prediction_name], d[task.label_name], d["weight"], d


def entropy(p, y, w):
    return -np.sum(w * (y * np.log2(p) + (1 - y) * np.log2(1 - p)))


def ne(p, y, w, d):
    base = entropy(np.full_like(p, np.average(y, weights=w)), y, w)
    return {"ne": entropy(p, y, w) / base, "logloss": entropy(p, y, w) / w.sum()}


def segmented_ne(p, y, w, d):
    of = [d["grouping_keys"] == g for g in range(3)]
    return {f"segmented_ne_{g}": ne(p[m], y[m], w[m], d)["ne"] for g, m in enumerate(of)}


def mse(p, y, w, d):
    error = sk.mean_squared_error(y, p, sample_weight=w)
    r_squared = sk.r2_score(y, p, sample_weight=w)
    return {"mse": error, "rmse": error**0.5, "r_squared": r_squared}


def nmse(p, y, w, d):
    error = 1 - sk.r2_score(y, p, sample_weight=w)
    return {"nmse": error, "nrmse": error**0.5}


def pairs_in_order(p, y, w, d):
    a, b = np.nonzero((y[:, None] > y) & (d["batch"][:, None] == d["batch"]))
    won = (p[a] > p[b]) + (p[a] == p[b]) / 2
    return {"xauc": np.average(won, weights=w[a] * w[b])}


def gauc(p, y, w, d):
    masks = [d["session"] == s for s in np.unique(d["session"])]
    both = [m for m in masks if 0 < y[m].sum() < m.sum()]
    areas = [sk.roc_auc_score(y[m], p[m], sample_weight=w[m]) for m in both]
    return {"gauc": np.mean(areas), "gauc_num_samples": len(areas)}


def ndcg(p, y, w, d, k=None, gain=lambda y: y, is_alone_judged=True):
    scores, weights = [], []
    for s in np.unique(d["session"]):
        m = d["session"] == s
        if gain(y[m]).sum() and m.sum() > 1:
            scores.append(sk.ndcg_score([gain(y[m])], [p[m]], k=k))
        elif gain(y[m]).sum() and is_alone_judged:
            scores.append(1.0)
        else:
            continue
        weights.append(w[m].mean())
    return np.average(scores, weights=weights)


def chance_in_top(scores, groups, k):
    """Of each example, the chance to be in the first k of its group, ties at random."""
    same = groups[:, None] == groups
    above = (same & (scores > scores[:, None])).sum(1)
    tied = (same & (scores == scores[:, None])).sum(1)
    return np.clip((k - above) / tied, 0, 1)


def recall_of_sessions(p, y, w, d):
    chosen = chance_in_top(p, d["session"], 2)
    return {"recall_session_level": np.average(chosen, weights=w * y)}


def precision_of_sessions(p, y, w, d):
    chosen = chance_in_top(p, d["session"], 2)
    return {"precision_session_level": np.average(y, weights=w * chosen)}


def recall_of_ranked_sessions(p, y, w, d):
    return recall_of_sessions(p, chance_in_top(y, d["session"], 2), w, d)


def recall_of_classes(p, y, w, d):
    numbers = {}
    for k in (1, 2):
        chances = [chance_in_top(row, np.zeros(4), k) for row in p]
        hits = np.stack(chances)[np.arange(len(y)), y.astype(int)]
        numbers[f"multiclass_recall_at_{k}"] = np.average(hits, weights=w)
    return numbers


def mean_of(name):
    return lambda p, y, w, d: np.average({"p": p, "y": y, **d}[name], weights=w)


# name -> (metric, its task, its arguments, expected numbers by name or the one of its own name)
CASES = {
    "ne": ("ne", CLICK, {}, ne),
    "segmented_ne": ("segmented_ne", CLICK, {"num_groups": 3}, segmented_ne),
    "calibration": ("calibration", CLICK, {}, lambda p, y, w, d: (w * p).sum() / (w * y).sum()),
    "ctr": ("ctr", CLICK, {}, mean_of("y")),
    "auc": ("auc", CLICK, {}, lambda p, y, w, d: sk.roc_auc_score(y, p, sample_weight=w)),
    "auprc": (
        "auprc",
        CLICK,
        {},
        lambda p, y, w, d: sk.average_precision_score(y, p, sample_weight=w),
    ),
    "gauc": ("gauc", CLICK, {}, gauc),
    "xauc": ("xauc", STARS, {}, pairs_in_order),
    "ndcg": ("ndcg", STARS, {}, lambda *a: 1 - ndcg(*a)),
    "ndcg of clicks": ("ndcg", CLICK, {}, lambda *a: 1 - ndcg(*a)),
    "ndcg with arguments": (
        "ndcg",
        STARS,
        {
            "k": 2,
            "exponential_gain": True,
            "report_ndcg_as_decreasing_curve": False,
            "remove_single_length_sessions": True,
        },
        lambda *a: ndcg(*a, k=2, gain=lambda y: 2**y - 1, is_alone_judged=False),
    ),
    "mse": ("mse", STARS, {}, mse),
    "nmse": ("nmse", STARS, {}, nmse),
    "mae": ("mae", STARS, {}, lambda p, y, w, d: sk.mean_absolute_error(y, p, sample_weight=w)),
    "accuracy": (
        "accuracy",
        CLICK,
        {"threshold": 0.7},
        lambda p, y, w, d: sk.accuracy_score(y, p >= 0.7, sample_weight=w),
    ),
    "precision": (
        "precision",
        CLICK,
        {},
        lambda p, y, w, d: sk.precision_score(y, p >= 0.5, sample_weight=w),
    ),
    "recall": (
        "recall",
        CLICK,
        {},
        lambda p, y, w, d: sk.recall_score(y, p >= 0.5, sample_weight=w),
    ),
    "recall_session_level": ("recall_session_level", SESSION, {}, recall_of_sessions),
    "recall of ranked labels": ("recall_session_level", RANKED, {}, recall_of_ranked_sessions),
    "precision_session_level": ("precision_session_level", SESSION, {}, precision_of_sessions),
    "multiclass_recall": ("multiclass_recall", CLASSES, {"top_k": (1, 2)}, recall_of_classes),
    "multi_label_precision": (
        "multi_label_precision",
        LABELS,
        {},
        lambda p, y, w, d: sk.precision_score(y, p >= 0.5, sample_weight=w),
    ),
    "average": (
        "average",
        STARS,
        {},
        lambda *a: {"label_average": mean_of("y")(*a), "prediction_average": mean_of("p")(*a)},
    ),
    "weighted_avg": ("weighted_avg", CLICK, {}, mean_of("p")),
    "tensor_weighted_avg": ("tensor_weighted_avg", TENSOR, {}, mean_of("tensor")),
    "tensor_weighted_avg without weights": (
        "tensor_weighted_avg",
        RecTaskInfo("click", tensor_name="tensor", weighted=False),
        {},
        lambda p, y, w, d: d["tensor"].mean(),
    ),
    "scalar": ("scalar", STARS, {}, lambda p, y, w, d: y.mean()),
    "num_positive_samples": ("num_positive_samples", CLICK, {}, lambda p, y, w, d: y.sum()),
    "sum_weights": ("sum_weights", CLICK, {}, lambda p, y, w, d: w.sum()),
    "weighted_sum_predictions": (
        "weighted_sum_predictions",
        CLICK,
        {},
        lambda p, y, w, d: (w * p).sum(),
    ),
}
WINDOW_ONLY = {"auc", "auprc"}


def make(case, rank=0, world_size=1, window_size=1000):
    metric, task, arguments, _ = CASES[case]
    definition = RecMetricDef(window_size=window_size, arguments=arguments)
    config = MetricsConfig([task], {RecMetricEnum(metric): definition}, compute_on_all_ranks=True)
    device = torch.device("cpu")
    return generate_metric_module(RecMetricModule, config, 40, world_size, rank, {}, device)


def expected(case, batches, prefix):
    metric, task, _, reference = CASES[case]
    numbers = reference(*present(batches, task))
    numbers = numbers if isinstance(numbers, dict) else {metric: numbers}
    return {f"{metric}-click|{prefix}{name}": value for name, value in numbers.items()}


def test_every_metric_has_a_case():
    covered = {metric for metric, *_ in CASES.values()}
    apart = {"tower_qps", "output", "num_missing_labels"}
    assert covered | apart == {member.value for member in RecMetricEnum}


@pytest.mark.parametrize("case", CASES)
def test_metric_equals_its_reference_over_window_and_lifetime(case):
    module, batches = make(case, window_size=120), [outputs(seed) for seed in range(5)]
    for batch in batches:
        module.update(batch)
    wanted = expected(case, batches[-3:], "window_")
    if CASES[case][0] not in WINDOW_ONLY:
        wanted |= expected(case, batches, "lifetime_")
    assert module.compute() == pytest.approx(wanted)


@pytest.mark.parametrize("case", CASES)
def test_metric_survives_a_checkpoint_and_goes_on(case):
    one, other = make(case, window_size=120), make(case, window_size=120)
    for seed in range(5):
        one.update(outputs(seed))
    other.update(outputs(99))
    other.load_state_dict(one.state_dict())
    for module in (one, other):
        module.update(outputs(5))
    assert other.compute() == one.compute()


def reduced(rank, world_size):
    """All metrics on this rank's batches, of which each rank has another number."""
    numbers = {}
    for case in CASES:
        module = make(case, rank, world_size)
        for seed in range(rank + 1):
            module.update(outputs(10 * rank + seed))
        numbers[case] = module.compute()
    return numbers


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_together_equal_the_references(ranks, world_size):
    batches = [outputs(10 * rank + seed) for rank in range(world_size) for seed in range(rank + 1)]
    for numbers in ranks(world_size, reduced):
        for case in CASES:
            wanted = expected(case, batches, "window_")
            assert {k: numbers[case][k] for k in wanted} == pytest.approx(wanted), case


@pytest.mark.parametrize("count", [0, 1, 2, 63])
def test_functions_take_any_count_and_rows(count):
    r = np.random.default_rng(count)
    p, y = torch.tensor(r.integers(0, 9, (2, 3, count)) / 9), torch.tensor(r.random((2, 3, count)))
    for function, labels in ((auc, y.round()), (auprc, y.round()), (xauc, y)):
        rows = zip(p.view(6, -1), labels.view(6, -1), strict=True)
        wanted = torch.stack([function(*row) for row in rows])
        torch.testing.assert_close(function(p, labels).flatten(), wanted, equal_nan=True)


def test_missing_labels_are_counted():
    task = RecTaskInfo("click")
    config = MetricsConfig([task], {RecMetricEnum.NUM_MISSING_LABELS: RecMetricDef()})
    module = generate_metric_module(RecMetricModule, config, 40, 1, 0, {}, torch.device("cpu"))
    module.update(outputs(0))
    wanted = int(outputs(0)["label"].isnan().sum())
    assert module.compute()["num_missing_labels-click|window_num_missing_labels"] == wanted


def test_output_is_of_the_latest_batch():
    config = MetricsConfig([TENSOR], {RecMetricEnum.OUTPUT: RecMetricDef()})
    module = generate_metric_module(RecMetricModule, config, 40, 1, 0, {}, torch.device("cpu"))
    for seed in range(3):
        module.update(outputs(seed))
    wanted = mean_of("tensor")(*present([outputs(2)], TENSOR))
    assert module.compute() == pytest.approx({"output-click|output": wanted})
