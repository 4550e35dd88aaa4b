"""The Python in the README and the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def snippets(path: Path) -> list[tuple[int, str]]:
    """(line, code) of each block of Python of a Markdown file."""
    text = path.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in blocks]


PAGES = [path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if snippets(path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a snippet writes is gone with the test
    names = {"__name__": "__main__"}
    for line, code in snippets(page):
        exec(compile("\n" * line + code, page, "exec"), names)  # later blocks see earlier ones
    assert len(names) > 1


def test_readme_shows_python():
    assert ROOT / "README.md" in PAGES
