"""The world model's study: each memory shows what it should, each measure sees its fault, and the whole runs."""

import argparse
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Generator

from experiments import world_memories, world_report, world_study
from experiments.world_memories import (
    Known,
    NoMemory,
    PixelLift,
    Release,
    ReleaseAnyOrder,
    RgbCloud,
    TrueLatents,
    as_kind,
)
from mirage_min.method.latent_memory import Memory
from mirage_min.networks import imagenet, weights
from mirage_min.systems.world import pad
from tests import small, test_world

SIZE = 32, 48


@pytest.fixture(autouse=True, scope="module")
def small_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_study, "SIZE", SIZE)
        world_study.make.cache_clear()
        yield
    world_study.make.cache_clear()


@pytest.fixture(scope="module")
def scene(small_scenes):
    """A clip out and back, and its cameras."""
    return world_study.make(3, 17, "out_and_back", True)


def cell_image(image):
    """[C, H, W] -> [C * 256, h, w], as the foreseeable VAE encodes it."""
    return test_world.Cells().encode(image[None, :, None])[0, :, 0]


# ---- the memories ----------------------------------------------------------------------------------------------------

def test_without_a_memory_nothing_is_shown_and_true_latents_are_those_of_the_clip(scene):
    clip, path = scene
    nothing = world_study.rollout(as_kind(NoMemory, test_world.world()), *scene, Known(*scene), 0)
    assert torch.equal(nothing[:, 0], clip.x_gt[:, 0]) and (nothing[:, 1:] - 0.5).abs().max() < 1e-6
    true = world_study.rollout(as_kind(TrueLatents, test_world.world()), *scene, Known(*scene), 0)
    assert true.shape == clip.x_gt.shape and (true[:, ::4] - clip.x_gt[:, ::4]).abs().max() < 1e-6


def test_the_measures_find_that_what_was_seen_comes_back(scene):
    """With networks that do what the memory says, and grey elsewhere."""
    clip, path = scene
    found = {}
    for name, kind in world_study.LOOPS.items():
        world = as_kind(kind, test_world.world())
        x = world_study.rollout(world, clip, path, Known(clip, path), 0)
        found[name] = world_study.judge(x, clip, world_study.seen_first(world, clip, path), mean_difference)
    none, latent, rgb, true = (row["PSNR_C, seen"] for row in found.values())
    assert latent > 100, "the very latents that were given"
    assert none + 3 < rgb < true < latent and true > 40, "up to the grain of the sensor"


def mean_difference(x, y):
    return (x - y).abs().mean(dim=(1, 2, 3))


def test_the_cloud_shows_a_remembered_frame_as_it_was_and_is_encoded_whole(scene):
    clip, path = scene
    cloud = as_kind(RgbCloud, test_world.world())
    x = pad(clip.x_gt[None, :, [0]])
    memory = cloud.update(cloud.blank(x), x, [0], Known(clip, path)(x[0], path[:1]), path[:1])
    near = clip.depth[0, 0].isfinite()
    assert len(memory) == near.sum() and memory.features.shape[1] == 3
    picture, seen = world_memories.render(memory, path[0])
    assert torch.equal(picture[:, near], clip.x_gt[:, 0, near]) and seen[0, near].all() and not seen.all()
    z, mask = cloud.control(memory, [path[0]], torch.zeros(1, 768, 1, 2, 3))[0].split([768, 1])
    assert torch.equal(z, torch.stack([cell_image(picture)] * 3, dim=1))
    assert mask.shape == (1, 3, 2, 3) and mask[0, 0, 1].all(), "the road"


