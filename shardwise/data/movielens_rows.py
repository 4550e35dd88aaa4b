"""The large editions of MovieLens as rows: one rating after the other, with its movie if wanted."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data.movielens import find_movielens, read_table
from shardwise.data.position import check_units

_ROWS_AT_ONCE = 2**16


class MovieLensRows(IterableDataset[dict[str, Any]]):
    """The ratings of an edition, in the order of its file.

    A row has `userId`, `movieId`, `rating` and `timestamp`; with movies, also `title` and `genres`
    (as written, separated by a bar). Columns are held in memory. Under
    `DataLoader(rows, batch_size=None)` workers share the rows out. `state_dict` gives the position,
    which moves where rows are handed out: under such workers, in their copies only.

    Args:
        root: The folder of the edition; by default it is looked for as `find_movielens` says.
        edition: The name of its folder.
        include_movies_data: Whether rows have their movie's title and genres.

    Raises:
        FileNotFoundError: The folder or one of its files is not there; the message says what to
            fetch from where.
        ValueError: A file is damaged, or a rating is of a movie that the file of movies lacks.
    """

    def __init__(
        self, root: str | Path | None, edition: str, *, include_movies_data: bool = False
    ) -> None:
        super().__init__()
        folder = find_movielens(root, edition)
        self.columns = read_table(folder, "ratings")
        if include_movies_data:
            self.columns |= _movies_of(self.columns["movieId"], folder)
        self._begin = self._next_row = 0

    def __len__(self) -> int:
        """Give the number of ratings."""
        return len(self.columns["rating"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the rows, or this worker's share of them."""
        worker = get_worker_info()
        share, num_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        begin, self._begin = self._begin + share * _ROWS_AT_ONCE, 0
        for start in range(begin, len(self), num_shares * _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = [column[part].tolist() for column in self.columns.values()]
            for number, row in enumerate(zip(*columns, strict=True), start + 1):
                self._next_row = number
                yield dict(zip(self.columns, row, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Give the position in the latest iteration, and what it counts in."""
        return {"num_rows": len(self), "next_row": self._next_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin at a position; the ones after it begin at the start.

        Raises:
            ValueError: It was saved with another number of rows.
        """
        check_units("MovieLensRows", state, {"num_rows": len(self)})
        self._begin = self._next_row = state["next_row"]


def _movies_of(rated: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Look up title and genres of the movie of each rating."""
    movies = read_table(folder, "movies")
    order = np.argsort(movies["movieId"], kind="stable")
    ids = movies["movieId"][order]
    places = np.searchsorted(ids, rated)
    is_lacking = ids[np.minimum(places, len(ids) - 1)] != rated
    if is_lacking.any():
        raise ValueError(
            f"{folder}: ratings speak of movie {rated[is_lacking][0]}, which the file of movies "
            "lacks; the files are of different editions or one is cut off; fetch them again"
        )
    return {name: movies[name][order][places] for name in ("title", "genres")}


def movielens_20m(
    root: str | Path | None = None, include_movies_data: bool = False
) -> Iterable[dict[str, Any]]:
    """Give the ratings of MovieLens 20M (`ml-20m`), as `MovieLensRows`.

    Args:
        root: Its folder; by default it is looked for as `find_movielens` says.
        include_movies_data: Whether rows have their movie's title and genres.
    """
    return MovieLensRows(root, "ml-20m", include_movies_data=include_movies_data)


def movielens_25m(
    root: str | Path | None = None, include_movies_data: bool = False
) -> Iterable[dict[str, Any]]:
    """Give the ratings of MovieLens 25M (`ml-25m`); all else as of `movielens_20m`."""
    return MovieLensRows(root, "ml-25m", include_movies_data=include_movies_data)


def movielens_32m(
    root: str | Path | None = None, include_movies_data: bool = False
) -> Iterable[dict[str, Any]]:
    """Give the ratings of MovieLens 32M (`ml-32m`); all else as of `movielens_20m`."""
    return MovieLensRows(root, "ml-32m", include_movies_data=include_movies_data)
