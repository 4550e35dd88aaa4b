"""Files of whole tensors: written and read in any layout, refused where they lie."""

import importlib
import json
import resource
from unittest import mock

import pytest
import torch

from shardwise.checkpoint.safetensors import export_safetensors, load_safetensors
from shardwise.checkpoint.source import blocks_here
from shardwise.checkpoint.tensor_file import DTYPES
from shardwise.sharding import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    shard,
    table_wise,
)
from shardwise.sharding.sliced import Block
from shardwise.tables import DataType, EmbeddingBagCollection, EmbeddingBagConfig

CONFIGS = [
    EmbeddingBagConfig(11, 8, "a"),
    EmbeddingBagConfig(3, 16, "b"),
    EmbeddingBagConfig(5, 4, "c", data_type=DataType.BF16),
]
LAYOUTS = {
    "rows": lambda ranks: {"a": row_wise(), "b": row_wise(), "c": data_parallel()},
    "columns": lambda ranks: {
        "a": column_wise([0, ranks - 1]),
        "b": column_wise([i % ranks for i in range(4)]),
        "c": table_wise(ranks - 1),
    },
    "grid": lambda ranks: {"a": grid_shard([0, 0]), "b": table_wise(0), "c": row_wise()},
}


class Model(torch.nn.Module):
    def __init__(self, configs=CONFIGS) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(configs)
        self.over = torch.nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))


def make(seed=0, ranks=0, layout="rows", configs=CONFIGS) -> Model:
    torch.manual_seed(seed)
    model = Model(configs)
    if ranks:
        plan = construct_module_sharding_plan(
            model.tables,
            LAYOUTS[layout](ranks),
            world_size=ranks,
            local_size=ranks,
            device_type="cpu",
        )
        shard(model.tables, plan)
    return model


def is_of(here, whole) -> bool:
    return torch.equal(here.value, Block(here.offsets, here.value.shape, ()).of(whole))


def differences(model, wanted) -> list[str]:
    """Names of the values of which a block here is not that of the wanted ones."""
    return [
        name
        for name, value in model.state_dict().items()
        if not all(is_of(one, wanted[name]) for one in blocks_here(value))
    ]


def export(rank, world_size, path, layout, options):
    model = make(1, world_size, layout)
    wire = model.tables.layout.wire
    before = wire.traffic.total()
    export_safetensors(model, path, **options)
    assert wire.traffic.total() == before


def load(rank, world_size, path, layout):
    model = make(2, world_size, layout)
    assert load_safetensors(path, model) == ([], [])
    return differences(model, make(1).state_dict())


@pytest.mark.parametrize(
    ("writers", "layout"), [(2, "rows"), (2, "columns"), (4, "columns"), (2, "grid")]
)
def test_ranks_write_the_file_that_one_process_writes(ranks, tmp_path, writers, layout):
    export_safetensors(make(1), tmp_path / "plain.safetensors")
    path = tmp_path / "new" / "sharded.safetensors"
    ranks(writers, export, path, layout, {})
    assert path.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("readers", "layout"), [(1, "rows"), (2, "columns"), (4, "rows"), (2, "grid")]
)
def test_any_layout_reads_its_own_blocks(ranks, tmp_path, readers, layout):
    export_safetensors(make(1), tmp_path / "model.safetensors")
    for found in ranks(readers, load, tmp_path / "model.safetensors", layout):
        assert found == []


def test_several_files_have_an_index(ranks, tmp_path):
    ranks(2, export, tmp_path / "model", "columns", {"max_shard_bytes": 400})
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values()}) == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    model = make(2)
    load_safetensors(tmp_path / "model", model)
    assert differences(model, make(1).state_dict()) == []
    with pytest.raises(FileExistsError, match="is there already"):
        export_safetensors(model, tmp_path / "model", max_shard_bytes=400)


