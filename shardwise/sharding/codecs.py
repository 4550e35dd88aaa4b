"""How vectors are written into messages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Codecs:
    """The precision of vectors on their way.

    Attributes:
        forward: Of answers.
        backward: Of gradients.
    """

    forward: str = "fp32"
    backward: str = "fp32"
