"""HiPrune's neighbours, and what its penalty does."""

import pytest
import slow_selectors as slow
import torch
from pictures import GRIDS, batch, kept, picture

from pumer.reducers import HiPrune
from pumer.reducers.hiprune import around
from pumer.reducers.ops.budget import num_keep as budget

SEEDS = range(4)


def neighbours(anchor, count, columns, padding=0):
    """The tokens around one anchor."""
    numbers = torch.arange(count + padding)[None]
    found = around(numbers == anchor, numbers < count, torch.tensor([columns]))
    return found[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        (5, [1, 4, 5, 6, 9]),
        (4, [0, 3, 4, 5, 8]),  # the one before is in the row above
        (0, [0, 1, 4]),  # what lies outside the image is the first token
        (2, [0, 1, 2, 3, 6]),
        (11, [7, 10, 11]),
        (9, [5, 8, 9, 10, 11]),  # or the last one
    ],
)
def test_neighbours_are_those_of_the_published_code(anchor, expected, padding):
    assert neighbours(anchor, 12, 4, padding) == expected


def test_one_token_is_its_own_neighbour():
    assert neighbours(0, 1, 1, padding=2) == [0]


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_budget_too_small_for_all_neighbours_is_kept(keep):
    """The published code raises an error; here anchors come first."""
    tokens = batch(0)
    plan = HiPrune(keep=keep, alpha=1.0, object_layer=1).plan(tokens)
    for row in range(len(GRIDS)):
        one = picture(tokens, row)
        count = budget(keep, one.count)
        assert kept(plan, tokens, row) == slow.hiprune(one, count, alpha=1.0)
        assert len(kept(plan, tokens, row)) == count


@pytest.mark.parametrize("keep", [0.5, 0.8])
@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 100.0])
def test_hiprune_may_choose_a_neighbour_again(keep, penalty):
    """As published for Qwen2.5-VL; fewer than the budget are then left."""
    reducer = HiPrune(keep=keep, alpha=0.6, object_layer=1, penalty=penalty)
    fewer = False
    for seed in SEEDS:
        tokens = batch(seed)
        plan = reducer.plan(tokens)
        for row in range(len(GRIDS)):
            one = picture(tokens, row)
            count = budget(keep, one.count)
            found = kept(plan, tokens, row)
            assert found == slow.hiprune(one, count, alpha=0.6, penalty=penalty)
            fewer |= len(found) < count
    assert fewer == (penalty < 100)
