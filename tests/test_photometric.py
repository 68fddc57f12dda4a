"""One clip in many tones: one draw for all its frames, in range, and every kind does what it is called."""

import math

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


def filmed(value, q, balance):
    """One pixel [3] in [0, 1] by a camera each of whose draws lies at the share q of its range, without grain."""
    def at(low, high):
        return low + q * (high - low)

    def grey_of(v):
        return 0.299 * v[0] + 0.587 * v[1] + 0.114 * v[2]
    v = [c * math.exp(0.3 * b) * math.exp(at(-0.9, 0.4)) for c, b in zip(value, balance)]
    v = [min(max(c, 1e-4), 1) ** math.exp(at(-0.6, 0.6)) for c in v]
    v = [grey_of(v) + at(0.3, 1.5) * (c - grey_of(v)) for c in v]
    return [min(max(0.5 + at(0.75, 1.35) * (c - 0.5) + at(-0.05, 0.1), 0), 1) for c in v]


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_a_camera_is_its_chain_step_by_step_at_the_ends_and_in_the_middle_of_every_range(x, monkeypatch, q):
    monkeypatch.setattr(photometric, "uniform", lambda draws, low, high: torch.tensor(low + q * (high - low)))
    y = photometric.camera((x + 1) / 2, draws(3))
    balance = 2 * torch.rand(3, generator=draws(3)) - 1                # of a camera, its first draws
    for t, row, column in ((0, 3, 5), (4, 20, 31), (2, 0, 0)):
        wanted = torch.tensor(filmed((((x[:, t, row, column]) + 1) / 2).tolist(), q, balance.tolist()))
        off = (y[:, t, row, column] - wanted).abs().max()
        assert off < 5 * q * 1.5 / 255 + 1e-5, f"{off:.4f} off"        # five standard deviations of the grain
    grain = (photometric.camera(torch.full((3, 2, 64, 64), 0.5), draws(3)) * 255).std(dim=(1, 2, 3))
    assert (grain - 1.5 * q).abs().max() < 0.05, f"standard deviations {grain.tolist()} of 255, wanted {1.5 * q}"


def test_night_is_a_share_of_the_light_and_haze_a_bright_veil(monkeypatch):
    monkeypatch.setattr(photometric, "camera", lambda x, draws: x)
    black, white = torch.full((3, 1, 2, 2), -1.0), torch.ones(3, 1, 2, 2)
    light, veil, tone = [], [], []
    for seed in range(200):
        light.append(float((vary(white, draws(seed), "night").mean() + 1) / 2))
        dark, bright = (float((vary(v, draws(seed), "haze").mean() + 1) / 2) for v in (black, white))
        veil.append(1 - (bright - dark))
        tone.append(dark / veil[-1])
        assert vary(black, draws(seed), "night").eq(-1).all()
    for found, low, high in ((light, 0.06, 0.35), (veil, 0.2, 0.6), (tone, 0.6, 1.0)):
        near = 0.05 * (high - low)
        within = low - 1e-4 <= min(found) < low + near and high - near < max(found) <= high + 1e-4
        assert within, f"from {min(found):.3f} to {max(found):.3f}, wanted {low} to {high}"


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
        for flat, n in ((rows, 24), (columns, 32)):
            bar = int((~flat).nonzero()[0])                            # as wide on both sides, 5 to 30 % of the frame
            assert int((~flat).nonzero()[-1]) == n - 1 - bar and (bar == 0 or int(0.05 * n) <= bar <= 0.3 * n)


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
