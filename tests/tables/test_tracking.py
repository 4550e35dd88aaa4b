"""Which rows have changed since a consumer last asked, of a model in one process."""

import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor
from shardwise.optim import KeyedOptimizerWrapper, RowWiseAdagrad, in_backward
from shardwise.tables import (
    BadIds,
    DeltaStore,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    ModelDeltaTracker,
    TrackingMode,
)

CONFIGS = [
    EmbeddingBagConfig(20, 4, "a", feature_names=["x", "y"]),
    EmbeddingBagConfig(30, 8, "b", feature_names=["y"]),
]
PATH = "embedding_bags"


def make(**options) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(CONFIGS, **options)


def batch(x, y) -> KeyedJaggedTensor:
    lengths = torch.tensor([len(x), 0, 0, len(y)])
    return KeyedJaggedTensor(["x", "y"], torch.tensor([*x, *y]), lengths=lengths)


def train(model, optimizer, x, y) -> None:
    optimizer.zero_grad()
    model(batch(x, y)).values().square().sum().backward()
    optimizer.step()


def ids(tracker, consumer=None) -> dict[str, list[int]]:
    found = tracker.get_delta_ids(consumer)
    return {name.removeprefix(f"{PATH}."): rows.tolist() for name, rows in found.items()}


OPTIMIZERS = {
    "backward": lambda m: in_backward(m, RowWiseAdagrad, lr=0.1),
    "step": lambda m: in_backward(m, torch.optim.Adam, when="step", lr=0.1),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "wrapped": lambda m: KeyedOptimizerWrapper(
        dict(m.named_parameters()), lambda p: torch.optim.Adagrad(p, lr=0.1)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_a_step_are_given_once_and_ascending(name):
    model = make()
    optimizer, tracker = OPTIMIZERS[name](model), ModelDeltaTracker(model)
    train(model, optimizer, [7, 3, 7], [9])
    train(model, optimizer, [3], [29 - 12, 1])
    assert ids(tracker) == {"a": [1, 3, 7, 9, 17], "b": [1, 9, 17]}
    assert ids(tracker) == {"a": [], "b": []}


def test_sparse_gradients_are_tracked():
    model = make(sparse=True)
    optimizer, tracker = torch.optim.SparseAdam(model.parameters()), ModelDeltaTracker(model)
    train(model, optimizer, [7, 3, 7], [9])
    assert ids(tracker) == {"a": [3, 7, 9], "b": [9]}


def test_an_optimizer_that_moves_rows_without_gradient_changes_all():
    model = make()
    optimizer, tracker = torch.optim.Adam(model.parameters()), ModelDeltaTracker(model)
    train(model, optimizer, [7], [9])
    assert ids(tracker) == {"a": [*range(20)], "b": [*range(30)]}


def test_what_is_only_looked_up_has_not_changed():
    model = make()
    OPTIMIZERS["backward"](model)
    tracker = ModelDeltaTracker(model)
    model(batch([1], [2]))
    with torch.no_grad():
        model(batch([3], [4]))
    assert ids(tracker) == {"a": [], "b": []}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(BadIds.IGNORE, [3]), (BadIds.CLIP, [0, 3, 19]), (BadIds.HASH, [3, 5, 19])],
)
def test_bad_ids_change_the_rows_that_their_policy_names(policy, expected):
    model = make(bad_ids=policy)
    optimizer, tracker = OPTIMIZERS["backward"](model), ModelDeltaTracker(model)
    train(model, optimizer, [-1, 3, 25], [])
    assert ids(tracker)["a"] == expected


def test_sequences_are_tracked():
    model = EmbeddingCollection([EmbeddingConfig(9, 4, "t", feature_names=["x", "y"])])
    in_backward(model, torch.optim.SGD, lr=0.1)
    tracker = ModelDeltaTracker(model)
    sum(jagged.values().sum() for jagged in model(batch([5, 5], [2])).values()).backward()
    assert tracker.get_delta_ids()["embeddings.t"].tolist() == [2, 5]


def test_each_consumer_has_its_own_reads():
    model = make()
    optimizer = OPTIMIZERS["backward"](model)
    tracker = ModelDeltaTracker(model, consumers=["fast", "slow"])
    train(model, optimizer, [1], [])
    assert ids(tracker, "fast")["a"] == [1]
    train(model, optimizer, [2], [])
    assert ids(tracker, "fast")["a"] == [2]
    assert ids(tracker, "slow")["a"] == [1, 2]
    train(model, optimizer, [3], [])
    tracker.clear("slow")
    assert (ids(tracker, "fast")["a"], ids(tracker, "slow")["a"]) == ([3], [])


