import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli import main
from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config
from shardwise.cli.data_config import CriteoConfig, MovieLensConfig, SequencesConfig
from shardwise.cli.model_config import (
    DCNConfig,
    DeepFMConfig,
    DLRMConfig,
    ProjectionConfig,
    SASRecConfig,
)
from shardwise.cli.settings import read_config, read_options

EXAMPLE = Path(__file__).parents[2] / "examples" / "movielens.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def every_field(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from every_field(value, f"{field.name}.")
        else:
            yield prefix + field.name, value


def overridden(*options: str) -> Config:
    return read_options("train", [str(EXAMPLE), *options], "", lambda config: config)


def test_example_sets_what_it_shows_and_leaves_the_rest():
    assert read_config(EXAMPLE) == Config()


@pytest.mark.parametrize("name", ["criteo_kaggle", "criteo_deepfm"])
def test_example_of_criteo_says_what_the_defaults_say_of_the_data(name):
    assert read_config(EXAMPLE.with_name(f"{name}.toml")).data == CriteoConfig()


def test_integer_is_read_as_a_float(tmp_path):
    config = read_config(write(tmp_path, "[train]\ntable_lr = 1"))
    assert config.train.table_lr == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 1", r"run.toml: train: unknown field 'epoch' \(is it 'epochs'\?\)"),
        ("[train]\nfoo = 1", r"train: unknown field 'foo'; known fields: seed, epochs, batch_size"),
        ("[trian]", r"unknown field 'trian' \(is it 'train'\?\); known fields: data, model, train"),
        ("train = 3", "train is 3, wanted: a section with fields"),
        ("[train]\nepochs = '2'", "run.toml: train.epochs is '2', wanted: int"),
        ("[train]\nepochs = 1.5", "train.epochs is 1.5, wanted: int"),
        ("[train]\nresume = 1", "train.resume is 1, wanted: bool"),
        ("[data]\nroot = 1", "data.root is 1, wanted: str"),
        ("[data]\ntrain_fraction = 1", "data.train_fraction is 1.0, wanted: over 0 and under 1"),
        ("[model]\ndense_layers = 8", "model.dense_layers is 8, wanted: a list of int"),
        (
            "[model]\ndense_layers = [64, '8']",
            r"dense_layers is \[64, '8'\], wanted: a list of int",
        ),
        ("[model]\nembedding_dim = 16", r"model.dense_layers is \[64, 8\].*embedding_dim, 16"),
        ("[model]\nover_layers = [1]", r"over_layers is \[1\], wanted: two widths or more"),
        ("[model]\npooling = 'max'", r"model.pooling is 'max', wanted: one of \['mean', 'sum'\]"),
        ("[train]\ndense_lr = nan", "train.dense_lr is nan, wanted: over 0 and finite"),
        ("[model]\nkind = 'dlmr'", r"model.kind is 'dlmr', wanted: one of \['dlrm', 'dcn', "),
        ("[data]\nsource = 3", "data.source is 3, wanted: one of \\['movielens', 'criteo-kaggle'"),
        (
            "[model]\nkind = 'deepfm'\nover_layers = [8, 1]",
            "model: unknown field 'over_layers'.*; known fields of kind 'deepfm': kind,",
        ),
        ("[model]\nkind = 'dcn'\ncross_rank = 0", "model.cross_rank is 0, wanted: at least 1"),
        (
            "[model]\nkind = 'projection'\nbranch2_layers = [9]",
            r"model.branch2_layers is \[9\], wanted: widths .* a multiple of embedding_dim, 8",
        ),
        (
            "[data]\nsource = 'criteo-kaggle'\nvalidation_rows = 8000",
            "data.validation_rows is 8000, wanted: at least 0 and under train_rows, 8000",
        ),
        (
            "[data]\nsource = 'sequences'",
            "model.kind is 'dlrm', wanted with data.source 'sequences': 'sasrec'",
        ),
        (
            "[model]\nkind = 'sasrec'",
            "model.kind is 'sasrec', wanted with data.source 'movielens': another",
        ),
        (
            "data = {source = 'sequences'}\nmodel = {kind = 'sasrec', num_heads = 3}",
            "model.num_heads is 3, wanted: a divisor of embedding_dim, 64",
        ),
        (
            "data = {source = 'sequences'}\nmodel = {kind = 'sasrec', dropout = 1}",
            "model.dropout is 1.0, wanted: at least 0 and under 1",
        ),
        ("[train]\npatience = 1", "train.patience is 1, but data.source 'movielens' .* no valid"),
        ("[train]\nresume = true", "train.resume is set but checkpoint.folder is empty"),
        ("[train", "run.toml: this is not TOML"),
    ],
)
def test_wrong_config_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text))


