import os
import re
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardwise.checkpoint import find_checkpoint, read_checkpoint, read_values
from shardwise.cli import main
from shardwise.cli.trainer import Trainer


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_training_shows_the_model_beside_the_baselines(config, capsys):
    assert main(["train", str(config)]) == 0
    shown = capsys.readouterr()
    table = shown.out.split("ratings held out:\n")[1].splitlines()
    assert re.fullmatch(r" +AUC +NE calibration", table[0])
    names = ["model", "user rate and item rate", "smoothed item rate"]
    assert [re.match(r"\D+?(?=  )", row)[0] for row in table[1:]] == names
    assert len({len(row) for row in table}) == 1


def test_training_shows_its_progress(config, capsys):
    main(["train", str(config)])
    shown = capsys.readouterr()
    assert re.search(r"640/640 .* samples/s, loss=0\.\d+, NE=\d\.\d+, AUC=0\.\d+", shown.err)
    assert re.search(r"epoch 2 of 2, held out: AUC 0\.\d+, NE \d\.\d+", shown.out)


def test_option_beats_the_file(config, capsys):
    main(["train", str(config), "--train.epochs", "3", "--train.batch-size", "320"])
    assert "epoch 3 of 3" in capsys.readouterr().out


def test_events_are_written(config, tmp_path):
    main(["train", str(config), "--log.tensorboard", str(tmp_path / "events")])
    names = events(tmp_path / "events").Tags()["scalars"]
    train = [f"train/{name}" for name in ("AUC", "NE", "loss", "samples_per_s")]
    held_out = [f"held_out/{name}" for name in ("AUC", "NE", "calibration")]
    assert sorted(names) == sorted(train + held_out)
    assert [step for step, _ in curve(tmp_path / "events", "train/loss")] == list(range(1, 11))


def test_keys_of_a_checkpoint_are_those_of_the_plain_model(config, tmp_path):
    main(["train", str(config), "--checkpoint.folder", str(tmp_path / "run")])
    names = read_checkpoint(find_checkpoint(tmp_path / "run")).keys()
    table = "sparse_arch.embedding_bag_collection.embedding_bags.movie.weight"
    assert {f"model.{table}", f"optimizer.state.{table}.sum"} <= names


@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_resumed_run_equals_an_undisturbed_one(config, tmp_path, monkeypatch, capsys, stop_at):
    def run(name: str, *options: str) -> int:
        folders = [
            "--checkpoint.folder",
            tmp_path / name,
            "--log.tensorboard",
            tmp_path / f"{name}-log",
        ]
        return main(["train", str(config), *map(str, folders), *options])

    assert run("whole") == 0
    table = capsys.readouterr().out.split("held out:\n")[1]
    whole_step = Trainer.step

    def interrupted_step(trainer, batch):
        whole_step(trainer, batch)
        if trainer.num_steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert run("broken") == 130
    assert (
        f"interrupted by SIGINT after step {stop_at}; go on with --train.resume"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(Trainer, "step", whole_step)
    torch.manual_seed(99)
    assert run("broken", "--train.resume") == 0
    assert capsys.readouterr().out.split("held out:\n")[1] == table
    for name in ("train/loss", "train/NE", "train/AUC"):
        assert curve(tmp_path / "broken-log", name) == curve(tmp_path / "whole-log", name)
    whole, broken = (find_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    ours, theirs = read_checkpoint(whole), read_checkpoint(broken)
    assert ours.keys() == theirs.keys()
    differ = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert [name for name in differ if ".python." not in name] == []  # which checks of types draw
    assert read_values(whole)["position"] == read_values(broken)["position"]


def test_threads_are_given_back(config):
    before = torch.get_num_threads()
    assert main(["train", str(config), "--train.num-threads", str(before + 1)]) == 0
    assert torch.get_num_threads() == before
