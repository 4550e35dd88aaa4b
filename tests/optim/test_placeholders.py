"""Classes that only name an update rule refuse to step."""

import pytest
import torch
from torch import nn

from shardwise.optim import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    LarsSGD,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
)

NAMES = [SGD, LarsSGD, LAMB, PartialRowWiseLAMB, Adam, PartialRowWiseAdam, Adagrad]


@pytest.mark.parametrize("optimizer_class", NAMES)
def test_step_says_how_to_use_the_rule(optimizer_class):
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = optimizer_class([param], lr=0.1)
    message = rf"\(3, 2\).*in_backward\(model, {optimizer_class.__name__}, lr=...\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", NAMES)
def test_option_that_the_rule_lacks_is_refused(optimizer_class):
    with pytest.raises(TypeError, match="nesterov"):
        optimizer_class([nn.Parameter(torch.ones(1))], nesterov=True)
