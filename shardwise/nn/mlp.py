"""Stacks of linear layers with activations between them."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor]
"""A function, a module (layers share its parameters), or the name of a function."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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


class Perceptron(nn.Module):
    """One linear layer and an activation.

    Args:
        in_size: Columns of the input.
        out_size: Columns of the output.
        bias: Whether the layer adds a learnt constant.
        activation: What follows the layer.
        device: Where the parameters lie.
        dtype: Number format of the parameters.

    Raises:
        ValueError: A size is not positive, or no activation has the name.
        TypeError: The activation cannot be called, or is a class.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool = True,
        activation: Activation = torch.relu,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Draw the weights as `torch.nn.Linear` does."""
        super().__init__()
        if in_size < 1 or out_size < 1:
            raise ValueError(
                f"Perceptron: sizes must be positive, got in_size {in_size} and out_size {out_size}"
            )
        self._linear = nn.Linear(in_size, out_size, bias=bias, device=device, dtype=dtype)
        self._activation = find_activation(activation)

    def forward(self, x: Float[Tensor, "*B wide"]) -> Float[Tensor, "*B narrow"]:
        """Apply the layer to the last dimension.

        Raises:
            ValueError: The input has another number of columns than `in_size`.
        """
        if x.shape[-1] != self._linear.in_features:
            raise ValueError(
                f"Perceptron: the input has {x.shape[-1]} columns, the layer was made for "
                f"{self._linear.in_features}"
            )
        return self._activation(self._linear(x))


class MLP(nn.Module):
    """Perceptrons one after another. Parameters are `_mlp.<layer>._linear.<weight|bias>`.

    Args:
        in_size: Columns of the input.
        layer_sizes: Columns of each layer's output, the first layer's first.
        bias: Whether layers add a learnt constant.
        activation: What follows each layer; a module is shared by all of them.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        activation_on_last: Whether an activation follows the last layer too.

    Raises:
        ValueError: There is no layer, a size is not positive, or no activation has the name.
        TypeError: The activation cannot be called, or is a class.
    """

    def __init__(
        self,
        in_size: int,
        layer_sizes: list[int],
        bias: bool = True,
        activation: Activation = torch.relu,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        activation_on_last: bool = True,
    ) -> None:
        """Draw the weights as `torch.nn.Linear` does, layer by layer."""
        super().__init__()
        if not layer_sizes:
            raise ValueError("MLP: layer_sizes is empty; give the width of at least one layer")
        activations = [activation] * len(layer_sizes)
        if not activation_on_last:
            activations[-1] = nn.Identity()
        sizes = zip([in_size, *layer_sizes], layer_sizes, activations, strict=False)
        self._mlp = nn.Sequential(
            *(Perceptron(wide, narrow, bias, act, device, dtype) for wide, narrow, act in sizes)
        )

    def forward(self, x: Float[Tensor, "*B wide"]) -> Float[Tensor, "*B narrow"]:
        """Apply the layers to the last dimension.

        Raises:
            ValueError: The input has another number of columns than `in_size`.
        """
        result: Tensor = self._mlp(x)
        return result


def find_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Give the function of an activation.

    Raises:
        ValueError: There is none of that name; lists those there are.
        TypeError: It is not a name and cannot be called, or is a class.
    """
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is unknown; known are {', '.join(_ACTIVATIONS)}, "
                f"or give a function"
            )
        return _ACTIVATIONS[activation]
    if isinstance(activation, type) or not callable(activation):
        raise TypeError(
            f"activation {activation!r}: give a name, a function on a tensor, or a module such as "
            f"torch.nn.PReLU()"
        )
    return activation
