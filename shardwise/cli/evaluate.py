"""`shardwise evaluate`: judge the model of a checkpoint on the held-out ratings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shardwise.cli.checkpoint import copy_tensors, find_checkpoint, read_state, read_tensors
from shardwise.cli.config import Config, ConfigError, EvaluateConfig
from shardwise.cli.held_out import compare, judge
from shardwise.cli.recipe import build_model, load_data
from shardwise.cli.settings import read_options
from shardwise.cli.trainer import check_config, model_tensors

_ABOUT = (
    "Judge the model of a checkpoint on the ratings held out, beside two simple predictions. The "
    "fields of CONFIG.toml must be those it was trained with."
)


def main(options: Sequence[str]) -> int:
    """Run `shardwise evaluate` with what follows it on the command line; give the exit status."""
    config = read_options("evaluate", options, _ABOUT, _start)
    if not config.checkpoint:
        raise ConfigError("no checkpoint is named; add --checkpoint and the folder of one")
    path = find_checkpoint(Path(config.checkpoint))
    check_config(path, read_state(path), asdict(config), ("data", "model"))
    data, samples = load_data(config.data)
    model = build_model(config.model, samples)
    copy_tensors(path, read_tensors(path, "model."), model_tensors(model))
    scores = judge(model, samples.test)
    print(f"{path}, {compare(scores, data, samples.test, config.data.train_fraction)}")
    return 0


def _start(config: Config) -> EvaluateConfig:
    """Take over what matters of a config; it does not name the checkpoint."""
    return EvaluateConfig(data=config.data, model=config.model)
