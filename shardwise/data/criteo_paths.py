"""The one way in which Criteo's preprocessed files are opened: as files of this machine."""

PATH_MANAGER_KEY = "torchrec"
"""What callers written for torchrec pass on; any other key would name another store of files."""


def check_path_manager(key: str) -> None:
    """Refuse a key that asks for files to be opened in another way.

    Raises:
        ValueError: The key is not `PATH_MANAGER_KEY`.
    """
    if key != PATH_MANAGER_KEY:
        raise ValueError(
            f"path_manager_key is {key!r}: files are opened as local ones, whatever is registered; "
            f"leave it at {PATH_MANAGER_KEY!r} and mount or copy remote files"
        )
