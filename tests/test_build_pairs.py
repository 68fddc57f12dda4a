"""build_pairs.py: a scene folder becomes aligned pairs, and whatever is wrong with one is said in one line."""

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image
from tqdm import tqdm

import build_pairs
from mirage_min.data import align, insertion, scene, scene_cameras, splat, toy_render, toy_scene, toy_world
from mirage_min.data.pairs import Pairs
from mirage_min.data.pixels import to_bytes
from mirage_min.data.video import read_clip, write_clip
from mirage_min.networks import weights

SEEDS, T, H, W = (0, 4), 4, 64, 96


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two toy scenes as folders."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed in SEEDS:
        toy_scene.write_scene(folder / f"s{seed}", seed, toy_world.WorldConfig(T, H, W))
    return folder


@pytest.fixture(scope="module")
def built(scenes, tmp_path_factory):
    """Their pairs, of two frames each, so that every scene makes two; with the manifest."""
    out = tmp_path_factory.mktemp("pairs")
    assert build_pairs.cli([*(str(scenes / f"s{seed}") for seed in SEEDS), "--out", str(out), "--frames", "2"]) == 0
    return out, json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def single(scenes, tmp_path_factory):
    """Pairs of one frame, two of them, and the arguments that made them but for --out."""
    out, argv = tmp_path_factory.mktemp("single"), [str(scenes / "s0"), "--frames", "1", "--range", "1:3"]
    assert build_pairs.cli([*argv, "--out", str(out)]) == 0
    return out, argv


@pytest.fixture
def copy(scenes, tmp_path):
    """A copy of the first scene, to be broken."""
    return shutil.copytree(scenes / "s0", tmp_path / "copy")


def change(path, edit):
    """Let `edit` work on the content of a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ---- alignment -------------------------------------------------------------------------------------------------------

def test_every_stage_of_alignment_brings_the_insertion_nearer_to_the_truth(built):
    for name, entry in built[1].items():
        for clip in entry["clips"]:
            none, coarse, full = (clip["crop_psnr"][stage] for stage in build_pairs.STAGES)
            assert none < coarse < full, f"{name}: PSNR in the crop {none:.2f}, {coarse:.2f}, {full:.2f} must rise"
            iou = clip["box_iou"]
            assert max(iou["none"], iou["coarse"]) < 0.9 and iou["full"] > 0.95, f"{name}: box IoU {iou}"


def test_the_inserted_asset_covers_the_actors_true_mask(built):
    """The toy world's own mask, which no part of the builder has seen; box edges lie on whole pixels, so ± 1."""
    for seed in SEEDS:
        truth = toy_world.make_clip(seed, toy_world.WorldConfig(T, H, W)).actor > 0.5
        files = [weights.load_tensors(built[0] / clip["file"])[0] for clip in built[1][f"s{seed}"]["clips"]]
        mask = torch.cat([file["actor"] for file in files], dim=1) > 127
        iou = (mask & truth).sum() / (mask | truth).sum()
        assert iou > 0.85, f"seed {seed}: masks overlap by {iou:.3f}, wanted 0.85"


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_the_fine_stage_undoes_six_percent_of_error_and_adds_no_jitter(scenes, seed):
    street, asset = scene.read_scene(scenes / f"s{seed}"), splat.load_ply(scenes / f"s{seed}" / "asset.ply")
    track, world = street.tracks[1], toy_world.sample_scene(seed, toy_world.WorldConfig(T, H, W))
    body = world.bodies[0]                               # the asset's Gaussians, one for one, where they belong
    true = toy_scene.surface(world, 0, track.reference, world.naive, toy_scene.SPACING)[0]
    to_object = torch.linalg.inv(toy_scene.from_box(body))
    s, R, t = align.umeyama(asset.means, true @ to_object[:3, :3].T + to_object[:3, 3])
    off = 0.06 * track.size[0].float()
    placed = build_pairs.Insertion(asset.transformed(1.06 * s, R, t + off), torch.zeros(T, 4))

    def boxes(insertion):
        return torch.stack([align.mask_box(insertion.render(i, street.cameras[i], track.pose[i])[1][0])
                            for i in range(T)])
    placed.boxes = boxes(placed)
    fine = replace(placed, **dict(zip(("scaling", "displacement"),
                                                  align.fine_2d(placed.boxes, track.box.float()))))
    before, after = (float(align.iou(b, track.box.float()).mean()) for b in (placed.boxes, fine.aligned_boxes()))
    assert before < 0.85 and after >= 0.95, f"mean box IoU {before:.3f} -> {after:.3f}, wanted 0.85 at most -> 0.95"
    missed = (boxes(fine) - fine.aligned_boxes()).abs().max()
    assert missed <= 1, f"rendered again, an edge is {missed:.2f} pixels from where the boxes were moved, allowed 1"

    def jitter(boxes):
        return (align.centres(boxes)[0].diff(n=2, dim=0)).norm(dim=1).mean()
    own, aligned = jitter(placed.boxes), jitter(fine.aligned_boxes())
    assert aligned <= own + 1e-4, f"the aligned box jitters by {aligned:.4f} pixels, the rendered asset's by {own:.4f}"


