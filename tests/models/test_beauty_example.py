"""The example that trains a SASRec on Amazon Beauty, here on made-up sequences of its format."""

import runpy
import tomllib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def train_beauty():
    threads = torch.get_num_threads()
    yield runpy.run_path(str(EXAMPLES / "train_beauty.py"))
    torch.set_num_threads(threads)


def config(file: Path) -> dict:
    settings = tomllib.loads((EXAMPLES / "beauty.toml").read_text())
    settings["data"]["file"] = str(file)
    settings["model"] |= {"embedding_dim": 16, "num_blocks": 1, "dropout": 0.0}
    settings["train"] |= {"epochs": 10, "batch_size": 32, "table_lr": 0.02, "dense_lr": 0.02}
    return settings


def test_example_finds_held_out_items(train_beauty, tmp_path):
    """Users walk round 300 items one by one, so the ten best of a good model have the next."""
    lines = []
    for user, start in enumerate(torch.randint(300, (200,)).tolist(), start=1):
        items = [1 + (start + step) % 300 for step in range(8 + user % 5)]
        lines.append(f"{user} {' '.join(map(str, items))}\n")
    file = tmp_path / "Walks.txt"
    file.write_text("".join(lines))
    result = train_beauty["main"](config(file))
    assert result["hr@10"] > 0.5  # chance: 0.03


def test_example_says_what_to_fetch(train_beauty, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.txt: no such file; get Beauty.txt"):
        train_beauty["main"](config(tmp_path / "absent.txt"))
