from __future__ import annotations

import pytest
import torch
from PIL import Image

from unsee.models.base import with_box
from unsee.query import Query, box_mask


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        # 64 pixels, 8 cells: the centre of cell k is at 8 k + 4
        ((0, 0, 64, 64), range(8), range(8)),
        ((0, 0, 32, 32), range(4), range(4)),
        ((32, 0, 64, 16), range(2), range(4, 8)),
        ((4, 4, 12, 12), [0], [0]),  # a centre on the upper or left edge is in, others out
        ((3, 4, 13, 12), [0], [0, 1]),
        ((5, 5, 10, 10), [0], [0]),  # no centre inside: the nearest cell, both ways
        ((5, 7, 12, 12), [1], [1]),
        ((63, 0, 64, 64), range(8), [7]),  # a sliver holds centres on one axis only
    ],
)
def test_cells_whose_centre_lies_in_the_box(box, rows, columns):
    expected = torch.zeros(8, 8)
    for y in rows:
        for x in columns:
            expected[y, x] = 1
    assert torch.equal(box_mask(box, (64, 64), (8, 8)), expected)


def test_oblong_pictures_keep_their_axes_apart():
    mask = box_mask((0, 0, 50, 10), image_size=(100, 20), latent_size=(2, 10))
    assert mask.shape == (2, 10)
    assert mask.tolist() == [[1.0] * 5 + [0.0] * 5, [0.0] * 10]


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 65, 5), (0, 0, 5, 49), (5, 0, 5, 5), (0, 6, 5, 5)],
)
def test_a_box_outside_the_picture_or_empty_is_refused(box):
    with pytest.raises(ValueError, match=r"box .* does not lie in the picture, which is 64x48"):
        box_mask(box, (64, 48), (6, 8))


def test_with_box_names_and_masks_the_query():
    picture = Image.new("RGB", (64, 64))
    query = Query("q", torch.zeros(4, 8, 8), torch.zeros(3, 5), "a prompt", picture)
    boxed = with_box(query, (0, 0, 32, 64))
    assert boxed.box == (0, 0, 32, 64)
    assert boxed.mask is not None and boxed.mask.sum() == 32
    assert boxed.id == "q@0,0,32,64"
    assert query.mask is None
