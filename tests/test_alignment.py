"""The trials of alignment: each is what its case is called, its solution is known, and errors are measured as named."""

import math
from functools import cache

import pytest
import torch

from experiments import alignment
from experiments.alignment import Draws, Trial, errors, make_trial, seen_from_one_side, surface, yaw
from mirage_min.data.toy_shapes import FACES, prism

make_trial = cache(make_trial)  # tests only look at them


def in_its_own_frame(trial: Trial) -> torch.Tensor:
    """The object's points [N, 3] where the asset's are: its similarity undone."""
    s, R, t = trial.truth
    return (trial.obj.means - t) @ R / s


# ---- points on a surface ---------------------------------------------------------------------------------------------

def test_points_are_spread_evenly_over_a_box():
    """Each face in 4 x 4 cells: as many points in each as its share of the whole area, by the chi-squared of 95."""
    size, corner = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([5.0, -1.0, 0.5])
    x, normals = surface([prism(*zip(corner.tolist(), (corner + size).tolist()))], 9600, Draws(0))
    u = (x - corner) / size
    cells, area = [], 2 * (2 * 1 + 1 * 3 + 3 * 2)
    for axis, side in ((axis, side) for axis in range(3) for side in (0, 1)):
        on = (u[:, axis] - side).abs() < 1e-5
        others = [k for k in range(3) if k != axis]
        assert torch.allclose(normals[on], torch.eye(3)[axis] * (2 * side - 1), atol=1e-6), "outwards"
        a, b = (u[on][:, k].mul(4).long().clamp(0, 3) for k in others)
        wanted = 9600 * (size[others].prod() / area / 16).item()
        cells += [(n - wanted) ** 2 / wanted for n in torch.bincount(4 * a + b, minlength=16).tolist()]
    assert len(x) == len(normals) == 9600 and sum(cells) < 150, f"chi-squared {sum(cells):.0f}"


def test_leaning_faces_get_their_share_and_what_another_part_covers_gets_none():
    leaning = prism((-1.0, 1.0), (-1.0, 0.0), (-1.0, 2.0), top=(0.6, 0.7, 0.2))
    x, normals = surface([leaning], 6000, Draws(1))
    quads = [leaning.corners[list(face)] for face in FACES]
    areas = torch.stack([torch.linalg.cross(q[2] - q[0], q[3] - q[1]).norm() / 2 for q in quads])  # of its diagonals
    for normal, offset, area in zip(leaning.normals, leaning.offsets, areas):
        on = (x @ normal - offset).abs() < 1e-5
        wanted = 6000 * (area / areas.sum()).item()
        assert abs(on.sum() - wanted) < 5 * wanted**0.5 and (normals[on] @ normal > 0.999).sum() >= 0.98 * on.sum()
    x, _ = surface([prism((0, 2), (0, 1), (0, 1)), prism((1, 3), (0.2, 0.8), (0.2, 0.8))], 2000, Draws(2))
    deep = 1e-3
    in_first = (x[:, 0] < 2 - deep) & ((x - 0.5).abs()[:, 1:] < 0.5 - deep).all(1) & (x[:, 0] > deep)
    in_second = (x[:, 0] > 1 + deep) & ((x - 0.5).abs()[:, 1:] < 0.3 - deep).all(1) & (x[:, 0] < 3 - deep)
    assert len(x) == 2000 and not in_first.any() and not in_second.any()
    assert (x[:, 0] > 2.5).any() and (x[:, 0] < 0.5).any()


