"""Blocks of hidden patches: how many, how compact, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest

from lm.data.patch_blocks import hidden_blocks

NUMBERS = np.arange(400)


@pytest.mark.parametrize(("side", "count"), [(8, 26), (14, 75), (4, 6), (2, 1), (2, 3), (8, 1), (8, 63)])
def test_each_image_has_exactly_as_many_hidden_patches(side, count):
    hidden = hidden_blocks(7, NUMBERS, side, count)
    assert hidden.shape == (400, side * side)
    assert (hidden.sum(1) == count).all()


def test_what_is_hidden_depends_on_the_seed_and_the_number_of_the_image_alone():
    hidden = hidden_blocks(7, NUMBERS, 8, 26)
    some = np.array([5, 399, 17])
    assert np.array_equal(hidden_blocks(7, some, 8, 26), hidden[some])
    assert not np.array_equal(hidden_blocks(8, some, 8, 26), hidden[some])
    assert len(np.unique(hidden, axis=0)) > 390


def test_hidden_patches_are_next_to_each_other():
    """A hidden patch has far more hidden neighbors than among patches that are drawn one by one."""

    def neighbors(hidden: np.ndarray) -> float:
        grid = hidden.reshape(-1, 14, 14)
        pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
        return pairs / grid.sum()

    blocks = hidden_blocks(1, NUMBERS, 14, 75)
    singles = np.random.default_rng(0).permuted(np.arange(196) < 75 + 0 * NUMBERS[:, None], axis=1)
    assert neighbors(blocks) > 1.4 > 0.8 > neighbors(singles)


def test_every_patch_is_hidden_often_and_blocks_lie_in_both_directions():
    grid = hidden_blocks(3, np.arange(4000), 8, 26).reshape(-1, 8, 8)
    often = grid.mean(0)
    assert often.min() > 0.07
    assert often.max() < 0.75
    assert np.abs(often - often.T).max() < 0.05, "rows and columns alike"
    assert np.abs(often - often[::-1]).max() < 0.08, "top and bottom alike, up to the part of the last block"


def test_a_single_block_has_the_size_and_the_shapes_of_beit():
    """With room for one block: its sides are as drawn, between a ratio of 0.3 and 1 / 0.3, up to rounding."""
    grid = hidden_blocks(0, NUMBERS, 40, 131)[:, :].reshape(-1, 40, 40)  # 131 = the smallest block
    heights, widths = grid.any(2).sum(1), grid.any(1).sum(1)
    one = (heights * widths - grid.sum((1, 2)) < np.minimum(heights, widths)) & (heights * widths >= 131)
    ratios = heights[one] / widths[one]
    assert one.mean() > 0.3
    assert 0.25 < ratios.min() < 0.45
    assert 2.2 < ratios.max() < 4
