"""The `shardwise` command: `train` and `evaluate` by a TOML file, and `bench`.

Only what a subcommand needs is imported, once it is asked for: the packages of the `train` extra
are not there in every installation, and torch takes a second.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from shardwise.cli.checks import ConfigError

_EXTRA = ("cattrs", "polars", "tensorboard", "tqdm", "tyro")

_ABOUT = "Train, evaluate and measure recommender models."
_COMMANDS = """commands:
  train CONFIG.toml [options]                    train a model; show what it gains on held-out data
  evaluate CONFIG.toml --checkpoint DIR          judge a saved model on the same held-out data
  bench [NAME ...] [options]                     measure operators, modules, steps, beside peers

`shardwise COMMAND --help` explains every field of CONFIG.toml and the option that overrides it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default the process's own.

    Returns:
        The exit status: 0 if all went well, 2 for a wrong config, 1 for anything else. A wrong
        option ends the process with 2, as does `--help` with 0.
    """
    parser = argparse.ArgumentParser(
        prog="shardwise",
        description=_ABOUT,
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"shardwise {version('shardwise')}")
    parser.add_argument(
        "command", choices=("train", "evaluate", "bench"), help="what to do; see below"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="CONFIG.toml, then its overrides")
    parsed = parser.parse_args(arguments)
    try:
        return _run(parsed.command, parsed.options)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        needs = f"needs {error.name}, which is not installed: pip install shardwise[train]"
        return _fail(f"{parsed.command} {needs}")
    except Exception as error:
        # What the user gave is wrong; anything else is a fault of ours and shows its traceback. An
        # error that all ranks raise is shown by the first, its traceback where it comes from.
        is_known = _is_shared(error)
        is_ours = not is_known or str(error).startswith(f"rank {_rank()}: ")
        if is_ours and not isinstance(error, OSError | ValueError):
            raise
        return _fail(str(error), 2 if isinstance(error, ConfigError) else 1, is_known)
    except KeyboardInterrupt:
        return _fail("interrupted", is_known=True)


def _run(command: str, options: Sequence[str]) -> int:
    if command == "train":
        from shardwise.cli.train import main as run
    elif command == "bench":
        from shardwise.cli.bench import main as run
    else:
        from shardwise.cli.evaluate import main as run
    return run(options)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _is_shared(error: Exception) -> bool:
    from shardwise.sharding.faults import is_shared

    return is_shared(error)


def _fail(message: str, status: int = 1, is_known: bool = False) -> int:
    """Show an error, but not by all ranks if they all know it; give the exit status."""
    if not is_known or _rank() == "0":
        print(f"shardwise: error: {message}", file=sys.stderr)
    return status
