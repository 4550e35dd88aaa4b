import re

import pytest

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli import main
from shardwise.cli.criteo import load_criteo
from shardwise.cli.data_config import CriteoConfig


def aucs(shown: str) -> dict[str, float]:
    found = re.findall(r"(?m)^(\w[\w ]*?) {2,}(\d\.\d+)", shown.split("held out:\n")[1])
    return {name: float(figure) for name, figure in found}


@pytest.mark.parametrize("kind", ["dlrm", "dcn", "projection", "deepfm"])
def test_every_kind_learns_and_is_shown_beside_its_rivals(criteo_config, rows, kind, capsys):
    options = ["--model.kind", kind, "--train.epochs", "8"]
    assert main(["train", str(criteo_config), *options]) == 0
    shown = capsys.readouterr().out
    assert "100 rows held out:\n" in shown
    found = aucs(shown)
    assert list(found) == ["model", "hashed logistic regression", "click rate"]
    assert found["model"] > 0.75
    assert found["hashed logistic regression"] > 0.75
    assert found["click rate"] == 0.5


@pytest.mark.parametrize("kind", ["dcn", "projection", "deepfm"])
def test_evaluation_gives_the_figures_of_the_training(criteo_config, tmp_path, kind, capsys):
    folder = str(tmp_path / "run")
    main(["train", str(criteo_config), "--model.kind", kind, "--checkpoint.folder", folder])
    trained = capsys.readouterr().out.split("held out:\n")[1]
    assert main(["evaluate", str(criteo_config), "--model.kind", kind, "--checkpoint", folder]) == 0
    assert capsys.readouterr().out.split("held out:\n")[1] == trained


def test_another_kind_is_named(criteo_config, tmp_path, capsys):
    folder = str(tmp_path / "run")
    main(["train", str(criteo_config), "--checkpoint.folder", folder])
    assert (
        main(["evaluate", str(criteo_config), "--model.kind", "dcn", "--checkpoint", folder]) == 1
    )
    assert "saved with model.kind 'dlrm', this run has 'dcn'" in capsys.readouterr().err


def test_validation_rows_are_the_last_of_those_to_train_on(rows):
    options = {"path": str(rows), "train_rows": 300, "test_rows": 100}
    whole = load_criteo(CriteoConfig(**options))
    parted = load_criteo(CriteoConfig(**options, validation_rows=50))
    assert whole.validation is None
    assert [len(part) for part in (parted.train, parted.validation, parted.test)] == [250, 50, 100]
    assert parted.validation.labels.equal(whole.train.labels[250:])
    assert parted.test.dense.equal(whole.test.dense)


def test_missing_file_says_what_to_fetch_and_where(criteo_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    assert main(["train", str(criteo_config), "--data.path", ""]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/criteo-kaggle-10k/train_examples.txt: no such file; get the click" in error
    assert "https://" in error
    assert "in $SHARDWISE_DATA" in error


def test_too_few_rows_are_named(criteo_config, capsys):
    assert main(["train", str(criteo_config), "--data.test-rows", "101"]) == 1
    assert "400 rows, too few for num_train 300" in capsys.readouterr().err


def test_damaged_row_is_named(criteo_config, rows, tmp_path, capsys):
    damaged = tmp_path / "damaged.txt"
    damaged.write_text(rows.read_text().replace("\t00000001", "\t0000000x", 1))
    assert main(["train", str(criteo_config), "--data.path", str(damaged)]) == 1
    assert re.search(r"damaged.txt: line \d+: cat_\d+ is '0000000x'", capsys.readouterr().err)
