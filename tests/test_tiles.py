"""Tiles: every pixel is some tile's own, exactly once; blends rise linearly over the whole overlap and sum to one."""

import pytest
import torch

from mirage_min.method.tiles import assemble, cut, cut_side, pixels_to_a_cell, ramp, scale, select, without_margin

PLANS = [(5, 7, (1, 1), 0), (5, 7, (2, 3), 0), (5, 7, (2, 3), 1), (4, 4, (4, 4), 2), (3, 2, (3, 1), 1),
         (9, 6, (2, 2), 20)]


@pytest.mark.parametrize("h, w, tiles, margin", PLANS)
@pytest.mark.parametrize("s", [1, 8])
def test_every_pixel_is_the_own_of_one_tile_and_lies_where_it_is_said_to_lie(h, w, tiles, margin, s):
    video = torch.arange(3.0 * h * s * w * s).view(1, 1, 3, h * s, w * s)
    counts = torch.zeros_like(video)
    plan = cut(h, w, tiles, margin)
    assert len(plan) == tiles[0] * tiles[1]
    for tile in plan:
        seen = select(video[:, :, 1:], tile, s)
        assert pixels_to_a_cell(seen, tile) == s
        own, where = without_margin(seen, 1, tile)
        assert torch.equal(own, video[where]) and own.numel() > 0
        counts[where] += 1
    assert counts[:, :, 0].max() == 0 and counts[:, :, 1:].min() == counts[:, :, 1:].max() == 1


def test_pieces_differ_by_one_cell_at_most_and_see_a_margin_that_ends_with_the_frame():
    sides = cut_side(7, 3, margin=1)
    assert [(side.own.start, side.own.stop) for side in sides] == [(0, 2), (2, 4), (4, 7)]
    assert [(side.seen.start, side.seen.stop) for side in sides] == [(0, 3), (1, 5), (3, 7)]
    assert scale(slice(3, 7), 8, origin=3) == slice(0, 32)


@pytest.mark.parametrize("tiles, margin", [((0, 1), 0), ((1, 0), 0), ((4, 1), 0), ((1, 3), 0), ((1, 1), -1)])
def test_tiles_that_the_frame_cannot_be_cut_into_are_refused(tiles, margin):
    with pytest.raises(ValueError, match=r"want tiles in 1..3 x 1..2 and a margin of 0 or more, got"):
        cut(3, 2, tiles, margin)


@pytest.mark.parametrize("h, w, tiles, margin", PLANS)
def test_tiles_that_agree_where_they_overlap_are_put_together_to_the_frame(h, w, tiles, margin):
    frame = torch.randn(2, 3, 2, h * 8, w * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = assemble(((tile, select(frame, tile, 8)) for tile in cut(h, w, tiles, margin)), h, w)
    difference = (whole - frame).abs().max().item()
    assert whole.shape == frame.shape and whole.dtype == frame.dtype
    assert difference <= 1e-12, f"largest difference {difference:.1e} > 1e-12"


@pytest.mark.parametrize("s", [1, 8])
@pytest.mark.parametrize("cells, margin", [(12, 0), (12, 1), (12, 2), (6, 2), (4, 2), (4, 9)])
def test_a_blend_rises_linearly_over_the_whole_overlap(cells, margin, s):
    """Tiles of zeros and of ones: from one to the other in equal steps, over all that both see, however narrow."""
    alone = max(cells // 2 - margin, 0) * s  # pixels that one tile alone sees
    overlap = cells * s - 2 * alone
    steps = [(k + 1) / (overlap + 1) for k in range(overlap)]
    wanted = torch.tensor([0.0] * alone + steps + [1.0] * alone)
    for tiles, axis in (((1, 2), 4), ((2, 1), 3)):
        h, w = (2, cells) if axis == 4 else (cells, 2)
        plan = cut(h, w, tiles, margin)
        answers = []
        for k, tile in enumerate(plan):
            height, width = ((side.seen.stop - side.seen.start) * s for side in tile)
            answers.append((tile, torch.full((1, 1, 1, height, width), float(k))))
        whole = assemble(answers, h, w)
        got = whole.movedim(axis, 0).flatten(1)
        difference = (got - wanted[:, None]).abs().max().item()
        assert difference <= 1e-6, f"axis {axis}: largest difference {difference:.1e} > 1e-6: {got[:, 0].tolist()}"


def test_the_weights_at_a_corner_of_four_tiles_sum_to_one():
    plan, total = cut(6, 6, (2, 2), 1), torch.zeros(1, 1, 1, 48, 48)
    for k in range(4):
        answers = [(tile, torch.full((1, 1, 1, 32, 32), float(j == k))) for j, tile in enumerate(plan)]
        share = assemble(answers, 6, 6)
        assert share.min() >= 0 and 0 < share[0, 0, 0, 23, 23] < 1
        total += share
    assert (total - 1).abs().max() <= 1e-6


def test_a_single_tile_is_given_back_as_it_is_and_a_bfloat16_blend_is_summed_in_float32():
    y = torch.randn(1, 3, 2, 16, 24)
    assert assemble([(cut(2, 3, (1, 1), 5)[0], y)], 2, 3) is y
    frame = torch.randn(1, 3, 2, 16, 24).bfloat16()
    blended = assemble([(tile, select(frame, tile, 8)) for tile in cut(2, 3, (2, 3), 1)], 2, 3)
    assert blended.dtype == torch.bfloat16 and (blended.float() - frame.float()).abs().max() <= 2**-6


def test_a_weight_is_the_distance_to_the_nearest_end_with_a_neighbour():
    first, middle, last = cut_side(9, 3, margin=1)
    assert ramp(first, 9, 1).tolist() == [4, 3, 2, 1] and ramp(last, 9, 1).tolist() == [1, 2, 3, 4]
    assert ramp(middle, 9, 2).tolist() == [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]
    assert len(set(ramp(cut_side(9, 1, margin=1)[0], 9, 1).tolist())) == 1
