"""The Python in the README and the documentation runs."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def snippets(path: Path) -> list[tuple[int, str]]:
    """(line, code) of each block of Python of a Markdown file."""
    text = path.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


PAGES = [path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if snippets(path)]


def run_page(page: Path) -> dict[str, object]:
    """Run the blocks of a page, of which later ones see earlier ones; give the names they leave."""
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in snippets(page):
        exec(compile("\n" * line + code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a snippet writes is gone with the test
    assert len(run_page(page)) > 1


def count_ranks(rank: int, world_size: int, page: Path, folder: Path) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(folder):
        names = run_page(page)
    return sum(name in names for name in ("ranks", "num_ranks")) * dist.get_world_size()


@pytest.mark.parametrize("page", ["README.md", "docs/sharding.md"])
def test_python_of_page_runs_on_two_ranks(ranks, page, tmp_path):
    assert ranks(2, count_ranks, ROOT / page, tmp_path) == [2, 2]


def test_readme_shows_python():
    assert ROOT / "README.md" in PAGES
