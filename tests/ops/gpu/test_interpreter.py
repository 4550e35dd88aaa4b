"""The Triton versions of the operators pass the operators' own tests, under Triton's interpreter.

In processes of their own: the interpreter is chosen when kernels are defined.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MANY_PROGRAMS = ("any_layout", "past_the_cache", "opcheck", "threads", "on_average")
ROOT = Path(__file__).parent.parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install shardwise[gpu]"
)


def run_pytest(*arguments: str, every: int = 1) -> None:
    # Without a CUDA device, where one is: that one runs the kernels themselves.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["EVERY"] = str(every)
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_kernels_pass_their_tests():
    run_pytest("tests/ops/gpu/test_kernels.py")


def test_kernels_pass_a_sample_of_the_tests_of_the_operators():
    run_pytest(
        *("-p", "tests.ops.gpu.triton_on_cpu", "-m", "not slow"),
        *("tests/ops/test_interaction.py", "tests/ops/test_lookup.py"),
        *("-k", f"not ({' or '.join(MANY_PROGRAMS)})"),
        every=3,
    )


@pytest.mark.slow
def test_kernels_pass_all_fast_tests_of_the_operators():
    tests = ("tests/ops/test_interaction.py", "tests/ops/test_lookup.py")
    run_pytest("-p", "tests.ops.gpu.triton_on_cpu", "-m", "not slow", *tests)
