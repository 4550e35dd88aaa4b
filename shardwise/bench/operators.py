"""Single operators on CPU: jagged inputs beside torchrec, pairs of vectors beside plain torch.

A `KeyedJaggedTensor` of 26 and of 500 keys, 1,024 and 8,192 samples, one id per bag, is made from
values and lengths; its offsets and its counts per key are computed; its keys are permuted, split,
taken apart and joined. The columns of two `KeyedTensor`s of half the keys each are regrouped into
three that take every third key. Each call gets an input that is made anew, so that nothing is
remembered. `pairs` are the dot products of 26 + 1 vectors of 2,048 samples, forward and backward,
beside `bmm` and the regroup of its triangle. `lookup` and `collection` look up one sample in 26
tables of 1,000 rows, as serving does, beside FBGEMM's operator and 26 `EmbeddingBag`s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from shardwise.bench.contenders import MAKERS, Tables, make_ours
from shardwise.bench.options import Options
from shardwise.bench.results import OURS, Results
from shardwise.bench.timing import Times, time_in_turn
from shardwise.jagged import KeyedJaggedTensor
from shardwise.ops.interaction import interaction
from shardwise.tables import EmbeddingBagCollection, EmbeddingBagConfig

CALLS = 100  # per timed round of the shortest: one alone is below the clock's noise


@dataclass(frozen=True)
class Case:
    """Sizes of one input; `width` is of each key's columns."""

    keys: int
    batch: int
    pooling: int = 1
    width: int = 64

    def draw(self) -> tuple[list[str], Tensor, Tensor]:
        """Give keys, values and lengths, every bag of one length."""
        generator = torch.Generator().manual_seed(0)
        num_bags = self.keys * self.batch
        values = torch.randint(0, 2**40, (num_bags * self.pooling,), generator=generator)
        lengths = torch.full((num_bags,), self.pooling)
        return [f"key_{i}" for i in range(self.keys)], values, lengths


Runs = Mapping[str, Callable[[int], object]]


def run(results: Results, options: Options) -> None:
    """Time all operators at every thread count."""
    cases = [Case(26, 1024), Case(26, 8192), Case(500, 1024, width=16), Case(500, 8192, width=16)]
    libraries = find_libraries(options.peers)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in cases[:1] if options.quick else cases:
            for name, prepare in JAGGED.items():
                runs = {library: prepare(kind, case) for library, kind in libraries.items()}
                _add(results, options, name, case, runs)
        pairs = Case(26, 64 if options.quick else 2048)
        _add(results, options, "pairs", pairs, prepare_pairs(pairs, options.peers))
        _add(results, options, "lookup", Case(26, 1), prepare_small(options.peers, is_op=True))
        _add(results, options, "collection", Case(26, 1), prepare_small(options.peers, is_op=False))


def _add(results: Results, options: Options, name: str, case: Case, runs: Runs) -> None:
    """Time contenders in turn: short ones many times a round."""
    calls = CALLS if name == "construct" or case.batch == 1 else 1

    def repeat(body: Callable[[int], object], i: int) -> None:
        for _ in range(calls):
            body(i)

    times = time_in_turn(
        {each: partial(repeat, body) for each, body in runs.items()}, options.repeats
    )
    what = {"operation": name, **vars(case), "threads": torch.get_num_threads()}
    results.add(what, {each: Times([s / calls for s in t.seconds]) for each, t in times.items()})


def find_libraries(peers: bool) -> dict[str, Any]:
    """Give the modules with the jagged types; says so where torchrec cannot be imported."""
    libraries = {OURS: import_module("shardwise.jagged")}
    try:
        if peers:
            libraries["torchrec"] = import_module("torchrec.sparse.jagged_tensor")
    except (ImportError, OSError) as error:
        print(f"without torchrec: {error}")
    return libraries


def prepare_jagged(
    call: Callable[[Any], object], library: Any, case: Case
) -> Callable[[int], object]:
    """Call something on an input that is made anew."""
    keys, values, lengths = case.draw()
    keyed_jagged = library.KeyedJaggedTensor
    return lambda _: call(keyed_jagged(keys, values, lengths=lengths))


def prepare_permute(library: Any, case: Case) -> Callable[[int], object]:
    """Put the keys into another order, weights absent."""
    order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(0)).tolist()
    return prepare_jagged(lambda features: features.permute(order), library, case)