def moved_with_its_box(layer, box, scale, shift):
    """What fine_2d found, applied to a layer [C, H, W]: pixel by pixel, of the four around the place it came from."""
    C, H, W = layer.shape
    (cx, cy), out = align.centres(box)[0].tolist(), torch.zeros_like(layer)
    for v, u in product(range(H), range(W)):
        x, y = cx + (u + 0.5 - cx - shift[0]) / scale[0] - 0.5, cy + (v + 0.5 - cy - shift[1]) / scale[1] - 0.5
        for i, j in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= i < H and 0 <= j < W:
                out[:, v, u] += (1 - abs(y - i)) * (1 - abs(x - j)) * layer[:, i, j]
    return out


@torch.no_grad()
def test_the_fine_stage_as_a_camera_is_the_warp_of_the_rendered_layer(scenes):
    """Insertion.render moves the camera; the spec resamples the picture: the same but for the blur."""
    street = scene.read_scene(scenes / "s4")
    insertion = build_pairs.Insertion(street.objects[1], torch.zeros(T, 4))
    layers = torch.cat(insertion.render(1, street.cameras[1], street.tracks[1].pose[1])[:2])
    insertion.boxes[1] = box = align.mask_box(layers[3])
    insertion.scaling, insertion.displacement = (1.2, 0.9), (5.0, -3.0)
    moved = torch.cat(insertion.render(1, street.cameras[1], street.tracks[1].pose[1])[:2])
    warped = moved_with_its_box(layers, box, insertion.scaling, insertion.displacement)
    error, moved_by = (moved - warped).abs().mean(), (moved - layers).abs().mean()
    assert error < 0.2 * moved_by, f"differs by {error:.4f}, allowed a fifth of what the map changes, {moved_by:.4f}"