def test_the_package_reads_what_is_written_and_the_reverse(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    export_safetensors(make(1), tmp_path / "ours.safetensors")
    theirs = package.load_file(tmp_path / "ours.safetensors")
    assert differences(make(1), theirs) == []
    package.save_file(theirs, tmp_path / "theirs.safetensors")
    assert load_safetensors(tmp_path / "theirs.safetensors", make(2)) == ([], [])


def test_file_has_the_bytes_of_the_format(tmp_path):
    """By hand, after the format's description: no package needed."""
    state = {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor([[1.5]])}
    export_safetensors(state, tmp_path / "x", metadata={"by": "me"})
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    assert json.loads(data[8 : 8 + size]) == {
        "__metadata__": {"format": "pt", "by": "me"},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [4, 6]},
    }
    assert data[8 + size :] == b"\0\0\xc0\x3f\1\2"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtype_goes_both_ways(tmp_path, dtype):
    values = {"x": torch.arange(12).view(3, 4).to(dtype), "none": torch.empty(0, 3, dtype=dtype)}
    export_safetensors(values, tmp_path / "x")
    into = {name: torch.ones_like(value) for name, value in values.items()}
    load_safetensors(tmp_path / "x", into)
    assert torch.equal(into["x"].view(torch.uint8), values["x"].view(torch.uint8))