def test_what_faces_a_distant_camera_is_kept_and_the_camera_is_3_to_20_degrees_above_the_ground():
    n = torch.nn.functional.normalize(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    heights, quarters = [], set()
    for seed in range(40):
        kept = seen_from_one_side(n, n, Draws(seed))
        camera = torch.nn.functional.normalize(kept.mean(dim=0), dim=0)  # the middle of the half of a sphere
        facing = n @ camera
        assert (kept @ camera > -0.06).all() and len(kept) >= (facing > 0.06).sum()
        heights.append(math.degrees(math.asin(-camera[1])))
        quarters.add((camera[0].item() > 0, camera[2].item() > 0, camera[0].abs().item() > camera[2].abs().item()))
    assert 1 < min(heights) < 7 and 16 < max(heights) < 22 and len(quarters) == 8, f"{min(heights)}, {max(heights)}"
    assert sum(heights) / 40 == pytest.approx(11.5, abs=2.5)


# ---- trials ----------------------------------------------------------------------------------------------------------

def test_cars_places_and_headings_are_drawn_from_their_whole_ranges():
    found = []
    for seed in range(60):
        trial = make_trial("copies", seed, 120)
        s, R, t = trial.truth
        assert torch.equal(R @ torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 1, 0])) and trial.heading[1] == 0
        size = trial.asset.means.amax(dim=0) - trial.asset.means.amin(dim=0)
        assert size[2] == pytest.approx(trial.length / s, rel=0.1)
        front = math.atan2(R[0, 2], R[2, 2])
        off = (math.atan2(trial.heading[0], trial.heading[2]) - front + math.pi) % (2 * math.pi) - math.pi
        found.append([trial.length / s, size[0].item(), -2 * trial.centre[1].item(), s, math.degrees(front),
                      math.degrees(off), *(t / 30).tolist()])
        assert trial.centre[0] == trial.centre[2] == 0 and size[1] == pytest.approx(found[-1][2], rel=0.15)
    low, high = torch.tensor(found).aminmax(dim=0)
    # length; width, of which points at the very sides are few; height; scale; yaw; heading
    ranges = (3.8, 5.0), (1.65, 2.03), (1.4, 1.9), (0.3, 3.0), (-180, 180), (-30, 30)
    for k, (a, b) in enumerate(ranges):
        assert a <= low[k] < a + (b - a) / 4 and b - (b - a) / 4 < high[k] <= b, f"{k}: {low[k]} to {high[k]}"
    spread = torch.tensor(found)[:, 6:].flatten()
    assert spread.std() == pytest.approx(1, abs=0.2) and spread.mean().abs() < 0.3, "places, in 30 m"


def test_copies_are_the_asset_itself_and_clean_is_another_draw_of_the_same_car():
    copies, clean = (make_trial(case, 0) for case in ("copies", "clean"))
    for trial in (copies, clean):
        assert len(trial.asset.means) == len(trial.obj.means) == 600
        for points in (trial.asset, trial.obj):
            assert torch.allclose(points.logit_opacities.sigmoid(), torch.tensor(0.9))
    assert torch.allclose(in_its_own_frame(copies), copies.asset.means, atol=1e-4)
    apart = torch.cdist(in_its_own_frame(clean), clean.asset.means).amin(dim=1)
    assert apart.mean() > 0.01 and apart.max() < 0.6, "600 points on 30 square metres"
    a, b = (torch.cov(points.T).diagonal() for points in (in_its_own_frame(clean), clean.asset.means))
    assert (a / b - 1).abs().max() < 0.15


def test_noise_is_2_percent_of_the_length_along_one_direction_and_half_a_percent_across():
    """Against another draw of it: the quantiles of how far a point is moved, in percent of the length."""
    clean, noisy = (make_trial(case, 0) for case in ("clean", "noise"))
    moved = in_its_own_frame(noisy) - in_its_own_frame(clean)
    size = moved.norm(dim=1) / (noisy.length / noisy.truth[0]) * 100
    draws = torch.Generator().manual_seed(5)
    direction = torch.nn.functional.normalize(torch.randn(20_000, 3, generator=draws), dim=1)
    wanted = (2 * direction * torch.randn(20_000, 1, generator=draws)
              + 0.5 * torch.randn(20_000, 3, generator=draws)).norm(dim=1)
    for q in (0.1, 0.5, 0.9, 0.98):
        assert size.quantile(q).item() == pytest.approx(wanted.quantile(q).item(), rel=0.15), q
    mean, std = moved.mean(dim=0), moved.std(dim=0)
    assert (mean.abs() < 5 * std / 600**0.5).all() and std.max() < 1.2 * std.min(), "to no side more than another"


def test_a_tenth_are_floaters_in_a_box_of_twice_the_size_at_any_opacity():
    clean, floating = (make_trial(case, 0) for case in ("clean", "floaters"))
    x = in_its_own_frame(floating)
    assert len(x) == 666 and torch.allclose(x[:600], in_its_own_frame(clean), atol=1e-4)
    opacities = floating.obj.logit_opacities.sigmoid()
    assert torch.allclose(opacities[:600], torch.tensor(0.9))
    assert opacities[600:].min() < 0.1 and opacities[600:].max() > 0.95
    low, high = floating.asset.means.aminmax(dim=0)
    u = (x[600:] - (low + high) / 2) / (high - low)  # in the box, from -1 to 1
    assert u.abs().max() < 1.03 and (u.amin(dim=0) < -0.85).all() and (u.amax(dim=0) > 0.85).all()
    assert u.mean(dim=0).abs().max() < 0.3 and u.std() == pytest.approx(1 / 3**0.5, abs=0.08)


