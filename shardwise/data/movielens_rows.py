"""The large editions of MovieLens as rows: one rating after the other, with its movie if wanted."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from shardwise.data.movielens import find_movielens, read_table

_ROWS_AT_ONCE = 2**16


class MovieLensRows(IterableDataset[dict[str, Any]]):
    """The ratings of an edition, in the order of its file.

    A row has `userId`, `movieId`, `rating` and `timestamp`; with movies, also `title` and `genres`
    (as written, separated by a bar). Columns are held in memory. Under
    `DataLoader(rows, batch_size=None)` workers share the rows out.

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

    def __len__(self) -> int:
        """Give the number of ratings."""
        return len(self.columns["rating"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the rows, or this worker's share of them."""
        worker = get_worker_info()
        share, num_shares = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for start in range(share * _ROWS_AT_ONCE, len(self), num_shares * _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns = [column[part].tolist() for column in self.columns.values()]
            for row in zip(*columns, strict=True):
                yield dict(zip(self.columns, row, strict=True))


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
