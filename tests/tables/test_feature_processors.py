"""Learnt position weights before pooling."""

import pytest
import torch

from shardwise.jagged import KeyedJaggedTensor
from shardwise.tables import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    FeatureProcessedEmbeddingBagCollection,
    PositionWeightedModule,
    PositionWeightedModuleCollection,
)

KEYS = ["f", "g"]


def features() -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        KEYS, torch.tensor([1, 2, 3, 4, 5]), lengths=torch.tensor([2, 1, 0, 2])
    )


def weighted_collection() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        [EmbeddingBagConfig(10, 4, key) for key in KEYS], is_weighted=True
    )


@pytest.mark.parametrize("is_collection", [False, True])
def test_position_weights_multiply_rows_and_learn(is_collection):
    if is_collection:
        processors = PositionWeightedModuleCollection({"f": 3, "g": 2})
        weight = processors.position_weights["f"]
    else:
        processors = {"f": PositionWeightedModule(3), "g": PositionWeightedModule(2)}
        weight = processors["f"].position_weight
    with torch.no_grad():
        weight.copy_(torch.tensor([2.0, 3.0, 4.0]))
    module = FeatureProcessedEmbeddingBagCollection(weighted_collection(), processors)
    out = module(features())["f"]
    rows = module.state_dict()["_embedding_bag_collection.embedding_bags.f.weight"]
    torch.testing.assert_close(out, torch.stack([2 * rows[1] + 3 * rows[2], 2 * rows[3]]))
    out.sum().backward()
    torch.testing.assert_close(
        weight.grad, torch.stack([rows[1].sum() + rows[3].sum(), rows[2].sum(), torch.tensor(0.0)])
    )


def test_features_without_a_processor_keep_weight_one():
    module = FeatureProcessedEmbeddingBagCollection(
        weighted_collection(), {"f": PositionWeightedModule(2)}
    )
    rows = module.state_dict()["_embedding_bag_collection.embedding_bags.g.weight"]
    torch.testing.assert_close(module(features())["g"][1], rows[4] + rows[5])


def test_bag_longer_than_the_weights_is_named():
    module = FeatureProcessedEmbeddingBagCollection(
        weighted_collection(), PositionWeightedModuleCollection({"f": 1, "g": 2})
    )
    with pytest.raises(IndexError, match=r"feature 'f': a bag has 2 ids.*1 positions"):
        module(features())


def test_processors_need_a_weighted_collection_and_known_features():
    plain = EmbeddingBagCollection([EmbeddingBagConfig(10, 4, "f")])
    with pytest.raises(ValueError, match="is_weighted=True"):
        FeatureProcessedEmbeddingBagCollection(plain, {"f": PositionWeightedModule(2)})
    with pytest.raises(ValueError, match=r"\['x'\]"):
        FeatureProcessedEmbeddingBagCollection(
            weighted_collection(), {"x": PositionWeightedModule(2)}
        )
