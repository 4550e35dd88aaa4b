"""Several processes train as one does: the same samples per step, figures and state."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.checkpoint import find_checkpoint, read_checkpoint, read_values
from shardwise.cli import main
from shardwise.cli.ranks import joined_ranks
from shardwise.cli.recipe import load_problem
from shardwise.cli.settings import read_config
from shardwise.cli.trainer import Trainer


def command(rank: int, world_size: int, *options: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = main([*options])
    return status, shown.getvalue()


def train(ranks, count: int, config: Path, folder: Path, *options: str) -> str:
    """Train with a checkpoint per epoch; give what the first of `count` ranks shows at the end."""
    options = ("train", str(config), "--checkpoint.folder", str(folder), *options)
    results = ranks(count, command, *options) if count > 1 else [command(0, 1, *options)]
    assert [status for status, _ in results] == [0] * count
    assert not any(shown for _, shown in results[1:])
    return results[0][1].split("held out:\n")[1]


def figures(table: str) -> torch.Tensor:
    return torch.tensor([float(number) for number in re.findall(r"\d+\.\d+", table)])


def assert_same_run(one: Path, other: Path, atol: float = 2e-5) -> None:
    ours, theirs = (read_checkpoint(find_checkpoint(path)) for path in (one, other))
    for tensors in (ours, theirs):
        for name in [name for name in tensors if name.startswith("random.")]:
            del tensors[name]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol)
    one_state, other_state = (read_values(find_checkpoint(path)) for path in (one, other))
    assert one_state["position"] == other_state["position"]


# Batches of 53 of the 320 samples: shares differ by one, and of the last 2 samples of an epoch two
# of four ranks get none.
ODD = ("--train.batch-size", "53")


@pytest.mark.parametrize(
    ("count", "sharding", "dense"),
    [
        (2, "auto", "ddp"),
        (2, "column_wise", "fsdp2"),
        (2, "data_parallel", "ddp"),
        (4, "row_wise", "ddp"),
        (2, "table_wise", "ddp"),
    ],
)
def test_several_processes_train_as_one(ranks, config, tmp_path, count, sharding, dense):
    table = train(ranks, 1, config, tmp_path / "one", *ODD)
    how = ("--train.sharding", sharding, "--train.dense", dense)
    other = train(ranks, count, config, tmp_path / "many", *ODD, *how)
    assert (figures(table) - figures(other)).abs().max() < 2e-3
    assert_same_run(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (2, 4)])
def test_run_goes_on_with_another_number_of_processes(ranks, config, tmp_path, counts):
    train(ranks, 1, config, tmp_path / "whole")
    train(ranks, counts[0], config, tmp_path / "run", "--train.epochs", "1")
    resume = ("--train.resume", "--train.sharding", "row_wise")
    train(ranks, counts[1], config, tmp_path / "run", *resume)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_best_epoch_of_several_processes_is_judged_by_one(ranks, criteo_config, tmp_path):
    rows = ("--data.validation-rows", "50")
    how = ("--train.patience", "1", "--train.epochs", "3", *rows)
    table = train(ranks, 2, criteo_config, tmp_path, *how)
    options = ("evaluate", str(criteo_config), *rows, "--checkpoint", str(tmp_path))
    _, shown = command(0, 1, *options)
    assert (figures(shown.split("held out:\n")[1]) - figures(table)).abs().max() < 2e-4


@pytest.mark.parametrize(("count", "dense"), [(2, "fsdp2"), (4, "ddp")])
def test_sequence_model_is_trained_and_judged_by_several(ranks, tmp_path, count, dense):
    path = tmp_path / "walks.txt"
    items = [[user % 7 + step for step in range(1, 5 + user % 4)] for user in range(33)]
    lines = [f"{user} {' '.join(map(str, taken))}" for user, taken in enumerate(items, 1)]
    path.write_text("\n".join([*lines, ""]))
    config = tmp_path / "walks.toml"
    config.write_text(f"""
        data = {{source = "sequences", path = "{path}", max_length = 6}}
        model = {{kind = "sasrec", embedding_dim = 8, dropout = 0.0, num_negatives = 0}}
        train = {{epochs = 2, batch_size = 10, table_rule = "adam", table_lr = 0.01}}
    """)
    table = train(ranks, 1, config, tmp_path / "one")
    how = ("--train.sharding", "row_wise", "--train.dense", dense)
    other = train(ranks, count, config, tmp_path / "many", *how)
    torch.testing.assert_close(figures(other), figures(table), rtol=0, atol=2e-4)
    # The bias of keys has a gradient of 0 but for rounding, which Adam makes steps of.
    assert_same_run(tmp_path / "one", tmp_path / "many", atol=1e-3)


def train_damaged(rank: int, world_size: int, config: Path) -> str:
    settings = read_config(config)
    problem = load_problem(settings.data)
    with joined_ranks() as ranks:
        trainer = Trainer(settings, problem, ranks)
    first, second, *_ = trainer.loader
    trainer.step(first)
    if rank == 1:
        second.dense_features[3, 1] = torch.nan
    with pytest.raises(ValueError, match="dense_features") as raised:
        trainer.step(second)
    return str(raised.value)


def test_damaged_batch_of_one_rank_ends_all(ranks, config):
    for text in ranks(2, train_damaged, config):
        assert text.startswith("rank 1: Batch: dense_features, sample 3, column 1")


def test_plan_that_does_not_fit_is_shown_once(ranks, config, tmp_path):
    (tmp_path / "plan.json").write_text('{"format": "shardwise plan 1", "plan": {"nowhere": {}}}')
    options = ("train", str(config), "--train.sharding", str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="rank 0: the plan names module 'nowhere'"):
        ranks(2, shown_error, *options)


def shown_error(rank: int, world_size: int, *options: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        assert main([*options]) == 1
    raise ValueError(shown.getvalue())
