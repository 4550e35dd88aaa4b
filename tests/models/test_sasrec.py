"""SASRec: parts equal NumPy, no look ahead, no trace of padding, training, tracing, errors."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models import SASRec, SASRecTrain
from shardwise.models.sasrec import CausalAttention, SASRecBlock
from shardwise.optim import Adam, in_backward, in_backward_optimizer_filter
from shardwise.tables import EmbeddingCollection, EmbeddingConfig

ITEMS, WIDTH, LONGEST = 20, 8, 6
SEQUENCES = [[3, 1, 4, 1], [5], [], [9, 2, 6, 5, 3, 19]]


def tables(width: int = WIDTH) -> EmbeddingCollection:
    return EmbeddingCollection(
        [
            EmbeddingConfig(ITEMS, width, "item", weight_init_min=-1.0, weight_init_max=1.0),
            EmbeddingConfig(LONGEST, width, "position", weight_init_min=-1.0, weight_init_max=1.0),
        ]
    )


def model(**options) -> SASRec:
    torch.manual_seed(0)
    return SASRec(tables(), **{"dropout": 0.0, **options})


def bags(sequences: list[list[int]], key: str = "item") -> KeyedJaggedTensor:
    ids = torch.tensor([item for one in sequences for item in one], dtype=torch.int64)
    return KeyedJaggedTensor([key], ids, lengths=torch.tensor([len(one) for one in sequences]))


def next_items(sequences: list[list[int]]) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    later = [item for one in sequences for item in one[1:]]
    return bags([one[:-1] for one in sequences]), torch.tensor(later, dtype=torch.int64)


# ---- NumPy, in float64


def numpy_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def linear(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(p: dict[str, np.ndarray], prefix: str, x: np.ndarray, heads: int) -> np.ndarray:
    queries, keys, values = np.split(linear(p, f"{prefix}project_in", x), 3, axis=1)
    mixed = []
    for q, k, v in zip(*(np.split(y, heads, axis=1) for y in (queries, keys, values)), strict=True):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[1])) * np.tri(len(x))
        mixed.append(weights / weights.sum(1, keepdims=True) @ v)
    return linear(p, f"{prefix}project_out", np.concatenate(mixed, axis=1))


def block(p: dict[str, np.ndarray], prefix: str, x: np.ndarray, heads: int) -> np.ndarray:
    x = x + attention(p, f"{prefix}attention.", norm(p, f"{prefix}attention_norm", x), heads)
    inner = np.maximum(linear(p, f"{prefix}item_layers.0", norm(p, f"{prefix}item_norm", x)), 0)
    return x + linear(p, f"{prefix}item_layers.2", inner)


def states(p: dict[str, np.ndarray], ids: list[int], blocks: int, heads: int) -> np.ndarray:
    items, places = (p[f"embedding_collection.embeddings.{n}.weight"] for n in ("item", "position"))
    x = items[ids] * np.sqrt(WIDTH) + places[: len(ids)]
    for number in range(blocks):
        x = block(p, f"blocks.{number}.", x, heads)
    return norm(p, "last_norm", x)


# ---- parts


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("part", [CausalAttention, SASRecBlock])
def test_part_equals_numpy(part, heads):
    module = part(8, heads, *([0.0] if part is SASRecBlock else [])).double()
    items = torch.randn(7, 8, dtype=torch.float64)
    slots = torch.tensor([0, 1, 2, 5, 6, 7, 8])  # sequences of 3 and 4 items among 3, padded to 5
    found = module(items, slots, (3, 5)).detach().numpy()
    of_numpy = block if part is SASRecBlock else attention
    expected = [of_numpy(numpy_of(module), "", x, heads) for x in np.split(items.numpy(), [3])]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-12)


@pytest.mark.parametrize(("blocks", "heads"), [(0, 1), (1, 2), (3, 4)])
def test_model_equals_numpy(blocks, heads):
    sasrec = model(num_blocks=blocks, num_heads=heads)
    p = numpy_of(sasrec)
    expected = [states(p, ids, blocks, heads)[-1] if ids else np.zeros(WIDTH) for ids in SEQUENCES]
    found = sasrec(bags(SEQUENCES))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=2e-6)


def test_score_is_the_dot_product_with_every_item():
    sasrec = model()
    items = sasrec.embedding_collection.embeddings["item"].weight
    expected = sasrec(bags(SEQUENCES)) @ items.T
    torch.testing.assert_close(sasrec.score(bags(SEQUENCES)), expected)


def test_later_items_change_no_earlier_state():
    sasrec = model()
    before, _ = sasrec.encode(sasrec.sequences(bags([[1, 2, 3, 4, 5]])))
    after, _ = sasrec.encode(sasrec.sequences(bags([[1, 2, 3, 7, 8]])))
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).any(1).all()


def test_earlier_items_change_every_later_state():
    sasrec = model()
    before, _ = sasrec.encode(sasrec.sequences(bags([[1, 2, 3, 4]])))
    after, _ = sasrec.encode(sasrec.sequences(bags([[7, 2, 3, 4]])))
    assert (before != after).any(1).all()


def test_sequence_has_the_same_state_whatever_it_is_padded_to():
    sasrec = model()
    alone = torch.cat([sasrec(bags([one])) for one in SEQUENCES])
    torch.testing.assert_close(sasrec(bags(SEQUENCES)), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_batch_without_items_gives_zeros_and_no_loss(sequences):
    sasrec = model()
    assert torch.equal(sasrec(bags(sequences)), torch.zeros(len(sequences), WIDTH))
    loss, _ = SASRecTrain(sasrec)(bags(sequences), torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0


def test_other_keys_are_left_aside():
    sasrec = model()
    more = KeyedJaggedTensor.concat([bags(SEQUENCES, "user"), bags(SEQUENCES)])
    torch.testing.assert_close(sasrec(more), sasrec(bags(SEQUENCES)))


def test_dropout_acts_in_training_only():
    sasrec = model(dropout=0.5)
    assert not torch.equal(sasrec(bags(SEQUENCES)), sasrec(bags(SEQUENCES)))
    sasrec.eval()
    assert torch.equal(sasrec(bags(SEQUENCES)), sasrec(bags(SEQUENCES)))


# ---- loss


def test_all_items_as_negatives_give_the_softmax():
    sasrec = model()
    features, targets = next_items(SEQUENCES)
    loss, (_, found) = SASRecTrain(sasrec, num_negatives=None)(features, targets)
    scores = found @ sasrec.embedding_collection.embeddings["item"].weight.T
    torch.testing.assert_close(loss, F.cross_entropy(scores, targets))


@pytest.mark.parametrize("num_negatives", [0, 50])
def test_targets_of_the_batch_are_negatives_corrected_by_their_share(num_negatives):
    counts = torch.arange(1, ITEMS + 1)
    train = SASRecTrain(model(), num_negatives, counts)
    features, targets = next_items(SEQUENCES)
    torch.manual_seed(1)
    loss, (_, found) = train(features, targets)
    torch.manual_seed(1)
    candidates = torch.cat([targets, torch.randint(ITEMS, (num_negatives,))])
    weights = train.model.embedding_collection.embeddings["item"].weight.detach()
    scores = (found @ weights.T).exp()
    expected = num_negatives / ITEMS + len(targets) * counts / counts.sum()
    own = scores.gather(1, targets[:, None])[:, 0]
    others = (scores / expected)[:, candidates] * (candidates != targets[:, None])
    torch.testing.assert_close(loss, ((own + others.sum(1)) / own).log().mean())


def test_sampled_loss_estimates_the_softmax():
    sasrec = model()
    features, targets = next_items(SEQUENCES)
    full, _ = SASRecTrain(sasrec, num_negatives=None)(features, targets)
    sampled, _ = SASRecTrain(sasrec, num_negatives=100_000)(features, targets)
    torch.testing.assert_close(sampled, full, rtol=0.01, atol=0)


def test_rule_in_backward_updates_each_item_once():
    fused, plain = model(), model()
    in_backward(fused, torch.optim.SGD, lr=0.1)
    features, targets = next_items([[3, 3, 3, 5]])  # read as input, as target and as negative
    for sasrec in (fused, plain):
        loss, _ = SASRecTrain(sasrec, num_negatives=None)(features, targets)
        loss.backward()
    torch.optim.SGD(plain.embedding_collection.parameters(), lr=0.1).step()
    ours, wanted = (sasrec.embedding_collection.state_dict() for sasrec in (fused, plain))
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("options", [{"num_negatives": None}, {"num_negatives": 64}])
def test_learns_to_count(options):
    """Each sequence goes up by one or down by one: the last item alone does not tell the next."""
    up = [list(range(start, start + 6)) for start in range(1, 15)]
    train = SASRecTrain(model(num_blocks=1), **options)
    tables_optimizer = in_backward(train, Adam, lr=0.05)
    optimizer = torch.optim.Adam(in_backward_optimizer_filter(train.named_parameters()), lr=0.02)
    features, targets = next_items([way for one in up for way in (one, one[::-1])])
    for _ in range(60):
        optimizer.zero_grad()
        train(features, targets)[0].backward()
        optimizer.step()
        tables_optimizer.step()
    scores = train.model.score(bags([[4, 5, 6, 7], [10, 9, 8, 7]]))
    assert scores.argmax(1).tolist() == [8, 6]


# ---- tracing


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("is_fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_training_equals_eager(is_fused):
    eager = SASRecTrain(model(num_blocks=1), num_negatives=None)
    compiled = copy.deepcopy(eager)
    for train in (eager, compiled):
        if is_fused:
            in_backward(train, Adam, lr=0.1)
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for sequences in (SEQUENCES, SEQUENCES[1:], [[1, 2, 3]] * 7, SEQUENCES):
        features, targets = next_items(sequences)
        for train in (step, eager):
            train(features, targets)[0].backward()
    for ours, wanted in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(ours.grad, wanted.grad)


# ---- errors


def test_sequence_past_the_positions_is_an_error_with_the_sample():
    with pytest.raises(IndexError, match=r"feature 'position', sample 1: id 6 is outside"):
        model()(bags([[1], [1] * 7]))


def test_unknown_item_is_an_error_with_the_sample():
    with pytest.raises(IndexError, match=r"feature 'item', sample 1: id 20 is outside table"):
        model()(bags([[1], [20]]))


def test_missing_key_is_an_error():
    with pytest.raises(KeyError, match="item"):
        model()(bags(SEQUENCES, "movie"))


def test_targets_must_be_one_per_item():
    with pytest.raises(ValueError, match="got 2 targets for 11 items"):
        SASRecTrain(model())(bags(SEQUENCES), torch.tensor([1, 2]))


def test_collection_must_have_items_and_positions():
    with pytest.raises(ValueError, match="a table of items and one of positions"):
        SASRec(EmbeddingCollection([EmbeddingConfig(5, 4, "item")]))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        model(num_heads=3)


@pytest.mark.parametrize(
    ("num_negatives", "num_counts", "message"),
    [(0, None, "needs item_counts"), (None, ITEMS, "need a num_negatives"), (5, 3, "3 item_coun")],
)
def test_loss_without_sensible_negatives_is_an_error(num_negatives, num_counts, message):
    counts = None if num_counts is None else torch.ones(num_counts)
    with pytest.raises(ValueError, match=message):
        SASRecTrain(model(), num_negatives, counts)
