"""How vectors are written into messages: in full, or shorter and less exactly.

| codec | bytes per value | largest error of a value x |
|---|---|---|
| fp32 | 4 | none |
| bf16 | 2 | 2^-8 abs(x) |
| fp16 | 2 | 2^-11 abs(x), at least 2^-25; beyond 65,504 it is infinite |
| fp8 | 1 + 4 / chunk | 2^-4 abs(x), at least 2^-10 m / 448, m being the chunk's largest abs(x) |
| int8 | 1 + 8 / chunk | (largest - smallest of the chunk) / 510 |

fp8 is e4m3, brought to its range by a float32 scale per chunk; int8 has a float32 scale and bias
per chunk. A chunk is as many values as all vectors of the messages have widths in common, so that
it lies within one vector; where that is below 16, it is 32 values, and each rank's part is filled
up with zeros to whole chunks. What is infinite or NaN does not arrive as a finite value.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_SHORTEST_CHUNK, _USUAL_CHUNK = 16, 32
_FP8_MAX = 448.0


@unique
class CommType(Enum):
    """The precisions of messages."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"

    def __str__(self) -> str:
        """Give the name as in messages."""
        return self.value


class _Chunked(NamedTuple):
    """Writes chunks, (N, chunk) float32, as bytes with `num_floats` float32 numbers behind each."""

    num_floats: int
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]


