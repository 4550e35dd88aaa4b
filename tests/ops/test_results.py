"""Large results lie in memory that is used again, and never in memory that a tensor still has."""

import gc
import threading

import pytest
import torch
from torch import Tensor

from shardwise.ops.interaction import interaction, reference
from shardwise.ops.library import is_compiled
from shardwise.ops.lookup import new_result

ROWS = 70_000  # 64 MB of results
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)


def make(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator), torch.randn(rows, 1, 16, generator=generator)


@pytest.mark.skipif(not is_compiled or OLD_TORCH, reason="needs the C++ operators on torch 2.11")
def test_freed_memory_is_used_again():
    first = interaction(*make(0))
    address = first.data_ptr()
    del first
    gc.collect()
    assert interaction(*make(1)).data_ptr() == address


@pytest.mark.skipif(not is_compiled or OLD_TORCH, reason="needs the C++ operators on torch 2.11")
def test_new_results_take_the_memory_that_others_leave():
    address = new_result(torch.empty(0), 2**20).data_ptr()
    gc.collect()
    assert new_result(torch.empty(0, dtype=torch.uint8), 2**22).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("numel", [0, 1, 2**18 + 1])
def test_new_results_have_the_size_and_dtype_asked_for(dtype, numel):
    result = new_result(torch.empty(3, dtype=dtype), numel).zero_()
    assert result.dtype == dtype
    assert result.shape == (numel,)
    assert not result.any()


def test_views_keep_memory_from_being_used_again():
    view = interaction(*make(0))[3:, 2:]
    wanted = view.clone()
    interaction(*make(1))
    assert torch.equal(view, wanted)


def test_results_of_many_threads_do_not_share_memory():
    inputs = [make(seed, rows) for seed, rows in enumerate((70_000, 70_001, 90_000, 140_000))]
    wrong = []

    def work(index: int) -> None:
        for _ in range(6):
            result = interaction(*inputs[index])
            if not torch.allclose(result, reference.interaction(*inputs[index]), atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
