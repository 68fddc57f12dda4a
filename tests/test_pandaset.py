"""PandaSet as a scene folder: a made-up sequence in its layout, and the real one where it is there."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from mirage_min.data.pandaset import main, write_scene
from mirage_min.data.scene import read_tracks
from mirage_min.data.scene_cameras import scene_cameras

REAL = Path(__file__).parents[2] / "shared" / "data" / "real" / "pandaset_002"
FIELDS = ["object", "label", "motion", "x", "y", "z", "width", "length", "height", "yaw", "sensor_id"]
CAR = [7, "Car", "Moving", 0.0, 12.0, 0.8, 1.9, 4.6, 1.6, 0.0, -1]          # ahead, looking along y as the camera does


def sequence(folder, rows=(CAR,), count=2, size=(192, 108), fields=FIELDS):
    """A sequence whose camera is 1.5 m high, looks along y and moves 1 m a frame; turned by half a turn about x."""
    camera = folder / "camera" / "front_camera"
    camera.mkdir(parents=True)
    half = math.sqrt(0.5)
    poses = [{"position": {"x": 0.0, "y": float(t), "z": 1.5}, "heading": {"w": half, "x": -half, "y": 0.0, "z": 0.0}}
             for t in range(count)]
    (camera / "poses.json").write_text(json.dumps(poses))
    (camera / "intrinsics.json").write_text(json.dumps({"fx": 1000.0, "fy": 1000.0, "cx": 970.0, "cy": 540.0}))
    for t in range(count):
        Image.new("RGB", size, (t, 0, 0)).save(camera / f"{t:02d}.jpg")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "cuboids.json").write_text(json.dumps({"fields": fields, "frames": [rows] * count}))
    return folder


def test_a_car_ahead_is_where_a_pinhole_sees_it(tmp_path, capsys):
    assert main([str(sequence(tmp_path / "002")), str(tmp_path / "out")]) == 0
    assert "2 frames and 1 objects; scene.ply and asset.ply are still missing" in capsys.readouterr().out
    cameras = scene_cameras(tmp_path / "out", 192, 108)
    track = read_tracks(tmp_path / "out" / "tracks.json", 2)[7]
    assert track.category == "Car" and track.visible.all()
    assert track.size[0].tolist() == [4.6, 1.9, 1.6]
    assert track.pose[0, :3, 0].tolist() == pytest.approx([0, 1, 0]), "it looks along y"
    assert track.pose[0, :3, 1].tolist() == pytest.approx([-1, 0, 0]) and track.pose[0, 2].tolist() == [0, 0, 1, 0.8]
    for t in range(2):
        # by hand: at depth 12 - t ± 2.3, .95 m to each side, .1 m above and 1.5 m below the camera; images a tenth
        near = 12 - t - 2.3
        wanted = [97 - 95 / near, 54 - 10 / near, 97 + 95 / near, 54 + 150 / near]
        assert track.box[t].tolist() == pytest.approx(wanted, rel=0, abs=1e-9)
        u, v, z = cameras[t].K @ (cameras[t].world_to_camera[:3] @ torch.tensor([1.0, 12, 0.8, 1]))
        assert [u / z, v / z, z] == pytest.approx([97 + 100 / (12 - t), 54 + 70 / (12 - t), 12 - t], abs=1e-3)
    pictures = sorted((tmp_path / "out" / "images").iterdir())
    assert [p.name for p in pictures] == ["000000.jpg", "000001.jpg"]
    assert pictures[1].read_bytes() == (tmp_path / "002/camera/front_camera/01.jpg").read_bytes()


def test_every_file_may_begin_with_a_byte_order_mark(tmp_path):
    files = list(sequence(tmp_path / "002").rglob("*.json"))
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(files) == 3 and write_scene(tmp_path / "002", tmp_path / "out", "front_camera") == (2, 1)


def test_yaw_turns_to_the_left_and_what_is_not_in_front_is_not_visible(tmp_path):
    quarter = [*CAR[:9], math.pi / 2, 0]
    beside = ["a-text-id", "Bus", "", 3.0, 0.5, 1.0, 2.5, 9.0, 3.0, 0.0, 0]
    other_sensor = [9, *CAR[1:10], 1]
    write_scene(sequence(tmp_path / "002", [quarter, beside, other_sensor]), tmp_path / "out", "front_camera")
    tracks = read_tracks(tmp_path / "out" / "tracks.json", 2)
    assert tracks.keys() == {7, 1}, "the other lidar's box of an object is left out"
    assert tracks[7].pose[0, :3, 0].tolist() == pytest.approx([-1, 0, 0], abs=1e-6)
    assert not tracks[1].visible.any() and tracks[1].box[0].tolist() == [0] * 4


@pytest.mark.parametrize("change, said", [
    (lambda f: shutil.rmtree(f / "camera" / "front_camera"), "front_camera: no such folder"),
    (lambda f: (f / "annotations" / "cuboids.json").unlink(), "cuboids.json: no such file"),
    (lambda f: (f / "annotations" / "cuboids.json").write_text('{"fields": ["x"], "frames": [[]]}'), "is missing"),
    (lambda f: (f / "annotations" / "cuboids.json").write_text(json.dumps({"fields": FIELDS, "frames": [[CAR]]})),
     "cuboids.json: frames: wanted 2, as many as the camera has, got 1"),
    (lambda f: (f / "annotations" / "cuboids.json").write_text(json.dumps(
        {"fields": FIELDS, "frames": [[[*CAR[:6], -1.9, *CAR[7:]]]] * 2})), r"frames\[0\]\[0\].width: wanted"),
    (lambda f: (f / "camera/front_camera/poses.json").write_text("[]"), "poses: wanted a list"),
    (lambda f: (f / "camera/front_camera/poses.json").write_text('[{"position": {"x": 0, "y": 0, "z": 0}}]'),
     r"poses\[0\].heading: wanted an object, got nothing"),
    (lambda f: (f / "camera/front_camera/poses.json").write_text(json.dumps(
        [{"position": dict.fromkeys("xyz", 0.0), "heading": dict.fromkeys("wxyz", 0.0)}] * 2)),
     r"poses\[0\].heading: wanted a rotation, got \[0.0, 0.0, 0.0, 0.0\]"),
    (lambda f: (f / "camera/front_camera/intrinsics.json").write_text('{"fx": 1000}'), "fy: wanted"),
    (lambda f: [Image.new("RGB", (100, 100)).save(p) for p in (f / "camera/front_camera").glob("*.jpg")],
     "wanted images of 1920x1080 or as much smaller on both sides, got 100x100")])
def test_a_sequence_of_another_kind_is_one_line(tmp_path, capsys, change, said):
    change(sequence(tmp_path / "002"))
    assert main([str(tmp_path / "002"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pandaset: ") and error.count("\n") == 1, error
    with pytest.raises(ValueError, match=said):
        raise ValueError(error)


@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_the_real_sequence_has_its_boxes_on_the_cars(tmp_path):
    """Every corner again, by PandaSet's own formula: K Rᵀ (x - t). The white car ahead is where the picture has it."""
    camera = tmp_path / "002" / "camera" / "front_camera"
    camera.mkdir(parents=True)
    shutil.copyfile(REAL / "front_camera.mp4", camera / "video.mp4")
    for name in ("intrinsics", "poses"):
        shutil.copyfile(REAL / "camera_json" / f"front_{name}.json", camera / f"{name}.json")
    (tmp_path / "002" / "annotations").mkdir()
    shutil.copyfile(REAL / "cuboids.json", tmp_path / "002" / "annotations" / "cuboids.json")
    frames, objects = write_scene(tmp_path / "002", tmp_path / "out", "front_camera")
    tracks = read_tracks(tmp_path / "out" / "tracks.json", frames)
    assert frames == 80 and objects == len(tracks) > 50
    t = 40
    k = json.loads((camera / "intrinsics.json").read_text())
    pose = json.loads((camera / "poses.json").read_text())[t]
    w, x, y, z = (pose["heading"][name] for name in "wxyz")
    axis = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]).double()
    R = torch.eye(3) + 2 * w * axis + 2 * axis @ axis                         # Rodrigues, of a unit quaternion
    content = json.loads((REAL / "cuboids.json").read_text())
    compared = 0
    for row in content["frames"][t]:
        cuboid = dict(zip(content["fields"], row))
        if cuboid["sensor_id"] == 1 or not tracks[cuboid["object"]].visible[t]:
            continue
        seen = []
        for a, b, c in product((-0.5, 0.5), repeat=3):
            right, ahead = a * cuboid["width"], b * cuboid["length"]
            cos, sin = math.cos(cuboid["yaw"]), math.sin(cuboid["yaw"])
            p = torch.tensor([cuboid["x"] + right * cos - ahead * sin, cuboid["y"] + right * sin + ahead * cos,
                              cuboid["z"] + c * cuboid["height"]]).double()
            p = R.T @ (p - torch.tensor([pose["position"][name] for name in "xyz"]))
            seen.append([(k["fx"] * p[0] / p[2] + k["cx"]) / 3, (k["fy"] * p[1] / p[2] + k["cy"]) / 3])
        seen = torch.tensor(seen)
        difference = (tracks[cuboid["object"]].box[t] - torch.cat([seen.amin(0), seen.amax(0)])).abs().max()
        assert difference < 1e-2, f"{cuboid['label']} {cuboid['object']}: {difference:.1e} pixels"
        compared += 1
    assert compared > 20
    boxes = [track.box[t] for track in tracks.values() if track.visible[t]]
    ahead = torch.tensor([275.0, 172, 351, 240])                              # read off the picture, by eye
    nearest = min(float((box - ahead).abs().max()) for box in boxes)
    assert nearest < 5, f"no box is within 5 pixels of the white car ahead, the nearest is {nearest:.1f} off"
