"""Adagrad with one accumulator per row, for parameters with ordinary gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from shardwise.optim.slices import WholeRows, owner_of


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad that adds up the mean squared gradient of each row instead of each element.

    With g the gradient plus `weight_decay` times the weight, a step is

        sum += mean(g ** 2 over the row)
        weight -= lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

    The state is `step`, and `sum` [rows, 1] in float32 or wider; each element of a vector is a row.
    A row-sparse gradient gives the same weights as the dense one: it touches only its rows unless
    there is weight decay, which changes every row. As the rule of tables that are updated in
    backward (`optim.in_backward`), the decay reaches touched rows only.

    After J. Duchi, E. Hazan, Y. Singer, "Adaptive subgradient methods", JMLR 12, 2011, with the
    diagonal averaged over rows.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate; a number or a tensor.
        lr_decay: How fast the learning rate falls with the number of steps.
        weight_decay: L2 penalty.
        initial_accumulator_value: What `sum` starts from.
        eps: Added to the denominator.
        maximize: Go up the gradient instead of down.

    Raises:
        ValueError: A number is negative.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        """Make the state of all parameters."""
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"RowWiseAdagrad: {name} must be at least 0, got {value}")
        super().__init__(params, {**defaults, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters and make their state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            num_rows = param.shape[0] if param.dim() else 1
            self.state[param] = {
                "step": torch.zeros(()),
                "sum": torch.full(
                    (num_rows, 1),
                    float(group["initial_accumulator_value"]),
                    dtype=torch.promote_types(param.dtype, torch.float32),
                    device=param.device,
                ),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What `closure` returned.

        Raises:
            ValueError: A gradient is sparse in more than rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        means = _means_of_whole_rows(self.param_groups)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    _update(param, self.state[param], group, means.get(param))
        return loss


def _means_of_whole_rows(groups: Sequence[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Give the mean squared gradients [N] of rows that go on in other slices than a parameter."""
    by_owner: dict[WholeRows, dict[int, Tensor]] = {}
    numbers: dict[Tensor, tuple[WholeRows, int]] = {}
    for group in groups:
        for param in group["params"]:
            owner = owner_of(param)
            if owner is None or owner.rows is None:
                continue
            sums = by_owner.setdefault(owner.rows, {})
            if param.grad is not None and param.numel():
                numbers[param] = owner.rows, owner.number
                grad = _prepared(param, group)
                values = grad.values() if grad.is_sparse else grad
                sums[owner.number] = values.float().square().sum(1)
    means = {owner: owner.mean(sums) for owner, sums in by_owner.items()}
    return {param: means[owner][number] for param, (owner, number) in numbers.items()}


def _prepared(param: Tensor, group: dict[str, Any]) -> Tensor:
    """Give the gradient with sign and decay; coalesced if it is sparse."""
    grad = param.grad
    assert grad is not None, "a parameter is updated when it has a gradient"
    if grad.is_sparse and grad.sparse_dim() != 1:
        raise ValueError(
            f"RowWiseAdagrad: parameter {tuple(param.shape)} has a gradient that is sparse in "
            f"{grad.sparse_dim()} dimensions; only rows may be sparse"
        )
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"]:
        grad = grad.to_dense() if grad.is_sparse else grad
        grad = grad.add(param, alpha=group["weight_decay"])
    return grad.coalesce() if grad.is_sparse else grad


def _update(
    param: Tensor, state: dict[str, Any], group: dict[str, Any], means: Tensor | None
) -> None:
    grad = _prepared(param, group)
    state["step"] += 1
    rate = group["lr"] / (1 + (state["step"].item() - 1) * group["lr_decay"])
    total = state["sum"]
    if grad.is_sparse:
        rows, values = grad.indices()[0], grad.values()
        touched = total[rows]
        step = _add_up(values[..., None].flatten(1), touched, rate, group["eps"], means)
        total.index_copy_(0, rows, touched)
        param.index_copy_(0, rows, (param[rows] - step.view_as(values)).to(param.dtype))
    else:
        flat = grad.reshape(total.shape[0], -1)
        step = _add_up(flat, total, rate, group["eps"], means)
        param.copy_(param - step.view(param.shape))


def _add_up(
    grad: Tensor, total: Tensor, rate: float | Tensor, eps: float, means: Tensor | None
) -> Tensor:
    """Add to the sums of rows in place, and give what to subtract from the rows."""
    grad = grad.to(total.dtype)
    total += grad.square().mean(1, keepdim=True) if means is None else means[:, None]
    denominator: Tensor = total.sqrt() + eps
    return rate * grad / denominator
