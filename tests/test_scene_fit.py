"""scene_fit.py: depth and poses that do not fit are refused, with the error that loops over pixels measure."""

import re
from dataclasses import replace

import pytest
import torch

from mirage_min.data import scene_fit
from mirage_min.data.scene_fit import Known, check_fit, misfit, misfit_of_pair
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method.camera import Camera

H, W = 32, 48


def scene(path="loop", seed=5) -> list[Known]:
    clip = make_clip(seed, WorldConfig(5, H, W, path=path, static=True))
    depth = torch.where(clip.depth[0].isfinite(), clip.depth[0], 0)
    return [Known(clip.x_gt[:, t], depth[t], None, Camera.from_pose(clip.K, clip.c2w[t], W, H)) for t in range(5)]


def by_loops(a: Known, b: Known, factor: float):
    """Each pixel of a through both cameras: median error in depth, mean error in colour, share that is seen."""
    errors, colours, count = [], [], 0
    for i in range(H):
        for j in range(W):
            d = factor * float(a.depth[i, j])
            if d == 0 or (a.dynamic is not None and a.dynamic[i, j]):
                continue
            count += 1
            ray = torch.linalg.inv(a.camera.K.double()) @ torch.tensor([j + 0.5, i + 0.5, 1.0], dtype=torch.float64)
            p = a.camera.camera_to_world.double() @ torch.cat([d * ray, torch.ones(1, dtype=torch.float64)])
            q = b.camera.world_to_camera.double() @ p
            x = b.camera.K.double() @ q[:3]
            u, v = float(x[0] / x[2]), float(x[1] / x[2])
            if q[2] > 0.01 * factor and 0 <= u < W and 0 <= v < H and b.depth[int(v), int(u)] > 0:
                errors.append(abs(float(q[2]) / (factor * float(b.depth[int(v), int(u)])) - 1))
                colours.append(127.5 * (a.frame[:, i, j] - b.frame[:, int(v), int(u)]).abs().mean())
    errors = torch.tensor(errors, dtype=torch.float64)
    return float(errors.median()), float(torch.stack(colours).mean()), len(errors) / count


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_misfit_is_that_of_each_pixel_through_both_cameras(factor):
    a, b = scene()[:2]
    a.dynamic = torch.zeros(H, W, dtype=torch.bool)
    a.dynamic[20:, :30] = True
    b.depth[12:16] = 0                                                 # unknown there
    depth, colour, share = by_loops(a, b, factor)
    assert share > scene_fit.OVERLAP
    assert misfit_of_pair(a, b, factor) == pytest.approx((depth, colour), rel=1e-5)
    found = misfit([(a, b), (b, b)], factor)
    assert found.depth == pytest.approx(depth / 2, rel=1e-5, abs=1e-6) and found.pairs == 2
    assert found.colour == pytest.approx(colour / 2, rel=1e-5)


def test_frames_that_do_not_see_each_other_and_one_alone_cannot_be_compared():
    a, b = scene()[:2]
    away = replace(b.camera, world_to_camera=b.camera.world_to_camera.clone())
    away.world_to_camera[0, 3] += 1000
    assert misfit_of_pair(a, replace(b, camera=away), 1.0) is None
    assert misfit_of_pair(a, replace(b, dynamic=torch.ones(H, W, dtype=torch.bool)), 1.0) is None
    assert check_fit([a, replace(b, camera=away)], "here") is None and check_fit([a], "here") is None


def test_what_fits_passes_wherever_the_camera_goes_and_many_frames_are_thinned():
    for path in ("loop", "out_and_back", "drive"):
        off = check_fit(scene(path), "here")
        assert off.depth < 0.03 and "in depth and" in str(off)
    assert check_fit(scene() * 4, "here").pairs <= 2 * scene_fit.FRAMES


@pytest.mark.parametrize("factor", [1000.0, 10.0, 0.4])
def test_depth_in_another_unit_is_refused_with_the_errors_and_the_factor(factor):
    known = [replace(view, depth=factor * view.depth) for view in scene()]
    with pytest.raises(ValueError, match="^here: depth and poses do not fit") as error:
        check_fit(known, "here")
    found = re.search(r"off by ([\d.]+)% in depth and ([\d.]+) of 255 in colour; with depth times (\S+) by ([\d.]+)% "
                      r"in depth and ([\d.]+) of 255 in colour: is it in another unit", str(error.value))
    assert found, str(error.value)
    assert 0.8 < float(found[3]) * factor < 1.25 and float(found[5]) < 0.67 * float(found[2])


def test_poses_turned_round_are_refused():
    known = scene()
    for view in known:
        view.camera = replace(view.camera, world_to_camera=view.camera.camera_to_world)
    with pytest.raises(ValueError, match="are poses camera to world, and is depth along z"):
        check_fit(known, "here")
