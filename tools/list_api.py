"""Write docs/api.md: the public names of shardwise by part, each with its first line of docs."""

import importlib
import inspect
import re
from pathlib import Path

import shardwise

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Public names

Each is imported from the package itself, `from shardwise import KeyedJaggedTensor`; anything else
may change without notice. `make docs` writes this page.
"""


def first_line(thing: object) -> str:
    """Give the first sentence of a docstring, on one line."""
    text = inspect.getdoc(thing) or ""
    return " ".join(text.partition("\n\n")[0].split())


def section(part: str) -> str:
    """List the public names that a part offers; empty where there are none."""
    module = importlib.import_module(f"shardwise.{part}")
    names = [name for name in shardwise.__all__ if name in getattr(module, "__all__", ())]
    lines = [f"- `{name}`: {first_line(getattr(module, name))}" for name in names]
    return "\n".join(["", f"## {part}", "", first_line(module), "", *lines, ""]) if lines else ""


def main() -> None:
    """Write the page, parts in the order of the package docstring."""
    parts = re.findall(r"^    (\w+)  +\S", shardwise.__doc__ or "", flags=re.MULTILINE)
    PAGE.write_text(HEAD + "".join(section(part) for part in parts))


if __name__ == "__main__":
    main()
