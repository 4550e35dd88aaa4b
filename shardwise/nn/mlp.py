"""Stacks of linear layers with activations between them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.nn.activation import Activation, find_activation
from shardwise.nn.initialization import Initialization, find_initialization


class Perceptron(nn.Module):
    """One linear layer and an activation.

    Args:
        in_size: Columns of the input.
        out_size: Columns of the output.
        bias: Whether the layer adds a learnt constant.
        activation: What follows the layer.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        init: How the weights start, the bias then at zero; None is as in `torch.nn.Linear`.

    Raises:
        ValueError: A size is not positive, or no activation or initialisation has the name.
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
        *,
        init: Initialization | None = None,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        if in_size < 1 or out_size < 1:
            raise ValueError(
                f"Perceptron: sizes must be positive, got in_size {in_size} and out_size {out_size}"
            )
        self._linear = nn.Linear(in_size, out_size, bias=bias, device=device, dtype=dtype)
        if init is not None:
            find_initialization(init)(self._linear.weight)
            if bias:
                nn.init.zeros_(self._linear.bias)
        self._activation_fn = find_activation(activation, out_size, device, dtype)

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
        return self._activation_fn(self._linear(x))


class MLP(nn.Module):
    """Perceptrons one after another. Parameters are `_mlp.<layer>._linear.<weight|bias>`.

    Args:
        in_size: Columns of the input.
        layer_sizes: Columns of each layer's output, the first layer's first.
        bias: Whether layers add a learnt constant.
        activation: What follows each layer; all share a module, each has
            its own `"swish_layernorm"`.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        activation_on_last: Whether an activation follows the last layer too.
        init: How the weights start, the biases then at zero; None is as in `torch.nn.Linear`.

    Raises:
        ValueError: There is no layer, a size is not positive, or no activation or initialisation
            has the name.
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
        *,
        init: Initialization | None = None,
    ) -> None:
        """Draw the weights, layer by layer."""
        super().__init__()
        if not layer_sizes:
            raise ValueError("MLP: layer_sizes is empty; give the width of at least one layer")
        activations = [activation] * len(layer_sizes)
        if not activation_on_last:
            activations[-1] = nn.Identity()
        sizes = zip([in_size, *layer_sizes], layer_sizes, activations, strict=False)
        self._mlp = nn.Sequential(
            *(
                Perceptron(wide, narrow, bias, act, device, dtype, init=init)
                for wide, narrow, act in sizes
            )
        )

    def forward(self, x: Float[Tensor, "*B wide"]) -> Float[Tensor, "*B narrow"]:
        """Apply the layers to the last dimension.

        Raises:
            ValueError: The input has another number of columns than `in_size`.
        """
        result: Tensor = self._mlp(x)
        return result