@torch.no_grad()
@pytest.mark.parametrize("t", [0, T - 1])
def test_the_streets_gaussians_show_the_street_without_its_vehicles(scenes, t):
    """Rendered by the scene folder's own camera, against the toy world with all vehicles taken away."""
    config = toy_world.WorldConfig(T, H, W)
    world = toy_world.sample_scene(SEEDS[0], config)
    world.bodies = [body for body in world.bodies if body.size is None]
    wanted = toy_render.frame(world, config, t)[1].clamp(0, 1) ** (1 / 2.2)
    street = scene.read_scene(scenes / "s0")
    shown, alpha, _ = splat.render(street.still, street.cameras[t])
    psnr = -10 * (shown - wanted).square().mean().log10()
    assert alpha.min() > 0.9 and psnr > 24, f"frame {t}: PSNR {psnr:.1f} dB, wanted 24; alpha from {alpha.min():.2f}"


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_every_gaussian_of_the_street_lies_flat_and_covers_a_third_of_a_pixel_in_its_camera(seed):
    """Seen from where it came from, a circle of .35 pixels, to which the renderer adds its low-pass; but thin across
    the road, or where it is sky along the ray."""
    config = toy_world.WorldConfig(T, H, W)
    world = toy_world.sample_scene(seed, config)
    camera = splat.Camera(toy_render.intrinsics(config), torch.linalg.inv(world.c2w[1]), W, H)
    street, eye = toy_scene.street(world, config, 1), world.c2w[1, :3, 3]
    splats, _ = splat.project(street, camera)
    covariance = splats[:, [2, 3, 3, 4]].view(-1, 2, 2).inverse()
    off = (covariance - (0.35**2 + splat.LOW_PASS) * torch.eye(2)).abs().max()
    assert len(splats) == H * W and off < 0.015, f"{len(splats)} Gaussians, a covariance {off:.3f} square pixels off"
    thin, away = splat.rotations(street.quats)[:, :, 2], street.means - eye
    road = (street.means[:, 1].abs() < 1e-3) & (away.norm(dim=1) < 30)
    sky = (away @ world.c2w[1, :3, 2] - 200).abs() < 1e-2
    for name, part, wanted in (("road", road, torch.tensor([0.0, 1, 0]).expand_as(away)), ("sky", sky, away)):
        cosine = torch.cosine_similarity(thin[part], wanted[part]).abs().min()
        assert part.sum() > H * W / 10 and cosine > 0.999, f"{part.sum()} of the {name}, cosines from {cosine:.4f}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reconstruction_has_floaters_on_every_side_of_its_object(seed):
    world, draws = toy_world.sample_scene(seed, toy_world.WorldConfig(T, H, W)), torch.Generator().manual_seed(seed)
    found = toy_scene.reconstructed(world, 0, 0, draws)
    thin = found.logit_opacities.sigmoid() < 0.5
    low, high = found.means[~thin].amin(0), found.means[~thin].amax(0)
    place = (found.means[thin] - low) / (high - low)  # 0 to 1 within the object's box
    assert thin.sum() == (~thin).sum() // 20
    assert (place.amin(0) > -0.301).all() and (place.amax(0) < 1.301).all(), "a floater is too far away"
    assert (place.amin(0) < -0.2).all() and (place.amax(0) > 1.2).all(), f"from {place.amin(0)} to {place.amax(0)}"


@pytest.mark.parametrize("seed", range(4))
def test_an_asset_is_the_vehicle_one_unit_long_turned_about_the_vertical_and_a_little_out_of_proportion(seed):
    world = toy_world.sample_scene(seed, toy_world.WorldConfig(T, H, W))
    points, _, _ = toy_scene.surface(world, 0, 0, world.naive, toy_scene.SPACING)
    made = toy_scene.generated(world, 0, 0, torch.Generator().manual_seed(seed))
    x, y = torch.cat([points, torch.ones(len(points), 1)], dim=1).double(), made.means.double()
    A, at = torch.linalg.lstsq(x, y).solution.split([3, 1])            # y = x A + t, whatever the map is
    assert (x[:, :3] @ A + at - y).abs().max() < 1e-5, "the vehicle's points, all of them moved alike"
    stretch = (A @ A.T).diagonal().sqrt() * world.bodies[0].size[2]    # along each of the vehicle's own axes
    assert (A @ A.T - (A @ A.T).diagonal().diag()).abs().max() < 1e-6, "its right angles stay right"
    assert (stretch - 1).abs().max() < 0.0751 and (stretch - stretch.mean()).abs().max() > 0.01, stretch
    assert A[1, [0, 2]].abs().max() < 1e-6 and A[1, 1] > 0, "up stays up"
    angle = torch.atan2(A[2, 0], A[2, 2])
    assert abs(angle) < 0.3001 and abs(torch.atan2(-A[0, 2], A[0, 0]) - angle) < 1e-5, f"turned by {angle:.2f}"
    assert torch.allclose(at[0], torch.tensor([0.1, -0.05, 0.02]).double(), atol=1e-5)


def test_the_assets_axes_are_named_by_where_they_point():
    """In the actor's frame forward is +x, left +y, up +z."""
    assert torch.equal(build_pairs.axes("FLU"), torch.eye(3))
    assert build_pairs.axes("RDF").T.tolist() == [[0, -1, 0], [0, 0, -1], [1, 0, 0]]   # x right, y down, z forward
    assert build_pairs.axes("luf").T.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]     # glTF: y up, z forward


