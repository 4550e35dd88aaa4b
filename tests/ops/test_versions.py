"""Every version of the compiled operators: each passes the tests, and all give the same bits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.ops import library

ROOT = Path(__file__).parent.parent.parent
COMPILED = ["avx512", "avx2", "baseline"]

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not library.is_compiled, reason="needs x86-64 operators"
)

DIGEST = """
import hashlib
import torch
from shardwise.ops.lookup import RULES
from tests.ops.test_lookup import make_case, make_update, plan_backward, run
from shardwise.ops.lookup import Pooling

digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for rule in RULES:
        case = make_case(
            [(300, 64), (50, 23)],
            [(0, 0, Pooling.SUM), (1, 1, Pooling.MEAN)],
            bags=63,
            dtype=dtype,
            is_weighted=True,
        )
        update = make_update(case, rule, seed=7, weight_decay=0.1)
        for table in case.tables:
            table.requires_grad_()
        out = run(case, plan_backward(case.call.features, 2, [update]))
        out.backward(case.grad)
        for tensor in (out, *case.tables, *update.states):
            digest.update(tensor.detach().float().numpy().tobytes())
print(digest.hexdigest())
"""


def run_python(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SHARDWISE_OPS": version}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_all_instruction_sets_give_the_same_bits():
    digests = {version: run_python(version, "-c", DIGEST) for version in COMPILED}
    assert all(done.returncode == 0 for done in digests.values()), digests
    assert len({done.stdout for done in digests.values()}) == 1, digests


@pytest.mark.slow
@pytest.mark.parametrize("version", [*COMPILED[1:], "reference"])
def test_operators_pass_their_tests_in_every_version(version):
    done = run_python(version, "-m", "pytest", "-q", "-m", "not slow", "tests/ops/test_lookup.py")
    assert done.returncode == 0, done.stdout
