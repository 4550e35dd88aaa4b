import dataclasses

import pytest
import torch

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor, validate_keyed_jagged_tensor


@dataclasses.dataclass
class Table:
    name: str
    num_embeddings: int
    feature_names: list[str]


def keyed(**changes) -> KeyedJaggedTensor:
    """a: [0], [1, 2]; b: [], [3]."""
    fields = {"values": torch.arange(4), "lengths": torch.tensor([1, 2, 0, 1]), **changes}
    return KeyedJaggedTensor(fields.pop("keys", ["a", "b"]), **fields)


def variable(rows: list[list[int]], keys: list[str]) -> dict[str, object]:
    return {"inverse_indices": (keys, torch.tensor(rows)), "stride_per_key_per_rank": [[2], [2]]}


def test_good_input_passes() -> None:
    assert keyed(weights=torch.ones(4)).validate() is None
    assert keyed(lengths=None, offsets=torch.tensor([0, 1, 3, 3, 4])).validate() is None
    assert keyed(**variable([[0, 1, 1], [1, 0, 0]], ["b", "a"])).validate() is None
    assert KeyedJaggedTensor.empty().validate() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([1, 2, -1, 2])}, "key 'b', sample 0: length -1 is negative"),
        ({"lengths": torch.tensor([1, 2, 0, 2])}, "lengths sum to 5 but there are 4 values"),
        ({"lengths": torch.tensor([1, 2, 1])},
         r"2 keys with \[1, 1\] samples need 2 lengths, got 3"),
        ({"stride": 3}, r"2 keys with \[3, 3\] samples need 6 lengths, got 4"),
        ({"weights": torch.ones(3)}, "3 weights but 4 values"),
        ({"keys": ["a", "a"]}, r"key 'a' appears twice in \['a', 'a'\]"),
        ({"lengths": None, "offsets": torch.tensor([1, 1, 3, 3, 4])}, "offsets start with 1"),
        ({"lengths": None, "offsets": torch.tensor([0, 1, 3, 2, 4])},
         "key 'b', sample 0: offsets decrease from 3 to 2"),
        ({"lengths": None, "offsets": torch.tensor([0, 1, 3, 3, 5])},
         "offsets end with 5 but there are 4 values"),
        ({"offsets": torch.tensor([0, 1, 3, 4])}, "4 bags need 5 offsets, got 4"),
        ({"offsets": torch.tensor([0, 1, 2, 3, 4])},
         "key 'a', sample 1: length 2 but offsets 1 to 2"),
        (variable([[0, 1, 2], [0, 0, 0]], ["b", "a"]),
         "key 'b', sample 2: inverse index 2 is not one of its 2 samples"),
        (variable([[0, 0, 0], [-1, 0, 0]], ["a", "b"]), "key 'b', sample 0: inverse index -1"),
        (variable([[0, 1, 1], [0, 0, 0]], ["b", "c"]),
         r"key 'a': inverse indices lack it; they have \['b', 'c'\]"),
        (variable([[0, 1, 1]], ["a", "b"]), r"for 2 keys must have as many rows .* got \(1, 3\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keyed(**changes).validate()


def test_sample_is_counted_within_its_key_where_strides_differ() -> None:
    kjt = keyed(lengths=torch.tensor([1, 2, 2, -1]), stride_per_key_per_rank=[[1], [3]])
    with pytest.raises(ValueError, match="key 'b', sample 2: length -1"):
        kjt.validate()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([2, -1, 3], "sample 1: length -1"), ([1, 2], "lengths sum to 3 but there are 4 values")],
)
def test_tensor_without_keys_names_the_sample(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"JaggedTensor.*{message}"):
        JaggedTensor(torch.arange(4), lengths=torch.tensor(lengths)).validate()


def test_ids_within_their_tables_pass() -> None:
    tables = [Table("t", 4, ["a", "b"]), Table("u", 1, ["c"])]
    assert validate_keyed_jagged_tensor(keyed(), tables)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 7, 0], "key 'a', sample 1: id 7 is not a row of table 't', which has 3 rows"),
        ([0, 1, 0, -2], "key 'b', sample 1: id -2 is not a row of table 't'"),
    ],
)
def test_ids_outside_their_table_are_named(values: list[int], message: str) -> None:
    tables = [Table("t", 3, ["a", "b"])]
    with pytest.raises(ValueError, match=message):
        validate_keyed_jagged_tensor(keyed(values=torch.tensor(values)), tables)
