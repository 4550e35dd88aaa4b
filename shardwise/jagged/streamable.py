"""What a pipeline asks of a batch: that it moves between devices and tells streams of its use."""

import abc

import torch


class Multistreamable(abc.ABC):
    """Something whose memory is used on several device streams."""

    __slots__ = ()

    @abc.abstractmethod
    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being reused before the work queued on `stream` is done."""


class Pipelineable(Multistreamable):
    """A batch that a pipeline can copy to a device ahead of its use."""

    __slots__ = ()

    @abc.abstractmethod
    def to(self, device: torch.device, non_blocking: bool = False) -> "Pipelineable":
        """Give the same batch on `device`."""
