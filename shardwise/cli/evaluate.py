"""`shardwise evaluate`: judge the model of a checkpoint on the held-out ratings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shardwise.checkpoint import find_checkpoint, load_checkpoint, read_values
from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config, EvaluateConfig
from shardwise.cli.problem import compare
from shardwise.cli.ranks import Ranks
from shardwise.cli.recipe import build_model, load_problem
from shardwise.cli.settings import read_options
from shardwise.cli.trainer import check_config

_ABOUT = (
    "Judge the model of a checkpoint on the samples held out, beside simple predictions. The "
    "fields of CONFIG.toml must be those it was trained with."
)


def main(options: Sequence[str]) -> int:
    """Run `shardwise evaluate` with what follows it on the command line; give the exit status."""
    config = read_options("evaluate", options, _ABOUT, _start)
    if not config.checkpoint:
        raise ConfigError("no checkpoint is named; add --checkpoint and the folder of one")
    path = find_checkpoint(Path(config.checkpoint))
    state = read_values(path)
    check_config(path, state, asdict(config), ("data", "model"))
    problem = load_problem(config.data)
    model = build_model(config.model, problem)
    # Of a run with train.patience the best epoch's model counts, not the last one's.
    name = "model" if state["best"] is None else "best_weights"
    load_checkpoint(path, {name: model.state_dict()})
    print(f"{path}, {compare(problem.judge(model, problem.test, Ranks()), problem)}")
    return 0


def _start(config: Config) -> EvaluateConfig:
    """Take over what matters of a config; it does not name the checkpoint."""
    return EvaluateConfig(data=config.data, model=config.model)
