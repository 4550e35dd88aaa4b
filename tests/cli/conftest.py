import gzip
from pathlib import Path

import pytest

from shardwise.data.movielens import SHIPPED

NUM_RATINGS = 400


def lines(name: str) -> list[str]:
    path = SHIPPED / "ml-latest-small" / f"{name}.csv.gz"
    return gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)


@pytest.fixture(scope="session")
def edition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first few hundred ratings of the shipped edition."""
    folder = tmp_path_factory.mktemp("edition")
    ratings = lines("ratings")[: NUM_RATINGS + 1]
    rated = {line.split(",")[1] for line in ratings}
    movies = [line for line in lines("movies") if line.split(",")[0] in rated]
    tags = [line for line in lines("tags") if line.split(",")[1] in rated]
    for name, text in {"ratings": ratings, "movies": movies, "tags": tags}.items():
        (folder / f"{name}.csv").write_text("".join(text))
    return folder


@pytest.fixture
def config(tmp_path: Path, edition: Path) -> Path:
    """A config file for a run of 2 epochs of 5 steps on `edition`."""
    path = tmp_path / "tiny.toml"
    path.write_text(f"""
        [data]
        root = "{edition}"
        [model]
        embedding_dim = 4
        dense_layers = [8, 4]
        over_layers = [8, 1]
        [train]
        epochs = 2
        batch_size = 64
        [log]
        every_steps = 1
    """)
    return path
