"""Read MovieLens: who rated what, how and when, which tags were given, and what the movies are.

Two layouts are read, told apart by the files that are there: comma-separated files with a header
(`ratings.csv`, `movies.csv`, `tags.csv`; the latest-small, 20M, 25M and 32M editions; each may be
gzipped) and files separated by `::` in Latin-1 (`ratings.dat`, `movies.dat`, no tags; the 1M
edition). What a model may know of them, and when, is left to `movielens_samples`.

Source: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS
5(4), 2015. Needs polars (the `train` extra), imported at the first read.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from shardwise.data.delimited import Column, Dialect, read_columns
from shardwise.data.earlier import concatenated_ranges
from shardwise.data.folders import data_folder, describe_data_folder

SHIPPED = Path(__file__).parents[2] / "datasets"
"""Where a checkout of the project keeps the data sets that it may redistribute."""

LIKED_FROM = 4.0
"""The stars from which a rating counts as liked."""

_GROUPLENS = "https://grouplens.org/datasets/movielens/"
_NO_GENRES = "(no genres listed)"
_LAST_YEAR_IN_TITLE = re.compile(r"\((\d{4})[^()]*\)\s*$")

_USER, _MOVIE = Column(name="userId", kind=int), Column(name="movieId", kind=int)
_TIME = Column(name="timestamp", kind=int)
_COLUMNS = {
    "ratings": (_USER, _MOVIE, Column(name="rating", kind=float, low=0.5, high=5.0), _TIME),
    "movies": (_MOVIE, Column(name="title", kind=str), Column(name="genres", kind=str)),
    "tags": (_USER, _MOVIE, Column(name="tag", kind=str), _TIME),
}
_CSV = Dialect()
_DAT = Dialect(separator="::", has_header=False, quotes=False, encoding="latin-1")


@dataclass(frozen=True, kw_only=True)
class MovieLens:
    """One edition, as columns. Ratings and tags are sorted by time, then user, movie and tag.

    Attributes:
        users: Who rated; the edition's own user numbers.
        movies: What was rated; the edition's own movie numbers.
        ratings: Stars, 0.5 to 5.
        times: When, in seconds since 1970.
        tag_movies: What was tagged.
        tags: The tag, lower case, without blanks around it.
        tag_times: When, in seconds since 1970.
        catalog: All movies, ascending; every movie rated or tagged is in it.
        release_years: Per movie of `catalog`; 0 where the title has none.
        genres: Per movie of `catalog`; none where no genre is listed.
    """

    users: Int64[np.ndarray, " ratings"]
    movies: Int64[np.ndarray, " ratings"]
    ratings: Float64[np.ndarray, " ratings"]
    times: Int64[np.ndarray, " ratings"]
    tag_movies: Int64[np.ndarray, " tags"]
    tags: np.ndarray
    tag_times: Int64[np.ndarray, " tags"]
    catalog: Int64[np.ndarray, " movies"]
    release_years: Int64[np.ndarray, " movies"]
    genres: tuple[tuple[str, ...], ...]

    def first(self, fraction: float) -> "MovieLens":
        """Keep the earliest share of the ratings, and the tags given before the first one left out.

        Args:
            fraction: Share of the ratings, over 0 and at most 1.

        Returns:
            The same edition as it was at that moment; `catalog` stays whole.
        """
        kept = int(fraction * len(self.times))
        if not 0 < kept <= len(self.times):
            raise ValueError(
                f"MovieLens.first: fraction {fraction} of {len(self.times)} ratings keeps {kept}; "
                "give a fraction over 0 and at most 1 that keeps at least one"
            )
        num_tags = len(self.tags)
        if kept < len(self.times):
            num_tags = int(np.searchsorted(self.tag_times, self.times[kept]))
        sizes = {"users": kept, "movies": kept, "ratings": kept, "times": kept}
        sizes |= {"tag_movies": num_tags, "tags": num_tags, "tag_times": num_tags}
        return replace(self, **{name: getattr(self, name)[:n] for name, n in sizes.items()})

    def num_before(self, fraction: float) -> int:
        """Count the ratings before the moment that cuts off a share of them.

        The cut never falls within a moment: ratings at the same moment as the cut are all after it.

        Args:
            fraction: Share of the ratings, over 0 and under 1.

        Raises:
            ValueError: The fraction is out of range, or no rating is before the cut.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"MovieLens: the fraction is {fraction}, wanted: over 0 and under 1")
        cut = self.times[int(fraction * len(self.times))]
        before = int(np.searchsorted(self.times, cut))
        if before == 0:
            raise ValueError(
                f"MovieLens: a fraction of {fraction} leaves none of {len(self.times)} ratings "
                "before the cut; give a larger one or more ratings"
            )
        return before

    def genre_bags(
        self,
    ) -> tuple[Int64[np.ndarray, " values"], Int64[np.ndarray, " ratings"], int]:
        """List the genres of each rating's movie.

        Returns:
            The genres, rating after rating, numbered from 1 in alphabetical order; how many each
            rating's movie has; how many genres there are.
        """
        names = sorted({name for genres in self.genres for name in genres})
        numbers = {name: number for number, name in enumerate(names, start=1)}
        flat = np.array([numbers[name] for genres in self.genres for name in genres], np.int64)
        lengths = np.array([len(genres) for genres in self.genres])
        starts = np.cumsum(lengths) - lengths
        movie = np.searchsorted(self.catalog, self.movies)
        return flat[concatenated_ranges(starts[movie], lengths[movie])], lengths[movie], len(names)


