import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.checkpoint import find_checkpoint, read_values
from shardwise.cli import main
from shardwise.cli.data_config import SequencesConfig
from shardwise.cli.next_items import judge, load_sequences
from shardwise.cli.ranks import Ranks
from shardwise.cli.settings import read_config
from shardwise.cli.trainer import Trainer
from shardwise.data import SequenceSamples
from shardwise.models import SASRec

NUM_ITEMS = 40


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users who walk round 40 items one by one."""
    draw = torch.Generator().manual_seed(0)
    lines = []
    for user, start in enumerate(torch.randint(NUM_ITEMS, (60,), generator=draw), start=1):
        items = [1 + (int(start) + step) % NUM_ITEMS for step in range(5 + user % 4)]
        lines.append(f"{user} {' '.join(map(str, items))}\n")
    path = tmp_path_factory.mktemp("sequences") / "walks.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path, walks: Path) -> Path:
    """A config file for a run of 30 epochs of 4 steps on `walks`."""
    path = tmp_path / "walks.toml"
    path.write_text(f"""
        data = {{source = "sequences", path = "{walks}", max_length = 6}}
        model = {{kind = "sasrec", embedding_dim = 16, num_blocks = 1, dropout = 0.1}}
        [train]
        epochs = 30
        batch_size = 16
        table_rule = "adam"
        table_lr = 0.02
        table_eps = 1e-8
        dense_lr = 0.02
        lr_falls = true
    """)
    return path


def table(shown: str) -> str:
    return shown.split("60 users held out:\n")[1]


def test_model_learns_what_comes_next_and_popularity_does_not(config, capsys):
    assert main(["train", str(config)]) == 0
    rows = re.findall(r"(?m)^(\w[\w ]*?) {2,}(\S+) +(\S+) +(\S+)$", table(capsys.readouterr().out))
    hits = {name: float(hit_rate) for name, hit_rate, _, _ in rows}
    assert list(hits) == ["model", "most taken items"]
    assert hits["model"] > 0.8
    assert hits["most taken items"] < 0.6


def test_progress_shows_the_loss_and_the_validation(config, capsys):
    main(["train", str(config), "--train.epochs", "2"])
    shown = capsys.readouterr()
    assert re.search(r"120/120 .*, loss=\d\.\d+", shown.err)
    assert re.search(r"epoch 2 of 2, validation: HR@10 0\.\d+, NDCG@10 0\.\d+, MRR", shown.out)


def test_evaluation_gives_the_figures_of_the_best_epoch(config, tmp_path, capsys):
    folder = str(tmp_path / "run")
    main(["train", str(config), "--checkpoint.folder", folder, "--train.patience", "2"])
    trained = table(capsys.readouterr().out)
    assert main(["evaluate", str(config), "--checkpoint", folder]) == 0
    assert table(capsys.readouterr().out) == trained


class Oracle(SASRec):
    """Scores highest, from the top, what was taken before, what comes next and item 0."""

    def __init__(self, num_better: int) -> None:
        torch.nn.Module.__init__(self)
        self.num_better = num_better

    def score(self, features):
        lasts = [bag[-1].item() for bag in features["item"].to_dense()]
        scores = torch.zeros(len(lasts), NUM_ITEMS + 1)
        scores[:, 0] = 9.0
        for row, last in zip(scores, lasts, strict=True):
            row[last] = 8.0
            row[1 + last % NUM_ITEMS] = 1.0
            for step in range(2, 2 + self.num_better):
                row[1 + (last + step - 1) % NUM_ITEMS] = 2.0
        return scores


@pytest.mark.parametrize(
    ("num_better", "figures"),
    [(0, (1.0, 1.0, 1.0)), (2, (1.0, 0.5, 1 / 3)), (10, (0.0, 0.0, 1 / 11))],
)
def test_items_taken_before_and_item_0_do_not_count(walks, num_better, figures):
    problem = load_sequences(SequencesConfig(path=str(walks)))
    found = judge(Oracle(num_better), problem.test, Ranks())
    assert tuple(found.values()) == pytest.approx(figures)


def test_held_out_items_are_not_trained_on(walks):
    problem = load_sequences(SequencesConfig(path=str(walks)))
    lengths = [part.sequences.lengths for part in (problem.train, problem.validation, problem.test)]
    assert isinstance(problem.train, SequenceSamples)
    assert (lengths[0] == lengths[1]).all()
    assert (lengths[1] + 1 == lengths[2]).all()


def test_rates_fall_to_0_and_a_resumed_run_goes_on_where_they_were(config, tmp_path):
    options = ["--train.epochs", "4", "--checkpoint.folder", str(tmp_path / "run")]
    main(["train", str(config), *options, "--checkpoint.keep", "9"])
    for step in (12, 16):
        (tmp_path / "run" / f"step_{step}").rename(tmp_path / f"step_{step}")
    text = config.read_text().replace("epochs = 30", "epochs = 4")
    config.write_text(f'checkpoint = {{folder = "{tmp_path / "run"}"}}\n{text}')
    settings = read_config(config)
    trainer = Trainer(settings, load_sequences(settings.data))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.02] * len(rates))
    trainer.resume()
    assert trainer.num_steps == 8
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.01] * len(rates))


def test_resumed_run_with_falling_rates_equals_an_undisturbed_one(config, tmp_path, capsys):
    options = ["--train.epochs", "4", "--checkpoint.keep", "9", "--checkpoint.folder"]
    main(["train", str(config), *options, str(tmp_path / "run")])
    whole = table(capsys.readouterr().out)
    for step in (12, 16):
        (tmp_path / "run" / f"step_{step}").rename(tmp_path / f"step_{step}")
    assert main(["train", str(config), *options, str(tmp_path / "run"), "--train.resume"]) == 0
    assert table(capsys.readouterr().out) == whole
    assert read_values(find_checkpoint(tmp_path / "run"))["num_steps"] == 16


def test_falling_rates_need_the_epochs_they_were_saved_with(config, tmp_path, capsys):
    folder = ["--checkpoint.folder", str(tmp_path / "run")]
    main(["train", str(config), *folder, "--train.epochs", "1"])
    assert main(["train", str(config), *folder, "--train.resume", "--train.epochs", "2"]) == 1
    assert "saved with train.epochs 1, this run has 2" in capsys.readouterr().err


def test_missing_file_says_what_to_fetch_and_where(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDWISE_DATA", str(tmp_path))
    assert main(["train", str(config), "--data.path", ""]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/s3rec/Beauty.txt: no such file; get Beauty.txt" in error
    assert "in $SHARDWISE_DATA" in error