def test_the_cloud_is_rendered_for_each_frame_of_a_chunk_and_at_its_end_the_last_camera_stays(scene):
    clip, path = scene
    cloud, like = as_kind(RgbCloud, test_world.world()), torch.zeros(1, 768, 1, 2, 3)
    x = pad(clip.x_gt[None, :, [0]])
    memory = cloud.update(cloud.blank(x), x, [0], Known(clip, path)(x[0], path[:1]), path[:1])
    for cameras in (path[:9], path[:6], path[3:5]):
        found = cloud.control(memory, cameras, like)
        shown = [cameras[min(t, len(cameras) - 1)] for t in (0, 4, 8)]  # the frames that the VAE codes here
        wanted = torch.stack([cell_image(world_memories.render(memory, camera)[0]) for camera in shown], dim=1)
        assert found.shape == (1, 769, 3, 2, 3) and torch.equal(found[0, :768], wanted)


def test_a_cell_is_known_if_half_of_its_pixels_are():
    seen = torch.zeros(1, 32, 48)
    seen[0, :16, :8], seen[0, :15, 16:24], seen[0, 16:, 32:] = 1, 1, 1  # a half, less than half, all of three cells
    assert world_memories.known_cells(seen, 2, 3).tolist() == [[[1, 0, 0], [0, 0, 1]]]


def test_true_latents_are_those_of_the_chunks_own_frames_and_the_last_stays(scene):
    clip, path = scene
    world = as_kind(TrueLatents, test_world.world())
    world.clip, world.path = clip.x_gt, path
    for cameras, frames in ((path[:9], (0, 4, 8)), (path[3:5], (3, 7, 11)), (path[12:], (12, 16, 16))):
        z, mask = world.control(None, cameras, None)[0].split([768, 1])
        assert torch.equal(z, torch.stack([cell_image(clip.x_gt[:, t]) for t in frames], dim=1))
        assert mask.shape == (1, 3, 2, 3) and (mask == 1).all()


def test_gaps_of_the_cloud_are_closed_by_larger_points():
    """A wall seen from a third of the way: every third pixel has a point, and all are shown."""
    cloud, near = as_kind(RgbCloud, test_world.world()), test_world.camera(0)
    x = torch.rand(1, 3, 1, test_world.H, test_world.W, generator=Generator().manual_seed(0))
    memory = cloud.update(cloud.blank(x), x, [0], test_world.wall(x[0], [near]), [near])
    pose = torch.eye(4, dtype=torch.float64)
    pose[2, 3] = test_world.DEPTH * 2 / 3
    closer = test_world.Camera.from_pose(near.K, pose, test_world.W, test_world.H)
    H, W = test_world.H, test_world.W
    assert world_memories.latent_memory.read(memory, closer, H, W)[1].mean() < 0.2
    picture, seen = world_memories.render(memory, closer)
    assert seen.all() and picture.min() > 0


def test_pixels_are_lifted_each_by_its_own_depth_and_hold_their_cells_latent(scene):
    clip, path = scene
    world = as_kind(PixelLift, test_world.world())
    x = torch.full((1, 3, 1, *SIZE), 0.25)
    memory = world.update(world.blank(x), x, [0], Known(clip, path)(x[0], path[:1]), path[:1])
    assert len(memory) == clip.depth[0, 0].isfinite().sum() and (memory.features == 0.25).all()


# ---- the release -----------------------------------------------------------------------------------------------------

def test_the_releases_readout_is_a_loop_that_writes_from_far_to_near_or_in_any_order():
    draws = Generator().manual_seed(0)
    camera = test_world.camera(0)
    points = torch.rand(300, 3, generator=draws) * torch.tensor([4.0, 2, 5]) - torch.tensor([2.0, 1, 1])
    memory = Memory(points, torch.arange(1.0, 301)[:, None])
    K = camera.resized(6, 4).K.float()
    wanted, cells = torch.zeros(4, 6), {}
    for z, i in sorted(((float(p[2]), i) for i, p in enumerate(points) if p[2] > 0), reverse=True):
        u, v, _ = K @ points[i] / z
        if 0 <= round(float(u)) < 6 and 0 <= round(float(v)) < 4:
            wanted[round(float(v)), round(float(u))] = i + 1
            cells.setdefault((round(float(v)), round(float(u))), set()).add(i + 1)
    camera.width, camera.height = 66, 32
    camera.K = camera.K.clone()
    camera.K[0] *= 66 / 64
    z, mask = world_memories.release_read(memory, camera, 4, 6, None)
    assert torch.equal(z[0], wanted) and torch.equal(mask[0] > 0, wanted > 0)
    other, _ = world_memories.release_read(memory, camera, 4, 6, draws)
    assert not torch.equal(other, z) and all(int(other[0, i, j]) in cells[i, j] for i, j in cells)


