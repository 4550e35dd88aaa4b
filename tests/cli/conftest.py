import gzip
import random
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


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 400 rows in which the first id decides about most clicks."""
    path = tmp_path_factory.mktemp("criteo") / "rows.txt"
    draw = random.Random(0)
    lines = []
    for _ in range(400):
        ids = [f"{draw.randrange(4):08x}" for _ in range(26)]
        click = draw.random() < (0.9 if ids[0] == "00000001" else 0.1)
        counts = [str(draw.randrange(-1, 50)) if draw.random() < 0.9 else "" for _ in range(13)]
        lines.append("\t".join([str(int(click)), *counts, *ids]) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def criteo_config(tmp_path: Path, rows: Path) -> Path:
    """A config file for a run of 2 epochs of 5 steps on `rows`."""
    path = tmp_path / "criteo.toml"
    path.write_text(f"""
        data = {{source = "criteo-kaggle", path = "{rows}", train_rows = 300, test_rows = 100}}
        model = {{pooling = "sum"}}
        train = {{epochs = 2, batch_size = 64, table_lr = 0.1, dense_lr = 0.01}}
    """)
    return path
