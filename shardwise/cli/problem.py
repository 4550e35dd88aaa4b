"""What a run is about, whatever the data: samples, how they are judged, what must be beaten."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwise.cli.ranks import Ranks
from shardwise.data.samples import Selectable
from shardwise.metrics import RecMetric

Figures = dict[str, float]
"""How good predictions are, by the names that are shown."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Samples in up to three parts, and how a model of them is judged.

    Attributes:
        train: What to train on.
        validation: What to judge by after each epoch; None: the test part.
        test: What to judge by at the end.
        tables: The features that share their ids, and so a table, by the table's name.
        num_ids: Per sparse feature, the rows its table needs.
        dense_names: What the dense columns are called, if there are any.
        samples_are: What samples are called, such as "ratings".
        metrics: What is computed from the predictions of training, by the names that are shown; the
            loss is shown anyway.
        judge: Gives the figures of a model on some samples, of which each rank judges its share;
            the model is left as it was.
        is_better: Whether the first of two sets of figures is the better one.
        rivals: Gives the figures on the test part of the simple predictions that a model must beat,
            by their names.
    """

    train: Selectable[Any]
    validation: Selectable[Any] | None = None
    test: Selectable[Any]
    tables: Mapping[str, tuple[str, ...]]
    num_ids: Mapping[str, int]
    dense_names: tuple[str, ...] = ()
    samples_are: str
    metrics: Mapping[str, type[RecMetric]]
    judge: Callable[[nn.Module, Any, Ranks], Figures]
    is_better: Callable[[Figures, Figures], bool]
    rivals: Callable[[], Mapping[str, Figures]]


def compare(figures: Figures, problem: Problem) -> str:
    """Show a model's figures on the test part beside those of the simple predictions."""
    rows = {"model": figures, **problem.rivals()}
    return f"{len(problem.test):,} {problem.samples_are} held out:\n{_table(rows)}"


def show(figures: Figures) -> str:
    """Show figures in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def _table(rows: Mapping[str, Figures]) -> str:
    """Line up one row of figures per name."""
    width = max(map(len, rows))
    columns = next(iter(rows.values()))
    lines = [" ".join([" " * width, *(f"{name:>11}" for name in columns)])]
    for name, figures in rows.items():
        lines.append(" ".join([f"{name:<{width}}", *(f"{figures[c]:11.4f}" for c in columns)]))
    return "\n".join(lines)