@pytest.mark.parametrize("there", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("here", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_are_converted_as_torch_does(tmp_path, there, here):
    values = torch.randn(50, 4).mul(1e3).to(there)
    export_safetensors({"x": values}, tmp_path / "x")
    into = {"x": torch.empty(50, 4, dtype=here)}
    load_safetensors(tmp_path / "x", into)
    assert torch.equal(into["x"], values.to(here))


def test_bf16_table_goes_to_fp32_and_back_unchanged(tmp_path):
    wide = [EmbeddingBagConfig(5, 4, "c")]
    narrow = [EmbeddingBagConfig(5, 4, "c", data_type=DataType.BF16)]
    first, between, last = make(1, configs=narrow), make(2, configs=wide), make(3, configs=narrow)
    export_safetensors(first, tmp_path / "x")
    load_safetensors(tmp_path / "x", between)
    export_safetensors(between, tmp_path / "x")
    load_safetensors(tmp_path / "x", last)
    assert differences(last, first.state_dict()) == []


def test_one_table_or_what_is_there_can_be_loaded(tmp_path):
    export_safetensors(make(1), tmp_path / "x")
    before, model = make(2).state_dict(), make(2)
    load_safetensors(tmp_path / "x", model, only=["tables.embedding_bags.a", "ste*"])
    assert differences(model, before) == ["tables.embedding_bags.a.weight"]
    some = {"over.weight": torch.zeros(2, 3), "new": torch.zeros(1)}
    missing, unexpected = load_safetensors(tmp_path / "x", some, strict=False)
    assert missing == ["new"]
    assert len(unexpected) == 5
    assert torch.equal(some["over.weight"], make(1).over.weight)


def test_what_does_not_fit_changes_nothing(tmp_path):
    export_safetensors(make(1), tmp_path / "x")
    model = make(2)
    model.over = torch.nn.Linear(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"'over.weight' is \[2, 3\] torch.float32 there and \[2, 4\]"
    ):
        load_safetensors(tmp_path / "x", model)
    with pytest.raises(ValueError, match=r"it lacks \['y'\] and has .*'steps'.* too many"):
        load_safetensors(tmp_path / "x", {"y": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"only='tables.c' is neither"):
        load_safetensors(tmp_path / "x", model, only=["tables.c"])
    with pytest.raises(ValueError, match=r"'steps' is \[\] torch.int64 there"):
        load_safetensors(tmp_path / "x", {"steps": torch.tensor(1.0)}, strict=False)
    assert differences(model, before) == []


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ATTACKS = {
    "empty": (b"", "header would be"),
    "short": (b"\1\0\0", "header would be"),
    "header beyond the end": ((1 << 40).to_bytes(8, "little") + b"{}", "header would be 1099511"),
    "of torch.save": (b"PK\3\4" + b"\0" * 60, "damaged|header would be"),
    "no JSON": (with_header(b"{'x': 1}"), "damaged"),
    "no UTF-8": (with_header(b"\xff\xfe{}"), "damaged"),
    "deep JSON": (with_header(b"[" * 100_000), "damaged"),
    "no object": (with_header([1]), "no JSON object"),
    "name twice": (with_header(b'{"x": 1, "x": 2}'), "given twice"),
    "no entry": (with_header({"x": 3}), "'x': its header does not give"),
    "no offsets": (with_header({"x": {"dtype": "F32", "shape": []}}), "does not give"),
    "three offsets": (with_header({"x": entry(offsets=(0, 4, 8))}), "does not give"),
    "unknown dtype": (with_header({"x": entry("F31")}), "unknown dtype 'F31'"),
    "dtype is a list": (with_header({"x": entry(["F32"])}), "unknown dtype"),
    "negative shape": (with_header({"x": entry(shape=(-1, -2))}), "is no shape"),
    "huge shape": (with_header({"x": entry(shape=(2**62, 0), offsets=(0, 0))}), "is no shape"),
    "shape of floats": (with_header({"x": entry(shape=(2.0,))}), "is no shape"),
    "negative offset": (with_header({"x": entry(offsets=(-8, 0))}), "begins at byte"),
    "offsets not of the shape": (with_header({"x": entry(shape=(3,))}), "takes 12 bytes"),
    "overlap": (with_header({"x": entry(), "y": entry()}), "neither overlap"),
    "gap": (with_header({"x": entry(offsets=(4, 12))}, b"\0" * 12), "nor leave gaps"),
    "cut off": (with_header({"x": entry()}, b"\0" * 7), "cut off"),
    "something added": (with_header({"x": entry()}, b"\0" * 9), "something"),
    "metadata": (with_header({"__metadata__": {"a": 1}, "x": entry()}), "no map of texts"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_file_is_refused_by_name_and_reason(tmp_path, attack):
    data, reason = ATTACKS[attack]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)bad.safetensors: .*({reason})"):
        load_safetensors(tmp_path / "bad.safetensors", {"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("index", "error", "reason"),
    [
        ('{"weight_map": ', ValueError, "damaged"),
        ("[]", ValueError, "damaged"),
        ('{"weight_map": {"x": "../a"}}', ValueError, "no file beside it"),
        ('{"weight_map": {"x": 3}}', ValueError, "no file beside it"),
        ('{"weight_map": {"x": "b"}}', FileNotFoundError, "b: there is no such file"),
        ('{"weight_map": {"y": "a"}}', ValueError, "'y' is not in a"),
    ],
)
def test_damaged_index_is_refused(tmp_path, index, error, reason):
    export_safetensors({"x": torch.zeros(2)}, tmp_path / "a")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=reason):
        load_safetensors(tmp_path, {"x": torch.zeros(2)})


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors\.index\.json"):
        load_safetensors(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="none: there is no such file"):
        load_safetensors(tmp_path / "none", {})


def fail_to_export(rank, world_size, path):
    module = importlib.import_module("shardwise.checkpoint.safetensors")
    error = OSError(28, "No space left", str(path)) if rank == 1 else None
    with mock.patch.object(module, "_put", side_effect=error):
        export_safetensors(make(1, world_size, "columns"), path)


def test_failure_of_one_rank_leaves_the_old_file(ranks, tmp_path):
    export_safetensors({"x": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(OSError, match="No space left"):
        ranks(2, fail_to_export, tmp_path / "x")
    assert [*tmp_path.iterdir()] == [tmp_path / "x"]
    load_safetensors(tmp_path / "x", {"x": torch.ones(2)})


def test_full_disk_is_said_before_anything_is_written(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses more
    try:
        with pytest.raises(OSError, match=r"no room for its \d+ bytes \(File too large\).*/x'"):
            export_safetensors({"x": torch.zeros(1000)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == []


def test_what_no_file_holds_is_refused(tmp_path):
    model = make()
    type(model).get_extra_state = lambda self: 3
    try:
        with pytest.raises(TypeError, match="'_extra_state': a file of tensors cannot hold a int"):
            export_safetensors(model, tmp_path / "x")
    finally:
        del type(model).get_extra_state
    with pytest.raises(ValueError, match=r"has no dtype torch\.complex128"):
        export_safetensors({"x": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "x")