def test_the_asset_is_hidden_by_what_stands_before_it_alone():
    torch.manual_seed(0)
    background, rgb, alpha = torch.rand(3, 5, 7), torch.rand(3, 5, 7), torch.rand(1, 5, 7)
    far, density, near = torch.rand(1, 5, 7) * 20, torch.rand(1, 5, 7), torch.rand(1, 5, 7) * 20
    near[0, 0], far[0, 1] = torch.inf, torch.inf
    frame, seen = build_pairs.composite((background, density, far), (alpha * rgb, alpha, near), margin=2.0)
    for y in range(5):
        for x in range(7):
            hidden = density[0, y, x] >= 0.5 and far[0, y, x] <= near[0, y, x] - 2
            a = 0.0 if hidden else alpha[0, y, x]
            wanted = a * rgb[:, y, x] + (1 - a) * background[:, y, x]
            assert torch.allclose(frame[:, y, x], wanted, atol=1e-6) and seen[0, y, x] == a, (y, x)


def plate(camera, depth):
    """A grid of opaque Gaussians over the whole view of a camera, at one depth."""
    u, v = torch.meshgrid(torch.linspace(-0.1, 1.1, 60), torch.linspace(-0.1, 1.1, 60), indexing="xy")
    pixels = torch.stack([u * camera.width, v * camera.height, torch.ones_like(u)], dim=-1).view(-1, 3)
    points = depth * pixels @ torch.linalg.inv(camera.K).T
    to_world = torch.linalg.inv(camera.world_to_camera)
    means = points @ to_world[:3, :3].T + to_world[:3, 3]
    sizes = torch.full_like(means, 0.02 * depth).log()
    return splat.Gaussians(means, sizes, torch.tensor([1.0, 0, 0, 0]).repeat(len(means), 1),
                           torch.full((len(means),), 6.0), torch.zeros(len(means), 1, 3))


@torch.no_grad()
def test_what_stands_before_the_asset_hides_it_from_its_smallest_side_on(scenes):
    """A plate before the whole view, nearer than the asset's nearest point, or its farthest, by that side."""
    street = scene.read_scene(scenes / "s0")
    street.objects = {1: street.objects[1]}              # no other vehicle is in the way
    asset, track, camera = street.objects[1], street.tracks[1], street.cameras[0]
    solid = asset.select(asset.logit_opacities > 0)      # without floaters
    insertion = build_pairs.Insertion(solid, torch.zeros(T, 4))
    _, alpha, depth = insertion.render(0, camera, track.pose[0])
    depth, side = depth[alpha > 0.5], track.size[0].min().item()
    still = street.still

    def shown(at):
        street.still = splat.Gaussians.cat([still, plate(camera, at)])
        file, _ = build_pairs.make_pair(street, dict.fromkeys(build_pairs.STAGES, insertion), 1, slice(0, 1),
                                        torch.zeros(3, 1, H, W), "full", tqdm(disable=True))
        return file["actor"].float().sum().item() / (255 * alpha.sum().item())
    hidden, seen = shown(depth.min().item() - 1.1 * side), shown(depth.max().item() - 0.9 * side)
    assert hidden < 0.02, f"1.1 sides before all of it, {hidden:.1%} of the asset is seen, wanted nothing"
    assert seen > 0.98, f"0.9 sides before its farthest point, {seen:.1%} of the asset is seen, wanted all of it"


def test_the_naive_placement_has_the_length_of_the_actors_box_and_its_middle_at_the_mean_of_the_actors_gaussians():
    torch.manual_seed(0)
    means = torch.rand(50, 3) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([7.0, -3.0, 1.0])
    asset = splat.Gaussians(means, means, torch.ones(50, 4), means[:, 0], means[:, None])
    actor = splat.Gaussians(means[:20] * 3, means[:20], torch.ones(20, 4), means[:20, 0], means[:20, None])
    turn = build_pairs.axes("RDF")
    placed = asset.transformed(*insertion.by_position(asset, actor, torch.tensor([4.5, 1.8, 1.5]), turn)).means
    low, high = placed.amin(0), placed.amax(0)
    off = ((low + high) / 2 - actor.means.mean(0)).abs().max()
    assert off < 1e-5, f"the middle of its box is {off:.1e} from the mean of the actor's Gaussians"
    assert abs((high - low)[0] - 4.5) < 1e-5, f"it is {(high - low)[0]:.3f} long, wanted 4.5"


