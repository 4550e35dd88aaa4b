"""Cross nets: layers that multiply what they make of the input with the input itself.

x0 is the input [B, N] and x the output of the layer before; every layer has residual + x. Wang et
al., "Deep & Cross Network for Ad Click Predictions" (2017, arXiv:1708.05123) has the vector form,
"DCN V2" (2020, arXiv:2008.13535) the others. Parameters have the names and shapes they have in
TorchRec, so that its state dicts load.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.nn.activation import Activation, find_activation
from shardwise.nn.initialization import Initialization, find_initialization


class CrossNet(nn.Module):
    """Layers with a full matrix: x0 * (W x + b) + x.

    Args:
        in_features: N, the columns of the input and of the output.
        num_layers: How often the input is multiplied in.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        init: How the matrices start; biases start at zero.

    Raises:
        ValueError: A number is not positive, or no initialisation has the name.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        init: Initialization = "xavier_normal",
    ) -> None:
        """Draw the matrices."""
        super().__init__()
        _check_positive(self, in_features=in_features, num_layers=num_layers)
        self._in_features = in_features
        new = _Draw(num_layers, device, dtype, init)
        self.kernels = new.matrices(in_features, in_features)
        self.bias = new.zeros(in_features, 1)

    def forward(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """Cross the input with itself.

        Raises:
            ValueError: The input has another number of columns than `in_features`.
        """
        _check_columns(self, x, self._in_features)
        x0 = x
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x = x0 * nn.functional.linear(x, kernel, bias.squeeze(1)) + x
        return x


class VectorCrossNet(nn.Module):
    """Layers with one vector: x0 (w . x) + b + x.

    Args:
        in_features: N, the columns of the input and of the output.
        num_layers: How often the input is multiplied in.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        init: How the vectors [N, 1] start; biases start at zero.

    Raises:
        ValueError: A number is not positive, or no initialisation has the name.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        init: Initialization = "xavier_normal",
    ) -> None:
        """Draw the vectors."""
        super().__init__()
        _check_positive(self, in_features=in_features, num_layers=num_layers)
        self._in_features = in_features
        new = _Draw(num_layers, device, dtype, init)
        self.kernels = new.matrices(in_features, 1)
        self.bias = new.zeros(in_features, 1)

    def forward(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """Cross the input with itself.

        Raises:
            ValueError: The input has another number of columns than `in_features`.
        """
        _check_columns(self, x, self._in_features)
        x0 = x
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x = x0 * (x @ kernel) + bias.squeeze(1) + x
        return x


class LowRankCrossNet(nn.Module):
    """Layers with a matrix of low rank: x0 * (W (V x) + b) + x.

    Args:
        in_features: N, the columns of the input and of the output.
        num_layers: How often the input is multiplied in.
        low_rank: Rows of V and columns of W.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        init: How the matrices start; biases start at zero.

    Raises:
        ValueError: A number is not positive, or no initialisation has the name.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        low_rank: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        init: Initialization = "xavier_normal",
    ) -> None:
        """Draw the matrices."""
        super().__init__()
        _check_positive(self, in_features=in_features, num_layers=num_layers, low_rank=low_rank)
        self._in_features = in_features
        new = _Draw(num_layers, device, dtype, init)
        self.W_kernels = new.matrices(in_features, low_rank)
        self.V_kernels = new.matrices(low_rank, in_features)
        self.bias = new.zeros(in_features)

    def forward(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """Cross the input with itself.

        Raises:
            ValueError: The input has another number of columns than `in_features`.
        """
        _check_columns(self, x, self._in_features)
        linear, x0 = nn.functional.linear, x
        for w, v, bias in zip(self.W_kernels, self.V_kernels, self.bias, strict=True):
            x = x0 * linear(linear(x, v), w, bias) + x
        return x


class LowRankMixtureCrossNet(nn.Module):
    """Layers with experts of low rank: x0 * (sum of g_k U_k act(C_k act(V_k x)) + b) + x.

    The weights g are a softmax over the experts of a linear gate of x, one gate per expert that all
    layers share. One expert has no gate.

    Args:
        in_features: N, the columns of the input and of the output.
        num_layers: How often the input is multiplied in.
        num_experts: K.
        low_rank: Rows of each V and columns of each U.
        activation: Follows V and C; `"swish_layernorm"` is one that all of them share.
        device: Where the parameters lie.
        dtype: Number format of the parameters.
        init: How each expert's matrices start; biases start at zero.

    Raises:
        ValueError: A number is not positive, or no activation or initialisation has the name.
        TypeError: The activation cannot be called, or is a class.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        num_experts: int = 1,
        low_rank: int = 1,
        activation: Activation = torch.relu,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        init: Initialization = "xavier_normal",
    ) -> None:
        """Draw the matrices."""
        super().__init__()
        sizes = {"num_experts": num_experts, "low_rank": low_rank}
        _check_positive(self, in_features=in_features, num_layers=num_layers, **sizes)
        self._in_features = in_features
        new = _Draw(num_layers, device, dtype, init)
        self.U_kernels = new.matrices(num_experts, in_features, low_rank)
        self.V_kernels = new.matrices(num_experts, low_rank, in_features)
        self.C_kernels = new.matrices(num_experts, low_rank, low_rank)
        self.bias = new.zeros(in_features, 1)
        self.gates = nn.ModuleList(
            nn.Linear(in_features, 1, bias=False, device=device, dtype=dtype)
            for _ in range(num_experts if num_experts > 1 else 0)
        )
        self._activation = find_activation(activation, low_rank, device, dtype)

    def forward(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """Cross the input with itself.

        Raises:
            ValueError: The input has another number of columns than `in_features`.
        """
        _check_columns(self, x, self._in_features)
        linear, x0 = nn.functional.linear, x
        for u, v, c, bias in zip(
            self.U_kernels, self.V_kernels, self.C_kernels, self.bias, strict=True
        ):
            inner = self._activation(linear(x, v.flatten(0, 1)).unflatten(-1, v.shape[:2]))
            inner = self._activation(torch.einsum("krs,...ks->...kr", c, inner))  # (*B, K, r)
            if len(self.gates):
                inner = inner * self._weigh_experts(x).unsqueeze(-1)
            # The weights add up to one, so the bias is outside of the sum, which is one product.
            joined = u.transpose(0, 1).flatten(1)  # (N, K r)
            x = x0 * linear(inner.flatten(-2), joined, bias.squeeze(1)) + x
        return x

    def _weigh_experts(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B K"]:
        gates = torch.cat(list(self.gates.parameters()))  # (K, N)
        return nn.functional.linear(x, gates).softmax(-1)


class _Draw:
    """Makes parameters of one device and format, a list with one for each layer."""

    def __init__(
        self,
        num_layers: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
        init: Initialization,
    ) -> None:
        self._num_layers, self._device, self._dtype = num_layers, device, dtype
        self._fill = find_initialization(init)

    def matrices(self, *shape: int) -> nn.ParameterList:
        """Fill one matrix at a time, also where a layer has several."""
        kernels = [
            torch.empty(shape, device=self._device, dtype=self._dtype)
            for _ in range(self._num_layers)
        ]
        for kernel in kernels:
            for matrix in kernel.view(-1, *shape[-2:]):
                self._fill(matrix)
        return nn.ParameterList(nn.Parameter(kernel) for kernel in kernels)

    def zeros(self, *shape: int) -> nn.ParameterList:
        return nn.ParameterList(
            nn.Parameter(torch.zeros(shape, device=self._device, dtype=self._dtype))
            for _ in range(self._num_layers)
        )


def _check_positive(net: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{type(net).__name__}: {name} must be at least 1, got {size}")


def _check_columns(net: nn.Module, x: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{type(net).__name__}: the input has {x.shape[-1]} columns, the net was made for "
            f"{in_features}"
        )
