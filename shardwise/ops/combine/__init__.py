"""Put answers together: add partials up, pool rows, divide means, lay columns side by side.

See `reference` for the definition.
"""

from typing import Any

import torch

from shardwise.ops.combine import reference
from shardwise.ops.combine.reference import Call
from shardwise.ops.library import register

__all__ = ["Call", "combine", "combine_grad", "combine_weight_grads"]


def _fake_combine(answer: Any, *arguments: Any) -> Any:
    return answer.new_empty(arguments[-2], arguments[-1], dtype=torch.float32)


combine = register("combine", reference=reference.combine, fake=_fake_combine)
combine_grad = register(
    "combine_grad",
    reference=reference.combine_grad,
    fake=lambda grad, *a: grad.new_empty(a[-2], dtype=torch.float32),
)
combine_weight_grads = register(
    "combine_weight_grads",
    reference=reference.combine_weight_grads,
    fake=lambda grad, answer, *a: grad.new_empty(a[4].shape[0], dtype=torch.float32),
)
