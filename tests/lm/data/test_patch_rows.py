"""Where patches stand in the rows of a pass."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.data.patch_rows import grid, packed_rows, rows_of_images

sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)


@given(sizes, st.integers(0, 30))
def test_every_patch_has_one_place_and_sees_the_patches_of_its_image_and_no_others(sizes, length):
    layout = packed_rows(tuple(sizes), length)
    images = [(h, w) for count, h, w in sizes for _ in range(count)]
    image_of = torch.cat([torch.full((h * w,), number) for number, (h, w) in enumerate(images)])
    flat_slots, places = layout.slots.flatten(), layout.places
    assert len(places.unique()) == len(places) == len(image_of)
    assert torch.equal(flat_slots[places], torch.arange(len(places)))
    positions = torch.cat([torch.from_numpy(grid(h, w)) for h, w in images])
    assert torch.equal(layout.positions.flatten(0, 1)[places], positions)
    used = torch.zeros(flat_slots.shape, dtype=torch.bool)
    used[places] = True
    shape = layout.lo.shape
    assert (layout.lo.flatten()[~used] >= layout.hi.flatten()[~used]).all()
    seen = (layout.lo[..., None] <= torch.arange(shape[1])) & (torch.arange(shape[1]) < layout.hi[..., None])
    for place, patch in zip(places.tolist(), range(len(places)), strict=True):
        row, column = divmod(place, shape[1])
        found = flat_slots.view(shape)[row, seen[row, column]]
        assert torch.equal(found, torch.nonzero(image_of == image_of[patch]).flatten())


def test_small_crops_fill_the_rows_of_large_ones():
    layout = packed_rows(((2, 8, 8), (8, 4, 4)))
    assert layout.slots.shape == (4, 64)
    assert len(layout.places) == layout.slots.numel()


def test_kept_patches_keep_their_positions():
    kept = torch.tensor([[0, 5], [3, 11]])
    rows = rows_of_images(2, 3, 4, kept)
    assert rows.positions.tolist() == [[[0, 0], [1, 1]], [[0, 3], [2, 3]]]
    assert rows.hi.tolist() == [[2, 2], [2, 2]]