# ---- the scene folder ------------------------------------------------------------------------------------------------

def test_cameras_project_as_opengl_says(tmp_path):
    """The file's numbers against OpenGL's own words: it looks along -z, x to the right, y up; pixel rows go down."""
    torch.manual_seed(0)
    frames = []
    for i in (10, 9):                                    # numbers go by value: 9 before 10
        c2w = torch.eye(4, dtype=torch.float64)
        c2w[:3, :3], c2w[:3, 3] = splat.rotations(torch.randn(1, 4, dtype=torch.float64))[0], torch.randn(3)
        frames.append({"file_path": f"images/{i}.png", "transform_matrix": c2w.tolist()})
    frames[0] |= {"fl_x": 50.0, "fl_y": 45.0, "cx": 21.0}
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 1.2, "cy": 13.0, "frames": frames}))
    cameras = scene_cameras.read_cameras(tmp_path / "transforms.json", 40, 30)
    focal = 20 / math.tan(0.6)
    for camera, frame, (fx, fy, cx, cy) in zip(cameras, frames[::-1], ((focal, focal, 20, 13), (50, 45, 21, 13))):
        c2w = torch.tensor(frame["transform_matrix"])
        for right, up, ahead in ((0.3, -0.2, 2.0), (-1.0, 0.5, 4.0)):
            point = c2w[:3, 3] + right * c2w[:3, 0] + up * c2w[:3, 1] - ahead * c2w[:3, 2]
            wanted = torch.tensor([cx + fx * right / ahead, cy - fy * up / ahead])
            p = camera.K @ (camera.world_to_camera[:3, :3] @ point + camera.world_to_camera[:3, 3])
            difference = (p[:2] / p[2] - wanted).abs().max()
            assert p[2] > 0 and difference < 1e-3, f"{difference:.1e} pixels off, allowed 1e-3"
    assert (cameras[0].width, cameras[0].height) == (40, 30)


def test_an_objects_gaussians_move_with_its_track(scenes):
    street, raw = scene.read_scene(scenes / "s0"), splat.load_ply(scenes / "s0" / "scene.ply")
    for t in range(T):
        pose, whole = street.tracks[1].pose, street.at(t)
        moving = (pose[t] @ torch.linalg.inv(pose[street.tracks[1].reference])).float()
        wanted = raw.means[raw.ids == 1] @ moving[:3, :3].T + moving[:3, 3]
        difference = (whole.means[whole.ids == 1] - wanted).abs().max()
        assert difference < 1e-3, f"frame {t}: {difference:.1e} m, allowed 1e-3"
        assert not (street.at(t, without=1).ids == 1).any()
        assert torch.equal(whole.means[whole.ids == 0], raw.means[raw.ids == 0]), "the street must stand still"


@pytest.mark.parametrize("frames, reference, wanted", [((3, 1), None, 1), ((2,), None, 2), ((0, 2, 3), 3, 3)])
def test_a_track_refers_to_its_first_frame_unless_it_names_another(tmp_path, frames, reference, wanted):
    entries = [{"frame": t, "pose": torch.eye(4).tolist(), "size": [4, 2, 1], "box": [t, 0, 9, 9]} for t in frames]
    item = {"id": 7, "frames": entries} | ({} if reference is None else {"reference": reference})
    (tmp_path / "tracks.json").write_text(json.dumps({"objects": [item]}))
    track = scene.read_tracks(tmp_path / "tracks.json", 4)[7]
    assert track.reference == wanted
    assert track.visible.nonzero().flatten().tolist() == sorted(frames) and track.box[frames[0], 0] == frames[0]


