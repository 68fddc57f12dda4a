"""Recorded vehicles: a box is seen where its camera says, its mask is its hull without what is nearer."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mirage_min.data import pandaset, streams, vehicles
from mirage_min.data.street_camera import Street
from mirage_min.data.vehicles import Sight, Vehicle, Vehicles
from mirage_min.method.camera import Camera
from mirage_min.networks import weights

HALF = 0.5**0.5
AHEAD = {"position": {"x": 2.0, "y": 1.0, "z": 1.5}, "heading": {"w": HALF, "x": -HALF, "y": 0.0, "z": 0.0}}  # along +y
K = {"fx": 100.0, "fy": 90.0, "cx": 80.0, "cy": 40.0}
BOX = {"x": 4.0, "y": 11.0, "z": 1.0, "width": 2.0, "length": 4.0, "height": 1.5, "yaw": 0.0, "sensor_id": 1}
SEEN = torch.tensor([[100 * (x - 2) / (y - 1) + 80, 90 * (1.5 - z) / (y - 1) + 40]      # its corners in that camera
                     for x in (3, 5) for y in (9, 13) for z in (0.25, 1.75)], dtype=torch.float64)


def rectangle(x0, y0, x1, y1):
    """The eight corners of a box that is seen straight from behind: left, right; rear, front; below, above."""
    return torch.tensor([[x, y] for x in (x0, x1) for _ in range(2) for y in (y1, y0)], dtype=torch.float64)


def known(*sights, width=160, height=80):
    return Vehicles(width, height, [Vehicle(i, list(s)) for i, s in enumerate(sights)])


def test_a_box_is_seen_where_its_camera_says():
    ahead = torch.tensor([[1.0, 0, 0, 2], [0, 0, 1, 1], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # right +x, down −z, ahead +y
    camera = Camera.from_pose(torch.tensor([[100.0, 0, 80], [0, 90, 40], [0, 0, 1]]), ahead, 160, 80)
    box = pandaset.Cuboid(object=0, label="Car", **BOX)
    corners, depths = box.seen_by(camera)
    torch.testing.assert_close(corners, SEEN, rtol=0, atol=1e-9)
    assert depths.tolist() == [8, 8, 12, 12] * 2
    turned, _ = replace(box, yaw=math.pi / 2).seen_by(camera)
    assert turned[:, 0].amax() == pytest.approx(100 * 4 / 9 + 80), "its length lies across now"
    assert replace(box, y=1.5).seen_by(camera)[1].min() < 0, "it reaches behind the camera"


def test_a_mask_is_the_hull_without_what_is_nearer():
    far, near, beyond = (Sight(0, d, rectangle(*r)) for d, r in
                         ((20.0, (40, 20, 79, 59)), (10.0, (60, 20, 99, 59)), (30.0, (40, 20, 59, 39))))
    mask = vehicles.mask_of(known([far], [near], [beyond]), 0, 0, (80, 160))
    assert mask.shape == (1, 80, 160) and mask[0, 30, 41:59].all() and not mask[0, 30, 61:].any()
    assert abs(float(mask.sum()) - 20 * 40) < 90
    half = vehicles.mask_of(known([far], [near]), 1, 0, (40, 80))
    assert abs(float(half.sum()) - 20 * 20) < 50 and half[0, 15, 35], "in a frame of half the size"


def test_a_hull_leaves_the_inner_points_out():
    points = [[0, 0], [4, 0], [4, 3], [0, 3], [2, 1], [1, 2], [2, 0]]
    assert sorted(vehicles.convex_hull(points)) == [[0, 0], [0, 3], [4, 0], [4, 3]]


@pytest.fixture
def clip(tmp_path):
    """Six frames; a vehicle that is there from the second on, and one that is too small."""
    path = tmp_path / "front_camera.safetensors"
    x = torch.randint(60, 200, (3, 6, 80, 160), dtype=torch.uint8)
    weights.save_tensors(path, {"x": x})
    here = [{"frame": t, "depth": 9.0, "corners": rectangle(40 + t, 30, 80 + t, 60).tolist()} for t in range(1, 6)]
    small = [{"frame": t, "depth": 60.0, "corners": rectangle(90, 30, 93, 33).tolist()} for t in range(6)]
    content = {"width": 160, "height": 80, "vehicles": [{"id": 7, "frames": here}, {"id": 8, "frames": small}]}
    path.with_suffix(".vehicles.json").write_text(json.dumps(content))
    return path


def test_a_piece_holds_a_vehicle_in_all_its_frames_and_isp_changes_it_alone(clip):
    found = vehicles.vehicles_of(clip)
    for seed in range(6):
        shot = vehicles.shoot_vehicle(clip, found, (48, 96), 3, torch.Generator().manual_seed(seed))
        assert shot.x.shape == (3, 3, 48, 96) and shot.mask.shape == (1, 3, 48, 96)
        assert (shot.mask.sum(dim=(0, 2, 3)) > 300).all()
        sample = streams.isp(shot, torch.Generator().manual_seed(seed))
        assert torch.equal(sample.clean, shot.x) and torch.equal(sample.actor, shot.mask)
        outside = torch.nn.functional.max_pool2d(shot.mask[0], 5, 1, 2)[None] == 0
        assert ((sample.degraded - sample.clean).abs() * outside).max() < 1e-5
        assert (sample.degraded - sample.clean)[:, shot.mask[0] == 1].abs().mean() > 0.01
    with pytest.raises(ValueError, match="no vehicle is in view in 6 frames in a row"):
        vehicles.shoot_vehicle(clip, found, (48, 96), 6, torch.Generator())


@pytest.mark.parametrize("first, last", [(0, 2), (1, 4), (3, 5)])
def test_a_piece_is_of_the_frames_in_which_its_vehicle_is_in_view(tmp_path, first, last):
    """A clip whose values say where and when they are: red the column, green the row, blue the frame."""
    t, y, x = torch.meshgrid(torch.arange(6), torch.arange(80), torch.arange(160), indexing="ij")
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, {"x": torch.stack([x, y, 40 * t]).byte()})
    corners = {t: rectangle(40 + 3 * t, 30 + 2 * t, 80 + 3 * t, 60 + 2 * t) for t in range(first, last + 1)}
    seen, starts, scales = known([Sight(t, 9.0, c) for t, c in corners.items()]), set(), []
    for seed in range(24):
        shot = vehicles.shoot_vehicle(path, seen, (48, 96), 3, torch.Generator().manual_seed(seed))
        value = (shot.x + 1) * 127.5
        times = value[2].mean(dim=(1, 2)) / 40
        start = round(float(times[0]))
        assert (times - torch.arange(start, start + 3)).abs().max() < 0.02, "frames in a row"
        starts.add(start)
        for k in range(3):                                             # the corners are where the clip shows them
            left, top = shot.corners[k].amin(0)
            across, down = value[0, k, 20, 30:41:10], value[1, k, 20:31:10, 30]
            step = (across[1] - across[0]) / 10, (down[1] - down[0]) / 10
            column = across[0] + 0.5 + (left - 30.5) * step[0]
            row = down[0] + 0.5 + (top - 20.5) * step[1]
            wanted = corners[start + k].amin(0)
            assert abs(column - wanted[0]) < 0.5 and abs(row - wanted[1]) < 0.5, f"{wanted}, got {column}, {row}"
        scales.append(float(step[0]))
    assert starts == set(range(first, last - 1))
    assert 0.999 < min(scales) < 1.1 and 1.5 < max(scales) < 1.7, "from the clip's own pixels to its whole frame"


def test_a_vehicle_that_is_hidden_or_fills_the_piece_is_refused(clip):
    front = [Sight(t, 5.0, rectangle(30, 20, 75, 70)) for t in range(6)]
    mine = [Sight(t, 9.0, rectangle(40, 30, 80, 60)) for t in range(6)]
    with pytest.raises(ValueError, match="vehicle 0 is hidden or too near"):
        hidden = known(mine, front)
        hidden.vehicles[1].frames.pop(0)  # it is not chosen: there in five frames alone
        vehicles.shoot_vehicle(clip, hidden, (48, 96), 6, torch.Generator().manual_seed(0))
    near = known([Sight(t, 3.0, rectangle(0, 5, 150, 80)) for t in range(6)])
    with pytest.raises(ValueError, match="vehicle 0 is hidden or too near"):
        vehicles.shoot_vehicle(clip, near, (48, 96), 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("left, right, wide", [
    (10, 16.3, False), (10, 16.5, True),                               # of 160 columns, 4 %
    (-20, 19, False), (-19, 20, True), (141, 180, False), (140, 179, True)])
def test_a_vehicle_is_of_use_from_four_percent_of_the_width_on_with_its_middle_in_the_image(left, right, wide):
    assert vehicles.is_wide(Sight(0, 9.0, rectangle(left, 30, right, 60)), 160) == wide


@pytest.mark.parametrize("edge, fits", [(54, True), (58, False)])      # it hides 14 and 18 of 40 columns
def test_a_nearer_vehicle_may_hide_four_tenths_of_one(clip, edge, fits):
    mine = [Sight(t, 9.0, rectangle(40, 30, 80, 60)) for t in range(6)]
    front = [Sight(t, 5.0, rectangle(-200, 20, edge, 70)) for t in range(6)]  # its own middle is out of view
    if fits:
        shot = vehicles.shoot_vehicle(clip, known(mine, front), (80, 160), 2, torch.Generator())
        assert 0.6 < float(shot.mask[0, 0].sum()) / (41 * 31) < 0.7
    else:
        with pytest.raises(ValueError, match="vehicle 0 is hidden or too near"):
            vehicles.shoot_vehicle(clip, known(mine, front), (80, 160), 2, torch.Generator())


@pytest.mark.parametrize("width, fits", [(56, True), (72, False)])
def test_a_vehicle_may_cover_four_tenths_of_the_piece(clip, width, fits):
    seen = known([Sight(t, 9.0, rectangle(20, 0, 20 + width, 80)) for t in range(6)])
    if fits:
        assert vehicles.shoot_vehicle(clip, seen, (80, 160), 2, torch.Generator()).mask.mean() > 0.34
    else:
        with pytest.raises(ValueError, match="vehicle 0 is hidden or too near"):
            vehicles.shoot_vehicle(clip, seen, (80, 160), 2, torch.Generator())


def test_a_recorded_vehicle_keeps_its_shadow(clip):
    shot = vehicles.shoot_vehicle(clip, vehicles.vehicles_of(clip), (48, 96), 2, torch.Generator().manual_seed(0))
    for relit, shadowed in ((True, True), (False, False)):
        with pytest.raises(ValueError, match="keeps its shadow"):
            shot.pair(relit, shadowed)


def test_relighting_changes_the_vehicle_alone_and_all_frames_alike(clip):
    shot = vehicles.shoot_vehicle(clip, vehicles.vehicles_of(clip), (48, 96), 3, torch.Generator().manual_seed(1))
    for k in range(3):  # the corners moved with the crop
        left, top = shot.corners[k].amin(dim=0).tolist()
        columns, rows = shot.mask[0, k].amax(dim=0).nonzero(), shot.mask[0, k].amax(dim=1).nonzero()
        assert abs(int(columns[0]) - left) < 2 and abs(int(rows[0]) - top) < 2
    sample = streams.relighting(replace(shot, x=torch.zeros_like(shot.x)), torch.Generator().manual_seed(3))
    assert set(sample.did) == {"azimuth", "elevation", "exposure"}
    outside = torch.nn.functional.max_pool2d(shot.mask[0], 5, 1, 2)[None] == 0
    assert (sample.degraded * outside).abs().max() < 1e-5 and not sample.clean.any()
    inside = -torch.nn.functional.max_pool2d(-shot.mask[0], 5, 1, 2)[None] == 1
    tones = [sample.degraded[:, k][:, inside[0, k]].mean(dim=1) for k in range(3)]
    assert tones[0].abs().amax() > 0.02 and all((tone - tones[0]).abs().amax() < 0.02 for tone in tones)


@pytest.mark.parametrize("stream", ["isp", "relighting"])
def test_half_of_the_pairs_of_such_a_clip_show_a_recorded_vehicle(clip, stream):
    job = streams.Job(stream, 0, 2, (48, 96), clip, Street(0.9, 0.4), vehicles.vehicles_of(clip))
    kinds = [type(streams.shot_of(job, torch.Generator().manual_seed(seed))).__name__ for seed in range(12)]
    assert 2 < kinds.count("RecordedShot") < 10
    other = streams.shot_of(streams.replace(job, stream="shadows"), torch.Generator().manual_seed(0))
    assert type(other).__name__ == "StreetShot"


@pytest.mark.parametrize("change, line", [
    ({"width": 0}, "width: wanted an integer from 1"), ({"vehicles": [{"id": 1}]}, "vehicles[0].frames: wanted"),
    ({"vehicles": [{"id": 1, "frames": [{"frame": 0, "depth": 3, "corners": [[1, 2]]}]}]},
     "vehicles[0].frames[0].corners: wanted 8x2 finite numbers")])
def test_a_wrong_file_is_one_line_with_the_field(clip, change, line):
    file = clip.with_suffix(".vehicles.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        vehicles.vehicles_of(clip)
    assert line in str(error.value) and file.name in str(error.value)


def test_pandasets_boxes_become_a_file_next_to_the_clip(clip, tmp_path):
    camera = tmp_path / "camera" / "front_camera"
    camera.mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    fields = ["object", "label", *BOX]
    rows = [[5, "Car", *BOX.values()], [6, "Pedestrian", *BOX.values()]]
    others = {9: {"y": -20.0},                                         # behind the camera
              10: {"y": 3.4}, 11: {"y": 3.6},                          # its rear .4 and .6 m ahead of it
              12: {"x": -9.0}, 13: {"x": -8.0},                        # left of the image, and cut by its edge
              14: {"x": 225.0}, 15: {"x": 223.0}}                      # the same to its right
    rows += [[i, "Car", *(BOX | place).values()] for i, place in others.items()]
    (tmp_path / "annotations" / "cuboids.json").write_text(json.dumps({"fields": fields, "frames": [rows, rows]}))
    (camera / "poses.json").write_text(json.dumps([AHEAD, AHEAD]))
    (camera / "intrinsics.json").write_text(json.dumps(K))
    vehicles.main(vehicles.argparse.Namespace(pandaset=tmp_path, clips=tmp_path))
    found = vehicles.vehicles_of(clip)
    assert [v.id for v in found.vehicles] == [5, 11, 13, 15] and [s.frame for s in found.vehicles[0].frames] == [0, 1]
    assert (found.width, found.height) == (1920, 1080) and found.vehicles[0].frames[0].depth == 10.0
    torch.testing.assert_close(found.vehicles[0].frames[0].corners, SEEN, rtol=0, atol=0.051)
    (camera / "poses.json").write_text(json.dumps([AHEAD]))
    with pytest.raises(ValueError, match="cuboids.json: frames: wanted 1, as many as the camera has, got 2"):
        vehicles.from_pandaset(tmp_path, "front_camera")
