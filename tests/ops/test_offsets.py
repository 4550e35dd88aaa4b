import pytest
import torch

from shardwise.ops.offsets import offsets_from_lengths, reference


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", [0, 1, 63, 1000, 100_000, 2_100_001])
def test_offsets_equal_the_reference(size: int, dtype: torch.dtype) -> None:
    lengths = torch.randint(0, 5, (size,), dtype=dtype)
    offsets = offsets_from_lengths(lengths)
    assert offsets.dtype == dtype
    assert torch.equal(offsets, reference.offsets_from_lengths(lengths))


def test_offsets_do_not_depend_on_threads() -> None:
    lengths = torch.randint(0, 5, (200_001,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(offsets_from_lengths(lengths))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8])
def test_narrow_lengths_give_wide_offsets(dtype: torch.dtype) -> None:
    lengths = torch.full((5,), 100, dtype=dtype)
    assert offsets_from_lengths(lengths).tolist() == [0, 100, 200, 300, 400, 500]


def test_two_dimensional_lengths_are_read_in_order() -> None:
    lengths = torch.tensor([[1, 2], [3, 4]]).t()
    assert offsets_from_lengths(lengths).tolist() == [0, 1, 4, 6, 10]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_pass_opcheck(dtype: torch.dtype) -> None:
    lengths = torch.randint(0, 5, (63,), dtype=dtype)
    torch.library.opcheck(torch.ops.shardwise.offsets_from_lengths.default, (lengths,))
