"""Activations: functions by name, and one that learns."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor]
"""A function, a module (layers share its parameters), or the name of one."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
    "relu": torch.relu,
    "selu": nn.functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
}


class SwishLayerNorm(nn.Module):
    """Swish with a normalised gate: x * sigmoid(layer_norm(x)). Parameters are `norm.0.*`.

    Args:
        input_dims: The last dimensions of the input, over which it is normalised together.
        device: Where the parameters lie.
        dtype: Number format of the parameters.

    Raises:
        ValueError: A dimension is not positive.
    """

    def __init__(
        self,
        input_dims: int | list[int] | torch.Size,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start the normalisation at scale one and shift zero."""
        super().__init__()
        dims = [input_dims] if isinstance(input_dims, int) else list(input_dims)
        if not dims or min(dims) < 1:
            raise ValueError(f"SwishLayerNorm: input_dims must be positive, got {input_dims}")
        self._dims = dims
        norm = nn.LayerNorm(dims, device=device, dtype=dtype)
        self.norm = nn.Sequential(norm, nn.Sigmoid())

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Scale each element by its gate.

        Raises:
            ValueError: The input ends in other dimensions than `input_dims`.
        """
        if list(x.shape[-len(self._dims) :]) != self._dims:
            raise ValueError(
                f"SwishLayerNorm: the input has shape {list(x.shape)}, which must end in "
                f"input_dims, {self._dims}"
            )
        gated: Tensor = x * self.norm(x)
        return gated


def find_activation(
    activation: Activation,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Tensor]:
    """Give the function of an activation.

    Args:
        activation: `"swish_layernorm"` makes a new `SwishLayerNorm`; other names are of functions.
        width: Last dimension of what it will be applied to.
        device: Where the parameters of a new module lie.
        dtype: Number format of the parameters of a new module.

    Raises:
        ValueError: There is none of that name; lists those there are.
        TypeError: It is not a name and cannot be called, or is a class.
    """
    if activation == "swish_layernorm":
        return SwishLayerNorm(width, device, dtype=dtype)
    if isinstance(activation, str):
        if activation not in _FUNCTIONS:
            known = ", ".join(sorted([*_FUNCTIONS, "swish_layernorm"]))
            raise ValueError(
                f"activation {activation!r} is unknown; known are {known}, or give a function"
            )
        return _FUNCTIONS[activation]
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(
            f"activation {activation!r}: give a name, a function on a tensor, or a module such as "
            f"torch.nn.PReLU()"
        )
    return activation
