"""Camera paths through toy scenes, and scenes in which nothing else moves: what is seen again is the same."""

import math

import pytest
import torch

from mirage_min.data import toy_paths, toy_render, toy_world
from mirage_min.data.toy_world import WorldConfig, make_clip, sample_scene


def config(path, T=5, **more):
    return WorldConfig(frames=T, height=48, width=72, grain=0.0, path=path, **more)


@pytest.mark.parametrize("T", [5, 6])
def test_out_and_back_a_static_scene_shows_the_same_frames_again_in_reverse(T):
    clip = make_clip(3, config("out_and_back", T, static=True))
    for t in range(T // 2):
        for name in ("x_gt", "x_ni", "depth", "actor", "shadow"):
            video = getattr(clip, name)
            assert torch.equal(video[:, t], video[:, T - 1 - t]), f"{name}: frames {t} and {T - 1 - t} differ"
    assert (clip.x_gt[:, 0] - clip.x_gt[:, T // 2]).abs().mean() > 0.01, "it must have moved"
    drive = sample_scene(3, config("drive", T, static=True)).c2w
    assert torch.equal(clip.c2w[0], drive[0]), "it starts where the drive does"


@pytest.mark.parametrize("T", [5, 8])
def test_a_loop_goes_out_on_the_right_comes_back_on_the_left_and_ends_where_it_began(T):
    scene = sample_scene(3, config("loop", T, static=True))
    c2w = scene.c2w
    assert torch.equal(c2w[0], c2w[-1])
    x, z = (c2w[:, i, 3] - c2w[0, i, 3] for i in (0, 2))
    ahead = [(1 - math.cos(2 * math.pi * t / (T - 1))) / 2 for t in range(T)]
    assert (z / z.max()).tolist() == pytest.approx([v / max(ahead) for v in ahead], abs=1e-5) and z.max() > 0.4
    side = [1.2 * math.sin(2 * math.pi * t / (T - 1)) for t in range(T)]
    assert x.tolist() == pytest.approx(side, abs=1e-5), "metres to the right"
    R = c2w[:, :3, :3]
    assert (R @ R.mT - torch.eye(3)).abs().max() < 1e-5 and (c2w[:, 1, 3] == c2w[0, 1, 3]).all()
    forward = R[:, :, 2] @ R[0].T[0] - R[0, :, 2] @ R[0].T[0]          # how far it looks to the right of the start
    assert [v > 0 for v in forward[1 : (T - 1) // 2].tolist()] == [True] * ((T - 1) // 2 - 1)


def test_the_last_frame_of_a_loop_is_the_first_in_a_static_scene():
    clip = make_clip(1, config("loop", static=True))
    assert torch.equal(clip.x_gt[:, 0], clip.x_gt[:, -1]) and torch.equal(clip.depth[:, 0], clip.depth[:, -1])
    assert not torch.equal(clip.x_gt[:, 1], clip.x_gt[:, -2]), "two sides of the street"


def test_nothing_but_the_camera_moves_in_a_static_scene_and_what_moves_is_marked_in_another():
    T, frozen = 5, make_clip(0, config("out_and_back", static=True))
    assert frozen.moving.abs().max() == 0
    for body in sample_scene(0, config("drive", static=True)).bodies:
        assert torch.equal(body.pose, body.pose[:1].expand(T, -1, -1))
    street = sample_scene(0, config("drive"))
    street.bodies[1].pose[:] = street.bodies[1].pose[:1]               # one that is parked
    known = toy_world.render(street, config("drive"))
    for t in range(T):
        hits = toy_render.cast(street, known.K, (48, 72), t, 1)
        moving = torch.zeros(48 * 72)
        for b, body in enumerate(street.bodies):
            if (body.pose[0] != body.pose[-1]).any():
                moving[hits.body == b] = 1
        assert torch.equal(known.moving[0, t].flatten(), moving) and moving.any(), f"frame {t}"


@pytest.mark.parametrize("path", ["out_and_back", "loop"])
def test_a_path_stays_clear_of_every_vehicle_in_a_static_scene(path):
    """The nearest corner of a vehicle in the camera's lane, for seeds with actors of every kind."""
    for seed in range(30):
        scene = sample_scene(seed, config(path, 17, static=True))
        for body in scene.bodies:
            if body.size is None:
                continue
            corners = torch.cat([p.corners for p in body.parts]) @ body.pose[0, :3, :3].T + body.pose[0, :3, 3]
            for eye in scene.c2w[:, :3, 3]:
                x, z = (corners[:, 0] - eye[0]).abs(), corners[:, 2] - eye[2]
                near = z[(x < 1.0) & (z > -6)]
                assert not len(near) or near.min() > 1.0, f"seed {seed}: {near.min():.1f} m before the camera"


def test_the_free_way_ends_three_metres_before_what_is_in_the_lane():
    street = sample_scene(0, config("drive", static=True))
    car = street.bodies[0]
    start = torch.eye(4)

    def way(x, z):
        car.pose[:, :3, :3], car.pose[:, :3, 3] = torch.eye(3), torch.tensor([x, 0.0, z])
        return toy_paths.free_way([car, *street.bodies[-3:]], start)
    half = float(car.size[2]) / 2
    assert way(0.0, 20.0) == pytest.approx(20 - half - 3, abs=1e-4)
    assert way(1.5, 20.0) == pytest.approx(20 - half - 3, abs=1e-4), "its side reaches into the lane"
    assert way(5.0, 20.0) == math.inf and way(0.0, -20.0) == math.inf
    assert way(0.0, half + 3.2) == 0.5, "at least half a metre"


def test_a_drive_out_is_shortened_to_the_free_way_and_a_single_frame_stays():
    path, start = torch.eye(4).repeat(9, 1, 1), torch.tensor([3.0, -2.0, 5.0])
    path[:, :3, 3] = start + torch.arange(9.0)[:, None] * torch.tensor([0.6, 0.0, 0.8])  # a metre a frame
    for way, wanted in ((100.0, [0, 1, 2, 3, 4, 3, 2, 1, 0]), (2.0, [0, 0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0])):
        gone = toy_paths.out_and_back(path, way)[:, :3, 3] - start
        assert torch.allclose(gone, torch.tensor(wanted)[:, None] * torch.tensor([0.6, 0.0, 0.8]), atol=1e-5), gone
    assert torch.equal(toy_paths.out_and_back(path[:1], 2.0), path[:1])
    assert torch.equal(toy_paths.loop(path[:1], 2.0), path[:1])
    assert torch.equal(toy_paths.along("drive", path, []), path)


def test_what_is_no_path_no_car_and_no_gloss_is_refused():
    with pytest.raises(ValueError, match="path must be one of drive, out_and_back, loop, got 'circle'"):
        WorldConfig(path="circle")
    with pytest.raises(ValueError, match="cars must be some of saloon, hatchback, van, pickup, got .*tank"):
        WorldConfig(cars=("van", "tank"))
    with pytest.raises(ValueError, match="gloss must be from 0 to 1, got 2"):
        WorldConfig(gloss=2)
    with pytest.raises(ValueError, match="path must be one of"):
        toy_paths.along("circle", torch.eye(4)[None], [])


def test_the_command_line_makes_static_loops(tmp_path):
    toy_world.main(["--out", str(tmp_path), "--clips", "1", "--frames", "2", "--size", "16x24", "--workers", "1",
                    "--path", "loop", "--static", "--extras"])
    clip = toy_world.load_clip(tmp_path / "0000000.safetensors")
    assert clip.moving.abs().max() == 0 and torch.equal(clip.c2w[0], clip.c2w[1])
