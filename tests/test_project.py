"""The package as a whole: which way imports go, what the binary needs, what an import costs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import shardwise
from shardwise.ops import library

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shardwise"
CHECK_ABI = ROOT / "csrc" / "check_abi.cpp"
LIBRARY = "shardwise/_lib/libshardwise.so"


def parts_lowest_first() -> list[str]:
    """The parts that the package docstring lists."""
    listing = shardwise.__doc__.partition("Parts, lowest first")[2]
    return re.findall(r"^    (\w+)  +\S", listing, flags=re.MULTILINE)


def imported_parts(path: Path) -> list[tuple[int, str]]:
    """(line, part) of every import of the package's own; "" is the package itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [node.module]
        else:
            continue
        found += [
            (node.lineno, (name + ".").split(".")[1])
            for name in names
            if name.split(".")[0] == "shardwise"
        ]
    return found


def test_every_part_is_listed_in_the_package_docstring():
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    parts |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert parts == set(parts_lowest_first())


def test_imports_go_down():
    order = parts_lowest_first()
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {part or 'the package itself'}"
        for place, own in enumerate(order)
        for path in sorted(PACKAGE.glob(f"{own}/**/*.py"))
        for line, part in imported_parts(path)
        if part not in order[: place + 1]
    ]
    assert not upward


def test_public_names_are_documented():
    documented = re.findall(r"^- `(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shardwise.__all__) == sorted(documented)
    assert all(hasattr(shardwise, name) for name in documented)


# ---- the binary


def undefined_torch_symbols(binary: Path) -> set[str]:
    """Undefined symbols without a version: those of the C and C++ libraries have one."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True
    )
    return set(re.findall(r" U (\w+)$", listing.stdout, flags=re.MULTILINE))


def compile_abi_check(folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile check_abi.cpp of a folder against the headers of the installed torch.

    First as torch 2.10 has them, then as 2.11, for the functions that are weak.
    """
    if shutil.which("g++") is None:
        pytest.skip("compares with torch's headers by compiling: needs g++")
    headers = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-isystem", headers, folder / CHECK_ABI.name]
    for minor in (10, 11):
        target = f"-DTORCH_TARGET_VERSION=0x02{minor:02x}000000000000"
        result = subprocess.run([*command, target], capture_output=True, text=True, check=False)
        if result.returncode:
            break
    return result


@pytest.mark.skipif(not library.is_compiled, reason="looks at the binary: needs it built")
def test_binary_needs_only_functions_of_torch_2_10():
    allowed = set(re.findall(r"^ALLOWED\((\w+)\);", CHECK_ABI.read_text(), re.MULTILINE))
    needed = undefined_torch_symbols(ROOT / LIBRARY)
    assert "torch_library_impl" in needed
    assert needed <= allowed


def test_declarations_agree_with_the_headers_of_torch():
    result = compile_abi_check(CHECK_ABI.parent)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "given", "wrong"),
    [
        ("torch_abi.h", "aoti_torch_get_dim(AtenTensorHandle tensor, int64_t*", "int32_t*"),
        ("torch_abi.h", "AOTITorchError torch_list_size(", "int64_t torch_list_size("),
        ("torch_abi.h", "int64_t storage_offset", "int32_t storage_offset"),
        ("check_abi.cpp", "ALLOWED(torch_list_size)", "ALLOWED(torch_dtype_float8_e8m0fnu)"),
    ],
    ids=["argument", "result", "weak", "later than torch 2.10"],
)
def test_wrong_declaration_does_not_compile(tmp_path, name, given, wrong):
    for path in (CHECK_ABI, CHECK_ABI.with_name("torch_abi.h")):
        shutil.copy(path, tmp_path)
    text = (tmp_path / name).read_text()
    assert given in text
    wrong = given.replace("int64_t*", wrong) if wrong == "int32_t*" else wrong
    (tmp_path / name).write_text(text.replace(given, wrong))
    assert compile_abi_check(tmp_path).returncode != 0


# ---- what it costs


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


def test_import_loads_nothing_heavy():
    heavy = {"polars", "pandas", "sklearn", "tyro", "cattrs", "tensorboard", "tqdm", "beartype"}
    heavy |= {"triton"}
    code = "import sys, torch; before = set(sys.modules); import shardwise; "
    code += f"print(*sorted((set(sys.modules) - before) & {heavy}))"
    assert run_python(code).stdout.split() == []


@pytest.mark.slow
def test_import_adds_at_most_0_3_s_to_that_of_torch():
    code = "import torch, time; start = time.perf_counter(); import shardwise; "
    code += "print(time.perf_counter() - start)"
    assert min(float(run_python(code).stdout) for _ in range(5)) <= 0.3


def requirements(package: str, *extras: str) -> set[str]:
    """The packages that one needs, its extras included."""
    found = map(Requirement, metadata.requires(package) or [])
    return {
        one.name
        for one in found
        if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", *extras))
    }


def test_nothing_but_torch_brings_torch_or_cuda():
    queue = requirements("shardwise", "train") - {"torch"}
    seen = set()
    while queue:
        seen |= queue
        queue = set().union(*map(requirements, queue)) - seen
    assert {"numpy", "polars"} <= seen
    assert not [name for name in seen if re.match("torch|nvidia|triton|cuda|cupy", name)]


# ---- the wheel


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build under ordinary isolation, as `pip install` does."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheel_holds_the_library_for_any_python_3(tmp_path):
    wheel = build_wheel(tmp_path)
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert re.fullmatch(r"shardwise-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert libraries == [LIBRARY]


@pytest.mark.slow
def test_install_without_a_compiler_works_and_says_so_once(tmp_path):
    wheel = build_wheel(tmp_path, CXX="/nonexistent")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # -S: without the editable install that the test itself runs on; -P: nor the current folder.
    paths = [str(tmp_path / "installed"), sysconfig.get_path("purelib")]
    code = "import torch; from shardwise.ops import library, offsets; "
    code += "print(library.__file__, library.is_compiled, offsets.offsets_from_lengths("
    code += "torch.tensor([2, 3])).tolist())"
    result = run_python(code, "-SP", PYTHONPATH=os.pathsep.join(paths))
    assert result.stdout == f"{paths[0]}/shardwise/ops/library.py False [0, 2, 5]\n"
    assert result.stderr.count("without its compiled operators") == 1