def test_the_release_puts_a_cell_at_its_corner_and_averages_its_depth_over_the_middle(scene):
    camera = test_world.camera(0)
    depth = torch.full((test_world.H, test_world.W), 4.0)
    depth[7, 7], depth[0, 0], depth[23, 23] = 8.0, 100.0, torch.inf  # in the middle of a cell, at its edge, and sky
    memory = world_memories.release_add(Memory.empty(1), torch.ones(1, 2, 4), depth, camera)
    q = memory.points @ camera.resized(4, 2).K.float().T
    corners = [[j, i] for i in range(2) for j in range(4)]
    assert torch.allclose(q[:, :2] / q[:, 2:], torch.tensor(corners).float(), atol=1e-5)
    assert q[0, 2] == 5 and q[1, 2] == 4 and q[5, 2] == 3, "means of four pixels, sky being 0"
    depth[16:, 48:] = torch.inf
    memory = world_memories.release_add(Memory.empty(1), torch.arange(8.0).view(1, 2, 4), depth, camera)
    assert memory.features[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6], "a cell of sky is no point"


def test_the_releases_loop_reads_by_its_own_rules_in_order_or_not(scene):
    """At the first camera all cells but sky are their own; in any order, only where nothing lies on top."""
    clip, path = scene
    like, views = torch.zeros(1, 768, 1, 2, 3), path[:1]
    found = []
    for kind in (Release, ReleaseAnyOrder):
        world = as_kind(kind, test_world.world())
        x, cameras = pad(clip.x_gt[None, :, :9]), [path[4], path[8]]
        memory = world.start(x[0, :, 0], Known(clip, path)(x[0], views), path[0]).memory
        assert torch.equal(world.shown(memory, views, like)[0, :768, 0, 1], cell_image(x[0, :, 0])[:, 1])
        memory = world.update(memory, x, [1, 2], Known(clip, path)(x[0], cameras), cameras)
        found.append(world.shown(memory, path[:9], like))
    assert torch.equal(found[0][:, -1], found[1][:, -1]) and not torch.equal(*found)


# ---- what is observed, and how it is judged --------------------------------------------------------------------------

def test_depth_is_wrong_by_as_much_as_is_said_the_same_at_each_call_and_smoothly(scene):
    clip, path = scene
    exact, wrong = Known(clip, path), Known(clip, path, noise=0.05)
    true, found = (known(clip.x_gt, path[14:16]).depth for known in (exact, wrong))
    assert torch.equal(true, clip.depth[0, 14:16]), "by the camera itself, not its pose"
    assert torch.equal(found, wrong(clip.x_gt, path[14:16]).depth)
    near = true.isfinite()
    error = (found / true - 1)[near]
    assert 0.03 < error.std() < 0.07 and error.diff().abs().mean() < 0.02
    assert not torch.equal(found, Known(clip, path, noise=0.05, seed=1)(clip.x_gt, path[14:16]).depth)
    assert exact(clip.x_gt, path[:1]).dynamic.shape == (1, *SIZE)
    assert Known(clip, path, moving=False)(clip.x_gt, path[:1]).dynamic is None


