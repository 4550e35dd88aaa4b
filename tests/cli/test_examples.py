import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")  # the extra is there as a whole or not

from shardwise.cli.settings import read_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_lowers_its_own_loss():
    names = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    batch = (torch.rand(2, 2), names["sparse"], torch.tensor([1.0, 0.0]))
    before = names["loss"].item()
    for _ in range(20):
        loss, _ = names["model"](names["sw"].Batch(*batch))
        loss.backward()
        names["optimizer"].step()
    assert loss.item() < before


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_shown_can_be_read(path):
    assert read_config(path).train.seed == 0
