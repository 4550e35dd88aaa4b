"""DLRM under torch.compile without a graph break, and exported to a package that runs alone."""

import pytest
import torch
from torch import nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import DLRM
from shardwise.optim import RowWiseAdagrad, in_backward
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

pytestmark = [
    pytest.mark.usefixtures("no_shape_checks"),
    # torch's own tracing and packaging use what torch deprecates
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
KEYS = ["a", "b", "c"]


def model(**options) -> DLRM:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(50, 8, "a"),
        EmbeddingBagConfig(60, 8, "b"),
        EmbeddingBagConfig(20, 8, "c", feature_names=["c", "a"]),
    ]
    return DLRM(EmbeddingBagCollection(tables), 5, [16, 8], [12, 1], **options)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(0, 4, (3 * size,), generator=generator)
    ids = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    return torch.randn(size, 5, generator=generator), ids, lengths


def train(step: nn.Module, of: DLRM) -> list[torch.Tensor]:
    for size in (3, 5, 8, 1):
        dense, ids, lengths = batch(size)
        step(dense, KeyedJaggedTensor(KEYS, ids, lengths=lengths)).sum().backward()
    tables = of.sparse_arch.embedding_bag_collection.parameters()
    return [table.detach().clone() if table.grad is None else table.grad for table in tables]


@pytest.mark.parametrize("is_fused", [False, True])
def test_compiled_training_equals_eager(is_fused):
    eager, compiled = model(), model()
    if is_fused:
        for each in (eager, compiled):
            in_backward(each, RowWiseAdagrad, lr=0.1)
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(train(step, compiled), train(eager, eager), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo asks
def test_model_with_compiled_dense_parts_trains_as_the_eager_one():
    eager, compiled = model(), model(compile_dense=True)
    torch._dynamo.reset()
    for ours, wanted in zip(train(compiled, compiled), train(eager, eager), strict=True):
        torch.testing.assert_close(ours, wanted)
    for ours, wanted in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_training_equals_eager():
    eager, compiled = model(), model()
    for each in (eager, compiled):
        in_backward(each, RowWiseAdagrad, lr=0.1)
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True)
    for ours, wanted in zip(train(step, compiled), train(eager, eager), strict=True):
        torch.testing.assert_close(ours, wanted)


class Served(nn.Module):
    """Takes tensors only: lengths, not offsets, whose size would have to be derived."""

    def __init__(self, dlrm: DLRM) -> None:
        super().__init__()
        self.dlrm = dlrm

    def forward(self, dense, ids, lengths):
        return self.dlrm(dense, KeyedJaggedTensor(KEYS, ids, lengths=lengths))


def export(served: Served) -> torch.export.ExportedProgram:
    size, ids = torch.export.Dim("size", min=1, max=4096), torch.export.Dim("ids", min=0)
    shapes = {"dense": {0: size}, "ids": {0: ids}, "lengths": {0: 3 * size}}
    # Without this torch guards against a batch of one wherever a tensor of that size is made.
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(served, batch(4), dynamic_shapes=shapes)


SIZES = [1, 2, 3, 5, 8, 21, 64, 1000]


def test_exported_model_equals_eager_at_any_batch():
    served = Served(model().eval())
    exported = export(served).module()
    for size in SIZES:
        torch.testing.assert_close(exported(*batch(size)), served(*batch(size)))


@pytest.mark.slow
def test_packaged_model_equals_eager_at_any_batch(tmp_path):
    served = Served(model().eval())
    path = torch._inductor.aoti_compile_and_package(
        export(served), package_path=str(tmp_path / "dlrm.pt2")
    )
    packaged = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        torch.testing.assert_close(packaged(*batch(size)), served(*batch(size)))


def test_model_takes_a_keyed_jagged_tensor_through_export():
    dlrm = model().eval()
    dense, ids, lengths = batch(4)
    features = KeyedJaggedTensor(KEYS, ids, lengths=lengths)
    with torch.no_grad():
        exported = torch.export.export(dlrm, (dense, features)).module()
    torch.testing.assert_close(exported(dense, features), dlrm(dense, features))