def test_the_error_of_depth_is_relative_has_its_deviation_and_is_another_in_every_frame():
    known = Known(None, [], noise=0.2, seed=2)
    ones = torch.ones(32, 48)
    errors = [known.wrong(ones, t) - 1 for t in (0, 1)]
    assert all(error.std().item() == pytest.approx(0.2, abs=1e-5) for error in errors)
    assert torch.allclose(known.wrong(7 * ones, 1), 7 * (1 + errors[1])) and not torch.equal(*errors)
    coarse = errors[0].view(4, 8, 6, 8).mean(dim=(1, 3))  # a fourth of the frame's height, a sixth of its width
    assert coarse.std() > 0.7 * 0.2, "smooth: averages over such a piece keep most of it"


def test_what_moves_is_left_out_frame_by_frame_and_what_rests_is_not():
    moving = torch.zeros(1, 3, 4, 6)
    moving[0, 1, 2, 3], moving[0, 2, 0, 0] = 0.25, 1
    clip = SimpleNamespace(depth=torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 4, 6), moving=moving)
    path = [object(), object(), object()]
    found = Known(clip, path)(None, [path[2], path[1]])
    assert torch.equal(found.dynamic, moving[0, [2, 1]] > 0) and found.depth[:, 0, 0].tolist() == [2, 1]


def test_a_readout_is_judged_where_both_memories_show_something():
    """Frame 1 is frame 0 and a tenth more, seen by the same camera; nothing is known of the two cells on the right."""
    frame = torch.rand(3, *SIZE, generator=Generator().manual_seed(0)) - 0.5
    depth = torch.full((1, 2, *SIZE), 4.0)
    depth[..., 32:] = torch.inf
    clip = SimpleNamespace(x_gt=torch.stack([frame, frame + 0.1], dim=1), depth=depth, moving=torch.zeros(1, 2, *SIZE))
    path = [test_world.camera(0, *SIZE), test_world.camera(0, *SIZE)]
    world = test_world.world()
    found = world_study.read_at(world, as_kind(RgbCloud, world), clip, path, 1)
    error = 0.01 / cell_image(frame).var().item()
    wanted = {"cells, latent": 2 / 3, "cells, RGB": 2 / 3, "latent": error, "RGB": error, "no warp": error,
              "PSNR latent": 10 * math.log10(4 / 0.01), "PSNR RGB": 10 * math.log10(4 / 0.01)}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-3) and found["PSNR true"] > 100


def test_a_path_is_whole_chunks_out_and_as_many_back(monkeypatch):
    def from_pretrained(folder, **given):
        assert given == {"dtype": torch.float32, "shared": 1, "steps": 5}
        return SimpleNamespace(settings=SimpleNamespace(latents=3))  # nine frames a chunk, of which one is known
    monkeypatch.setattr(world_study.World, "from_pretrained", from_pretrained)
    for frames in range(8, 50):
        args = argparse.Namespace(frames=frames, steps=5)
        if frames in (17, 33, 49):
            world_study.read_world("x", args)
        else:
            with pytest.raises(ValueError, match=r"--frames: wanted 1 \+ a multiple of 16"):
                world_study.read_world("x", args)


def test_what_frame_0_did_not_show_counts_in_the_whole_and_not_in_what_was_seen():
    y = torch.rand(3, 5, *SIZE, generator=Generator().manual_seed(0))
    seen = torch.zeros(1, 5, *SIZE, dtype=torch.bool)
    seen[..., :16] = True
    y[:, 4] = y[:, 0]
    x = y + 0.2 * ~seen
    found = world_study.judge(x, SimpleNamespace(x_gt=y), seen, mean_difference)
    assert found["PSNR_C, seen"] == found["way back, seen"] == float("inf") and found["LPIPS_C, seen"] == 0
    assert found["PSNR_C"] == pytest.approx(10 * torch.tensor(4 / (0.04 * 2 / 3)).log10().item(), abs=1e-4)
    assert found["LPIPS_C"] == pytest.approx(0.2 * 2 / 3, abs=1e-5)
    late = y.clone()
    late[:, 3] += 0.5
    found = world_study.judge(late, SimpleNamespace(x_gt=y), seen, mean_difference)
    assert found["frame 3"] == pytest.approx(10 * torch.tensor(4 / 0.25).log10().item(), abs=1e-4)
    assert found["PSNR_C"] == found["frame 2"] == float("inf") and found["way back"] == float("inf")


