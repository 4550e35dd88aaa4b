"""Triton is no dependency: without it, operators on CUDA run their references and say so once."""

import sys

import pytest

from shardwise.ops import library


def test_without_triton_the_reference_runs_and_a_warning_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "shardwise.ops.lookup.gpu", raising=False)
    run = library._load_for_gpu("lookup", lambda *arguments: arguments)
    with pytest.warns(UserWarning, match="on CUDA, lookup runs its slower PyTorch reference"):
        assert run(1, 2) == (1, 2)
    assert run(3) == (3,)


@pytest.mark.parametrize("name", library.GPU_VERSIONS)
def test_every_gpu_version_is_there(name):
    pytest.importorskip("triton", reason="needs Triton: pip install shardwise[gpu]")
    module = pytest.importorskip(library.GPU_VERSIONS[name])
    assert callable(getattr(module, name))