def test_without_object_ids_the_gaussians_in_the_3d_box_are_the_objects(scenes, copy):
    raw = splat.load_ply(copy / "scene.ply")
    splat.save_ply(copy / "scene.ply", replace(raw, ids=None))
    by_box, by_id = (scene.read_scene(folder).objects[1] for folder in (copy, scenes / "s0"))
    size = torch.tensor(json.loads((copy / "tracks.json").read_text())["objects"][0]["frames"][0]["size"])
    wanted = int((by_id.means.abs() <= size / 2).all(dim=1).sum())
    assert len(by_id) / 2 < wanted <= len(by_box) < len(by_id) + 2000
    assert (by_box.means.abs() <= size / 2 + 1e-4).all()


def test_the_largest_object_that_stays_inside_the_image_is_chosen(scenes):
    street = scene.read_scene(scenes / "s0")

    def chosen(wanted=None):
        with torch.no_grad():
            return build_pairs.choose_actor(scenes / "s0", street, range(T), wanted)
    other = next(i for i in street.tracks if i != 1)
    street.tracks = {i: street.tracks[i] for i in (other, 1)}
    street.tracks[other].visible[:], street.tracks[other].box[:] = True, torch.tensor([10.0, 10, 12, 12])
    assert chosen() == 1 and chosen(other) == other
    street.tracks[1].box[2, 2] = W                       # it touches the edge in one frame
    assert chosen() == other
    with pytest.raises(ValueError, match=r"tracks.json: objects: none is visible .* the best, 1, is in 3 of them"):
        chosen(1)
    with pytest.raises(ValueError, match=r"tracks.json: objects: no id 77 \(--actor\)"):
        chosen(77)


# ---- what is written -------------------------------------------------------------------------------------------------

def test_pairs_reads_what_is_written_and_the_truth_is_the_video_itself(scenes, built):
    out, manifest = built
    pairs = Pairs(out, frames=2)
    assert len(pairs) == 4 and not pairs.left_out
    for seed in SEEDS:
        video = to_bytes(read_clip(scenes / f"s{seed}" / "images"))
        for clip in manifest[f"s{seed}"]["clips"]:
            file, first = weights.load_tensors(out / clip["file"])[0], clip["first_frame"]
            assert torch.equal(file["x_gt"], video[:, first : first + 2]) and file["x_ni"].shape == (3, 2, H, W)
            assert align.iou(file["boxes"], file["boxes_gt"]).mean() == pytest.approx(clip["box_iou"]["full"], abs=1e-5)
            outside = file["actor"][0] == 0              # where there is no asset, NI and GT are one street
            near = (file["x_ni"].float() - file["x_gt"].float()).abs().mean(0)[outside].median()
            assert near < 8, f"the background is {near:.0f} of 255 off"


def test_a_contact_sheet_shows_naive_aligned_and_truth(built):
    sheet = Image.open(built[0] / "s0.png")
    assert sheet.size == (3 * 240 + 8, 2 * 162)
    file = weights.load_tensors(built[0] / "s0_000000.safetensors")[0]
    x0, y0, x1, y1 = file["boxes_gt"][1].tolist()
    at = (int((y0 + y1) / 2), int((x0 + x1) / 2))        # the middle of the box is the middle of every panel
    for i, x in enumerate((file["naive"], file["x_ni"][:, 1], file["x_gt"][:, 1])):
        shown = torch.tensor(sheet.getpixel((i * 244 + 120, 80)))
        around = x[:, at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2].float()
        assert (around.amin((1, 2)) - 3 <= shown).all() and (shown <= around.amax((1, 2)) + 3).all(), f"panel {i}"


