"""A picture of a file of results: the peers' times as multiples of ours, or the machine's GB/s."""

import csv
from importlib import import_module
from pathlib import Path
from typing import Any

_ABOUT_ROW = ("contender", "value", "unit", "quartile1", "quartile3", "repeats", "ratio_to_ours")
_ABOUT_PLACE = ("cpu", "cores", "torch", "commit")


def plot(path: Path) -> Path:
    """Draw the newest row of each case and contender beside the CSV file, as PNG.

    Returns:
        The picture's path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pyplot: Any = import_module("matplotlib.pyplot")
    with path.open(newline="") as file:
        rows = {_name(row): row for row in csv.DictReader(file)}  # later rows replace earlier ones
    newest = next(reversed(rows.values()))
    bars: dict[str, float] = {}
    shown = [name for name in newest if len({row[name] for row in rows.values()}) > 1]
    for row in rows.values():
        is_ours = row["ratio_to_ours"] in ("1.000", "nan")
        if row["unit"] == "GB/s" or not is_ours:
            what = [row[n] for n in shown if n not in _ABOUT_ROW + _ABOUT_PLACE]
            label = " ".join([*what, row["contender"]])
            bars[label] = float(row["value"] if row["unit"] == "GB/s" else row["ratio_to_ours"])
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.2 * len(bars)), layout="constrained")
    axes.barh(list(bars), list(bars.values()))
    axes.invert_yaxis()
    axes.set_ymargin(0)
    axes.tick_params(axis="y", labelsize=6)
    if newest["unit"] != "GB/s":
        axes.axvline(1, color="black")
        axes.set_xscale("log")
    axes.set_xlabel("GB/s" if newest["unit"] == "GB/s" else "time as a multiple of ours")
    axes.set_title(", ".join(newest[name] for name in _ABOUT_PLACE))
    figure.savefig(path.with_suffix(".png"))
    pyplot.close(figure)
    return path.with_suffix(".png")


def _name(row: dict[str, str]) -> str:
    measured = {"value", "quartile1", "quartile3", "repeats", "ratio_to_ours", *_ABOUT_PLACE}
    return " ".join(value for name, value in row.items() if name not in measured)
