"""One training step of a DLRM: tables, a jagged batch of two samples, model, step."""

import torch

import shardwise as sw

movies = sw.EmbeddingBagConfig(name="movie", num_embeddings=9742, embedding_dim=16)
genres = sw.EmbeddingBagConfig(name="genres", num_embeddings=20, embedding_dim=16)
model = sw.DLRMTrain(sw.DLRM(sw.EmbeddingBagCollection([movies, genres]), 2, [32, 16], [32, 1]))
sw.in_backward(model, sw.RowWiseAdagrad, lr=0.05)  # tables change as their gradients arrive
optimizer = torch.optim.Adam(sw.in_backward_optimizer_filter(model.named_parameters()))  # the rest
# Movie 7 with genre 4, which was liked; movie 3 with genres 2 and 0, which was not.
ids, lengths = torch.tensor([7, 3, 4, 2, 0]), torch.tensor([1, 1, 1, 2])
sparse = sw.KeyedJaggedTensor(["movie", "genres"], ids, lengths=lengths)
loss, _ = model(sw.Batch(torch.rand(2, 2), sparse, torch.tensor([1.0, 0.0])))
loss.backward()
optimizer.step()
