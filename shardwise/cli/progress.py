"""Show a run: a progress bar on standard error and, where asked for, TensorBoard events."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]  # it comes without types

_UNWATCHED_S = 5.0
"""Seconds between two bars in a file or a pipe, where each is a line of its own."""


class Progress:
    """The bar and the events of one run; a context manager that closes both.

    Args:
        total: Samples of the whole run.
        start: Samples seen before, by the run that this one goes on with.
        num_steps: Steps taken before.
        tensorboard: Folder for events; empty: none are written.
        is_silent: Show and write nothing, as all processes do but the first.
    """

    def __init__(
        self, *, total: int, start: int, num_steps: int, tensorboard: str, is_silent: bool = False
    ) -> None:
        """Show an empty bar."""
        self._is_silent = is_silent
        is_watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            unit=" samples",
            desc="train",
            dynamic_ncols=is_watched,
            mininterval=0.1 if is_watched else _UNWATCHED_S,
            disable=is_silent,
        )
        self._writer = None
        if tensorboard and not is_silent:
            from torch.utils.tensorboard import SummaryWriter  # slow, and not always wanted

            # What an interrupted run wrote past its last checkpoint is hidden.
            self._writer = SummaryWriter(tensorboard, purge_step=num_steps + 1)
        self._shown = (time.perf_counter(), start)

    def reach(self, num_samples: int) -> None:
        """Move the bar on, to so many samples of the whole run."""
        self._bar.update(num_samples - self._bar.n)

    def show(self, num_steps: int, figures: Mapping[str, float]) -> None:
        """Put figures of training at the end of the bar and, with samples/s, into the events."""
        if self._is_silent:
            return
        texts = {name: f"{value:.4f}" for name, value in figures.items()}
        self._bar.set_postfix(texts, refresh=False)
        now, (before, start) = time.perf_counter(), self._shown
        self._shown = (now, self._bar.n)
        speed = (self._bar.n - start) / max(now - before, 1e-9)
        self.record("train", num_steps, {**figures, "samples_per_s": speed})

    def record(self, part: str, num_steps: int, figures: Mapping[str, float]) -> None:
        """Write figures into the events."""
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{part}/{name}", value, num_steps)

    def flush(self) -> None:
        """Write down all events so far, so that a run that goes on from here has all before it."""
        if self._writer is not None:
            self._writer.flush()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._is_silent:
            self._bar.write(text, file=sys.stdout)

    def __enter__(self) -> "Progress":
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it is, and finish the events."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