def test_the_way_back_begins_after_the_middle_and_ends_with_the_last_frame():
    y = torch.zeros(3, 9, *SIZE)
    everywhere = torch.ones(1, 9, *SIZE, dtype=torch.bool)

    def judged(frame):
        x = y + 0.1
        x[:, frame] += 0.4
        return world_study.judge(x, SimpleNamespace(x_gt=y), everywhere, mean_difference)["way back"]
    small, large = (10 * math.log10(4 / error**2) for error in (0.1, 0.5))
    assert [judged(frame) for frame in (3, 4)] == pytest.approx([small] * 2, abs=1e-4)
    assert [judged(frame) for frame in (5, 8)] == pytest.approx([(3 * small + large) / 4] * 2, abs=1e-4)


@pytest.mark.parametrize("latents", [2, 3])
def test_in_the_middle_of_a_path_the_memory_holds_the_true_frames_up_to_there(scene, latents):
    clip, path = scene
    world, observe = test_world.world(latents=latents), Known(clip, path)
    state = world_study.after_true_frames(world, clip, path, observe)
    assert torch.equal(state.past, pad(clip.x_gt[None, :, [8]])) and state.cameras == [path[8]]
    memory = Memory.empty(768)
    for t in (0, 4, 8):
        memory = world.remember(memory, cell_image(clip.x_gt[:, t])[:, None], observe(clip.x_gt, [path[t]]), [path[t]])
    assert torch.equal(state.memory.features, memory.features) and torch.equal(state.memory.points, memory.points)


def test_the_filter_is_judged_at_rest_where_the_two_memories_differ():
    """A still camera and a wall. What stood before the cell on the top left in the first half is gone in the second."""
    wall = torch.rand(3, *SIZE, generator=Generator().manual_seed(0)) * 0.2
    x, moving = wall[:, None].repeat(1, 17, 1, 1), torch.zeros(1, 17, *SIZE)
    x[:, :9, :16, :16], moving[:, :9, :16, :16] = 0.9, 1
    clip = SimpleNamespace(x_gt=x, depth=torch.full((1, 17, *SIZE), 4.0), moving=moving)
    path = [test_world.camera(0, *SIZE) for _ in range(17)]
    found = world_study.filtered(test_world.world(), clip, path, seed=0)
    cell = wall[:, :16, :16]

    def psnr(shown, share):
        return 10 * math.log10(4 / ((shown - cell).square().mean().item() * share))
    assert found["cells"] == pytest.approx(1 / 6)
    for name, shown in (("with", 0.5), ("without", 0.9)):  # the networks show mid-grey where nothing is known
        assert found[f"cells that the filter changes, {name}"] == pytest.approx(psnr(shown, 1), abs=1e-3)
        assert found[f"what is at rest, {name}"] == pytest.approx(psnr(shown, 1 / 6), abs=1e-3)


def test_cells_become_the_pixels_that_they_are():
    cells = torch.tensor([[[[1.0, 0], [0, 1]]]])
    got = world_study.pixels(cells, (30, 25))
    wanted = torch.zeros(1, 1, 32, 32)
    wanted[..., :16, :16], wanted[..., 16:, 16:] = 1, 1
    assert torch.equal(got, wanted[..., :30, :25])


