"""Break one line at a time and see that a test fails: `python tools/break_lines.py [NAME …]`.

The lines are in break_lines.toml. All happens in a copy of the checkout under the temporary folder,
with an environment of its own that sees the packages of this one, so the checkout is never touched
and its installed package is not what is tested. C++ lines are compiled there, for one instruction
set, which takes a third of the time and runs the same source.

Exit status 1 when a break goes unnoticed, when the tests fail without one, or when a line is no
longer there (`find_problems`, which the test suite runs too).
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Break:
    """A line to break.

    Attributes:
        name: What is then wrong.
        file: Path within the checkout.
        line: The line, without indentation.
        broken: What stands there instead.
        tests: Test files or functions of which at least one test must fail.
    """

    name: str
    file: str
    line: str
    broken: str
    tests: list[str]

    @property
    def is_cpp(self) -> bool:
        """Whether the operators must be compiled anew."""
        return self.file.startswith("csrc/")


BREAKS = [
    Break(**entry)
    for entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["break"]
]


def find_problems(root: Path) -> list[str]:
    """Name the breaks whose line, file or tests are not there; an empty list is good."""
    problems = []
    for each in BREAKS:
        file = root / each.file
        lines = [line.strip() for line in file.read_text().splitlines()] if file.exists() else []
        if (count := lines.count(each.line)) != 1:
            problems.append(f"{each.name}: {each.file} has its line {count} times, not once")
        if each.line == each.broken:
            problems.append(f"{each.name}: it changes nothing")
        for test in each.tests:
            path, _, function = test.partition("::")
            text = (root / path).read_text() if (root / path).exists() else ""
            if f"def {function or 'test'}" not in text:
                problems.append(f"{each.name}: there is no test {test}")
    return problems


def copy_checkout(folder: Path) -> None:
    """Copy the files that git tracks or would track, and make an environment beside them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    environment = folder / ".venv"
    venv.create(environment, symlinks=True)
    # A .pth file adds folders without reading the .pth files in them, so the packages of this
    # environment are found, but not a checkout that is installed there in editable form.
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(packages, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run in the copy; its output is kept."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def build(folder: Path) -> None:
    """Compile what has changed.

    Raises:
        SystemExit: It does not compile; shows why.
    """
    if not (folder / "build").exists():
        # As for a processor that CMakeLists.txt does not know: the baseline loops alone.
        one_set = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any"]
        done = run(folder, ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", *one_set])
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    done = run(folder, ["cmake", "--build", "build"])
    if done.returncode or not (folder / "shardwise/_lib/libshardwise.so").exists():
        raise SystemExit(done.stdout + done.stderr)


def fails(folder: Path, tests: list[str]) -> bool:
    """Whether a test fails, or the interpreter with it.

    Raises:
        SystemExit: They could not be run.
    """
    python = str(folder / ".venv/bin/python")
    done = run(folder, [python, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests])
    if done.returncode > 1:  # interrupted, misused, or no test found
        raise SystemExit(done.stdout + done.stderr)
    return done.returncode != 0


@contextmanager
def broken_line(folder: Path, each: Break) -> Iterator[None]:
    """Break a line of the copy, and put it back."""
    file = folder / each.file
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    (index,) = [i for i, line in enumerate(lines) if line.strip() == each.line]
    lines[index] = lines[index].replace(each.line, each.broken)
    file.write_text("".join(lines))
    try:
        yield
    finally:
        file.write_text(text)


def check_copy(folder: Path, breaks: list[Break]) -> None:
    """See that the copy tests itself, and that the tests pass while nothing is broken.

    Raises:
        SystemExit: They do not.
    """
    build(folder)
    code = "import shardwise.ops.library as library; print(library.__file__, library.is_compiled)"
    done = run(folder, [str(folder / ".venv/bin/python"), "-c", code])
    if done.stdout.split() != [str(folder / "shardwise/ops/library.py"), "True"]:
        raise SystemExit(f"the copy in {folder} does not use its own operators: {done}")
    tests = list(dict.fromkeys(test for each in breaks for test in each.tests))
    if fails(folder, tests):
        raise SystemExit("the tests fail before any line is broken; mend them first")


def try_break(folder: Path, each: Break) -> bool:
    """Whether a test notices."""
    with broken_line(folder, each):
        if each.is_cpp:
            build(folder)
        return fails(folder, each.tests)


def main() -> int:
    """Break the lines one at a time, print a table, and give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names of breaks; all by default")
    names = parser.parse_args().names
    breaks = [b for b in BREAKS if not names or any(name in b.name for name in names)]
    if problems := find_problems(ROOT):
        print("\n".join(problems))
        return 1
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="break_lines_") as name:
        folder = Path(name).resolve()
        copy_checkout(folder)
        check_copy(folder, breaks)
        # C++ first, so that after them one build puts the operators right for the Python ones.
        for each in sorted(breaks, key=lambda each: not each.is_cpp):
            if not each.is_cpp:
                build(folder)
            start = time.monotonic()
            is_noticed = try_break(folder, each)
            unnoticed += not is_noticed
            verdict = "noticed" if is_noticed else "UNNOTICED"
            print(f"{verdict:10} {time.monotonic() - start:5.1f} s  {each.name}", flush=True)
    print(f"{len(breaks) - unnoticed} of {len(breaks)} breaks noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