def test_half_has_one_flank_of_the_car_and_all_is_the_same_with_noise_and_floaters():
    for seed in range(3):
        half, everything, clean = (make_trial(case, seed) for case in ("half", "all", "clean"))
        flanks = {}
        for trial in (half, clean):
            x, height = in_its_own_frame(trial), -2 * trial.centre[1].item()
            doors = (x[:, 1] < -0.63) & (x[:, 1] > -0.58 * height) & (x[:, 2].abs() < 1.7)
            flanks[trial is half] = sorted((doors & (side * x[:, 0] > 0.8)).sum().item() for side in (-1, 1))
        assert flanks[True][0] == 0 and flanks[True][1] > 1.5 * flanks[False][1] > 0, f"seed {seed}: {flanks.values()}"
        assert len(half.obj.means) == 600 and len(everything.obj.means) == 666
        moved = torch.cdist(in_its_own_frame(everything)[:600], in_its_own_frame(half)).amin(dim=1)
        assert 0.01 < moved.median() < 0.1, f"seed {seed}: {moved.median():.3f} m of noise"


def test_cut_keeps_what_is_before_a_vertical_plane_through_the_centre():
    turns = torch.arange(7200) * math.pi / 3600
    directions, middles = torch.stack([turns.sin(), turns.cos()]), []
    for seed in range(40):
        whole, cut = (in_its_own_frame(make_trial(case, seed, 200)) for case in ("clean", "cut"))
        kept = torch.cdist(whole, cut).amin(dim=1) < 1e-3
        assert kept.sum() == len(cut) and 0.3 < kept.float().mean() < 0.7
        before = whole[:, [0, 2]] @ directions > 0  # of every plane through the vertical axis
        fits = (before == kept[:, None]).float().mean(dim=0)
        assert fits.max() > 0.99, f"seed {seed}: no vertical plane parts the kept from the others"
        middles.append(directions[:, fits.argmax()])
    eighths = {(x > 0, z > 0, abs(x) > abs(z)) for x, z in torch.stack(middles).tolist()}
    assert len(eighths) == 8, "the plane has any direction"


# ---- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("degrees", [-179, -100, -20, 0, 0.5, 20, 100, 179])
def test_errors_are_the_centre_in_lengths_the_yaw_in_degrees_and_the_scale(degrees):
    R, t = yaw(0.3), torch.tensor([7.0, -2, 30])
    trial = Trial(None, None, None, (torch.tensor(2.0), R, t), centre=torch.tensor([0.0, -1, 0]), length=5.0)
    found = torch.tensor(2.2), yaw(0.3 + math.radians(degrees)), t + torch.tensor([0.3, 0.2, 0.4])
    # the centre lies on the axis of the turn, 2 above t and 2.2 above the t that was found
    assert errors(found, trial) == pytest.approx((10.0, abs(degrees), 10.0), abs=2e-2)
    smaller = torch.tensor(1.5), R, t
    assert errors(smaller, trial) == pytest.approx((10.0, 0, 25.0), abs=2e-2)


def test_a_half_turn_moves_a_centre_that_is_off_the_axis():
    trial = Trial(None, None, None, (torch.tensor(1.0), yaw(1.0), torch.zeros(3)), torch.tensor([3.0, -1, 0]), 5.0)
    found = torch.tensor(1.0), yaw(1.0 + math.pi), torch.zeros(3)
    assert errors(found, trial) == pytest.approx((120.0, 180.0, 0.0), abs=1e-3)


def test_a_positive_yaw_turns_z_towards_x():
    assert torch.allclose(yaw(math.pi / 6) @ torch.tensor([0.0, 0, 1]), torch.tensor([0.5, 0, 3**0.5 / 2]))
    assert torch.allclose(yaw(0.7) @ yaw(0.7).T, torch.eye(3), atol=1e-6) and torch.linalg.det(yaw(0.7)) > 0.99


def test_the_table_has_median_and_ninetieth_percentile_and_counts_flips(tmp_path, monkeypatch, capsys):
    of_case = torch.stack([torch.arange(11.0), 20 * torch.arange(11.0), torch.arange(11.0) / 10], dim=1).flip(0)
    monkeypatch.setattr(alignment, "measure", lambda case, trials, heading: of_case)
    clock = iter([100.0, 188.0])
    monkeypatch.setattr(alignment.time, "process_time", lambda: next(clock))
    threads = torch.get_num_threads()
    alignment.main(alignment.flags().parse_args(["--trials", "11", "--out", str(tmp_path)]))
    torch.set_num_threads(threads)
    text = (tmp_path / "alignment.md").read_text()
    row = "5.000 (9.000) | 100.000 (180.000) | 0.500 (0.900) | 6 |"  # 100, 120, ... 200 degrees
    assert all(f"| {case} | {row}" in text for case in (*alignment.CASES, "all, no heading given"))
    assert "One alignment took 1.00 s of one core on average" in text, "88 s, 8 rows, 11 trials"