def find_movielens(root: str | Path | None = None, edition: str = "ml-latest-small") -> Path:
    """Find the folder of an edition.

    Args:
        root: The folder itself. By default it is looked for in `$SHARDWISE_DATA` (when unset,
            `~/.cache/shardwise`), then among the data sets shipped with a checkout of the project.
        edition: The name of its folder.

    Raises:
        FileNotFoundError: It is nowhere; the message says where it was looked for and what to do.
    """
    places = [data_folder() / edition, SHIPPED / edition]
    candidates = places if root is None else [Path(root)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    name = edition if root is None else Path(root).name
    raise FileNotFoundError(
        f"MovieLens '{name}': no such folder, looked for {looked}; download {edition}.zip from "
        f"{_GROUPLENS} and unpack it into {describe_data_folder()}, or name its folder"
    )


def read_movielens(root: str | Path | None = None, edition: str = "ml-latest-small") -> MovieLens:
    """Read an edition whole.

    Args:
        root: Its folder; by default it is looked for as `find_movielens` says.
        edition: The name of its folder, used when `root` is not given.

    Raises:
        FileNotFoundError: The folder or one of its files is not there.
        ValueError: A file is empty or damaged; the message names the file, the line, what was found
            and what is wanted.
    """
    folder = find_movielens(root, edition)
    ratings, movies = read_table(folder, "ratings"), read_table(folder, "movies")
    # The 1M edition has no tags at all.
    has_tags = (folder / "tags.dat").is_file() or not (folder / "ratings.dat").is_file()
    tags = read_table(folder, "tags") if has_tags else None
    catalog = np.unique(movies["movieId"])
    for name, table in {"ratings": ratings, "tags": tags}.items():
        strays = np.setdiff1d(table["movieId"], catalog) if table else catalog[:0]
        if len(strays):
            raise ValueError(
                f"{folder}: {name} speak of movie {strays[0]}, which the file of movies lacks; "
                "the files are of different editions or one is cut off; fetch them again"
            )
    return _assemble(ratings, movies, tags)


def read_table(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read one file of an edition, in either layout, gzipped or not.

    Args:
        folder: Of the edition.
        name: `ratings`, `movies` or `tags`.

    Returns:
        A column by name, in the order of the file.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is empty or damaged.
    """
    is_dat = (folder / "ratings.dat").is_file()
    names = [f"{name}.dat"] if is_dat else [f"{name}.csv", f"{name}.csv.gz"]
    for path in (folder / file for file in names):
        if path.is_file():
            return read_columns(path, _COLUMNS[name], _DAT if is_dat else _CSV)
    raise FileNotFoundError(
        f"{folder}: there is no {' or '.join(names)}; fetch the edition again from {_GROUPLENS}"
    )


def _assemble(
    ratings: dict[str, np.ndarray],
    movies: dict[str, np.ndarray],
    tags: dict[str, np.ndarray] | None,
) -> MovieLens:
    """Sort by time and take titles and genres apart."""
    if tags is None:
        tags = {name: np.empty(0, np.int64) for name in ("userId", "movieId", "tag", "timestamp")}
    words = np.array([tag.strip().lower() for tag in tags["tag"]], dtype=np.str_)
    by_time = np.lexsort((ratings["movieId"], ratings["userId"], ratings["timestamp"]))
    tags_by_time = np.lexsort((words, tags["movieId"], tags["userId"], tags["timestamp"]))
    by_id = np.argsort(movies["movieId"], kind="stable")
    found = [_LAST_YEAR_IN_TITLE.search(title) for title in movies["title"][by_id]]
    genres = movies["genres"][by_id]
    return MovieLens(
        users=ratings["userId"][by_time],
        movies=ratings["movieId"][by_time],
        ratings=ratings["rating"][by_time],
        times=ratings["timestamp"][by_time],
        tag_movies=tags["movieId"][tags_by_time],
        tags=words[tags_by_time],
        tag_times=tags["timestamp"][tags_by_time],
        catalog=movies["movieId"][by_id],
        release_years=np.array([int(year[1]) if year else 0 for year in found]),
        genres=tuple(() if g == _NO_GENRES else tuple(g.split("|")) for g in genres),
    )
