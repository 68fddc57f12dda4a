"""scene.py: what is no pinhole is refused by name, every picture gets its own camera, and every value has its kind."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from mirage_min.data.scene import read_tracks
from mirage_min.data.scene_cameras import read_cameras

POSE = torch.eye(4).tolist()
CASES = Path(__file__).parents[2] / "shared" / "cases"


def cameras(folder: Path, pictures=(), **fields):
    """read_cameras of a file with two frames, 40 x 30; a field called frame goes to the first frame alone."""
    own = fields.pop("frame", {})
    content = {"fl_x": 50.0, "frames": [{"file_path": "b", "transform_matrix": POSE} | own,
                                        {"file_path": "a", "transform_matrix": POSE}]} | fields
    path = folder / "transforms.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return read_cameras(path, 40, 30, list(pictures))


def tracks(folder: Path, item=None, sight=None):
    """read_tracks of one object, seen in frame 2 of 4."""
    entry = {"frame": 2, "pose": POSE, "size": [4, 2, 1], "box": [0, 0, 9, 9]} | (sight or {})
    path = folder / "tracks.json"
    path.write_text(json.dumps({"objects": [{"id": 7, "frames": [entry]} | (item or {})]}))
    return read_tracks(path, 4)


# ---- cameras ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("camera_model", "EQUIRECTANGULAR"), ("camera_model", "OPENCV_FISHEYE"), ("camera_model", "ORTHOPHOTO"),
    ("camera_model", "FISHEYE624"), ("camera_model", 7), ("is_fisheye", True), ("is_fisheye", 1),
    ("equirectangular", True), ("latlong", True), ("orthographic", True), ("ftheta_p0", 0.1),
    ("fisheye_crop_radius", 500), *((f"k{i}", -0.3) for i in range(1, 7)), *((f"p{i}", 0.1) for i in range(1, 5)),
    ("b1", 0.2), ("b2", 0.2), ("distortion_params", [0, 0.1]), ("rolling_shutter", [0, 0, 0.03, 0])])
@pytest.mark.parametrize("where", ["file", "frame"])
def test_a_camera_that_is_no_pinhole_is_refused_by_name(tmp_path, name, value, where):
    with pytest.raises(ValueError, match=rf"transforms.json: frames\[0\].{name}: wanted"):
        cameras(tmp_path, **({name: value} if where == "file" else {"frame": {name: value}}))


def test_a_real_panorama_is_refused_by_name():
    real = CASES / "31_camera_model_ignored" / "real_LichtFeld_Export01_transforms_3_frames.json"
    if not real.exists():
        pytest.skip(f"needs {real}")
    with pytest.raises(ValueError, match=r"frames\[0\].camera_model: wanted one of .*, got 'EQUIRECTANGULAR'"):
        read_cameras(real, 5888, 2944)


@pytest.mark.parametrize("fields", [
    {"camera_model": "OPENCV", "k1": 0, "k2": 0.0, "p1": -0.0}, {"is_fisheye": False}, {"distortion_params": [0.0] * 6},
    {"rolling_shutter": [0, 0, 0, 0]}, {"camera_model": "SIMPLE_PINHOLE"}, {"aabb_scale": 16, "applied_transform": 3},
    {"w": 40.0, "h": 30, "fl_y": 50}])
def test_what_says_pinhole_or_nothing_is_one(tmp_path, fields):
    for camera in cameras(tmp_path, **fields):
        assert camera.K.tolist() == [[50, 0, 20], [0, 50, 15], [0, 0, 1]]


def test_angles_are_those_of_their_own_sides(tmp_path):
    (first, second) = cameras(tmp_path, fl_x="absent", camera_angle_x=1.2, frame={"camera_angle_y": 0.8})
    fx, fy = 20 / math.tan(0.6), 15 / math.tan(0.4)
    assert [first.K[0, 0], first.K[1, 1], second.K[1, 1]] == pytest.approx([fx, fx, fy])


@pytest.mark.parametrize("fields, wanted", [
    ({"fl_x": "absent"}, "no intrinsics: neither"), ({"fl_x": "absent", "camera_angle_x": 0}, "camera_angle_x: wanted"),
    ({"fl_x": "absent", "camera_angle_x": False}, "camera_angle_x: wanted"),
    ({"fl_x": "absent", "camera_angle_x": 4}, "camera_angle_x: wanted"), ({"fl_x": 0}, "fl_x: wanted"),
    ({"fl_x": -50}, "fl_x: wanted"), ({"fl_x": 1e300}, "fl_x: wanted"), ({"cx": 1e39}, "cx: wanted"),
    ({"fl_x": "50"}, "fl_x: wanted"), ({"cx": math.nan}, "cx: wanted"), ({"w": 41}, "w, h: wanted the video's 40x30"),
    ({"w": [40]}, "w: wanted"), ({"k1": "0"}, "k1: wanted"), ({"distortion_params": {}}, "distortion_params: wanted"),
    ({"frame": {"file_path": 7}}, "file_path: wanted text"), ({"frame": {"transform_matrix": [[1]]}}, "4x4 finite"),
    ({"frame": {"transform_matrix": None}}, "4x4 finite"), ({"frames": []}, "frames: wanted a list of objects"),
    ({"frame": {"transform_matrix": [[1e200] * 4] * 4}}, "4x4 finite numbers"),
    ({"frame": {"transform_matrix": [[1e30] * 4] * 4}}, "wanted a rotation"),
    ({"frames": [7]}, r"frames\[0\]: wanted"), ({"frames": {}}, "frames: wanted a list of objects")])
def test_a_value_of_another_kind_is_refused_with_its_field(tmp_path, fields, wanted):
    with pytest.raises(ValueError, match=f"transforms.json: .*{wanted}"):
        cameras(tmp_path, **fields)


@pytest.mark.parametrize("names, files, wanted", [
    (("images/r_10", "images/r_9"), ("r_9.png", "r_10.png"), [1, 0]),       # without an ending
    (("a.png", "a-1.png"), ("a-1.png", "a.png"), [1, 0]), (("a", "a-1"), ("a-1.png", "a.png"), [1, 0]),
    (("x\\frame.2.jpg", "frame.1.jpg"), ("frame.1.jpg", "frame.2.jpg"), [1, 0]),
    (("0001.jpg", "0002.jpg"), ("0001.png", "0002.png"), [0, 1])])          # converted since
def test_a_camera_is_that_of_the_picture_of_its_name(tmp_path, names, files, wanted):
    frames = [{"file_path": name, "transform_matrix": POSE, "cx": float(i)} for i, name in enumerate(names)]
    found = cameras(tmp_path, [tmp_path / name for name in files], frames=frames)
    assert [camera.K[0, 2].item() for camera in found] == wanted


@pytest.mark.parametrize("names, said", [(("a.png", "c.png"), "there is no such picture"), (("a.png", "a"), "another")])
def test_a_camera_whose_picture_is_not_there_is_refused(tmp_path, names, said):
    frames = [{"file_path": name, "transform_matrix": POSE} for name in names]
    with pytest.raises(ValueError, match=rf"frames\[1\].file_path: .*{said}.*{names[1]}"):
        cameras(tmp_path, [tmp_path / "a.png", tmp_path / "b.png"], frames=frames)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    cameras(tmp_path)
    path = tmp_path / "transforms.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_cameras(path, 40, 30)) == 2


# ---- tracks ----------------------------------------------------------------------------------------------------------

def test_a_track_is_what_its_file_says(tmp_path):
    track = tracks(tmp_path, {"category": 3}, {"visible": False})[7]
    assert (track.id, track.category, track.reference, track.visible.tolist()) == (7, "3", 2, [False] * 4)
    assert track.size[2].tolist() == [4, 2, 1] and track.box[2].tolist() == [0, 0, 9, 9] and track.pose[0].isnan().all()


@pytest.mark.parametrize("item, sight, wanted", [
    ({"id": 1.5}, {}, r"objects\[0\].id: wanted an integer, got 1.5"), ({"id": False}, {}, "id: wanted an integer"),
    ({"id": 10**30}, {}, "id: wanted an integer"), ({"id": None}, {}, "id: wanted an integer"),
    ({"frames": []}, {}, "frames: wanted a list"), ({"frames": 7}, {}, "frames: wanted a list"),
    ({"reference": 3}, {}, "reference: wanted a frame of this track, got 3"), ({"reference": "2"}, {}, "reference"),
    ({}, {"frame": 4}, r"frames\[0\].frame: wanted each of 0 to 3 at most once, got 4"), ({}, {"frame": -1}, "got -1"),
    ({}, {"frame": 2.0}, "frame: wanted an integer, got 2.0"), ({}, {"size": [4, 2]}, "size: wanted 3 finite numbers"),
    ({}, {"size": [4, 0, 1]}, "size: wanted a length, width and height above 0"), ({}, {"visible": 1}, "visible: w"),
    ({}, {"box": [9, 0, 0, 9]}, "box: wanted x0, y0, x1, y1 with x0 <= x1"), ({}, {"box": 7}, "box: wanted 4 finite"),
    ({}, {"box": [0, 0, 1e39, 9]}, "box: wanted 4 finite"), ({}, {"pose": [[0] * 4] * 4}, "pose: wanted a rotation")])
def test_a_track_of_another_kind_is_refused_with_its_field(tmp_path, item, sight, wanted):
    with pytest.raises(ValueError, match=f"tracks.json: .*{wanted}") as error:
        tracks(tmp_path, item, sight)
    assert re.match(r".*objects\[0\]\.", str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"objects": []}, {"objects": 7}, {"objects": [7]}, {"objects": {}}])
def test_without_objects_there_is_no_actor(tmp_path, content):
    (tmp_path / "tracks.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tracks.json: objects(\[0\])?: wanted"):
        read_tracks(tmp_path / "tracks.json", 4)
