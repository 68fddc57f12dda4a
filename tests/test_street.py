"""A rendered car on a real street: it stands on the road and darkens it away from the sun, and changes nothing else."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mirage_min.data import street, street_camera
from mirage_min.data.pairs import Pairs
from mirage_min.data.street_camera import Street
from mirage_min.networks import weights
from tests import scripts

H, W = 72, 128
SUNNY = Street(focal=0.9, horizon=0.45, near=8, far=9, sun=(90.0, 40.0), shadow=0.3, asphalt=0.2)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def grey_road(frames=2):
    return torch.full((3, frames, H, W), 0.1)


def inserted(what=SUNNY, seed=0, x=None):
    x = grey_road() if x is None else x
    scene, K = street.sample_car(what, x.shape[1], draws(seed)), street_camera.intrinsics(what, H, W)
    white = street.brightness_of_the_road(x, what) / what.asphalt
    return scene, K, street.insert(x, scene, K, what.shadow, white)


def test_the_car_stands_where_the_camera_says():
    scene, K, pair = inserted()
    x, _, z = scene.bodies[0].pose[0, :3, 3].tolist()
    left, top, right, bottom = pair.boxes[0].tolist()
    # a point of the road at (x, z) is seen at row cy + f · height / z and column cx + f · x / z
    nearest = z - scene.bodies[0].size[2] / 2
    foot = 0.45 * H + 0.9 * W * SUNNY.height / nearest
    assert abs(bottom - foot) < 3, f"the car ends at row {bottom}, the road there is at row {foot:.1f}"
    assert left < 0.5 * W + 0.9 * W * x / z < right
    roof = 0.45 * H + 0.9 * W * (SUNNY.height - scene.bodies[0].size[1]) / z
    assert abs(top - roof) < 4


def test_the_naive_insertion_leaves_the_street_as_it_was_and_the_truth_darkens_it_away_from_the_sun():
    scene, _, pair = inserted()
    outside = pair.actor < 1e-6
    x = grey_road()
    assert ((pair.x_ni - x).abs() * outside).max() < 1e-5
    darker = ((x - pair.x_gt).mean(dim=0) > 0.05) & outside[0]
    assert darker.any(dim=(1, 2)).all() and not ((pair.x_gt - x).mean(dim=0)[outside[0]] > 1e-5).any()
    columns = darker[0].nonzero()[:, 1].float().mean()
    middle = pair.boxes[0, [0, 2]].mean()
    assert columns < middle - 2, f"the sun is at the right, the shadow's mean column {columns}, the car's {middle}"
    assert not darker[0, : int(0.45 * H)].any(), "no shadow falls on the sky"


def test_what_may_be_wrong_with_a_naive_car_is_its_light_and_its_shadow():
    scene, K, both = inserted()
    x, white = grey_road(), street.brightness_of_the_road(grey_road(), SUNNY) / SUNNY.asphalt
    light, shadow, neither = (street.insert(x, scene, K, SUNNY.shadow, white, relit=relit, shadowed=shadowed)
                              for relit, shadowed in ((True, True), (False, False), (False, True)))
    assert torch.equal(neither.x_ni, both.x_gt)
    car, road = (both.actor == alpha for alpha in (1, 0))
    for pair, wrong, right in ((light, car, road), (shadow, road, car)):
        assert torch.equal(pair.x_ni * right, both.x_gt * right) and torch.equal(pair.x_ni * wrong, both.x_ni * wrong)


def angles(light):
    """Azimuth and elevation of a sun in degrees."""
    x, y, z = light.to_sun
    return torch.stack([torch.atan2(x, z), torch.asin(-y)]).rad2deg()


def test_a_car_drives_along_a_lane_of_its_street_and_every_draw_fills_its_range():
    lanes = ((-3.0, 10.0), (4.0, 190.0))                               # metres to the right, degrees
    what = Street(0.9, 0.45, lanes=lanes, height=1.3, near=8, far=20, sun=(-60.0, 35.0), warmth=0.2)
    scenes = [street.sample_car(what, 3, draws(seed)) for seed in range(200)]
    place = torch.stack([scene.bodies[0].pose for scene in scenes])    # [200, 3, 4, 4]
    position, ahead = place[:, :, :3, 3], place[:, 0, :3, 2]
    x, y, z = position[:, 0].T
    lane = (x > 0).long()
    assert 70 < lane.sum() < 130 and not position[..., 1].any(), "either lane, on the ground"
    steps = position.diff(dim=1)
    drift = (steps[:, 0] * ahead).sum(1)
    along = (drift[:, None] * ahead)[:, None].expand_as(steps)
    assert torch.allclose(steps, along, atol=1e-5), "steadily where it heads"
    off_lane = x - torch.tensor([at for at, _ in lanes])[lane]
    askew = torch.atan2(ahead[:, 0], ahead[:, 2]).rad2deg() - torch.tensor([heading for _, heading in lanes])[lane]
    width, height, length = torch.stack([scene.bodies[0].size for scene in scenes]).T
    naive = [scene.naive for scene in scenes]
    azimuth, elevation = torch.stack([angles(light) for light in naive]).T
    sun, sky = (torch.stack([getattr(light, name) for light in naive]) for name in ("sun", "sky"))
    found = {"metres from the lane's middle": (off_lane, -0.5, 0.5), "degrees from its heading": (
                 (askew + 180) % 360 - 180, -6, 6), "metres ahead": (z, 8, 20), "metres a frame": (drift, -0.12, 0.12),
             "length": (length, 4.0, 4.9), "width": (width, 1.75, 1.95), "height": (height, 1.45, 1.85),
             "the wrong sun's azimuth": (azimuth, -180, 180), "its elevation": (elevation, 30, 75),
             "its strength": (sun[:, 1], 0.2, 1.2), "its tint": (sun[:, 0] / sun[:, 1] - 1, -0.15, 0.15),
             "the wrong sky's": (sky[:, 1] / 0.95, 0.4, 1.0),
             "its exposure": (torch.tensor([light.exposure for light in naive]), 0.7, 1.4)}
    for name, (values, low, high) in found.items():
        near = 0.04 * (high - low)
        assert low - 1e-3 <= values.min() < low + near and high - near < values.max() <= high + 1e-3, (
            f"{name}: from {values.min():.3f} to {values.max():.3f}, wanted {low} to {high}")
    assert torch.allclose(sun[:, 0] + sun[:, 2], 2 * sun[:, 1], atol=1e-5), "as much less blue as it is redder"
    for scene in scenes[:20]:
        corners = torch.cat([part.corners for part in scene.bodies[0].parts])
        assert torch.allclose((corners.amax(0) - corners.amin(0))[1:], scene.bodies[0].size[1:], atol=0.05)
        assert angles(scene.light).tolist() == pytest.approx([-60, 35], abs=1e-3), "the street's own sun"
        assert scene.light.sun[0] - scene.light.sun[2] == pytest.approx(0.4 * float(scene.light.sun[1]))
        assert scene.c2w[:, :3, 3].tolist() == [[0, pytest.approx(-1.3), 0]] * 3, "a camera at rest above the road"
    colours = torch.stack([scene.bodies[0].color for scene in scenes])
    plain = torch.tensor(street.CAR_COLORS)
    ratio = (colours[:, None] / plain).sub(1)                          # [200, 8, 3] to each of the paints
    assert colours.max() <= 0.9 and (ratio.abs().amax(-1).amin(-1) < 0.1501).all(), "a paint, 15 % lighter or darker"
    assert len(set(ratio.abs().amax(-1).argmin(-1).tolist())) == len(plain), "every paint"


@pytest.mark.parametrize("white", [(0.6, 0.6, 0.6), (0.8, 0.5, 0.2)])
def test_in_the_same_light_the_naive_car_is_as_bright_as_the_true_one_but_for_its_own_shadow(white):
    scene, K = street.sample_car(SUNNY, 1, draws()), street_camera.intrinsics(SUNNY, H, W)
    scene = replace(scene, naive=scene.light)
    white = torch.tensor(white)
    lit, wrong, alpha, _ = street.render_car(scene, K, (H, W), 0, shadow=0.3, white=white)
    sun, sky, up = scene.light.sun, scene.light.sky, -scene.light.to_sun[1]
    road = sky + sun * up                                              # what reaches it
    colour = (white / road) / (white.mean() / road.mean())             # the naive car's exposure has none
    same_light = wrong * colour.view(3, 1, 1)
    assert (lit <= same_light + 1e-5).all(), "its own shadow takes light away"
    equal = (lit - same_light).abs().amax(0)[alpha[0] > 0.99] < 1e-4
    assert 0.3 < equal.float().mean() < 1, f"{equal.float().mean():.0%} of the car is as bright"


def test_a_white_roof_is_as_bright_as_a_white_road(monkeypatch):
    what = replace(SUNNY, height=4.0)
    scene, K = street.sample_car(what, 1, draws()), street_camera.intrinsics(what, H, W)
    monkeypatch.setattr(street, "albedo", lambda body, k, points, seed: torch.ones_like(points.local))
    white = torch.tensor([0.8, 0.5, 0.2])
    lit, _, alpha, _ = street.render_car(scene, K, (H, W), 0, shadow=0.3, white=white)
    roof = ((lit - white.view(3, 1, 1)).abs() < 1e-4).all(0) & (alpha[0] == 1)
    assert roof.sum() > 40, f"{roof.sum()} of {alpha.sum():.0f} pixels are as bright as {white.tolist()}"


def test_the_road_is_bluer_in_a_shadow_under_a_clear_sky_and_not_under_clouds():
    low_sun = replace(SUNNY, sun=(90.0, 15.0))
    scene, K = street.sample_car(low_sun, 1, draws()), street_camera.intrinsics(low_sun, H, W)
    for shadow in (0.3, 0.8):
        _, _, _, (red, green, blue) = street.render_car(scene, K, (H, W), 0, shadow=shadow, white=torch.ones(3), s=1)
        far_from_it = (green / shadow - 1).abs() < 0.01                # where the sun alone is hidden
        assert green.max() == 1 and far_from_it.sum() > 10
        assert 0.4 * shadow - 1e-6 <= green.min() < 0.7 * shadow, "beneath the car the sky is hidden too"
        tint = (1 - green) if shadow < 0.7 else torch.zeros_like(green)
        assert torch.allclose(red, green * (1 - 0.06 * tint), atol=1e-6)
        assert torch.allclose(blue, green * (1 + 0.08 * tint), atol=1e-6)


def test_where_the_sun_is_hidden_the_stated_share_of_light_is_left():
    what = Street(0.9, 0.45, near=8, far=9, sun=(90.0, 20.0), shadow=0.3, asphalt=0.2)
    _, _, pair = inserted(what)
    x, clear = grey_road(), pair.actor[0, 0] < 1e-6
    share = (((pair.x_gt + 1) / (x + 1)) ** street.GAMMA).mean(dim=0)[0]
    far_from_the_car = share[clear & (share < 0.5)].max()
    assert 0.25 < far_from_the_car < 0.5
    assert share[clear].min() >= 0.3 * 0.4 - 0.02, "beneath the car the sky is hidden too, never more than that"


def test_under_clouds_there_is_only_a_soft_shadow_close_to_the_car():
    _, _, pair = inserted(Street(0.9, 0.45, near=8, far=9, sun=(90.0, 40.0), shadow=1.0, asphalt=0.2))
    darker = ((grey_road() - pair.x_gt).mean(dim=0)[0] > 0.1) & (pair.actor[0, 0] < 1e-6)
    left, top, right, bottom = pair.boxes[0].tolist()
    rows, columns = darker.nonzero().T
    assert columns.min() > left - 15 and columns.max() < right + 15 and rows.min() > top


def test_a_brighter_street_has_a_brighter_car():
    dark, bright = (inserted(x=torch.full((3, 1, H, W), level))[2] for level in (-0.5, 0.3))
    on = dark.actor[0, 0] > 0.99
    assert (bright.x_gt[:, 0, on].mean() - dark.x_gt[:, 0, on].mean()) > 0.1
    assert torch.equal(dark.actor, bright.actor)


def test_a_window_holds_the_car_and_stays_inside_the_frame():
    for seed in range(20):
        scene, K = street.sample_car(SUNNY, 1, draws(seed)), street_camera.intrinsics(SUNNY, H, W)
        top, left = street.window_with_the_car(scene, K, (H, W), (48, 64), draws(seed))
        assert 0 <= top <= H - 48 and 0 <= left <= W - 64
        K[0, 2] -= left
        K[1, 2] -= top
        pair = street.insert(grey_road(1)[..., :48, :64], scene, K, 0.3, torch.ones(3))
        assert pair.actor.sum() > 50, f"seed {seed}: no car in the crop"


@pytest.mark.parametrize("horizon, centre, row, column", [
    (0.5, 0.5, 0.675, 0.5), (0.5, -1.0, 0.675, 0.12), (0.5, 2.0, 0.675, 0.88), (-0.5, 0.5, 0.075, 0.5),
    (1.5, 0.5, 0.925, 0.5)])
def test_the_brightness_of_the_road_is_that_ahead_or_of_what_is_nearest_in_the_frame(horizon, centre, row, column):
    """A ramp along rows and columns: its median is in the middle of the patch."""
    y, x = torch.meshgrid((torch.arange(200) + 0.5) / 200, (torch.arange(300) + 0.5) / 300, indexing="ij")
    ramp = torch.stack([y, x, 0 * x])[:, None] * 2 - 1
    found = street.brightness_of_the_road(ramp, Street(0.9, horizon, centre))
    assert (found[:2] ** (1 / street.GAMMA)).tolist() == pytest.approx([row, column], abs=0.005)
    assert found[2] == pytest.approx(0.02**street.GAMMA), "never black"


def test_the_ground_grid_lies_on_the_road_and_the_lanes_meet_at_the_horizon():
    x = street_camera.ground_grid(torch.zeros(3, H, W), Street(0.9, 0.45, lanes=((-2.0, 0.0), (2.0, 0.0))))
    green = (x[1] == 1).nonzero()
    assert not x[:, : int(0.45 * H)].any(), "nothing above the horizon"
    spread = [green[green[:, 0] == row, 1] for row in (36, 50, 64)]
    widths = [int(columns.max() - columns.min()) for columns in spread]
    for row, width in zip((36, 50, 64), widths):
        # 4 m apart at the distance z where the road is seen in this row: f · 4 / z, and z = f · height / (row − cy)
        assert abs(width - 4 * (row + 0.5 - 0.45 * H) / 1.4) < 4, f"row {row}: {width} columns"


def test_the_camera_of_a_piece_sees_what_that_of_the_clip_saw_in_the_same_pixels(tmp_path):
    """A clip that is a ramp along x, y and t in its three colours: its values say from where each pixel was cut."""
    T, rows, columns = 6, 108, 192
    t, y, x = torch.meshgrid(20 * torch.arange(T), torch.arange(rows), torch.arange(columns), indexing="ij")
    weights.save_tensors(tmp_path / "ramp.safetensors", {"x": torch.stack([x, y, t]).byte()})
    what, starts, steps = Street(0.9, 0.45, centre=0.4, near=8, far=9), set(), []
    for seed in range(30):
        shot = street.shoot(tmp_path / "ramp.safetensors", what, (40, 60), 2, draws(seed))
        value, K = (shot.x + 1) * 127.5, shot.K
        assert value.shape == (3, 2, 40, 60)
        for ramp, focal, principal, ahead in ((value[0, 0, 20], K[0, 0], K[0, 2], 0.4 * columns),
                                              (value[1, 0, :, 30], K[1, 1], K[1, 2], 0.45 * rows)):
            step = (ramp[-5] - ramp[4]) / (len(ramp) - 9)              # pixels of the clip to one of the piece
            begins = ramp[4] + 0.5 - 4.5 * step                        # where, in the clip's pixels
            assert abs(begins + principal * step - ahead) < 0.6, f"wanted {ahead}, got {begins + principal * step:.1f}"
            assert abs(focal * step / (0.9 * columns) - 1) < 0.02, "the focal length is the clip's"
            steps.append(float(step))
        times = value[2].mean(dim=(1, 2)) / 20
        assert abs(times[1] - times[0] - 1) < 0.02, "frames in a row"
        starts.add(round(float(times[0])))
    assert starts == set(range(T - 1)), "anywhere in the clip"
    assert 1.48 < min(steps) < 1.65 and 2.5 < max(steps) < 2.75, "108 rows are shrunk to 40 at least, to 72 at most"
    assert street.shoot(tmp_path / "ramp.safetensors", what, (40, 60), 6, draws()).x.shape == (3, 6, 40, 60)
    with pytest.raises(ValueError, match="ramp.safetensors: wanted at least 7 frames, got 6"):
        street.shoot(tmp_path / "ramp.safetensors", what, (40, 60), 7, draws())


@pytest.fixture
def clips(tmp_path):
    weights.save_tensors(tmp_path / "drive.safetensors", {"x": torch.full((3, 12, 108, 192), 120, dtype=torch.uint8)})
    (tmp_path / "drive.street.json").write_text('{"focal": 0.9, "horizon": 0.45, "lanes": [[0, 0], [3, 180]]}')
    return tmp_path


def test_pairs_of_a_folder_are_a_function_of_their_seed_and_read_like_any_other(clips):
    for out in ("a", "b"):
        done = scripts.run("-m", "mirage_min.data.street", "--clips", clips, "--size", "48x80", "--frames", 3,
                           "--count", 2, "--out", clips / out)
        assert done.returncode == 0, done.stderr
    assert [p.read_bytes() for p in sorted((clips / "a").iterdir())] == [
        p.read_bytes() for p in sorted((clips / "b").iterdir())]
    pairs = Pairs(clips / "a", frames=3)
    x_ni, x_gt = pairs.read(0, lambda n: 0)
    assert len(pairs) == 2 and x_ni.shape == x_gt.shape == (3, 3, 48, 80) and not torch.equal(x_ni, x_gt)


@pytest.mark.parametrize("text, line", [
    ('{"focal": 9, "horizon": 0.5}', "focal: wanted one finite number from 0.2 to 5, got 9"),
    ('{"focal": 0.9}', "horizon: wanted one finite number from -0.5 to 1.5, got nothing"),
    ('{"focal": 0.9, "horizon": 0.5, "focus": 1}', "focus: wanted only the fields focal, horizon, centre"),
    ('{"focal": 0.9, "horizon": 0.5, "near": 5, "far": 4}', "near must be less than far, got 5.0 and 4.0"),
    ('{"focal": 0.9, "horizon": 0.5, "lanes": [[1]]}', "sun and each of lanes must be two numbers"),
    ('{"focal": 0.9, "horizon": true}', "horizon: wanted one finite number"), ("{", "Expecting property name")])
def test_a_wrong_camera_file_is_one_line_with_its_name_and_the_field(clips, text, line):
    (clips / "drive.street.json").write_text(text)
    with pytest.raises(ValueError) as error:
        street_camera.street_of(clips / "drive.safetensors")
    said = str(error.value)
    assert line in said and "drive.street.json" in said and "\n" not in said, said


def test_a_file_changes_single_numbers_of_a_clip_that_is_known(tmp_path):
    known = street_camera.STREETS["U3_challenge_video"]
    (tmp_path / "U3_challenge_video.street.json").write_text('{"height": 1.7, "sun": [-30, 40]}')
    found = street_camera.street_of(tmp_path / "U3_challenge_video.safetensors")
    assert (found.height, found.sun, found.focal, found.lanes) == (1.7, (-30, 40), known.focal, known.lanes)
    assert street_camera.street_of(tmp_path / "U1a_project_video_000-199.safetensors").asphalt == 0.08
    assert street_camera.street_of(tmp_path / "my_drive.safetensors") is None


def test_the_grid_is_drawn_over_a_frame_of_every_clip_whose_camera_is_known(clips):
    weights.save_tensors(clips / "other.safetensors", {"x": torch.zeros(3, 2, 36, 64, dtype=torch.uint8)})
    street_camera.draw_grids(clips, clips / "grid.png")
    assert Image.open(clips / "grid.png").size == (640, 360)


def test_a_folder_of_clips_without_cameras_is_refused(tmp_path):
    done = scripts.run("-m", "mirage_min.data.street", "--clips", tmp_path, "--out", tmp_path / "o")
    assert done.returncode == 2 and "no clip of a known camera" in done.stderr


@pytest.mark.parametrize("tensors", [{"y": torch.zeros(3, 2, 36, 64, dtype=torch.uint8)},
                                     {"x": torch.zeros(3, 2, 36, 64)},
                                     {"x": torch.zeros(4, 2, 36, 64, dtype=torch.uint8)}, None])
def test_a_file_that_is_no_clip_is_refused_by_its_name(clips, tensors):
    file = clips / "drive.safetensors"
    file.write_bytes(b"\5\0\0\0\0\0\0\0{}xyz") if tensors is None else weights.save_tensors(file, tensors)
    with pytest.raises(ValueError, match="drive.safetensors: (truncated or corrupt|wanted a tensor x, uint8)"):
        street_camera.clips_of_known_streets(clips)
