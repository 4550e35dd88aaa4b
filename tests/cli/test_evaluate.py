import shutil
from pathlib import Path

import pytest

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli import main


@pytest.fixture(scope="module")
def trained(edition, tmp_path_factory) -> tuple[Path, Path]:
    """The config of a finished run of one epoch, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "run.toml"
    config.write_text(f"""
        data = {{root = "{edition}"}}
        model = {{embedding_dim = 4, dense_layers = [4], over_layers = [4, 1]}}
        checkpoint = {{folder = "{folder / "run"}"}}
    """)
    assert main(["train", str(config)]) == 0
    return config, folder / "run"


def test_evaluation_gives_the_figures_of_the_training(config, tmp_path, capsys):
    main(["train", str(config), "--checkpoint.folder", str(tmp_path / "run")])
    trained = capsys.readouterr().out.split("held out:\n")[1]
    assert main(["evaluate", str(config), "--checkpoint", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'run' / 'step_10'}, 80 ratings held out:\n")
    assert shown.split("held out:\n")[1] == trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.pooling", "sum"], "saved with model.pooling 'mean', this run has 'sum'"),
        (
            ["--model.over-layers", "8", "1"],
            "saved with model.over_layers (4, 1), this run has (8, 1)",
        ),
        (["--data.max-tags", "3"], "saved with data.max_tags 10, this run has 3"),
    ],
)
def test_another_config_is_named(trained, options, message, capsys):
    config, folder = trained
    assert main(["evaluate", str(config), "--checkpoint", str(folder), *options]) == 1
    assert message in capsys.readouterr().err


def test_other_data_is_named(trained, capsys):
    config, folder = trained
    assert main(["evaluate", str(config), "--checkpoint", str(folder), "--data.root", ""]) == 1
    assert "embedding_bags.user.weight' is [3, 4]" in capsys.readouterr().err


def test_missing_checkpoint_is_named(trained, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main(["evaluate", str(trained[0]), "--checkpoint", nowhere]) == 1
    assert f"checkpoint {nowhere}: no such folder" in capsys.readouterr().err


def test_checkpoint_must_be_given(trained, capsys):
    assert main(["evaluate", str(trained[0])]) == 2
    assert "no checkpoint is named; add --checkpoint" in capsys.readouterr().err


def test_cut_off_checkpoint_is_named(trained, tmp_path, capsys):
    config, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    data = next((tmp_path / "run").glob("step_*/__0_0.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    assert main(["evaluate", str(config), "--checkpoint", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"checkpoint {data.parent}: file __0_0.distcp has 1000 bytes" in error
    assert error.count("\n") == 1


def test_new_run_does_not_mix_with_an_earlier_one(trained, capsys):
    config, folder = trained
    assert main(["train", str(config)]) == 2
    assert f"checkpoint.folder is '{folder}', which holds step_3" in capsys.readouterr().err
