"""Degradations: sizes, repeatability, that every stage loses something, and masks of exactly what they should cover."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.data import degradations, toy_world
from mirage_min.data.degradations import FIRST, SECOND, central_mask, half_of_vehicles, low_resolution, vehicle_boxes
from mirage_min.data.photometric import uniform
from mirage_min.data.toy_world import WorldConfig


@pytest.fixture(scope="module")
def x():
    return toy_world.make_clip(3, WorldConfig(frames=3, height=48, width=72), extras=False).x_gt


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale, size", [(4, (12, 18)), (3, (16, 24)), (8, (6, 9))])
def test_low_resolution_has_its_size_repeats_and_stays_in_range(x, scale, size):
    y = low_resolution(x, scale, draws(5))
    assert y.shape == (3, 3, *size) and y.abs().max() <= 1
    assert torch.equal(y, low_resolution(x, scale, draws(5))), "a clip is a function of its draws"
    assert not torch.equal(y, low_resolution(x, scale, draws(6)))


def test_it_loses_more_than_resizing_alone_and_less_than_everything(x):
    plain = torch.nn.functional.interpolate(x.transpose(0, 1), (12, 18), mode="area").transpose(0, 1)
    lost = sum(float((low_resolution(x, 4, draws(s)) - plain).square().mean()) for s in range(8)) / 8
    assert 1e-3 < lost < 0.5 * float(plain.var()), lost


def test_the_ranges_are_real_esrgans():
    assert FIRST.blur == (0.2, 3.0) and SECOND.blur == (0.2, 1.5)
    assert FIRST.resize == (0.15, 1.5) and SECOND.resize == (0.3, 1.2)
    assert FIRST.noise == (1, 30) and SECOND.noise == (1, 25)
    assert FIRST.jpeg == SECOND.jpeg == (30, 95)
    assert (FIRST.blurred, SECOND.blurred) == (1.0, 0.8)


def test_blur_keeps_a_flat_frame_and_spreads_a_point_as_its_gaussian():
    flat = torch.full((2, 3, 20, 24), 0.3)
    assert torch.allclose(degradations.blur(flat, draws(), (0.2, 3.0)), flat, atol=1e-6)
    point = torch.zeros(1, 3, 21, 21)
    point[..., 10, 10] = 1
    spread = degradations.blur(point, draws(), (1.5, 1.5))[0, 0]       # both axes alike: any angle is the same
    wanted = torch.tensor([[math.exp(-((i - 10) ** 2 + (j - 10) ** 2) / 4.5) for j in range(21)] for i in range(21)])
    assert torch.allclose(spread, wanted * (spread.sum() / wanted.sum()), atol=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_point_is_spread_along_the_angle_that_was_drawn_and_as_far(seed):
    """The second moments of what a point becomes: a² along the angle, b² across it; the deviations are drawn first."""
    a, b, angle = (float(uniform(draws_again, *limits)) for draws_again in [draws(seed)]
                   for limits in ((1.0, 3.0), (1.0, 3.0), (0, math.pi)))
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    spread = degradations.blur(point, draws(seed), (1.0, 3.0))[0, 1].double()
    at = torch.arange(41) - 20.0
    xx, yy, xy = ((spread * w).sum() for w in (at**2, at[:, None] ** 2, at * at[:, None]))
    c, s = math.cos(angle), math.sin(angle)
    wanted = [a * a * c * c + b * b * s * s, a * a * s * s + b * b * c * c, (a * a - b * b) * c * s]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    # a kernel of three deviations lacks 3 % of a second moment at most
    assert [float(v) for v in (xx, yy, xy)] == pytest.approx(wanted, abs=0.05 * max(a, b) ** 2)


def test_noise_is_as_strong_as_is_drawn_and_the_same_in_all_colours_for_two_clips_of_five():
    grey, alike, strengths = torch.full((2, 3, 40, 40), 0.5), 0, []
    for seed in range(200):
        noise = degradations.noisy(grey, draws(seed), (5, 25)) - grey
        alike += torch.equal(noise[:, 0], noise[:, 1]) and torch.equal(noise[:, 0], noise[:, 2])
        strengths.append(float(noise.std()) * 255)
        assert abs(noise.mean()) < 0.01 and not torch.equal(noise[0], noise[1]), "another in every frame"
    assert 60 < alike < 100, f"{alike} of 200"
    assert 4.5 < min(strengths) < 6.5 and 23.5 < max(strengths) < 26, f"from {min(strengths)} to {max(strengths)}"


def test_a_resized_frame_has_the_factors_size_by_any_of_three_filters_and_eight_pixels_at_least():
    frames, found = torch.rand(1, 3, 40, 60, generator=draws()), set()
    for seed in range(30):
        y = degradations.resize(frames, (40, 60), 0.37, draws(seed))
        assert y.shape == (1, 3, 15, 22) and 0 <= y.min() and y.max() <= 1
        found.add(round(float(y[0, 0, 7, 11]), 5))
    assert len(found) == 3
    assert degradations.resize(frames, (10.5, 60), 0.5, draws()).shape == (1, 3, 8, 30)
    assert degradations.resize(frames, (5, 6), 1.0, draws()).shape == (1, 3, 5, 6), "the last size is the one wanted"


def noted(calls, what, frames, *given):
    """A stage that only notes what it was given, after the frames."""
    calls.append(given[what])
    return frames


def test_both_rounds_draw_all_of_their_ranges_and_the_second_begins_at_the_last_size(x, monkeypatch):
    calls = {name: [] for name in ("blur", "resize", "noisy", "as_jpeg", "as_h264")}
    for name, what in {"blur": 1, "resize": slice(0, 2), "noisy": 1, "as_jpeg": 0, "as_h264": 0}.items():
        monkeypatch.setattr(degradations, name, partial(noted, calls[name], what))
    for seed in range(300):
        assert (low_resolution(x, 4, draws(seed)) - x).abs().max() < 1e-6, "nothing else is done to a clip"
    assert 0.73 < calls["blur"].count(SECOND.blur) / 300 < 0.87 and calls["blur"].count(FIRST.blur) == 300
    assert calls["noisy"] == [FIRST.noise, SECOND.noise] * 300
    sides, factors = zip(*calls["resize"])
    assert list(sides) == [(48, 72), (12, 18), (12, 18)] * 300 and set(factors[2::3]) == {1.0}
    for found, (low, high) in ((factors[::3], FIRST.resize), (factors[1::3], SECOND.resize)):
        near = 0.03 * (high - low)
        assert low <= min(found) < low + near and high - near < max(found) <= high
    assert set(calls["as_jpeg"]) == set(range(30, 96)) and set(calls["as_h264"]) == set(range(18, 36))


def test_what_h264_makes_of_equal_frames_is_equal_whatever_the_memory_held():
    frames = nnf.interpolate(torch.rand(9, 3, 6, 9, generator=torch.Generator().manual_seed(0)), (96, 144),
                             mode="bilinear")
    first = degradations.as_h264(frames, 30)
    for k in range(30):
        torch.randint(0, 255, (1_000 + 37 * k, 1_000), dtype=torch.uint8)  # memory that is given back, written
        assert torch.equal(degradations.as_h264(frames, 30), first)


def test_codecs_lose_more_at_a_worse_quality(x):
    frames = ((x + 1) / 2).transpose(0, 1)
    for codec, fine, coarse in ((degradations.as_jpeg, 95, 30), (degradations.as_h264, 12, 40)):
        lost = [float((codec(frames, quality) - frames).square().mean()) for quality in (fine, coarse)]
        assert 0 < lost[0] < 0.5 * lost[1] and lost[0] < 1e-3, lost


def test_a_size_that_the_scale_does_not_divide_is_refused(x):
    with pytest.raises(ValueError, match="wanted frames whose sides 5 divides, got 48x72"):
        low_resolution(x, 5, draws())


@pytest.mark.parametrize("H, W", [(8, 12), (9, 13)])
def test_the_central_mask_has_half_of_both_sides(H, W):
    mask = central_mask(H, W)
    rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
    assert len(rows) == H // 2 and len(columns) == W // 2 and mask.sum() == (H // 2) * (W // 2)
    for found, n in ((rows, H), (columns, W)):
        assert abs(int(found[0]) - (n - 1 - int(found[-1]))) <= 1


def test_half_of_the_vehicles_are_hidden_the_same_in_all_frames():
    boxes = [torch.tensor([[10.0 * i, 2.0, 10.0 * i + 4, 6.0]] * 2) for i in range(5)]
    boxes[0][1] = math.nan  # not seen in the second frame
    seen = set()
    for seed in range(40):
        mask = half_of_vehicles(boxes, 2, 8, 50, draws(seed))[0]
        hidden = [i for i in range(5) if mask[0, 2:6, 10 * i : 10 * i + 4].all()]
        assert len(hidden) == 3 and int(mask[0].sum()) == 3 * 16
        assert int(mask[1].sum()) == 16 * len([i for i in hidden if i])
        seen.add(tuple(hidden))
    assert len(seen) == 10, "every choice of three of five is drawn"
    with pytest.raises(ValueError, match="no vehicle of the half"):
        half_of_vehicles([torch.full((2, 4), math.nan)], 2, 8, 50, draws())


def test_a_made_up_vehicles_box_holds_what_is_seen_of_it():
    config = WorldConfig(frames=2)
    scene = toy_world.sample_scene(3, config)
    clip = toy_world.render(scene, config)
    found = vehicle_boxes(scene, config)[0]                            # the actor's
    inside = clip.boxes[:, 2] > clip.boxes[:, 0]
    assert inside.any()
    x0, y0, x1, y1 = (found - clip.boxes)[inside].unbind(1)
    assert (x0 <= 1).all() and (y0 <= 1).all() and (x1 >= -1).all() and (y1 >= -1).all()
    sample = degradations.boxes_hidden(3, config)
    mask = sample.actor.bool().expand_as(sample.clean)
    assert torch.equal(sample.degraded[~mask], sample.clean[~mask]) and (sample.degraded[mask] == 0).all()
