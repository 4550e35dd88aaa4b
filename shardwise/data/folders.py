"""Where data sets are looked for, and what is said when one is not there."""

import os
from pathlib import Path


def data_folder() -> Path:
    """Give `$SHARDWISE_DATA`; when unset or empty, `~/.cache/shardwise`."""
    return Path(os.environ.get("SHARDWISE_DATA") or "~/.cache/shardwise").expanduser()


def describe_data_folder() -> str:
    """Name the variable and what it is now, for a message that says where to put something."""
    now = os.environ.get("SHARDWISE_DATA") or "unset, so ~/.cache/shardwise"
    return f"$SHARDWISE_DATA (now {now})"


def find_file(path: str | Path | None, *, default: str, fetch: str) -> Path:
    """Find one file of a data set.

    Args:
        path: The file itself. By default it is looked for in the data folder.
        default: Its place in the data folder, used when `path` is not given.
        fetch: What to fetch from where, for the message.

    Raises:
        FileNotFoundError: It is not there; the message says where it was looked for and what to do.
    """
    found = data_folder() / default if path is None else Path(path)
    if found.is_file():
        return found
    place = f"put it at {default} in {describe_data_folder()}, or name the file"
    raise FileNotFoundError(f"{found}: no such file; {fetch}{'; ' + place if path is None else ''}")