def test_reads_cover_batches_from_where_the_last_one_ended():
    tracker = ModelDeltaTracker(make(), consumers=["fast", "slow"])
    for _ in range(3):
        tracker.step()
    tracker.get_delta_ids("fast")
    assert tracker.per_consumer_batch_idx == {"fast": 3, "slow": 0}
    tracker.clear()
    assert tracker.per_consumer_batch_idx == {"fast": 3, "slow": 3}


def test_any_number_of_reads_equals_a_record_of_every_change():
    generator = torch.Generator().manual_seed(3)
    consumers = ["always", "often", "seldom", "never"]
    store = DeltaStore(50, consumers, torch.device("cpu"))
    record: dict[str, set[int]] = {consumer: set() for consumer in consumers}
    for turn in range(1500):  # the numbers of reads run out several times
        rows = torch.randint(0, 50, (turn % 3,), generator=generator)
        store.mark(rows)
        for consumer, every in zip(consumers, (1, 7, 501, 10**6), strict=True):
            record[consumer] |= {*rows.tolist()}
            if turn % every == 0:
                assert store.changed(consumer).tolist() == sorted(record[consumer]), turn
                store.clear(consumer)
                record[consumer] = set()
    assert store.changed("never").tolist() == sorted(record["never"])


def test_memory_is_a_byte_per_row_whatever_the_consumers():
    tracker = ModelDeltaTracker(make(), consumers=[*"abcdefgh"], fqns_to_skip=["a"])
    assert tracker.num_bytes == 30


@pytest.mark.parametrize("name", ["a", "embedding_bags.a"])
def test_skipped_tables_are_left_out(name):
    model = make()
    optimizer, tracker = (
        OPTIMIZERS["backward"](model),
        ModelDeltaTracker(model, fqns_to_skip=[name]),
    )
    train(model, optimizer, [1], [2])
    assert ids(tracker) == {"b": [2]}


@pytest.mark.parametrize("when", ["backward", "step"])
def test_an_older_copy_with_all_deltas_is_the_model(when):
    model = make()
    optimizer = in_backward(model, torch.optim.Adam, when=when, lr=0.1)
    copy = {name: value.clone() for name, value in model.state_dict().items()}
    states = {
        name: {kind: value.clone() for kind, value in state.items()}
        for name, state in optimizer.state_dict()["state"].items()
    }
    tracker = ModelDeltaTracker(model, mode=TrackingMode.OPTIMIZER_STATE)
    for step in range(4):
        train(model, optimizer, [step, 3], [2 * step])
        for delta in tracker.get_delta().values() if step % 2 else ():
            delta.apply_to(copy, states)
    assert all(torch.equal(copy[name], value) for name, value in model.state_dict().items())
    for name, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(states[name][kind], value) for kind, value in state.items())


def test_ids_alone_cannot_be_applied():
    model = make()
    delta = ModelDeltaTracker(model).get_delta()["embedding_bags.a"]
    with pytest.raises(ValueError, match=r"'embedding_bags.a.weight': has ids only; track"):
        delta.apply_to(model.state_dict())


def test_rows_changed_otherwise_can_be_recorded():
    tracker = ModelDeltaTracker(make())
    tracker.record_lookup(batch([4], [6, 25]))  # 25 is no row of `a`
    assert ids(tracker) == {"a": [4, 6], "b": [6, 25]}


def test_a_later_tracker_takes_the_tables_over():
    model = make()
    first, second = ModelDeltaTracker(model), ModelDeltaTracker(model)
    assert ids(second) == {"a": [], "b": []}
    with pytest.raises(RuntimeError, match="'a' was cut anew, or given to another tracker"):
        first.get_delta()


def test_unknown_consumers_and_tables_are_named():
    with pytest.raises(KeyError, match=r"no consumer 'x' of changes; there are \['default'\]"):
        ModelDeltaTracker(make()).get_delta("x")
    with pytest.raises(ValueError, match=r"are named \['c'\]"):
        ModelDeltaTracker(make(), fqns_to_skip=["c"])
    with pytest.raises(ValueError, match="Linear: no tables to track"):
        ModelDeltaTracker(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at most 127 consumers of changes, got 128"):
        ModelDeltaTracker(make(), consumers=[str(i) for i in range(128)])


@pytest.mark.usefixtures("no_shape_checks")
def test_compiled_updates_of_tracked_tables_are_refused():
    model = make()
    in_backward(model, torch.optim.SGD, lr=0.1)
    ModelDeltaTracker(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be compiled, as compiled updates tell nobody"):
        compiled(batch([1], [2]))
