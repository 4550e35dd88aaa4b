"""The lines that `make break` breaks are still there."""

from pathlib import Path

from tools.break_lines import BREAKS, find_problems


def test_every_line_to_break_occurs_once_and_has_its_tests():
    assert len(BREAKS) >= 10
    assert find_problems(Path(__file__).parents[1]) == []
