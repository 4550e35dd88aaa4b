import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli import main
from shardwise.cli.recipe import load_problem
from shardwise.cli.settings import read_config
from shardwise.cli.trainer import Trainer


def trainer_of(config: Path) -> Trainer:
    settings = read_config(config)
    return Trainer(settings, load_problem(settings.data))


def test_missing_data_folder_is_named(config, tmp_path, capsys):
    assert main(["train", str(config), "--data.root", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("shardwise: error: MovieLens 'nowhere': no such folder, looked for")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, "there is no ratings.csv"),
        (0, "ratings.csv: the file is empty"),
        (600, "in mid-line"),
    ],
)
def test_damaged_data_file_is_named(config, edition, tmp_path, size, message, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(edition, folder)
    text = (folder / "ratings.csv").read_text()
    (folder / "ratings.csv").unlink()
    if size is not None:
        (folder / "ratings.csv").write_text(text[:size])
    assert main(["train", str(config), "--data.root", str(folder)]) == 1
    assert message in capsys.readouterr().err


def test_dense_feature_that_is_nan_changes_no_weight(config):
    trainer = trainer_of(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch = next(iter(trainer.loader))
    batch.dense_features[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"dense_features, sample 3, column 1 \('.+'\) is nan"):
        trainer.step(batch)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loss_that_is_not_finite_changes_no_weight(config):
    trainer = trainer_of(config)
    with torch.no_grad():
        next(trainer.model.over_arch.parameters()).fill_(torch.inf)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="step 1: the loss is nan; training has diverged"):
        trainer.step(next(iter(trainer.loader)))
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_position_of_other_samples_is_named(config):
    settings = read_config(config)
    problem = load_problem(settings.data)
    trainer = Trainer(settings, problem)
    position = trainer.loader.state_dict()
    fewer = replace(problem, train=problem.train.select(torch.arange(9)))
    with pytest.raises(ValueError, match="saved with num_samples 320, this loader has 9"):
        Trainer(settings, fewer).loader.load_state_dict(position)
