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
    path = _find(Path(config.checkpoint), config.which)
    state = read_values(path)
    check_config(path, state, asdict(config), ("data", "model"))
    problem = load_problem(config.data)
    model = build_model(config.model, problem)
    load_checkpoint(path, {"model": model})
    print(f"{path}, {compare(problem.judge(model, problem.test, Ranks()), problem)}")
    return 0


def _find(folder: Path, which: str) -> Path:
    """Find what is asked for, or what the run itself took at its end."""
    if not which:
        state = read_values(folder)
        which = "best" if state["config"]["train"]["patience"] and state["best"] else "latest"
    return find_checkpoint(folder, int(which) if which.isdecimal() else which)  # type: ignore[arg-type]  # one of Which


def _start(config: Config) -> EvaluateConfig:
    """Take over what matters of a config; it does not name the checkpoint."""
    return EvaluateConfig(data=config.data, model=config.model)
