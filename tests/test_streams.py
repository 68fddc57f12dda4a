"""The five streams: each changes what it is named for and nothing else, for all frames alike, and says what it did."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.data import isp, reconstruct, shots, streams, toy_render, toy_world
from mirage_min.data.pairs import Pairs
from mirage_min.data.streams import Job
from mirage_min.data.street_camera import Street
from mirage_min.data.toy_world import WorldConfig
from mirage_min.networks import weights
from tests import scripts

H, W, T = 48, 72, 2
CONFIG = WorldConfig(T, H, W)
SUNNY = Street(focal=0.9, horizon=0.45, near=8, far=9, sun=(90.0, 40.0), shadow=0.3, asphalt=0.2)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy():
    """A made-up scene whose actor is whole in the image."""
    return shots.ToyShot(toy_world.sample_scene(0, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A recorded street that is grey, and the clip's file."""
    clip = tmp_path_factory.mktemp("clips") / "drive.safetensors"
    weights.save_tensors(clip, {"x": torch.full((3, 4, 72, 128), 140, dtype=torch.uint8)})
    return clip


def on_street(road, seed=0):
    return shots.StreetShot(**vars(streams.street.shoot(road, SUNNY, (H, W), T, draws(seed))))


def change(sample):
    """By how much [1, T, H, W] the degraded clip is brighter than the clean one."""
    return (sample.degraded - sample.clean).mean(dim=0, keepdim=True)


# ---- what each changes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["toy", "street"])
def test_relighting_changes_the_object_alone_and_shadows_all_but_the_object(where, toy, road):
    shot = toy if where == "toy" else on_street(road)
    relit = streams.relighting(shot, draws(3))
    off = relit.actor == 0
    assert change(relit)[relit.actor > 0.99].abs().mean() > 0.02
    assert change(relit)[off].abs().max() < 1e-6, "the street and its shadow stay"
    bare = streams.shadows(shot, draws(3))
    assert change(bare)[bare.actor == 1].abs().max() < 1e-6, "the object stays as it is lit"
    assert change(bare).min() > -1e-6 and (change(bare) > 0.03).float().mean() > 0.001, "without its shadow: brighter"
    assert torch.equal(bare.actor, relit.actor)


def test_in_made_up_scenes_the_sun_of_shadows_stands_anywhere_and_on_a_street_where_it_is(toy, road):
    suns = [streams.shadows(toy, draws(seed)).did for seed in range(4)]
    assert len({round(sun["azimuth"]) for sun in suns}) == 4 and all(20 <= sun["elevation"] <= 70 for sun in suns)
    assert {sun["exposure"] for sun in suns} == {1}, "by a camera that does not change"
    here = streams.shadows(on_street(road), draws(5)).did
    assert (here["azimuth"], here["elevation"]) == pytest.approx((90, 40), abs=1e-3)


def test_a_shadow_is_that_of_a_strong_sun_under_a_darker_sky_than_another_light_has(toy):
    light = streams.another_light(draws(3))
    clear = replace(light, sun=1.5 * light.sun, sky=0.6 * light.sky, exposure=1.0)
    wanted = replace(toy, scene=replace(toy.scene, light=clear)).pair(relit=False, shadowed=False)
    found = streams.shadows(toy, draws(3))
    assert torch.equal(found.clean, wanted.clean) and torch.equal(found.degraded, wanted.degraded)


def fills(values, low, high, share=0.05) -> bool:
    """Whether values lie between low and high and come near to both, to a share of what is between."""
    near = share * (high - low)
    return low - 1e-4 <= min(values) < low + near and high - near < max(values) <= high + 1e-4


