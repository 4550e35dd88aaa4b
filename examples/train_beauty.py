"""Train a SASRec on sequences of items and rank all items for every user, leave-one-out.

    SHARDWISE_DATA=folder python examples/train_beauty.py [examples/beauty.toml]

A user's last item is for the test, the one before for validation, the rest for training. Each is
ranked among all items but those that the user had before it.
"""

import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shardwise as sw


def start(rows: Tensor) -> Tensor:
    """Draw the start of tables."""
    return rows.normal_(0, 0.02)


def make_model(num_items: int, max_length: int, options: dict[str, Any]) -> sw.SASRec:
    """Make the tables and the blocks."""
    width = options["embedding_dim"]
    tables = [
        sw.EmbeddingConfig(num_items + 1, width, "item", init_fn=start),  # items count from 1
        sw.EmbeddingConfig(max_length, width, "position", init_fn=start),
    ]
    blocks = {name: value for name, value in options.items() if name != "embedding_dim"}
    return sw.SASRec(sw.EmbeddingCollection(tables), **blocks)


@torch.no_grad()
def evaluate(model: sw.SASRec, held_out: sw.HeldOut) -> dict[str, float]:
    """Rank the item that each user took next."""
    model.eval()
    samples = sw.held_out_samples(held_out, max_length=model.max_length)
    metrics = sw.RetrievalMetrics([10])
    for rows in np.array_split(np.arange(len(samples)), -(-len(samples) // 256)):
        batch = samples.select(torch.from_numpy(rows)).batch()
        scores = model.score(batch.features)
        scores[:, 0] = float("-inf")  # no item
        relevant = sw.JaggedTensor(batch.targets, lengths=torch.ones(len(rows), dtype=torch.int64))
        before = held_out.histories.take(rows)
        items, lengths = torch.from_numpy(before.items), torch.from_numpy(before.lengths)
        metrics.update(scores, relevant, excluded=sw.JaggedTensor(items, lengths=lengths))
    model.train()
    return metrics.compute()


def main(config: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Train, show validation on the way, and give the test's metrics."""
    options, max_length = config["train"], config["data"]["max_length"]
    torch.manual_seed(options["seed"])
    torch.set_num_threads(options["num_threads"] or torch.get_num_threads())
    parts = sw.leave_one_out(sw.read_sequences(config["data"]["file"] or None))
    samples = sw.training_samples(parts.train, max_length=max_length)
    loader = sw.SampleLoader(samples, options["batch_size"], seed=options["seed"])
    model = make_model(parts.train.num_items, max_length, config["model"])
    train = sw.SASRecTrain(model, options["num_negatives"])
    tables = sw.in_backward(train, sw.Adam, lr=options["table_lr"])
    rest = sw.in_backward_optimizer_filter(train.named_parameters())
    dense = torch.optim.Adam((parameter for _, parameter in rest), lr=options["dense_lr"])
    wall, cpu = time.perf_counter(), time.process_time()
    for epoch in range(options["epochs"]):
        losses = []
        for optimizer, name in ((tables, "table_lr"), (dense, "dense_lr")):
            optimizer.param_groups[0]["lr"] = options[name] * (1 - epoch / options["epochs"])
        for batch in loader:
            dense.zero_grad()
            tables.zero_grad()  # hands over the rate
            loss, _ = train(batch.features, batch.targets)
            loss.backward()
            dense.step()
            losses.append(loss.item())
        line = f"epoch {epoch + 1}: loss {np.mean(losses):.4f}"
        if (epoch + 1) % 5 == 0:
            line += f", validation {evaluate(model, parts.validation)}"
        spent = f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
        print(f"{line} ({spent})", flush=True)
    return evaluate(model, parts.test)


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("beauty.toml")
    print("test", main(tomllib.loads(Path(file).read_text())))
