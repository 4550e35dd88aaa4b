"""Each codec keeps to its error and its bytes, whatever the sizes of the ranks' parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