def prepare_concat(library: Any, case: Case) -> Callable[[int], object]:
    """Join two inputs of half the keys each."""
    keys, values, lengths = case.draw()
    half = case.keys // 2
    cut = half * case.batch
    kind = library.KeyedJaggedTensor

    def concat(_: int) -> object:
        first = kind(keys[:half], values[: cut * case.pooling], lengths=lengths[:cut])
        second = kind(keys[half:], values[cut * case.pooling :], lengths=lengths[cut:])
        return kind.concat([first, second])

    return concat


def prepare_regroup(library: Any, case: Case) -> Callable[[int], object]:
    """Move the columns of two tensors into three."""
    keys, half = case.draw()[0], case.keys // 2
    inputs = [
        library.KeyedTensor(
            part, [case.width] * len(part), torch.randn(case.batch, case.width * len(part))
        )
        for part in (keys[:half], keys[half:])
    ]
    groups = [keys[start::3] for start in range(3)]
    return lambda _: library.KeyedTensor.regroup(inputs, groups)


JAGGED: dict[str, Callable[[Any, Case], Callable[[int], object]]] = {
    "construct": partial(prepare_jagged, lambda features: features),
    "offsets": partial(prepare_jagged, lambda features: features.offsets()),
    "length_per_key": partial(prepare_jagged, lambda features: features.length_per_key()),
    "permute": prepare_permute,
    "split": partial(
        prepare_jagged,
        lambda features: features.split([len(features.keys()) // 2, -(-len(features.keys()) // 2)]),
    ),
    "to_dict": partial(prepare_jagged, lambda features: features.to_dict()),
    "concat": prepare_concat,
    "regroup": prepare_regroup,
}


def prepare_pairs(case: Case, peers: bool) -> Runs:
    """Multiply all pairs of vectors, and give the gradients of a random one."""
    dense, sparse = (
        torch.randn(case.batch, case.width),
        torch.randn(case.batch, case.keys, case.width),
    )
    inputs = [dense.requires_grad_(), sparse.requires_grad_()]
    rows, columns = torch.triu_indices(case.keys + 1, case.keys + 1, offset=1)

    def in_torch(dense: Tensor, sparse: Tensor) -> Tensor:
        vectors = torch.cat([dense[:, None], sparse], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        return torch.cat([dense, products[:, rows, columns]], dim=1)

    grad = torch.randn_like(in_torch(dense, sparse))

    def step(multiply: Callable[..., Tensor], _: int) -> None:
        torch.autograd.grad(multiply(*inputs), inputs, grad)

    contenders = {OURS: interaction} | ({"torch": in_torch} if peers else {})
    return {name: partial(step, multiply) for name, multiply in contenders.items()}


def prepare_small(peers: bool, is_op: bool) -> Runs:
    """Look up one sample: the operator beside FBGEMM's, or the collection beside EmbeddingBags."""
    tables = Tables(26, 1000, 64, "fp32", "row_wise_adagrad")
    ids = torch.arange(26).view(26, 1, 1)
    contenders = {OURS: make_ours(tables)}
    for name in ("fbgemm" if is_op else "torch",) if peers else ():
        try:
            contenders[name] = MAKERS[name](tables)
        except (ImportError, AssertionError) as error:
            print(f"without {name}: {error}")
    runs: dict[str, Callable[[int], object]] = {
        name: _without_grad(partial(contender.forward, contender.prepare(ids)))
        for name, contender in contenders.items()
    }
    if is_op:
        names = [f"t{i}" for i in range(tables.num_tables)]
        collection = EmbeddingBagCollection(
            [EmbeddingBagConfig(tables.rows, tables.width, name) for name in names]
        )
        features = KeyedJaggedTensor(
            names, ids.flatten(), lengths=torch.ones(26, dtype=torch.int64)
        )
        call, shape, weights, *_ = collection.arguments(collection.prepare(features))
        operator = torch.ops.shardwise.lookup
        runs[OURS] = _without_grad(lambda: operator(*call, weights, *shape))
    return runs


def _without_grad(body: Callable[[], object]) -> Callable[[int], object]:
    def run_body(_: int) -> object:
        with torch.no_grad():
            return body()

    return run_body
