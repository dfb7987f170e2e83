"""An index of pages for late interaction: its size, its ranking, and pooling of whole outputs.

A page or query is a tensor [N,D] of unit vectors, of any length N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BYTES = 2
"""Of a number in an index: half precision."""


def index_bytes(pages: Sequence[Tensor]) -> int:
    """Size of an index that holds every vector of every page."""
    return BYTES * sum(page.numel() for page in pages)


def late_interaction(queries: Sequence[Tensor], pages: Sequence[Tensor]) -> Tensor:
    """Scores [queries,pages]: over the vectors of a query, the sum of the best match on a page."""
    pages_PND = pad_sequence(list(pages), batch_first=True)
    lengths_P = torch.tensor([len(page) for page in pages])
    empty_PN = torch.arange(pages_PND.shape[1]) >= lengths_P[:, None]
    scores = []
    for query_ND in queries:
        match_PNM = torch.einsum("nd,pmd->pnm", query_ND, pages_PND)
        match_PNM = match_PNM.masked_fill(empty_PN[:, None], -torch.inf)
        scores.append(match_PNM.amax(2).sum(1))
    return torch.stack(scores)


def pool_vectors(page_ND: Tensor, num_vectors: int) -> Tensor:
    """A page in so many vectors: means of clusters (agglomerative, Ward's criterion on cosine
    distances), as colpali-engine's hierarchical pooling forms them (Faysse et al., 2024); scaled
    to unit length, and a page that has no more than that stays as it is."""
    from scipy.cluster.hierarchy import fcluster, linkage  # of the extra study
    from scipy.spatial.distance import squareform

    if len(page_ND) <= num_vectors:
        return page_ND
    unit_ND = torch.nn.functional.normalize(page_ND.double(), dim=-1)
    distance_NN = (1 - unit_ND @ unit_ND.T).clamp_min(0).fill_diagonal_(0)
    tree = linkage(squareform(distance_NN.numpy(), checks=False), method="ward")
    cluster_N = torch.from_numpy(fcluster(tree, t=num_vectors, criterion="maxclust")).long() - 1
    sums = page_ND.new_zeros(int(cluster_N.max()) + 1, page_ND.shape[1])
    return torch.nn.functional.normalize(sums.index_add(0, cluster_N, page_ND), dim=-1)


def recall(scores_QP: Tensor, relevant_QP: Tensor, first: int) -> float:
    """Share of queries with a relevant page among the `first` ones, percent."""
    top_QK = scores_QP.topk(first, dim=1).indices
    return float(100 * relevant_QP.gather(1, top_QK).any(1).float().mean())


def ndcg(scores_QP: Tensor, relevant_QP: Tensor, first: int) -> float:
    """Normalized discounted cumulative gain of the `first` pages, percent: 100 where all relevant
    pages come first."""
    discount_K = 1 / torch.arange(2, first + 2).float().log2()
    gain_QK = relevant_QP.gather(1, scores_QP.topk(first, dim=1).indices).float()
    best_QK = relevant_QP.float().sort(1, descending=True).values[:, :first]
    return float(100 * ((gain_QK @ discount_K) / (best_QK @ discount_K)).mean())
