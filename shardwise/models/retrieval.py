"""Find for each query the candidates of the highest scores, in an index of their vectors."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shardwise.jagged import KeyedJaggedTensor
from shardwise.models.two_tower import TwoTower


class CandidateIndex(Protocol):
    """Candidate vectors that can be searched: an `ExactIndex`, a `FaissIndex`, or one's own."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Give scores and rows, both [B, k], the highest score first."""


class ExactIndex(nn.Module):
    """Scores all candidates, in blocks, and keeps the best; the vectors are a buffer.

    Args:
        candidates: Their vectors, not copied; candidate i is row i.
        block_rows: Candidates scored at once, which bounds memory to B times as many scores.

    Raises:
        ValueError: There are no candidates, or `block_rows` is not positive.
    """

    candidates: Tensor

    def __init__(self, candidates: Float[Tensor, "N D"], *, block_rows: int = 65_536) -> None:
        """Keep the vectors."""
        super().__init__()
        if candidates.shape[0] < 1 or block_rows < 1:
            raise ValueError(
                f"ExactIndex: needs at least one candidate and block_rows of at least 1, got "
                f"{candidates.shape[0]} candidates and block_rows {block_rows}"
            )
        self.register_buffer("candidates", candidates.detach())
        self._block_rows = block_rows

    def search(
        self, queries: Float[Tensor, "B D"], k: int
    ) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """Give the k highest dot products of each query, and the rows of their candidates.

        Raises:
            ValueError: The vectors have another width, or there are fewer than k candidates.
        """
        _check_query("ExactIndex", queries, k, *self.candidates.shape)
        best = queries.new_empty(queries.shape[0], 0)
        rows = torch.empty_like(best, dtype=torch.int64)
        for first in range(0, self.candidates.shape[0], self._block_rows):
            block = self.candidates[first : first + self._block_rows]
            scores, found = (queries @ block.T).topk(min(k, block.shape[0]))
            scores, rows = torch.cat([best, scores], 1), torch.cat([rows, found + first], 1)
            best, order = scores.topk(min(k, scores.shape[1]))
            rows = rows.gather(1, order)
        return best, rows


class FaissIndex:
    """A FAISS index on CPU, for more candidates than can all be scored. Needs `faiss-cpu`.

    Args:
        candidates: Their vectors; copied, as float32.
        description: What FAISS's `index_factory` shall make, such as `"IVF1024,PQ16"`.
        num_probes: Lists that a search visits in an index of inverted lists; None is FAISS's own.

    Raises:
        ImportError: FAISS is not installed.
        ValueError: There are no candidates, FAISS knows no such index, or it has no lists to probe.
    """

    def __init__(
        self,
        candidates: Float[Tensor, "N D"],
        description: str = "Flat",
        *,
        num_probes: int | None = None,
    ) -> None:
        """Train the index on the candidates and add them."""
        faiss = _import_faiss()
        self._num_candidates, self._width = candidates.shape
        if self._num_candidates < 1:
            raise ValueError("FaissIndex: got no candidates; it needs at least one")
        vectors = candidates.detach().float().cpu().contiguous().numpy()
        try:
            index = faiss.index_factory(self._width, description, faiss.METRIC_INNER_PRODUCT)
            if num_probes is not None:
                faiss.ParameterSpace().set_index_parameter(index, "nprobe", num_probes)
            index.train(vectors)
            index.add(vectors)
        except RuntimeError as error:
            raise ValueError(
                f"FaissIndex: FAISS cannot make {description!r} with num_probes {num_probes} of "
                f"{self._num_candidates} candidates of width {self._width}: {error}"
            ) from error
        self.index: Any = index

    def search(
        self, queries: Float[Tensor, "B D"], k: int
    ) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """Give the scores and rows that FAISS finds, on the device of the queries.

        A row is -1 where fewer than k candidates were visited.

        Raises:
            ValueError: The vectors have another width, or there are fewer than k candidates.
        """
        _check_query("FaissIndex", queries, k, self._num_candidates, self._width)
        vectors = queries.detach().float().cpu().contiguous().numpy()
        scores, rows = self.index.search(vectors, k)
        found = torch.from_numpy(scores), torch.from_numpy(rows)
        return found[0].to(queries.device, queries.dtype), found[1].to(queries.device)


class TwoTowerRetrieval(nn.Module):
    """Embed queries and find their k best candidates.

    Args:
        two_tower: The trained towers.
        candidates: Vectors of all candidates, by `two_tower.embed_candidates`; one is named by its
            row.
        k: How many to find.
        make_index: Takes the vectors; `functools.partial(FaissIndex, description=…)` for FAISS.

    Raises:
        ValueError: k is not between 1 and the number of candidates.
    """

    def __init__(
        self,
        two_tower: TwoTower,
        candidates: Float[Tensor, "N D"],
        k: int,
        *,
        make_index: Callable[[Tensor], CandidateIndex] = ExactIndex,
    ) -> None:
        """Make the index."""
        super().__init__()
        if not 1 <= k <= candidates.shape[0]:
            raise ValueError(
                f"TwoTowerRetrieval: k must be from 1 to the number of candidates, "
                f"{candidates.shape[0]}, got {k}"
            )
        self.two_tower = two_tower
        self.k = k
        self.index = make_index(candidates)

    @torch.no_grad()
    def forward(
        self, features: KeyedJaggedTensor
    ) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """Give scores and candidates' rows, the highest score first.

        Args:
            features: The keys of the query's features; others are not needed.

        Raises:
            KeyError: A key is missing or unknown.
            IndexError: An id is outside its table.
        """
        return self.index.search(self.two_tower.embed_queries(features), self.k)


def _check_query(name: str, queries: Tensor, k: int, num_candidates: int, width: int) -> None:
    if queries.shape[1] != width or not 1 <= k <= num_candidates:
        raise ValueError(
            f"{name}: got queries of width {queries.shape[1]} and k {k}; the {num_candidates} "
            f"candidates have width {width}, and k is from 1 to their number"
        )


def _import_faiss() -> ModuleType:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "FaissIndex needs FAISS: pip install 'shardwise[retrieval]', or use ExactIndex"
        ) from error
