"""Train a SASRec on sequences of items and rank all items for every user, leave-one-out.

    SHARDWISE_DATA=folder python examples/train_beauty.py [examples/beauty.toml]

A user's last item is for the test, the one before for validation, the rest for training. Each is
ranked among all items but those that the user had before it.
"""

import os
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardwise as sw

FETCH = "fetch Beauty.txt from the data folder of github.com/RUCAIBox/CIKM2020-S3Rec"


def read_sequences(file: str) -> list[Tensor]:
    """Read `user item item …` per line, oldest item first."""
    folder = Path(os.environ.get("SHARDWISE_DATA") or "~/.cache/shardwise").expanduser()
    path = Path(file) if file else folder / "s3rec" / "Beauty.txt"
    if not path.exists():
        raise SystemExit(f"{path} is not there: {FETCH}")
    lines = path.read_text().splitlines()
    return [torch.tensor([int(item) for item in line.split()[1:]]) for line in lines]


def join(sequences: list[Tensor]) -> sw.KeyedJaggedTensor:
    """Lay sequences end to end under the model's key."""
    lengths = torch.tensor([len(one) for one in sequences])
    return sw.KeyedJaggedTensor(["item"], torch.cat(sequences), lengths=lengths)


def shuffle(lengths: Tensor, size: int) -> Iterator[list[int]]:
    """Cut users into random batches of like lengths, which saves padding."""
    batches: list[Tensor] = []
    for group in torch.randperm(len(lengths)).split(8 * size):
        batches += group[lengths[group].argsort()].split(size)
    for number in torch.randperm(len(batches)).tolist():
        yield batches[number].tolist()


def make_model(num_items: int, max_length: int, options: dict[str, Any]) -> sw.SASRec:
    """Make tables and blocks, which start normal with deviation 0.02."""

    def start(rows: Tensor) -> Tensor:
        return rows.normal_(0, 0.02)

    width = options["embedding_dim"]
    tables = [
        sw.EmbeddingConfig(num_items, width, "item", init_fn=start),
        sw.EmbeddingConfig(max_length, width, "position", init_fn=start),
    ]
    blocks = {name: value for name, value in options.items() if name != "embedding_dim"}
    model = sw.SASRec(sw.EmbeddingCollection(tables), **blocks)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, 0, 0.02)
            torch.nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def evaluate(model: sw.SASRec, sequences: list[Tensor], held_out: int) -> dict[str, float]:
    """Rank the item that is `held_out` from the end, given all before it."""
    model.eval()
    metrics = sw.RetrievalMetrics([10])
    for first in range(0, len(sequences), 256):
        users = sequences[first : first + 256]
        before = [one[:-held_out] for one in users]
        relevant = sw.JaggedTensor.from_dense([one[-held_out].view(1) for one in users])
        scores = model.score(join([one[-model.max_length :] for one in before]))
        scores[:, 0] = float("-inf")  # items count from 1
        metrics.update(scores, relevant, excluded=sw.JaggedTensor.from_dense(before))
    model.train()
    return metrics.compute()


def main(config: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Train, show validation on the way, and give the test's metrics."""
    options, max_length = config["train"], config["data"]["max_length"]
    torch.manual_seed(options["seed"])
    torch.set_num_threads(options["num_threads"] or torch.get_num_threads())
    sequences = read_sequences(config["data"]["file"])
    inputs = [one[:-3][-max_length:] for one in sequences]
    targets = [one[1:-2][-max_length:] for one in sequences]
    lengths = torch.tensor([len(one) for one in inputs])
    num_items = 1 + max(int(one.max()) for one in sequences)
    counts = torch.bincount(torch.cat(targets), minlength=num_items)
    model = make_model(num_items, max_length, config["model"])
    with_batch = counts if options["in_batch_negatives"] else None
    train = sw.SASRecTrain(model, options["num_negatives"], with_batch)
    tables = sw.in_backward(train, sw.Adam, lr=options["table_lr"])
    rest = sw.in_backward_optimizer_filter(train.named_parameters())
    dense = torch.optim.Adam((parameter for _, parameter in rest), lr=options["dense_lr"])
    wall, cpu = time.perf_counter(), time.process_time()
    for epoch in range(options["epochs"]):
        total = 0.0
        for optimizer, name in ((tables, "table_lr"), (dense, "dense_lr")):
            optimizer.param_groups[0]["lr"] = options[name] * (1 - epoch / options["epochs"])
        for users in shuffle(lengths, options["batch_size"]):
            dense.zero_grad()
            tables.zero_grad()  # hands over the rate
            batch = join([inputs[user] for user in users])
            loss, _ = train(batch, torch.cat([targets[user] for user in users]))
            loss.backward()
            dense.step()
            total += loss.item() * len(users) / len(sequences)
        line = f"epoch {epoch + 1}: loss {total:.4f}"
        if (epoch + 1) % 5 == 0:
            line += f", validation {evaluate(model, sequences, 2)}"
        spent = f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
        print(f"{line} ({spent})", flush=True)
    return evaluate(model, sequences, 1)


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("beauty.toml")
    print("test", main(tomllib.loads(Path(file).read_text())))
