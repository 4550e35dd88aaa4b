"""Runs that judge and save as they go, are asked to end, and go on."""

import contextlib
import io
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint, read_values
from shardwise.cli import main
from shardwise.cli.trainer import Trainer


@pytest.fixture
def run(criteo_config: Path, tmp_path: Path):
    """Train in the folder `run`, for 2 epochs of 4 steps; give the exit status."""

    def train(*options: str) -> int:
        folder = ("--checkpoint.folder", str(tmp_path / "run"), "--checkpoint.keep", "9")
        return main(
            ["train", str(criteo_config), "--data.validation-rows", "50", *folder, *options]
        )

    return train


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def end_by(monkeypatch, number: int, stop_at: int) -> None:
    whole_step = Trainer.step

    def step(trainer, batch):
        whole_step(trainer, batch)
        if trainer.num_steps == stop_at and trainer.ranks.rank == trainer.ranks.count - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "step", step)


def test_checkpoints_are_written_every_so_many_steps(run, tmp_path):
    assert run("--checkpoint.every-steps", "3") == 0
    assert steps(tmp_path / "run") == [3, 4, 6, 8]


def test_model_is_judged_every_so_many_steps(run, capsys):
    run("--train.evaluate-every", "3")
    shown = capsys.readouterr().out.splitlines()
    judged = [line.partition(", validation: ")[0] for line in shown if ", validation: " in line]
    assert judged == ["step 3", "epoch 1 of 2", "step 6", "epoch 2 of 2"]


def test_patience_counts_judgements_within_an_epoch(run, tmp_path, monkeypatch):
    figures = iter([0.9, 0.7, 0.8, 0.75])
    note = Trainer.note
    monkeypatch.setattr(
        Trainer, "note", lambda trainer, _: note(trainer, {"NE": next(figures), "AUC": 0.5})
    )
    assert run("--train.evaluate-every", "1", "--train.patience", "2") == 0
    assert steps(tmp_path / "run") == [1, 2, 4]
    assert find_checkpoint(tmp_path / "run", "best").name == "step_2"


def test_best_checkpoint_stays_beside_the_latest(run, tmp_path, monkeypatch):
    figures = iter([0.7, 0.9, 0.8, 0.75])
    note = Trainer.note
    monkeypatch.setattr(
        Trainer, "note", lambda trainer, _: note(trainer, {"NE": next(figures), "AUC": 0.5})
    )
    run("--train.epochs", "4", "--checkpoint.keep", "2")
    assert steps(tmp_path / "run") == [4, 12, 16]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_saves_and_ends_with_its_status(run, tmp_path, monkeypatch, capsys, name, status):
    end_by(monkeypatch, getattr(signal, name), 3)
    assert run() == status
    assert f"interrupted by {name} after step 3; go on with" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [3]


def test_judgement_that_a_signal_cut_off_is_made_up_for(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patches:
        end_by(patches, signal.SIGTERM, 4)  # the end of an epoch
        run()
    assert "validation" not in capsys.readouterr().out
    assert run("--train.resume") == 0
    shown = capsys.readouterr().out
    assert shown.index("epoch 1 of 2, validation") < shown.index("epoch 2 of 2, validation")
    assert read_values(tmp_path / "run")["best_at"] in (4, 8)


def test_run_without_a_checkpoint_begins(run, capsys):
    assert run("--train.resume") == 0
    assert capsys.readouterr().out.startswith("starting, as there is no checkpoint yet\n")


def test_run_that_torchrun_starts_again_goes_on(run, tmp_path, monkeypatch, capsys):
    run("--train.epochs", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run() == 0
    assert f"going on from {tmp_path}/run/step_4\n" in capsys.readouterr().out


def test_finished_run_shows_its_figures_again(run, capsys):
    run()
    table = capsys.readouterr().out.split("held out:\n")[1]
    assert run("--train.resume") == 0
    assert capsys.readouterr().out.split("held out:\n")[1] == table


@pytest.mark.parametrize("which", ["latest", "best", "4"])
def test_checkpoint_that_is_asked_for_is_judged(run, criteo_config, tmp_path, capsys, which):
    run()
    capsys.readouterr()
    options = ["--data.validation-rows", "50", "--checkpoint", str(tmp_path / "run")]
    assert main(["evaluate", str(criteo_config), *options, "--which", which]) == 0
    wanted = find_checkpoint(tmp_path / "run", int(which) if which.isdecimal() else which)
    assert capsys.readouterr().out.startswith(f"{wanted}, 100 rows held out")


def test_failed_save_ends_the_run(run, tmp_path, capsys):
    (tmp_path / "run").write_text("no folder")
    assert run() == 1
    assert "could not be written" in capsys.readouterr().err


def end_one_rank(rank: int, world_size: int, options: list[str], stop_at: int) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(io.StringIO()):
        end_by(monkeypatch, signal.SIGTERM, stop_at)
        return main(options)


def go_on(rank: int, world_size: int, options: list[str], copy: Path) -> int:
    """Resume, and save at once what was loaded, to another folder."""
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()):
        resume = Trainer.resume

        def resume_and_save(trainer):
            path = resume(trainer)
            trainer.checkpoints.folder, folder = copy, trainer.checkpoints.folder
            trainer.save().result()
            trainer.checkpoints.folder = folder
            return path

        monkeypatch.setattr(Trainer, "resume", resume_and_save)
        return main([*options, "--train.resume"])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 1), (1, 3)])
def test_signal_to_one_rank_saves_and_others_go_on_exactly(
    ranks, criteo_config, tmp_path, before, after
):
    folder = tmp_path / "run"
    options = ["train", str(criteo_config), "--checkpoint.folder", str(folder)]
    options += ["--train.sharding", "row_wise", "--train.batch-size", "37"]
    assert ranks(before, end_one_rank, options, 5) == [143] * before
    saved = find_checkpoint(folder)
    values, tensors = read_values(saved), read_checkpoint(saved)
    assert values["position"]["next_batch"] == 5
    assert ranks(after, go_on, options, tmp_path / "copy") == [0] * after
    loaded = read_checkpoint(tmp_path / "copy")
    alike = [name for name in tensors if not name.startswith("random.")]
    assert all(torch.equal(loaded[name], tensors[name]) for name in alike)
    assert {**read_values(tmp_path / "copy"), "config": 0} == {**values, "config": 0}
    assert read_values(folder)["num_steps"] == 18
