"""DLRM with other interactions: a cross net, or products of projections.

Parameters have the names they have in TorchRec, so that its state dicts load.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shardwise.models.dlrm import DLRM, DenseArch, check_vectors
from shardwise.nn import LowRankCrossNet
from shardwise.tables import EmbeddingBagCollection


class InteractionDCNArch(nn.Module):
    """The dense vector and the sparse ones side by side, through a cross net.

    Args:
        num_sparse_features: F, the number of sparse vectors.
        crossnet: Takes (F + 1) D columns.
    """

    def __init__(self, num_sparse_features: int, crossnet: nn.Module) -> None:
        """Take in the net."""
        super().__init__()
        self.num_sparse_features = num_sparse_features
        self.crossnet = crossnet

    def forward(
        self, dense_features: Float[Tensor, "B D"], sparse_features: Float[Tensor, "B F D"]
    ) -> Float[Tensor, "B columns"]:
        """Give what the net gives for (F + 1) D columns, the dense ones first.

        Raises:
            ValueError: The number of sparse vectors, or their width, is another.
        """
        check_vectors(self, self.num_sparse_features, dense_features, sparse_features)
        joined = torch.cat([dense_features, sparse_features.flatten(1)], dim=1)
        crossed: Tensor = self.crossnet(joined)
        return crossed


class InteractionProjectionArch(nn.Module):
    """Dot products of two sets of vectors, both projected from all the vectors side by side.

    Args:
        num_sparse_features: F, the number of sparse vectors.
        interaction_branch1: From (F + 1) D columns to F1 vectors of width D.
        interaction_branch2: From (F + 1) D columns to F2 such vectors, as a matrix [D, F2].
    """

    def __init__(
        self,
        num_sparse_features: int,
        interaction_branch1: nn.Module,
        interaction_branch2: nn.Module,
    ) -> None:
        """Take in the projections."""
        super().__init__()
        self.num_sparse_features = num_sparse_features
        self.interaction_branch1 = interaction_branch1
        self.interaction_branch2 = interaction_branch2

    def forward(
        self, dense_features: Float[Tensor, "B D"], sparse_features: Float[Tensor, "B F D"]
    ) -> Float[Tensor, "B columns"]:
        """Give the dense vector and the products, D + F1 F2 columns.

        Raises:
            ValueError: The number of sparse vectors, or their width, is another, or a branch gives
                no whole number of vectors.
        """
        check_vectors(self, self.num_sparse_features, dense_features, sparse_features)
        width = dense_features.shape[1]
        joined = torch.cat([dense_features, sparse_features.flatten(1)], dim=1)
        first, second = self.interaction_branch1(joined), self.interaction_branch2(joined)
        for number, projected in enumerate((first, second), 1):
            if projected.shape[1] % width:
                raise ValueError(
                    f"InteractionProjectionArch: branch {number} gives {projected.shape[1]} "
                    f"columns, which must be a multiple of the vectors' width, {width}"
                )
        vectors = first.unflatten(1, (-1, width))  # (B, F1, D)
        products = torch.bmm(vectors, second.unflatten(1, (width, -1)))  # (B, F1, F2)
        return torch.cat([dense_features, products.flatten(1)], dim=1)


class DLRM_DCN(DLRM):
    """A DLRM whose vectors meet in a low-rank cross net (Wang et al. 2020, arXiv:2008.13535).

    Args:
        embedding_bag_collection: The tables, all of one width D.
        dense_in_features: Number of dense features.
        dense_arch_layer_sizes: Widths of the layers over the dense features; the last is D.
        over_arch_layer_sizes: Widths of the layers over the interactions, at least two; the last is
            the number of logits, usually 1.
        dcn_num_layers: Layers of the cross net.
        dcn_low_rank_dim: Rank of its matrices.
        dense_device: Where the parameters lie, the cross net's too, other than the tables'.
        compile_dense: As in `DLRM`.

    Raises:
        ValueError: The widths do not fit together, or a number is not positive.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dcn_num_layers: int,
        dcn_low_rank_dim: int,
        dense_device: torch.device | str | None = None,
        *,
        compile_dense: bool = False,
    ) -> None:
        """Make the dense parts."""

        def cross(num_sparse: int, width: int) -> tuple[nn.Module, int]:
            columns = (num_sparse + 1) * width
            net = LowRankCrossNet(columns, dcn_num_layers, dcn_low_rank_dim, device=dense_device)
            return InteractionDCNArch(num_sparse, net), columns

        super().__init__(
            embedding_bag_collection,
            dense_in_features,
            dense_arch_layer_sizes,
            over_arch_layer_sizes,
            dense_device,
            interaction=cross,
            compile_dense=compile_dense,
        )


class DLRM_Projection(DLRM):
    """A DLRM whose vectors meet in dot products of two learnt projections of them.

    Args:
        embedding_bag_collection: The tables, all of one width D.
        dense_in_features: Number of dense features.
        dense_arch_layer_sizes: Widths of the layers over the dense features; the last is D.
        over_arch_layer_sizes: Widths of the layers over the interactions, at least two; the last is
            the number of logits, usually 1.
        interaction_branch1_layer_sizes: Widths of the first projection's layers; the last is F1 D.
        interaction_branch2_layer_sizes: Widths of the second projection's layers; the last is F2 D.
        dense_device: Where the parameters lie, other than the tables'.
        compile_dense: As in `DLRM`.

    Raises:
        ValueError: The widths do not fit together.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        interaction_branch1_layer_sizes: list[int],
        interaction_branch2_layer_sizes: list[int],
        dense_device: torch.device | str | None = None,
        *,
        compile_dense: bool = False,
    ) -> None:
        """Make the dense parts."""
        sizes = interaction_branch1_layer_sizes, interaction_branch2_layer_sizes

        def project(num_sparse: int, width: int) -> tuple[nn.Module, int]:
            num_vectors = [_count_vectors(n, s, width) for n, s in enumerate(sizes, 1)]
            columns = (num_sparse + 1) * width
            branches = [DenseArch(columns, s, dense_device) for s in sizes]
            interaction = InteractionProjectionArch(num_sparse, *branches)
            return interaction, width + num_vectors[0] * num_vectors[1]

        super().__init__(
            embedding_bag_collection,
            dense_in_features,
            dense_arch_layer_sizes,
            over_arch_layer_sizes,
            dense_device,
            interaction=project,
            compile_dense=compile_dense,
        )


def _count_vectors(branch: int, layer_sizes: list[int], width: int) -> int:
    if not layer_sizes or layer_sizes[-1] % width:
        raise ValueError(
            f"DLRM_Projection: interaction_branch{branch}_layer_sizes {layer_sizes} must end in a "
            f"multiple of the tables' embedding_dim, {width}"
        )
    return layer_sizes[-1] // width
