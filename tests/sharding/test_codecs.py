"""Each codec keeps to its error and its bytes, whatever the sizes of the ranks' parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import in_backward
from shardwise.sharding import (
    EmbeddingBagCollectionSharder,
    construct_module_sharding_plan,
    row_wise,
    shard,
    table_wise,
)
from shardwise.sharding.codecs import (
    BF16,
    FP8,
    FP16,
    FP32,
    INT8,
    Codec,
    Codecs,
    CommOp,
    CommType,
    QCommsConfig,
    get_qcomm_codecs,
    get_qcomm_codecs_registry,
    read_registry,
)
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

ALL = [FP32, FP16, BF16, FP8, INT8]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def largest_errors(codec, flat, sizes, chunk):
    """What the table in the module allows each value to be off by."""
    if codec.precision in (CommType.FP8, CommType.INT8):
        pieces = [piece for part in flat.split(sizes) if len(part) for piece in part.split(chunk)]
        return torch.cat([chunk_errors(codec, piece, chunk) for piece in pieces])
    bits = {"fp32": 99, "fp16": 11, "bf16": 8}[str(codec.precision)]
    return (flat.abs() * 2.0**-bits).clamp(min=2.0**-25 if codec == FP16 else 0)


def chunk_errors(codec, piece, chunk):
    if codec == FP8:
        return (piece.abs() / 16).clamp(min=float(piece.abs().max()) / 448 / 1024)
    filled = torch.cat([piece, torch.zeros(chunk - len(piece))])
    return torch.full_like(piece, float(filled.max() - filled.min()) / 510)


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: str(codec.precision))
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), width=st.sampled_from([1, 4, 24]))
def test_values_come_back_within_the_stated_error(codec, sizes, width):
    sizes = [size * width for size in sizes] + [2 * width]
    flat = torch.randn(sum(sizes)) * torch.logspace(-3, 2, sum(sizes))
    message = codec.encode(flat, sizes, width)
    assert len(message) == sum(codec.encoded_sizes(sizes, width))
    back = codec.decode(message, sizes, width)
    assert back.dtype == torch.float32
    chunk = width if width >= 16 else 32
    slack = 1e-6 * flat.abs().max()  # of the arithmetic in float32
    assert ((back - flat).abs() <= largest_errors(codec, flat, sizes, chunk) + slack).all()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: str(codec.precision))
def test_messages_take_the_stated_bytes(codec):
    sizes, width = [64 * 100, 0, 64 * 7], 64
    message = codec.encode(torch.randn(sum(sizes)), sizes, width)
    per_chunk = {"fp8": 64 + 4, "int8": 64 + 8}.get(str(codec.precision), 0)
    expected = 107 * (per_chunk or BYTES[str(codec.precision)] * 64)
    assert message.numel() * message.element_size() == expected


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: str(codec.precision))
def test_each_ranks_part_can_be_read_alone(codec):
    sizes, width = [33, 0, 5, 64], 1
    flat = torch.randn(sum(sizes))
    message = codec.encode(flat, sizes, width)
    parts = message.split(codec.encoded_sizes(sizes, width))
    alone = [codec.decode(part, [size], width) for part, size in zip(parts, sizes, strict=True)]
    assert torch.equal(torch.cat(alone), codec.decode(message, sizes, width))


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: str(codec.precision))
def test_zeros_are_exact_and_infinity_is_seen(codec):
    flat = torch.zeros(64)
    assert torch.equal(codec.decode(codec.encode(flat, [64], 32), [64], 32), flat)
    for bad in (float("inf"), float("-inf"), float("nan")):
        flat[5] = bad
        back = codec.decode(codec.encode(flat, [64], 32), [64], 32)
        assert not back[5].isfinite()
        assert torch.equal(back[32:], flat[32:])


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: str(codec.precision))
def test_an_empty_message_stays_empty(codec):
    message = codec.encode(torch.empty(0), [0, 0], 24)
    assert message.numel() == codec.decode(message, [0, 0], 24).numel() == 0


def test_a_scale_keeps_small_gradients():
    small = torch.full((4,), 1e-8)
    scaled = Codec(CommType.FP16, scale=2.0**16)
    assert torch.equal(FP16.decode(FP16.encode(small, [4], 4), [4], 4), torch.zeros(4))
    torch.testing.assert_close(scaled.decode(scaled.encode(small, [4], 4), [4], 4), small)


def test_a_configuration_gives_the_codecs_by_what_they_are_for():
    config = QCommsConfig(
        forward_precision=CommType.FP8,
        backward_precision=CommType.FP16,
        backward_loss_scale=8.0,
        fp8_quantize_dim=16,
    )
    expected = Codecs(Codec(CommType.FP8, chunk=16), Codec(CommType.FP16, scale=8.0))
    assert get_qcomm_codecs(config) == expected
    registry = get_qcomm_codecs_registry(config, [CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL])
    assert registry == {"POOLED_EMBEDDINGS_ALL_TO_ALL": expected}
    assert read_registry(registry, is_pooled=True) == expected
    assert read_registry(registry, is_pooled=False) == Codecs()
    assert read_registry(None, is_pooled=True) == Codecs()


def test_codecs_that_cannot_both_hold_are_refused():
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType.BF16))
    registry["POOLED_EMBEDDINGS_REDUCE_SCATTER"] = Codecs()
    with pytest.raises(ValueError, match="one exchange carries both"):
        read_registry(registry, is_pooled=True)
    with pytest.raises(ValueError, match="codec int8: scale 2"):
        Codec(CommType.INT8, scale=2.0)
    with pytest.raises(ValueError, match="codec fp16: chunk 8"):
        Codec(CommType.FP16, chunk=8)


def train(rank, world_size, codecs):
    """Give the outputs before and the rows after one step of tables that lie in slices."""
    configs = [EmbeddingBagConfig(20, 16, name, feature_names=["f"]) for name in ("a", "b")]
    torch.manual_seed(0)
    bags = EmbeddingBagCollection(configs)
    optimizer = in_backward(bags, torch.optim.SGD, lr=1.0)
    if codecs is not None:
        plan = construct_module_sharding_plan(bags, {"a": row_wise(), "b": table_wise(rank=0)})
        sharder = EmbeddingBagCollectionSharder(
            qcomm_codecs_registry={op.name: codecs for op in CommOp}
        )
        shard(bags, plan, sharder=sharder)
    ids = torch.arange(20).repeat(2)
    batch = KeyedJaggedTensor(["f"], ids, lengths=torch.tensor([10, 10, 15, 5]))
    values = bags(batch).values()
    (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
    assert optimizer is not None
    rows = [v if codecs is None else v.full() for v in bags.state_dict().values()]
    return values.detach(), torch.stack(rows)


@pytest.mark.parametrize(
    ("codec", "error"), [(FP32, 1e-6), (FP16, 1e-3), (BF16, 1e-2), (FP8, 0.1), (INT8, 0.01)]
)
def test_sharded_tables_differ_by_the_codecs_error_only(ranks, codec, error):
    plain, rows = train(0, 1, None)
    for values, sharded_rows in ranks(2, train, Codecs(codec, codec)):
        assert 0 < (values - plain).abs().max() / plain.abs().max() < error or codec == FP32
        assert (sharded_rows - rows).abs().max() / rows.abs().max() < error