def test_every_wrong_field_is_named_at_once(tmp_path):
    path = write(tmp_path, "[train]\nepochs = '2'\n[log]\nwindow = 0")
    with pytest.raises(ConfigError, match=r"train.epochs is '2'.*; log.window is 0"):
        read_config(path)


def test_option_for_a_tag_keeps_what_the_new_class_has_too():
    model = overridden("--model.kind", "dcn", "--model.cross-rank=4").model
    assert model == DCNConfig(cross_rank=4)


def test_option_for_a_tag_drops_nothing_of_the_file(capsys):
    assert main(["train", str(EXAMPLE), "--model.kind", "deepfm"]) == 2
    error = capsys.readouterr().err
    assert "model: unknown field 'dense_layers', unknown field 'over_layers'" in error


def test_unknown_tag_in_an_option_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        overridden("--data.source", "criteo")
    assert ended.value.code == 2
    assert "invalid choice: 'criteo' (choose from" in capsys.readouterr().err


def test_missing_config_file_is_named(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shardwise: error: ")
    assert "none.toml: cannot read the config file: No such file" in error
    assert error.count("\n") == 1


def test_option_overrides_the_file():
    changed = overridden("--train.epochs", "3", "--model.over-layers", "4", "1")
    assert changed.train.epochs == 3
    assert changed.model.over_layers == (4, 1)
    assert changed.model.dense_layers == Config().model.dense_layers


SECTIONS = [
    Config(data=CriteoConfig(), model=DCNConfig()),
    Config(data=CriteoConfig(), model=DeepFMConfig()),
    Config(data=MovieLensConfig(), model=DLRMConfig()),
    Config(data=MovieLensConfig(), model=ProjectionConfig()),
    Config(data=SequencesConfig(), model=SASRecConfig()),
]
"""Every class of a section, at least once."""

TAGS = ("data.source", "model.kind")


def tags_of(config: Config) -> list[str]:
    return ["--data.source", config.data.source, "--model.kind", config.model.kind]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (config, name, value)
        for config in SECTIONS
        for name, value in every_field(config)
        if name not in TAGS and (config is SECTIONS[0] or name.startswith(("data", "model")))
    ],
)
def test_every_field_has_an_option(tmp_path, config, name, value):
    option, new = "--" + name.replace("_", "-"), another(value)
    texts = [] if new is True else [str(item) for item in new] if isinstance(new, tuple) else [new]
    options = [option, *map(str, texts), *go_together(config).get(name, ())]
    options = [str(write(tmp_path, "")), *tags_of(config), *options]
    changed = read_options("train", options, "", lambda config: config)
    assert dict(every_field(changed))[name] == new


def go_together(config: Config) -> dict[str, tuple[str, ...]]:
    """What must be set with some of the fields."""
    has_layers = hasattr(config.model, "dense_layers")
    return {
        "model.embedding_dim": ("--model.dense-layers", "16") if has_layers else (),
        "train.patience": ("--data.validation-rows", "1"),
        "train.resume": ("--checkpoint.folder", "run"),
    }


def another(value: object) -> object:
    """A value that the field may have as well."""
    if isinstance(value, tuple):
        return (3, *value)
    kinds = {bool: lambda: True, int: lambda: value * 2 or 1, float: lambda: value / 2}
    return kinds.get(type(value), lambda: OTHER.get(value, "other"))()


OTHER = {"mean": "sum", "vectors": "scalars", "rowwise_adagrad": "adam", "ddp": "fsdp2"}
OTHER |= {"auto": "plan.json"}


@pytest.mark.parametrize("config", SECTIONS)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_lists_and_explains_every_field(command, config, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help", *tags_of(config)])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    sections = ("data.", "model.") if command == "evaluate" else ("",)
    names = [name for name, _ in every_field(config) if name.startswith(sections)]
    assert ended.value.code == 0
    assert all("--" + name.replace("_", "-") in text for name in names)
    explained = {"movielens": "Most movies in a bag of liked or disliked ones, the latest."}
    explained["criteo-kaggle"] = "Rows held out, those that follow."
    explained["sequences"] = "Most items of a user that the model reads, the latest."
    assert explained[config.data.source] in text
    assert "Stop after this many judgements without better" in text or command == "evaluate"


def test_help_shows_the_values_of_the_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(write(tmp_path, "[train]\nseed = 12345")), "--help"])
    assert "(default: 12345)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.epoch", "3"], "Unrecognized options: --train.epoch"),
        (["--train.epochs", "x"], "Error parsing --train.epochs"),
        (["--train.epochs", "0"], "train.epochs is 0, wanted: at least 1"),
    ],
)
def test_wrong_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        overridden(*options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_options_need_a_file_before_them(capsys):
    assert main(["train", "--train.epochs", "3"]) == 2
    assert "the config file must come first: shardwise train" in capsys.readouterr().err
