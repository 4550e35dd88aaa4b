from pathlib import Path

import pytest

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.checkpoint import list_checkpoints, read_values
from shardwise.cli import main
from shardwise.cli.trainer import Trainer

NE_BY_EPOCH = [0.9, 0.7, 0.8, 0.75, 0.6]


@pytest.fixture
def run(criteo_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train for up to 5 epochs whose figures on the validation part are given; say how it ended."""
    monkeypatch.setattr(
        "shardwise.cli.train.Trainer.note",
        lambda trainer, figures, note=Trainer.note: note(
            trainer, {**figures, "NE": NE_BY_EPOCH[trainer.loader.epoch - 1]}
        ),
    )

    def train(*options: str) -> int:
        folder = ("--checkpoint.folder", str(tmp_path / "run"), "--checkpoint.keep", "9")
        rows = ("--data.validation-rows", "50", "--train.epochs", "5")
        return main(["train", str(criteo_config), *rows, *folder, *options])

    return train


def last_epoch(folder: Path) -> int:
    return int(read_values(list_checkpoints(folder)[-1])["position"]["epoch"])


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (1, 3), (2, 4), (3, 5)])
def test_training_ends_after_so_many_epochs_without_better(run, tmp_path, patience, epochs):
    assert run("--train.patience", str(patience)) == 0
    assert last_epoch(tmp_path / "run") == epochs


def test_best_epoch_is_judged_at_the_end_and_by_evaluate(run, criteo_config, tmp_path, capsys):
    run("--train.patience", "2")
    shown = capsys.readouterr().out.split("held out:\n")[1]
    options = ["--data.validation-rows", "50", "--checkpoint", str(tmp_path / "run")]
    main(["evaluate", str(criteo_config), *options])
    text = capsys.readouterr().out
    assert text.startswith(f"{list_checkpoints(tmp_path / 'run')[1]}, 100 rows held out")
    assert text.split("held out:\n")[1] == shown
    main(["evaluate", str(criteo_config), *options, "--which", "latest"])
    assert capsys.readouterr().out.split("held out:\n")[1] != shown


def test_validation_part_is_judged_meanwhile_and_the_test_part_in_the_end(run, monkeypatch, capsys):
    sizes = []

    def judge(model, samples, ranks):
        sizes.append(len(samples))
        return {"AUC": 0.5, "NE": 1.0, "calibration": 1.0}

    monkeypatch.setattr("shardwise.cli.clicks.judge", judge)
    run("--train.epochs", "2")
    assert sizes == [50, 50, 100]
    assert "epoch 2 of 2, validation: AUC 0.5000" in capsys.readouterr().out


def test_resumed_run_remembers_the_best_epoch(run, tmp_path, capsys):
    run("--train.patience", "2")
    whole = capsys.readouterr().out.split("held out:\n")[1]
    run_again = ["--train.patience", "2", "--train.resume"]
    for path in list_checkpoints(tmp_path / "run")[3:]:
        path.rename(tmp_path / path.name)
    assert last_epoch(tmp_path / "run") == 3
    assert run(*run_again) == 0
    assert capsys.readouterr().out.split("held out:\n")[1] == whole
    assert last_epoch(tmp_path / "run") == 4