def test_a_run_that_was_killed_goes_on_and_ends_the_same(single, tmp_path, monkeypatch):
    whole, argv = single
    argv = [*argv, "--out", str(tmp_path)]
    make, calls = build_pairs.make_pair, []

    def killed(*args, **settings):
        calls.append(args[3].start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*args, **settings)
    monkeypatch.setattr(build_pairs, "make_pair", killed)
    assert build_pairs.cli(argv) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["s0_000001.safetensors"]
    assert build_pairs.cli(argv) == 0 and calls == [1, 2, 2], "the first pair must be kept"
    for file in whole.glob("*.safetensors"):
        (one, about), (two, about_two) = weights.load_tensors(file), weights.load_tensors(tmp_path / file.name)
        assert about == about_two and all(torch.equal(one[k], two[k]) for k in one), file.name
    for name in ("manifest.json", "s0.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    monkeypatch.setattr(build_pairs, "read_scene", None)  # all is there: not even the scene is read
    assert build_pairs.cli(argv) == 0


def test_other_settings_make_the_pairs_anew_and_leave_no_old_ones(single, tmp_path):
    out = shutil.copytree(single[0], tmp_path / "out")
    (out / "s0_x_000001.safetensors").write_text("another scene's")
    assert {file.stem for file in out.glob("s0_*")} == {"s0_000001", "s0_000002", "s0_x_000001"}
    argv = [*single[1], "--out", str(out), "--range", "2:3", "--align", "none", "--min-iou", "0"]
    assert build_pairs.cli(argv) == 0
    assert {file.stem for file in out.glob("s0_*")} == {"s0_000002", "s0_x_000001"}
    file = weights.load_tensors(out / "s0_000002.safetensors")[0]
    assert torch.equal(file["naive"], file["x_ni"][:, 0]), "--align none is the naive placement"


def test_pairs_that_stay_too_far_off_are_left_out_and_listed(single, tmp_path, capsys):
    assert build_pairs.cli([*single[1], "--out", str(tmp_path), "--range", "1:2", "--align", "none"]) == 0
    (left,) = json.loads((tmp_path / "manifest.json").read_text())["s0"]["left_out"]
    assert not list(tmp_path.glob("*.safetensors")) and left["first_frame"] == 1
    assert f"left out: box IoU {left['box_iou']['none']:.3f}, wanted at least 0.8" in capsys.readouterr().out


# ---- what may be wrong -----------------------------------------------------------------------------------------------

def nan_means(folder):
    g = splat.load_ply(folder / "scene.ply")
    g.means[7, 1] = torch.nan
    splat.save_ply(folder / "scene.ply", g)


def three_frames(folder):
    shutil.rmtree(folder / "images")
    write_clip(folder / "video.mp4", torch.zeros(3, 3, H, W))


def of_first(edit):
    return lambda folder: change(folder / "tracks.json", lambda c: edit(c["objects"][0]["frames"]))


def of_cameras(edit):
    return lambda folder: change(folder / "transforms.json", edit)


BROKEN = {
    "no scene.ply": (lambda f: (f / "scene.ply").unlink(), r"scene\.ply"),
    "wrong PLY header": (lambda f: (f / "scene.ply").write_bytes(b"ply\nformat ascii 1.0\n"), r"scene\.ply: .*header"),
    "NaN in Gaussians": (nan_means, r"scene\.ply: .*\by\b.*vertex 7"),
    "no intrinsics": (of_cameras(lambda c: c.pop("fl_x")), r"transforms\.json: frames\[0\]: no intrinsics"),
    "intrinsics are text": (of_cameras(lambda c: c.update(cy="x")), r"frames\[0\]\.cy: wanted one finite number"),
    "distortion": (of_cameras(lambda c: c.update(k1=0.1)), r"frames\[0\]\.k1: wanted images without"),
    "another size": (of_cameras(lambda c: c.update(w=50)), r"transforms\.json: frames\[0\]: w, h: .* 50x64"),
    "singular camera": (of_cameras(lambda c: c["frames"][2].update(transform_matrix=[[0] * 4] * 4)),
                        r"transforms\.json: frames\[2\]\.transform_matrix: .*determinant 0"),
    "not JSON": (lambda f: (f / "tracks.json").write_text("{"), r"tracks\.json: truncated or corrupt"),
    "tracks for missing frames": (of_first(lambda e: e[1].update(frame=T)),
                                  r"tracks\.json: objects\[0\]\.frames\[1\]\.frame: wanted .* 0 to 3 .* got 4"),
    "a singular pose": (of_first(lambda e: e[3]["pose"][0].__setitem__(slice(0, 3), [0, 0, 0])),
                        r"tracks\.json: objects\[0\]\.frames\[3\]\.pose: .*determinant"),
    "NaN in a box": (of_first(lambda e: e[0].update(box=[0, 1, math.nan, 3])), r"objects\[0\]\.frames\[0\]\.box"),
    "an actor never visible": (lambda f: change(f / "tracks.json", lambda c: [
        e.update(visible=False) for o in c["objects"] for e in o["frames"]]), r"tracks\.json: objects: none is vis"),
    "frame counts differ": (three_frames, r"video\.mp4: 3 frames, but .* has 4 cameras"),
    "no video": (lambda f: shutil.rmtree(f / "images"), r"neither video\.mp4 nor images"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_scene_is_one_line_that_names_the_file_and_the_field(copy, tmp_path, capsys, fault):
    spoil, wanted = BROKEN[fault]
    spoil(copy)
    assert build_pairs.cli([str(copy), "--out", str(tmp_path / "out"), "--frames", "2"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("build_pairs.py: ") and str(copy) in lines[0], lines
    assert re.search(wanted, lines[0]), lines[0]
    assert not list((tmp_path / "out").glob("*"))


def without_extent(folder):
    g = splat.load_ply(folder / "asset.ply")
    g.means[:] = g.means[:1].clone()
    splat.save_ply(folder / "asset.ply", g)


FAULTS = {
    "no asset": (lambda f: (f / "asset.ply").unlink(), r"asset\.ply: no such file"),
    "empty asset": (lambda f: splat.save_ply(f / "asset.ply", splat.load_ply(f / "asset.ply").select(torch.arange(0))),
                    r"asset\.ply: wanted Gaussians that span a space, got 0"),
    "one point": (without_extent, r"asset\.ply: wanted Gaussians that span a space"),
    "no angle": (lambda f: change(f / "transforms.json", lambda c: c.update(camera_angle_x=0)),
                 "camera_angle_x: wanted"),
    "a link to nothing": (lambda f: (f / "gone").symlink_to("nowhere"), "gone"),
    "no folder": (shutil.rmtree, "no such folder")}


def test_after_broken_scenes_the_others_are_made(scenes, single, tmp_path, capsys):
    for fault, (spoil, _) in FAULTS.items():
        spoil(shutil.copytree(scenes / "s0", tmp_path / fault))
    out = tmp_path / "out"
    broken = [str(tmp_path / fault) for fault in FAULTS]
    assert build_pairs.cli([*broken, *single[1], "--out", str(out), "--range", "1:2"]) == 1
    assert list(json.loads((out / "manifest.json").read_text())) == ["s0"] and (out / "s0_000001.safetensors").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(FAULTS)
    for line, fault, (_, wanted) in zip(lines, FAULTS, FAULTS.values()):
        assert re.search(f"build_pairs.py: .*{fault}.*{wanted}", line), line


@pytest.mark.parametrize("content, wanted", [
    ({"s0": 7}, "s0: wanted an object, got 7"), ({"s0": {"settings": {}, "clips": 3}}, r"s0.clips: wanted a list"),
    ({"s0": {"settings": {}, "clips": [{"file": 1}]}}, r"s0.clips\[0\].file: wanted text, got 1")])
def test_a_manifest_of_another_kind_is_one_line(scenes, tmp_path, capsys, content, wanted):
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert build_pairs.cli([str(scenes / "s0"), "--out", str(tmp_path)]) == 2
    assert re.fullmatch(rf"build_pairs.py: .*manifest.json: {wanted}.*\n", capsys.readouterr().err)


def test_a_pair_that_lacks_a_tensor_is_made_anew(single, tmp_path):
    out = shutil.copytree(single[0], tmp_path / "out")
    (out / "manifest.json").unlink()
    file = out / "s0_000001.safetensors"
    tensors, about = weights.load_tensors(file)
    weights.save_tensors(file, {k: v for k, v in tensors.items() if k != "boxes_gt"}, about)
    assert build_pairs.cli([*single[1], "--out", str(out)]) == 0
    assert weights.load_tensors(file)[0].keys() == tensors.keys()


@pytest.mark.parametrize("flags", [["--frames", "0"], ["--asset-axes", "RUF"], ["--asset-axes", "X"], ["--range", "3"],
                                   ["--min-iou", "nan"], ["--min-iou", "-1"]])
def test_a_wrong_flag_is_status_2(scenes, flags):
    with pytest.raises(SystemExit) as stop:
        build_pairs.cli([str(scenes / "s0"), *flags])
    assert stop.value.code == 2