def test_another_light_comes_from_anywhere_but_behind_and_fills_its_ranges():
    lights = [streams.another_light(draws(seed)) for seed in range(300)]
    where = [streams.angles(light) for light in lights]
    sun, sky = (torch.stack([getattr(light, name) for light in lights]) for name in ("sun", "sky"))
    strength = sun[:, 1] / 0.96
    assert fills([at["elevation"] for at in where], 20, 70)
    assert fills([at["azimuth"] for at in where], -math.degrees(math.acos(-0.75)), math.degrees(math.acos(-0.75)))
    assert fills([at["exposure"] for at in where], 0.7, 1.35) and fills(strength.tolist(), 0.3, 1.8)
    assert fills((sky[:, 1] / 0.92).tolist(), 0.4, 1.1) and fills((sun[:, 0] / strength - 1).tolist(), -0.15, 0.15)


def test_the_settings_of_artifacts_fill_their_ranges(toy, monkeypatch):
    clip = toy_world.render(toy.scene, CONFIG)
    monkeypatch.setattr(toy_world, "render", lambda scene, config: clip)
    monkeypatch.setattr(reconstruct, "back_project", lambda *given: None)
    monkeypatch.setattr(reconstruct, "fit", lambda *given: None)
    monkeypatch.setattr(reconstruct, "film", lambda g, cameras: (clip.x_gt, clip.depth))
    did = [streams.artifacts(toy, draws(seed), steps=100).did for seed in range(400)]
    found = {kind: [each for each in did if each["kind"] == kind] for kind in streams.KINDS}
    assert all(len(each) > 70 for each in found.values()), {kind: len(each) for kind, each in found.items()}
    assert {each["every"] for each in found["sparse"]} == {2, 3, 4}
    assert fills([each["steps"] for each in found["stopped"]], 25, 75, 0.12)
    for kind, name, low, high in (("shifted", "shift", 0.5, 1.5), ("one camera", "shift", 0.3, 1.0),
                                  ("one camera", "turn", 4, 10)):
        for side in (-1, 1):
            values = [side * each[name] for each in found[kind] if side * each[name] > 0]
            assert fills(values, low, high, 0.12), f"{kind}: {name} from {min(values):.2f} to {max(values):.2f}"
    assert {each["points"] for each in did} == {T * H * W // 40}


def test_a_car_without_a_shadow_in_view_is_of_no_use_to_shadows(toy):
    shot = replace(toy, scene=replace(toy.scene, bodies=[replace(toy.scene.bodies[0], pose=far(toy))]))
    with pytest.raises(ValueError, match="wanted a shadow on 0.08% of the pixels"):
        streams.shadows(shot, draws())


def far(toy):
    pose = toy.scene.bodies[0].pose.clone()
    pose[:, 2, 3] = 1e4
    return pose


def test_reinsertion_on_a_street_is_another_light_and_no_shadow_at_once(road):
    shot, light = on_street(road), streams.another_light(draws(2))
    both = streams.reinsertion(shot, draws(2))
    relit = replace(shot, scene=replace(shot.scene, naive=light)).pair(relit=True, shadowed=True)
    bare = shot.pair(relit=False, shadowed=False)
    on, off = both.actor[0] == 1, both.actor[0] == 0
    assert torch.equal(both.degraded[:, on], relit.degraded[:, on])
    assert torch.equal(both.degraded[:, off], bare.degraded[:, off])
    assert torch.equal(both.clean, bare.clean)


def test_reinsertion_in_a_made_up_scene_is_a_reconstruction_over_what_was_filmed(toy):
    sample = streams.reinsertion(toy, draws(1))
    truth = toy_world.render(toy.scene, CONFIG)
    assert (sample.clean - truth.x_gt).abs().max() <= 1.01 / 127.5, "what was filmed, to 8 bits"
    overlap = (sample.boxes[:, :2].maximum(truth.boxes[:, :2]), sample.boxes[:, 2:].minimum(truth.boxes[:, 2:]))
    area = [(b[:, 2:] - b[:, :2]).prod(1) for b in (sample.boxes, truth.boxes)]
    common = (overlap[1] - overlap[0]).clamp(min=0).prod(1)
    assert (common / (area[0] + area[1] - common)).min() > 0.8, "the asset is aligned"
    around = sample.actor < 0.01
    assert 0.005 < change(sample)[around].abs().mean() < 0.15, "around it there is a reconstruction"
    assert torch.equal(sample.flow, truth.flow) and torch.equal(sample.visible, truth.visible)
    with pytest.raises(ValueError, match="inside the image in all frames"):
        streams.reinsertion(replace(toy, scene=replace(toy.scene, bodies=[
            replace(toy.scene.bodies[0], pose=far(toy)), *toy.scene.bodies[1:]])), draws())


# ---- ISP -------------------------------------------------------------------------------------------------------------

def developed_by_hand(value, did):
    """One pixel [3] in [0, 1], step by step."""
    linear = [v**2.2 * 2 ** did["exposure"] * did[name] for v, name in zip(value, ("red", "green", "blue"))]
    mixed = [sum(m * v for m, v in zip(row, linear)) for row in did["matrix"]]
    out = [min(max(v, 0), 1) ** (did["gamma"] / 2.2) for v in mixed]
    out = [(v - 0.5) * did["contrast"] + 0.5 + did["brightness"] for v in out]
    grey = 0.299 * out[0] + 0.587 * out[1] + 0.114 * out[2]
    out = [min(max(grey + did["saturation"] * (v - grey), 0), 1) for v in out]
    return [a + did["blend"] * (b - a) for a, b in zip(value, out)]


def test_isp_is_equation_3_and_its_chain_step_by_step():
    x, mask = torch.rand(3, 2, 24, 24, generator=draws(1)) * 2 - 1, torch.zeros(1, 2, 24, 24)
    mask[:, :, 6:18, 6:18] = 1
    y, did = isp.develop_object(x, mask, draws(4))
    for t, row, column in ((0, 12, 12), (1, 9, 14)):
        wanted = developed_by_hand(((x[:, t, row, column] + 1) / 2).tolist(), did)
        assert (y[:, t, row, column] + 1).div(2).tolist() == pytest.approx(wanted, abs=1e-5)
    sigma = 2 * 24 / 576
    assert torch.allclose(isp.feather(mask, sigma), mask, atol=1e-6), "here the edge is narrower than a pixel"
    assert (y - x)[:, :, :5].abs().max() < 1e-6, "outside M it is x"
    for name, (low, high) in isp.RANGES.items():
        assert low <= did[name] <= high, name


def test_a_feathered_edge_is_a_blurred_step():
    mask = torch.zeros(1, 1, 9, 40)
    mask[..., 20:] = 1
    edge = isp.feather(mask, 2.0)[0, 0, 4]
    wanted = 0.5 * (1 + torch.erf((torch.arange(40) - 19.5) / (2 * 2**0.5)))
    assert (edge - wanted).abs().max() < 0.01 and torch.equal(isp.feather(mask, 2.0)[0, 0, 0], edge)


def test_another_camera_is_brighter_or_darker_and_not_of_another_world():
    for name, (low, high) in isp.RANGES.items():
        neutral = {"exposure": 0, "brightness": 0, "blend": 1}.get(name, 1)
        most = {"exposure": 0.6, "brightness": 0.04, "blend": 0.5}.get(name, 0.3)  # stops, a share of white; 30 %
        assert neutral - most <= low < high <= neutral + most, f"{name}: from {low} to {high}"
        assert low < neutral < high or name == "blend", f"{name}: {neutral} changes nothing"
    found = [isp.develop_object(torch.zeros(3, 1, 8, 8), torch.ones(1, 1, 8, 8), draws(seed))[1] for seed in range(200)]
    matrices = torch.tensor([did["matrix"] for did in found])
    assert (matrices.mean(0) - torch.eye(3)).abs().max() < 0.01 and 0.03 < matrices.std(0).mean() < 0.04
    for name, (low, high) in isp.RANGES.items():
        drawn, near = [did[name] for did in found], 0.05 * (high - low)
        assert min(drawn) < low + near and max(drawn) > high - near, f"{name}: from {min(drawn)} to {max(drawn)}"


def test_the_edge_of_the_object_is_as_wide_as_two_pixels_are_on_576_rows():
    x, mask = torch.zeros(3, 1, 288, 40), torch.zeros(1, 1, 288, 40)
    mask[..., 20:] = 1
    change = isp.develop_object(x, mask, draws(4))[0][0, 0, 144]
    assert abs(change[39]) > 0.05
    wanted = 0.5 * (1 + torch.erf((torch.arange(40) - 19.5) / 2**0.5))  # a step blurred by one pixel
    assert (change / change[39] - wanted).abs().max() < 0.03


def test_isp_has_one_draw_for_all_frames_and_refuses_a_small_object(toy):
    still = torch.rand(3, 1, 24, 24, generator=draws(1)).expand(3, 3, 24, 24)
    y, _ = isp.develop_object(still, torch.ones(1, 3, 24, 24), draws(2))
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    small = torch.zeros(1, 3, 24, 24)
    small[:, :, 0, 0] = 1
    with pytest.raises(ValueError, match="covers 0.2% of the clip at least, got 0.17%"):
        isp.develop_object(still, small, draws())
    sample = streams.isp(toy, draws(2))
    far_off = nnf.max_pool2d(sample.actor[0], 5, 1, 2)[None] == 0
    assert change(sample)[far_off].abs().max() < 1e-6 and not torch.equal(sample.degraded, sample.clean)


# ---- artifacts -------------------------------------------------------------------------------------------------------

def test_points_are_put_where_their_pixels_are(toy):
    clip, K = toy_world.render(toy.scene, CONFIG), toy_render.intrinsics(CONFIG)
    cameras = reconstruct.cameras_of(toy.scene.c2w, K, (H, W))
    g = reconstruct.back_project([clip.x_gt[:, 1]], [clip.depth[0, 1]], cameras[1:], 50, draws())
    pixels, z = toy_render.project(g.means, K, toy.scene.c2w[1])
    u, v = pixels.floor().long().T
    assert len(g) == 50 and (pixels - pixels.floor() - 0.5).abs().max() < 1e-2, "in the middles of pixels"
    assert torch.allclose(z, clip.depth[0, 1, v, u].clamp(max=reconstruct.FAR), rtol=1e-4)
    width = g.log_scales.exp() * K[0, 0] / z[:, None]                  # of each in pixels: half of their distance
    assert torch.allclose(width, torch.full_like(width, 0.5 * (H * W / 50) ** 0.5), rtol=1e-3)
    colour = (0.5 + reconstruct.C0 * g.sh[:, 0]).T * 2 - 1
    assert torch.allclose(colour, clip.x_gt[:, 1, v, u], atol=1e-5)


def test_a_window_shows_what_the_whole_frame_does_there(toy):
    K = toy_render.intrinsics(CONFIG)
    camera = reconstruct.cameras_of(toy.scene.c2w[:1], K, (H, W))[0]
    clip = toy_world.render(toy.scene, CONFIG)
    g = reconstruct.back_project([clip.x_gt[:, 0]], [clip.depth[0, 0]], [camera], 100, draws())
    part, (rows, columns) = reconstruct.random_window(camera, (16, 200), draws(3))
    assert columns == slice(0, W) and rows.stop - rows.start == 16 and rows.start > 0
    whole, _ = reconstruct.film(g, [camera])
    piece, _ = reconstruct.film(g, [part])
    difference = (piece - whole[:, :, rows, columns]).abs()  # only of what lies far outside is the image approximated
    assert difference.mean() < 1e-3 and difference.max() < 0.03, difference.max()


def test_more_steps_come_nearer_and_leave_the_first_guess_as_it_was(toy):
    scene, config = replace(toy.scene, bodies=toy.scene.bodies[1:]), replace(CONFIG, supersample=1, frames=1)
    clip = toy_world.render(scene, config)
    cameras = reconstruct.cameras_of(scene.c2w[:1], toy_render.intrinsics(config), (H, W))
    g = reconstruct.back_project([clip.x_gt[:, 0]], [clip.depth[0, 0]], cameras, 100, draws())
    before = g.means.clone()
    errors = []
    for steps in (0, 5, 15):
        fitted = reconstruct.fit(g, [clip.x_gt[:, 0]], cameras, steps, draws(1), (24, 24))
        errors.append((reconstruct.film(fitted, cameras)[0] - clip.x_gt).abs().mean().item())
    assert errors[0] > 1.1 * errors[1] and errors[1] > 1.1 * errors[2], errors
    assert torch.equal(g.means, before)


@pytest.mark.parametrize("kind", streams.KINDS)
def test_an_artifact_is_what_gaussians_show_of_the_scene_at_rest(toy, kind):
    sample = streams.artifacts(toy, draws(1), kind, steps=4)
    bodies = [replace(body, pose=body.pose[:1].expand_as(body.pose)) for body in toy.scene.bodies]
    truth = toy_world.render(replace(toy.scene, bodies=bodies), CONFIG)
    assert torch.equal(sample.clean, truth.x_gt) and torch.equal(sample.flow, truth.flow)
    assert 0.02 < change(sample).abs().mean() < 0.6 and sample.degraded.abs().max() <= 1
    assert sample.did["kind"] == kind
    limits = {"every": (2, 4), "shift": (0.3, 1.5), "turn": (4, 10), "steps": (1, 4)}
    for name, (low, high) in limits.items():
        assert low <= abs(sample.did.get(name, low)) <= high, (name, sample.did)


def test_each_kind_of_artifact_is_fitted_to_the_frames_that_it_is_named_for(toy, monkeypatch):
    seen, fit = [], reconstruct.fit

    def watched(g, frames, cameras, steps, draws, **more):
        seen.append((len(frames), [c.world_to_camera for c in cameras], steps))
        return fit(g, frames, cameras, 0, draws)
    monkeypatch.setattr(reconstruct, "fit", watched)
    shot = shots.ToyShot(toy_world.sample_scene(0, replace(CONFIG, frames=4)), replace(CONFIG, frames=4, supersample=1))
    true = torch.linalg.inv(shot.scene.c2w)

    def same(path):
        return torch.allclose(torch.stack(path), true[:: 4 // len(path)][: len(path)], atol=1e-5)
    did = streams.artifacts(shot, draws(1), "sparse", 8).did
    (n, path, steps), *rest = seen
    assert not rest and n == len(range(0, 4, did["every"])) and steps == 8
    assert torch.allclose(torch.stack(path), true[:: did["every"]], atol=1e-5)
    seen.clear()
    did = streams.artifacts(shot, draws(1), "shifted", 8).did
    (n, path, _), (m, moved, _) = seen
    assert n == m == 4 and same(path)
    # x in the moved camera is less by the shift, if that is to the right
    assert torch.allclose(torch.stack(moved)[:, :3, 3] - true[:, :3, 3],
                          torch.tensor([-did["shift"], 0.0, 0.0]).expand(4, 3), atol=1e-4)
    seen.clear()
    did = streams.artifacts(shot, draws(1), "one camera", 8).did
    (n, path, _), = seen
    turn = torch.stack(path)[:, :3, :3] @ true[:, :3, :3].mT
    cosine = torch.tensor(did["turn"]).deg2rad().cos().expand(4)
    assert n == 4 and torch.allclose((turn.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2, cosine, atol=1e-4)
    seen.clear()
    did = streams.artifacts(shot, draws(1), "stopped", 8).did
    assert seen[0][2] == did["steps"] and 2 <= did["steps"] <= 6 and same(seen[0][1])


def test_what_a_stream_cannot_do_it_refuses_by_name(toy, road):
    with pytest.raises(ValueError, match="a recording's camera path is not known"):
        streams.artifacts(on_street(road), draws())
    with pytest.raises(ValueError, match="kind must be one of sparse, shifted, one camera, stopped, got 'blur'"):
        streams.artifacts(toy, draws(), "blur")


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", ["isp", "relighting", "shadows"])
def test_a_sample_is_a_function_of_its_shot_and_draws(stream, toy):
    one, two, other = (streams.STREAMS[stream](toy, draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.degraded, two.degraded) and one.did == two.did
    assert not torch.equal(one.degraded, other.degraded) and one.did != other.did


def test_a_job_whose_first_shot_is_of_no_use_takes_the_next_and_says_why_if_none_is(monkeypatch):
    tried = []

    def useless(shot, draws):
        tried.append(float(torch.rand((), generator=draws)))
        raise ValueError("too small")
    monkeypatch.setitem(streams.STREAMS, "isp", useless)
    monkeypatch.setattr(streams, "shot_of", lambda job, draws: None)
    for seed in (7, 8):
        with pytest.raises(ValueError, match=f"isp_toy_00000{seed}: no shot in 50 is of use: too small"):
            streams.make(Job("isp", seed, T, (H, W)))
    assert len(set(tried)) == 100, "and no other job tries the same"


def test_jobs_are_the_streams_in_turn_with_the_seeds_that_follow_the_first():
    args = streams.argparse.Namespace(clips=None, streams=None, count=7, first_seed=3, frames=T, size=(H, W))
    jobs, names = streams.jobs_of(args), list(streams.STREAMS)
    assert [(job.seed, job.stream) for job in jobs] == [(seed, names[seed % 5]) for seed in range(3, 10)]
    assert {(job.frames, job.size, job.clip) for job in jobs} == {(T, (H, W), None)}


def test_a_folder_reads_like_any_other_and_what_is_there_stays(tmp_path, monkeypatch):
    jobs = [Job("relighting", 1, T, (H, W)), Job("shadows", 2, T, (H, W))]
    for job in jobs:
        streams.write(job, tmp_path)
    tensors, about = weights.load_tensors(tmp_path / "shadows_toy_000002.safetensors")
    assert about["stream"] == "shadows" and json.loads(about["did"])["share"] > 0
    assert tensors["flow"].shape == (2, T - 1, H, W) and tensors["visible"].shape == (1, T - 1, H, W)
    pairs = Pairs(tmp_path, frames=T)
    x_ni, x_gt = pairs.read(0, lambda n: 0)
    assert len(pairs) == 2 and x_ni.shape == (3, T, H, W) and any(pairs.crops(0))
    monkeypatch.setattr(streams, "make", None)
    streams.write(jobs[0], tmp_path)


def test_the_command_makes_pairs_of_recorded_streets_in_turn_and_a_contact_sheet(road):
    road.with_suffix(".street.json").write_text('{"focal": 0.9, "horizon": 0.45, "near": 8, "far": 9, "asphalt": 0.2}')
    done = scripts.run("-m", "mirage_min.data.streams", "--clips", road.parent, "--size", "48x72", "--frames", 2,
                       "--count", 4, "--out", road.parent / "out")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (road.parent / "out").iterdir())
    assert names == ["isp_drive_000000.safetensors", "reinsertion_drive_000003.safetensors",
                     "relighting_drive_000001.safetensors", "shadows_drive_000002.safetensors", "streams.png"]
    assert "4 pairs" in done.stdout and "streams.png" in done.stdout


def test_artifacts_of_recorded_streets_are_refused_before_anything_is_made(road):
    road.with_suffix(".street.json").write_text('{"focal": 0.9, "horizon": 0.45}')
    args = streams.argparse.Namespace(clips=road.parent, streams=["isp", "artifacts"], count=1, first_seed=0)
    with pytest.raises(ValueError, match="artifacts want made-up scenes: leave --clips out"):
        streams.jobs_of(args)