def test_figures_are_means_over_the_scenes_of_a_seed_without_those_that_could_not_be_measured():
    rows = [[{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": float("nan")}], [{"a": 5.0, "b": 4.0}]]
    assert world_study.by_seed(rows) == {"a": [2.0, 5.0], "b": [2.0, 4.0]}


def test_the_report_says_what_the_memory_gains_and_what_was_not_tried():
    def method(a, b):
        return dict.fromkeys(world_report.SCORES, [1.0, 1.0]) | {"PSNR_C, seen": [a, b]}
    methods = {"no memory": method(10.0, 12.0), "latent memory": method(15.0, 16.0)}
    part = {"command": "c", "date": "d", "methods": methods}
    assert f"is {world_report.spread([5.0, 4.0])} dB\nabove" in world_report.loop(part)
    rest = {"command": "c", "date": "d", "methods": {"pixel lift": method(3.0, 3.0)}, "left out": ["one", "two"]}
    lines = world_report.ablations(rest, part).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| no memory", "| latent memory", "| –", "| pixel lift"]
    assert {row.count("|") for row in rows} == {len(world_report.SCORES) + 2}
    assert "for want of a model that is trained so: one, two." in lines[-1]
    alone = world_report.ablations(rest | {"left out": []}, None)
    assert "Not tried" not in alone and "–" not in alone


# ---- the whole -------------------------------------------------------------------------------------------------------

def test_the_study_runs_part_by_part_and_says_what_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world_study, "DISTANCES", (0, 2))
    monkeypatch.setattr(world_study, "CHUNKS", 2)
    world = small.world(latents=2)
    world.vae.save_pretrained(tmp_path / "vae")
    world.save_pretrained(tmp_path / "model", "../vae")
    weights.save_tensors(tmp_path / "alexnet_features.safetensors", imagenet.alexnet().state_dict())

    def study(*parts, **changes):
        given = dict(out=tmp_path / "out", model=tmp_path / "model", vae=None, single_stage=None, unmasked=None,
                     perceptual=tmp_path, scenes=1, seeds=2, frames=9, steps=1, threads=torch.get_num_threads())
        world_study.main(argparse.Namespace(**given | changes, part=parts))
        return (tmp_path / "out" / "world_study.md").read_text()
    study("readout", vae=tmp_path / "vae")
    text = study("cost")
    assert "Not run yet: loop, ablations, moving." in text and "## A readout" in text and "## Out and back" not in text
    text = study("loop", "ablations", "moving", single_stage=tmp_path / "model")
    record = json.loads((tmp_path / "out" / "world_study.json").read_text())
    assert list(record) == list(world_study.PARTS) and "Not run yet" not in text

    same = record["readout"]["distances"]["0"]
    assert same["latent"] == [0, 0] and same["PSNR latent"] == same["PSNR true"]
    for row in record["cost"]["rows"]:
        assert row["bytes, latent"] == row["points, latent"] * 4 * (3 + 4)
        assert row["bytes, RGB"] == row["points, RGB"] * 4 * (3 + 3)
    assert [row["frames"] for row in record["cost"]["rows"]] == [9, 17]
    assert set(record["loop"]["methods"]) == set(world_study.LOOPS)
    for methods in (record["loop"]["methods"], record["ablations"]["methods"]):
        for name, found in methods.items():
            assert f"| {name} |" in text and all(len(found[key]) == 2 for key in world_report.SCORES)
    single, latent = record["ablations"]["methods"]["single stage"], record["loop"]["methods"]["latent memory"]
    assert single == latent, "the same model under another name"
    assert "for want of a model that is trained so: mask always 1, in training too." in text
    assert sum(record["moving"]["cells"]) > 0
    for name in ("world_study.png", "world_study_strip.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert str(tmp_path) not in text and "loop --scenes 1 --seeds 2 --frames 9 --steps 1" in text

    with pytest.raises(ValueError, match="wanted --perceptual DIR"):
        study("loop", perceptual=None)
    with pytest.raises(ValueError, match=r"--frames: wanted 1 \+ a multiple of 8, whole chunks out and back, got 5"):
        study("moving", frames=5)