def _to_fp8(chunks: Tensor) -> tuple[Tensor, Tensor]:
    scale = chunks.abs().amax(1, keepdim=True) / _FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (chunks / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _from_fp8(data: Tensor, scale: Tensor) -> Tensor:
    return data.view(torch.float8_e4m3fn).float() * scale


def _to_int8(chunks: Tensor) -> tuple[Tensor, Tensor]:
    bias, top = chunks.aminmax(dim=1, keepdim=True)
    scale = (top - bias) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    steps = ((chunks - bias) / scale).round().nan_to_num(0.0).clamp(0, 255)
    return steps.to(torch.uint8), torch.cat([scale, bias], 1)


def _from_int8(data: Tensor, numbers: Tensor) -> Tensor:
    return data.float() * numbers[:, :1] + numbers[:, 1:]


_HALVES = {CommType.FP16: torch.float16, CommType.BF16: torch.bfloat16}
_CHUNKED = {
    CommType.FP8: _Chunked(1, _to_fp8, _from_fp8),
    CommType.INT8: _Chunked(2, _to_int8, _from_int8),
}


@dataclass(frozen=True)
class Codec:
    """Writes float32 numbers for the other ranks.

    Attributes:
        precision: How.
        scale: What numbers are multiplied by on their way, so that small ones survive fp16.
        chunk: Values that share a scale in fp8 and int8; None takes the widths of the vectors.
    """

    precision: CommType = CommType.FP32
    scale: float = 1.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.scale <= 0 or (self.scale != 1 and self.precision not in _HALVES):
            raise ValueError(
                f"codec {self.precision}: scale {self.scale}; want 1, or > 0 for 16 bit"
            )
        if self.chunk is not None and (self.chunk < 1 or self.precision not in _CHUNKED):
            raise ValueError(
                f"codec {self.precision}: chunk {self.chunk}; for fp8 and int8, and > 0"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The elements of a message."""
        if self.precision in _CHUNKED:
            return torch.uint8
        return _HALVES.get(self.precision, torch.float32)

    def encoded_sizes(self, sizes: Sequence[int], width: int) -> list[int]:
        """Give the elements that parts of a message take.

        Args:
            sizes: Values of each rank's part.
            width: The greatest common divisor of all vectors' widths.
        """
        if self.precision not in _CHUNKED:
            return list(sizes)
        chunk = self._chunk(width)
        step = chunk + 4 * _CHUNKED[self.precision].num_floats
        return [-(-size // chunk) * step for size in sizes]

    def encode(
        self, flat: Float[Tensor, " N"], sizes: Sequence[int], width: int
    ) -> Shaped[Tensor, " M"]:
        """Write a message.

        Args:
            flat: Each rank's part, one after another.
            sizes: See `encoded_sizes`, which gives the sizes of the parts of the result.
            width: See `encoded_sizes`.
        """
        if not len(flat):  # of which a float cannot be viewed as bytes
            return flat.new_empty(0, dtype=self.dtype)
        if self.precision not in _CHUNKED:
            return (flat if self.scale == 1 else flat * self.scale).to(self.dtype)
        chunk = self._chunk(width)
        if any(size % chunk for size in sizes):
            filled = [-(-size // chunk) * chunk for size in sizes]
            flat = flat.new_zeros(sum(filled)).index_copy_(0, _places(flat, sizes, filled), flat)
        data, numbers = _CHUNKED[self.precision].encode(flat.view(-1, chunk))
        return torch.cat([data, numbers.contiguous().view(torch.uint8)], 1).view(-1)

    def decode(
        self, message: Shaped[Tensor, " M"], sizes: Sequence[int], width: int
    ) -> Float[Tensor, " N"]:
        """Read what `encode` wrote; the arguments are as there.

        Returns:
            The values, float32.
        """
        if self.precision not in _CHUNKED or not len(message):
            flat = message.float()
            return flat if self.scale == 1 else flat / self.scale
        chunk = self._chunk(width)
        chunked = _CHUNKED[self.precision]
        rows = message.view(-1, chunk + 4 * chunked.num_floats)
        numbers = rows[:, chunk:].contiguous().view(torch.float32)
        flat = chunked.decode(rows[:, :chunk].contiguous(), numbers).view(-1)
        if any(size % chunk for size in sizes):
            filled = [-(-size // chunk) * chunk for size in sizes]
            flat = flat[_places(flat, sizes, filled)]
        return flat

    def _chunk(self, width: int) -> int:
        return self.chunk or (width if width >= _SHORTEST_CHUNK else _USUAL_CHUNK)


def _places(flat: Tensor, sizes: Sequence[int], filled: Sequence[int]) -> Tensor:
    """Where values lie once each rank's part is filled up."""
    counts = torch.tensor([sizes, filled], device=flat.device)
    starts = counts.cumsum(1) - counts
    shifts = (starts[1] - starts[0]).repeat_interleave(counts[0])
    return shifts + torch.arange(len(shifts), device=flat.device)


FP32, FP16, BF16 = Codec(), Codec(CommType.FP16), Codec(CommType.BF16)
FP8, INT8 = Codec(CommType.FP8), Codec(CommType.INT8)


@dataclass(frozen=True)
class Codecs:
    """How a collection's vectors travel.

    Attributes:
        forward: Answers.
        backward: Their gradients.
    """

    forward: Codec = FP32
    backward: Codec = FP32


# ---- under the names they go by elsewhere


class CommOp(Enum):
    """What a codec may be registered for; here all are parts of one exchange."""

    POOLED_EMBEDDINGS_ALL_TO_ALL = "pooled_embeddings_all_to_all"
    POOLED_EMBEDDINGS_REDUCE_SCATTER = "pooled_embeddings_reduce_scatter"
    SEQUENCE_EMBEDDINGS_ALL_TO_ALL = "sequence_embeddings_all_to_all"


@dataclass
class QCommsConfig:
    """The precision of messages.

    Attributes:
        forward_precision: Of answers.
        backward_precision: Of gradients.
        forward_loss_scale: See `Codec.scale`; None is 1.
        backward_loss_scale: The same for gradients.
        fp8_quantize_dim: See `Codec.chunk`; of fp8 only.
        fp8_quantize_dim_bwd: The same for gradients; None takes that of answers.
    """

    forward_precision: CommType = CommType.FP32
    backward_precision: CommType = CommType.FP32
    forward_loss_scale: float | None = None
    backward_loss_scale: float | None = None
    fp8_quantize_dim: int | None = None
    fp8_quantize_dim_bwd: int | None = None


def get_qcomm_codecs(qcomms_config: QCommsConfig | None) -> Codecs:
    """Give the codecs that a configuration asks for; None asks for none."""
    config = qcomms_config or QCommsConfig()

    def codec(precision: CommType, scale: float | None, chunk: int | None) -> Codec:
        return Codec(precision, scale or 1.0, chunk if precision is CommType.FP8 else None)

    chunk = config.fp8_quantize_dim
    return Codecs(
        codec(config.forward_precision, config.forward_loss_scale, chunk),
        codec(
            config.backward_precision,
            config.backward_loss_scale,
            config.fp8_quantize_dim_bwd or chunk,
        ),
    )


def get_qcomm_codecs_registry(
    qcomms_config: QCommsConfig,
    comm_ops: list[CommOp] | None = None,
    device: torch.device | None = None,
) -> dict[str, Codecs]:
    """Give the codecs by the name of what they are for, as sharders take them.

    Args:
        qcomms_config: The precisions.
        comm_ops: What they are for; None means everything.
        device: Makes no difference: all codecs work on all devices.
    """
    codecs = get_qcomm_codecs(qcomms_config)
    return {op.name: codecs for op in (CommOp if comm_ops is None else comm_ops)}


def read_registry(registry: Mapping[str, Codecs] | None, *, is_pooled: bool) -> Codecs:
    """Give the codecs that a registry has for a collection; without any, those that change nothing.

    Raises:
        ValueError: It has different ones for messages that are one here.
    """
    pooled = {CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER}
    wanted = pooled if is_pooled else {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL}
    found = {op.name: (registry or {})[op.name] for op in wanted if op.name in (registry or {})}
    if len(set(found.values())) > 1:
        raise ValueError(f"codecs {found}: one exchange carries both, so give both the same")
    return next(iter(found.values()), Codecs())
