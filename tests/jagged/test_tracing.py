"""No graph break under `torch.compile`, and export at any batch size."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.fx.experimental._config
import torch.utils._pytree as pytree

from shardwise.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor

BATCHES = [1, 2, 3, 5, 8, 21, 64, 1000]


pytestmark = pytest.mark.usefixtures("no_shape_checks", "no_compiled_code")


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(batch: int, is_weighted: bool = False) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 4, (3 * batch,), dtype=torch.int32, generator=generator)
    values = torch.randint(0, 100, (int(lengths.sum()),), generator=generator)
    weights = values / 10 if is_weighted else None
    return KeyedJaggedTensor(["a", "b", "c"], values, weights, lengths)


def construct(kjt: KeyedJaggedTensor) -> object:
    made = KeyedJaggedTensor(kjt.keys(), kjt.values() + 1, None, kjt.lengths())
    return made.keys(), made.offsets(), torch.ones(made.stride())


def permute(kjt: KeyedJaggedTensor) -> object:
    return kjt.permute([2, 0, 1])


def drop_and_repeat(kjt: KeyedJaggedTensor) -> object:
    return kjt.permute([2, 0, 2]).values() * 2


def split(kjt: KeyedJaggedTensor) -> object:
    return [(part.values() * 2, part.offsets()) for part in kjt.split([1, 0, 2])]


def get_item(kjt: KeyedJaggedTensor) -> object:
    return kjt["b"].values() * 2, kjt["b"].offsets(), kjt["b"].to_padded_dense(3)


def to_dict(kjt: KeyedJaggedTensor) -> object:
    return KeyedJaggedTensor.from_jt_dict(kjt.to_dict()).values() * 2


def concat(kjt: KeyedJaggedTensor) -> object:
    return KeyedJaggedTensor.concat([kjt, kjt.permute([1, 0, 2])]).offsets()


def regroup(kjt: KeyedJaggedTensor) -> object:
    values = kjt.lengths().reshape(-1, 3).float()
    keyed = [KeyedTensor(["a", "b"], [1, 2], values), KeyedTensor(["c"], [3], values * 2)]
    return KeyedTensor.regroup(keyed, [["c", "a"], ["b", "c"]])


def jagged_output(kjt: KeyedJaggedTensor) -> object:
    return {"b": JaggedTensor(kjt.values(), lengths=kjt.lengths())}


CASES = [
    construct, permute, drop_and_repeat, split, get_item, to_dict, concat, regroup, jagged_output
]  # fmt: skip


def assert_same(left: object, right: object) -> None:
    left_leaves, right_leaves = pytree.tree_leaves(left), pytree.tree_leaves(right)
    assert len(left_leaves) == len(right_leaves)
    for a, b in zip(left_leaves, right_leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_compiled_as_one_graph_equals_eager(case: Callable) -> None:
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5, 64, 1):
        assert_same(compiled(make(batch)), case(make(batch)))


def test_batch_sizes_compile_few_graphs() -> None:
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(permute, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5, 8, 64, 1000):
        compiled(make(batch))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_gradients_equal_eager() -> None:
    def loss(kjt: KeyedJaggedTensor, weights: torch.Tensor) -> torch.Tensor:
        kjt = KeyedJaggedTensor(kjt.keys(), kjt.values(), weights, kjt.lengths())
        return (kjt.permute([2, 2, 0]).weights() ** 2).sum()

    kjt = make(5, is_weighted=True)
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        weights = kjt.weights().clone().requires_grad_()
        function(kjt, weights).backward()
        grads.append(weights.grad)
    assert torch.equal(grads[0], grads[1])


def export(case: Callable) -> torch.export.ExportedProgram:
    class Model(torch.nn.Module):
        def forward(self, kjt: KeyedJaggedTensor) -> object:
            return case(kjt)

    example = make(8)
    shapes = [
        None if t is None else {0: torch.export.Dim.AUTO} for t in pytree.tree_leaves(example)
    ]
    # Sizes that follow from others are 1 at batch 1; this keeps export from ruling that out.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(Model(), (example,), dynamic_shapes=(shapes,))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_exported_program_equals_eager_at_any_batch(case: Callable) -> None:
    exported = export(case).module()
    for batch in BATCHES:
        assert_same(exported(make(batch)), case(make(batch)))


def test_offsets_are_no_input_of_an_exported_program() -> None:
    program = export(construct)
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    used = [n for n in program.graph.nodes if n.name in names and n.users]
    assert sorted(n.name for n in used) == ["kjt_lengths", "kjt_values"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_package_without_python_equals_eager(tmp_path) -> None:
    def everything(kjt: KeyedJaggedTensor) -> object:
        return [case(kjt) for case in (drop_and_repeat, split, get_item, concat, regroup)]

    path = torch._inductor.aoti_compile_and_package(
        export(everything), package_path=str(tmp_path / "model.pt2")
    )
    packaged = torch._inductor.aoti_load_package(path)
    for batch in BATCHES:
        assert_same(packaged(make(batch)), everything(make(batch)))
