"""One clip in many tones: one draw for all its frames, in range, and every kind does what it is called."""

import pytest
import torch

from mirage_min.data import photometric
from mirage_min.data.photometric import KINDS, vary


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    return torch.rand(3, 5, 24, 32, generator=draws(7)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_variation_keeps_shape_and_range_leaves_its_input_alone_and_follows_its_draws(kind, x):
    before = x.clone()
    y = vary(x, draws(1), kind)
    assert y.shape == x.shape and y.dtype == x.dtype and y.abs().max() <= 1 and torch.equal(x, before)
    assert torch.equal(y, vary(x, draws(1), kind))
    assert kind == "as it is" or not torch.equal(y, vary(x, draws(2), kind))


def test_kinds_are_drawn_as_often_as_they_say():
    generator, n = draws(), 4000
    counts = dict.fromkeys(KINDS, 0)
    for _ in range(n):
        counts[photometric.draw_kind(generator)] += 1
    assert abs(sum(KINDS.values()) - 1) < 1e-9
    for kind, share in KINDS.items():
        assert abs(counts[kind] / n - share) < 4 * (share / n) ** 0.5, f"{kind}: {counts[kind] / n} for {share}"


def test_a_camera_sees_all_frames_alike(x, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.zeros(shape))  # no grain
    frame = x[:, :1].expand(-1, 4, -1, -1)
    y = photometric.camera((frame + 1) / 2, draws(3))
    assert (y - y[:, :1]).abs().max() == 0


def test_brighter_stays_brighter_under_a_camera_without_grain(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.zeros(shape))
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(3, 1, 4, 64)
    for seed in range(20):
        y = photometric.luma(photometric.camera(ramp, draws(seed)))[0, 0, 0]
        assert (y.diff() >= -1e-6).all(), f"seed {seed}: tones change their order"


def test_night_is_dark_haze_bright_and_grey_without_colour(x):
    levels = {kind: torch.stack([vary(x, draws(s), kind).mean() for s in range(30)]).mean()
              for kind in ("night", "camera", "haze")}
    assert levels["night"] + 0.2 < levels["camera"] < levels["haze"] - 0.1, levels
    assert vary(x, draws(), "grey").std(dim=0).max() < 1e-6


def test_bars_are_even_dark_and_leave_a_picture(x):
    for seed in range(12):
        y = vary(x, draws(seed), "bars")
        rows, columns = (y.std(dim=(0, 1, d)) < 1e-6 for d in (3, 2))
        assert rows[0] and rows[-1] or columns[0] and columns[-1], f"seed {seed}: no bars"
        assert not (rows.all() or columns.all()) and y[:, :, 0, 0].max() < -0.8


def test_a_fade_ends_or_begins_in_black_or_white(x):
    ends = set()
    for seed in range(24):
        y = vary(x, draws(seed), "fade")
        flat = [i for i in (0, -1) if y[:, i].std() < 1e-6]
        assert len(flat) == 1, f"seed {seed}: {flat}"
        ends.add((flat[0], round(float(y[:, flat[0]].mean()))))
    assert ends == {(0, -1), (0, 1), (-1, -1), (-1, 1)}


def test_one_colour_fills_the_frames_from_one_on(x):
    starts, greys = set(), 0
    for seed in range(40):
        y = vary(x, draws(seed), "one colour")
        flat = [bool(y[:, t].std(dim=(1, 2)).max() < 1e-6) for t in range(5)]
        assert flat[-1] and flat == sorted(flat), f"seed {seed}: {flat}"
        starts.add(flat.index(True))
        greys += bool(y[:, -1].std(dim=0).max() < 1e-6)
    assert starts == {0, 1, 2, 3, 4} and 5 < greys < 35


def test_an_unknown_kind_is_refused_by_name(x):
    with pytest.raises(ValueError, match="kind must be one of as it is, camera, .*, got 'sepia'"):
        vary(x, draws(), "sepia")
