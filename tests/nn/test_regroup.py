"""Regroup as a module: values, options, layouts that change, refused input."""

import pytest
import torch

from shardwise.jagged import KeyedTensor
from shardwise.nn import KTRegroupAsDict
from shardwise.tables import DataType

GROUPS, KEYS = [["c", "a"], ["b"], ["a", "b"]], ["first", "second", "third"]


def keyed_tensors(*widths: int, device: str = "cpu") -> list[KeyedTensor]:
    a, b, c = (torch.randn(5, width, device=device) for width in widths)
    return [KeyedTensor.from_tensor_list(["a", "b"], [a, b]), KeyedTensor(["c"], [c.shape[1]], c)]


def expected(first: KeyedTensor, second: KeyedTensor) -> dict[str, torch.Tensor]:
    a, b, c = first["a"], first["b"], second["c"]
    return {"first": torch.cat([c, a], 1), "second": b, "third": torch.cat([a, b], 1)}


def test_groups_are_joined_and_named():
    given = keyed_tensors(2, 3, 4)
    actual = KTRegroupAsDict(GROUPS, KEYS)(given)
    assert list(actual) == KEYS
    assert all(torch.equal(actual[key], value) for key, value in expected(*given).items())


def test_widths_may_change_between_calls():
    regroup = KTRegroupAsDict(GROUPS, KEYS)
    for widths in [(2, 3, 4), (4, 2, 3)]:
        given = keyed_tensors(*widths)
        assert torch.equal(regroup(given)["first"], expected(*given)["first"])


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16, DataType.FP32])
def test_results_have_the_asked_format(data_type):
    given = keyed_tensors(2, 3, 4)
    actual = KTRegroupAsDict(GROUPS, KEYS, emb_dtype=data_type)(given)
    for key, value in expected(*given).items():
        assert torch.equal(actual[key], value.to(data_type.dtype))


def test_several_devices_need_to_be_allowed():
    given = [keyed_tensors(2, 3, 4, device="meta")[0], keyed_tensors(2, 3, 4)[1]]
    with pytest.raises(ValueError, match=r"of \['c'\] lies on cpu, that of \['a', 'b'\] on meta"):
        KTRegroupAsDict(GROUPS, KEYS)(given)
    actual = KTRegroupAsDict(GROUPS, KEYS, multi_device=True)(given)
    assert {value.device.type for value in actual.values()} == {"meta"}
    assert [value.shape for value in actual.values()] == [(5, 6), (5, 3), (5, 5)]


def test_groups_and_keys_must_match():
    with pytest.raises(ValueError, match=r"got 3 groups and keys \['x'\]"):
        KTRegroupAsDict(GROUPS, ["x"])
    with pytest.raises(ValueError, match="as many different keys"):
        KTRegroupAsDict([["a"], ["b"]], ["x", "x"])


def test_missing_key_is_named():
    with pytest.raises(KeyError, match="no tensor has the key 'c'"):
        KTRegroupAsDict(GROUPS, KEYS)(keyed_tensors(2, 3, 4)[:1])


@pytest.mark.usefixtures("no_shape_checks")
def test_compiles_to_one_graph():
    given = keyed_tensors(2, 3, 4)
    regroup = KTRegroupAsDict(GROUPS, KEYS, emb_dtype=DataType.BF16)
    torch._dynamo.reset()
    actual = torch.compile(regroup, fullgraph=True, backend="aot_eager")(given)
    assert all(torch.equal(actual[key], value) for key, value in regroup(given).items())
