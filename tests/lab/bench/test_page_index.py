"""The index of pages: late interaction, pooling of vectors, ranking."""

import pytest
import torch
from torch.nn.functional import normalize

from pumer.lab.bench.page_index import index_bytes, late_interaction, ndcg, pool_vectors, recall


def page(length, seed, width=8):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(length, width, generator=generator), dim=-1)


def test_scores_are_sums_of_best_matches_without_padding():
    queries, pages = [page(3, 0), page(2, 1)], [page(4, 2), page(1, 3)]
    pages[1] = -queries[0][:1]  # all its matches with itself are negative: padding must not win
    scores = late_interaction(queries, pages)
    for row, query in enumerate(queries):
        for column, vectors in enumerate(pages):
            best = [max(float(a @ b) for b in vectors) for a in query]
            assert scores[row, column] == pytest.approx(sum(best), abs=1e-5)


def test_an_index_takes_two_bytes_a_number():
    assert index_bytes([page(4, 0), page(1, 1)]) == 2 * 8 * 5


def test_pooling_finds_groups():
    centres = page(3, 4)
    members = torch.tensor([0, 1, 2, 1, 0, 0])
    noisy = normalize(centres[members] + 0.01 * page(6, 5), dim=-1)
    pooled = pool_vectors(noisy, 3)
    assert len(pooled) == 3
    match = (pooled @ centres.T).sort(1, descending=True)
    assert sorted(match.indices[:, 0].tolist()) == [0, 1, 2]
    assert (match.values[:, 0] > 0.99).all()
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(3))


def test_pooling_to_more_vectors_changes_nothing():
    vectors = page(4, 6)
    assert pool_vectors(vectors, 4) is vectors
    assert pool_vectors(vectors, 1).shape == (1, 8)


def test_recall_and_ndcg():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    relevant = torch.tensor([[True, False, True], [True, False, False]])
    assert recall(scores, relevant, 1) == 50
    assert recall(scores, relevant, 3) == 100
    third, second = 1 / 2, 1 / torch.tensor(3.0).log2()
    expected = 50 * ((1 + third) / (1 + second) + third)
    assert ndcg(scores, relevant, 3) == pytest.approx(float(expected), abs=1e-4)
    assert ndcg(scores[:1, [0, 2, 1]], torch.tensor([[True, False, False]]), 2) == 100
