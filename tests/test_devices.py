"""Nothing is made on the CPU that belongs on the device of its input; seen without a GPU."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardwise import (
    DLRM,
    DLRM_DCN,
    BadIds,
    DLRM_Projection,
    DLRMTrain,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
    SimpleDeepFMNN,
)
from shardwise.data.batch import Batch
from shardwise.metrics import functional
from shardwise.ops.combine import combine, combine_grad, combine_weight_grads
from shardwise.ops.route import unpack
from shardwise.optim import in_backward
from tests.ops import test_combine, test_route
from tests.pretended_gpu import GPU, pretended_gpu


@pytest.fixture(autouse=True)
def gpu(no_shape_checks):
    with pretended_gpu() as device:
        yield device


def make_input(is_weighted: bool = False) -> KeyedJaggedTensor:
    """Two keys, three samples, on the GPU."""
    weights = torch.rand(8) if is_weighted else None
    lengths = torch.tensor([2, 0, 1, 1, 1, 3])
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 1, 2])
    return KeyedJaggedTensor(["a", "b"], ids, weights, lengths=lengths).to(GPU)


def make_tables(**options) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name="ta", embedding_dim=4, num_embeddings=10, feature_names=["a"]),
        EmbeddingBagConfig(name="tb", embedding_dim=4, num_embeddings=12, feature_names=["b"]),
    ]
    return EmbeddingBagCollection(tables=configs, **options).to(GPU)


def test_a_mixture_is_refused():
    with pytest.raises(RuntimeError, match=r"\(3,\) is on the CPU, another tensor on the GPU"):
        torch.ones(3, device=GPU) + torch.ones(3)


JAGGED: dict[str, Callable[[KeyedJaggedTensor], Tensor]] = {
    "permute": lambda kjt: kjt.permute([1, 0]).lengths(),
    "repeat": lambda kjt: kjt.permute([1, 0, 1]).values(),
    "split": lambda kjt: kjt.split([1, 1])[1].values(),
    "concat": lambda kjt: KeyedJaggedTensor.concat([kjt, kjt.permute([1, 0])]).lengths(),
    "offsets": lambda kjt: kjt["b"].offsets(),
    "bags": lambda kjt: kjt["b"].to_dense()[0],
    "from bags": lambda kjt: JaggedTensor.from_dense(kjt["a"].to_dense()).lengths(),
    "stack": lambda kjt: KeyedTensor.from_tensor_list(
        ["a", "b"], [kjt["a"].values()[:2, None], kjt["b"].values()[:2, None]]
    ).values(),
}


@pytest.mark.parametrize("name", JAGGED)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_jagged_tensors_stay_on_their_device(name, is_weighted):
    kjt = make_input(is_weighted)
    kjt.validate()
    assert JAGGED[name](kjt).device == GPU


def on_cpu(results: Iterable[Tensor]) -> list[Tensor]:
    return [result.cpu() for result in results]


def all_equal(results: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    pairs = zip(on_cpu(results), wanted, strict=True)
    return all(torch.equal(result, other) for result, other in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_ids_are_routed_and_unpacked_on_their_device(seed):
    """Tables of integers are on the CPU, and so are the counts of what was sent."""
    case = test_route.random_case(seed)
    moved = {name: getattr(case, name).to(GPU) for name in ("ids", "offsets", "weights")}
    routed = test_route.run(replace(case, **moved))
    assert [result.device == GPU for result in routed] == [True, False, False, *[True] * 3, False]
    assert all_equal(routed, test_route.by_reference(case))
    message, *counts = test_route.arrived(case, 0)
    options = (case.is_weighted, case.is_wide)
    unpacked = unpack(message.to(GPU), *counts, *options)
    assert all_equal(unpacked, unpack(message, *counts, *options))


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_combined_on_their_device(seed):
    case = test_combine.random_case(seed)
    names = ("entries", "entry_offsets", "offsets", "weights")
    call = case.call._replace(**{name: getattr(case.call, name).to(GPU) for name in names})
    grad, answer = case.grad().to(GPU), case.answer.to(GPU)
    results = [
        combine(answer, *call, case.rows, case.width),
        combine_grad(grad, *call, case.answer.numel(), 0.25),
        combine_weight_grads(grad, answer, *call),
    ]
    assert all_equal(results, test_combine.run_reference(case))


@pytest.mark.parametrize("bad_ids", BadIds)
@pytest.mark.parametrize("is_in_backward", [False, True])
def test_tables_train_on_their_device(bad_ids, is_in_backward):
    tables = make_tables(bad_ids=bad_ids)
    make = in_backward if is_in_backward else lambda m, cls, lr: cls(m.parameters(), lr)
    optimizer = make(tables, torch.optim.Adagrad, lr=0.1)
    before = [p.value.clone() for p in tables.parameters()]
    out = tables(make_input()).values()
    assert out.device == GPU
    out.sum().backward()
    optimizer.step()
    assert all((p.value != b).any() for p, b in zip(tables.parameters(), before, strict=True))


def test_weights_get_their_gradient_on_their_device():
    kjt = make_input(is_weighted=True)
    kjt.weights().requires_grad_()
    make_tables(is_weighted=True)(kjt).values().sum().backward()
    assert kjt.weights().grad.device == GPU


def test_vectors_per_id_and_a_variable_batch():
    configs = [
        EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["a", "b"])
    ]
    vectors = EmbeddingCollection(tables=configs).to(GPU)(make_input())
    assert vectors["b"].values().device == GPU
    varying = KeyedJaggedTensor(
        ["a", "b"],
        torch.arange(5, device=GPU),
        lengths=torch.tensor([2, 0, 3], device=GPU),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 1, 1], [0, 0, 0]], device=GPU)),
    )
    assert make_tables()(varying).values().shape == (3, 8)


BRANCHES = {
    "interaction_branch1_layer_sizes": [8, 8],
    "interaction_branch2_layer_sizes": [8, 8],
}
MODELS = {
    "DLRM": lambda tables: DLRM(tables, 3, [8, 4], [8, 1]),
    "DLRM_DCN": lambda tables: DLRM_DCN(tables, 3, [8, 4], [8, 1], 2, 2),
    "DLRM_Projection": lambda tables: DLRM_Projection(tables, 3, [8, 4], [8, 1], **BRANCHES),
    "DeepFM": lambda tables: SimpleDeepFMNN(3, tables, 8, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train_on_their_device(name):
    model = DLRMTrain(MODELS[name](make_tables())).to(GPU)
    batch = Batch(torch.rand(3, 3), make_input(), torch.tensor([0.0, 1.0, 0.0])).to(GPU)
    loss, _ = model(batch)
    loss.backward()
    assert all(parameter.grad.device == GPU for parameter in model.parameters())


def test_metrics_are_made_on_the_device_of_the_predictions():
    p, labels = torch.rand(1, 9).to(GPU), (torch.arange(9)[None] % 2).double().to(GPU)
    assert functional.auc(p, labels, torch.ones_like(labels)).device == GPU
