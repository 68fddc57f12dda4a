"""Undistorting: the lens against OpenCV's, and a folder whose pictures and boxes land where a pinhole has them."""

import json
import math

import numpy as np
import pytest
import torch

from mirage_min.data.scene import read_tracks
from mirage_min.data.scene_cameras import read_cameras
from mirage_min.data.undistort import Lens, distort, main, straight_frame, straighten, undistort, undistort_scene
from mirage_min.data.video import read_clip, write_clip

W, H, F = 72, 48, 60.0
POSE = torch.eye(4).tolist()
LENSES = [Lens(k1=-0.2, k2=0.05), Lens(k1=0.15), Lens(k1=-0.1, k2=0.02, k3=-0.01, p1=0.01, p2=-0.02)]
K = torch.tensor([[F, 0, 0.48 * W], [0, 1.1 * F, 0.53 * H], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("lens", LENSES)
def test_the_lens_is_opencvs(lens):
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).double() - 0.5
    space = torch.cat([points, torch.ones(50, 1)], dim=1).numpy()
    coefficients = np.array([lens.k1, lens.k2, lens.p1, lens.p2, lens.k3])
    theirs, _ = cv2.projectPoints(space, (0.0, 0, 0), (0.0, 0, 0), torch.eye(3).double().numpy(), coefficients)
    ours = distort(lens, points)
    difference = (ours - torch.from_numpy(theirs[:, 0])).abs().max()
    assert difference < 1e-9, f"largest difference to projectPoints {difference:.1e}, allowed 1e-9"
    assert (undistort(lens, ours) - points).abs().max() < 1e-6
    if lens != Lens():
        assert (ours - points).abs().max() > 0.01


def test_a_lens_that_folds_the_image_is_refused():
    with pytest.raises(ValueError, match=r"wanted a lens that can be inverted inside the image, got Lens\(k1=-3"):
        undistort(Lens(k1=-3.0), torch.tensor([[0.9, 0.9]]))
    with pytest.raises(ValueError, match="a pinhole of 4 times its focal length can replace"):
        straighten(Lens(p1=9.0), K, W, H)


def test_where_the_lens_folds_the_straight_image_ends_before():
    """r (1 - r²) is largest at r = 1 / √3, and what lies beyond would be seen again inside."""
    straight = straighten(Lens(k1=-1.0), K, W, H)
    corner = ((torch.tensor([W, 0.0]) - K[:2, 2]) / (straight.zoom * K.diagonal()[:2])).norm()
    assert 0.57 < corner < 3**-0.5, f"the farthest corner is at {corner:.3f}"


@pytest.mark.parametrize("lens", LENSES)
def test_the_straight_image_shows_all_that_it_can_and_nothing_that_was_not_filmed(lens):
    straight = straighten(lens, K, W, H)
    grid = torch.cartesian_prod(torch.linspace(0, W, 40), torch.linspace(0, H, 40)).double()
    filmed = straight.to_filmed(grid)
    room = torch.stack([filmed.amin(), W - filmed[:, 0].amax(), H - filmed[:, 1].amax()])
    assert room.min() > -1e-6, f"{-room.min():.2g} pixels outside of what was filmed"
    assert room.min() < 0.02, "a shorter focal length would do"
    assert (straight.to_straight(filmed) - grid).abs().max() < 1e-3


def pattern(u, v):
    """A smooth picture of the whole plane, at positions in pixels of a pinhole at K."""
    return torch.stack([torch.sin(u / 9), torch.cos(v / 7), torch.sin((u + v) / 11)]) * 0.8


def filmed(lens):
    """The pattern as the lens shows it, pixel by pixel: where each pixel looks is found by OpenCV."""
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    pixels = torch.stack([u, v], dim=-1).double().view(-1, 1, 2).numpy()
    coefficients = np.array([lens.k1, lens.k2, lens.p1, lens.p2, lens.k3])
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-10)
    seen = cv2.undistortPoints(pixels, K.numpy(), coefficients, P=K.numpy(), criteria=criteria)
    u, v = torch.from_numpy(seen).view(H, W, 2).unbind(-1)
    return pattern(u, v).float()


@pytest.mark.parametrize("lens", LENSES)
def test_a_filmed_frame_becomes_what_the_pinhole_would_have_filmed(lens):
    straight = straighten(lens, K, W, H)
    found = straight_frame(filmed(lens), straight)
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    # the same ray in the pinhole at K
    wanted = pattern(*((torch.stack([u, v]) - K[:2, 2, None, None]) / straight.zoom + K[:2, 2, None, None]))
    difference = (found - wanted)[:, 1:-1, 1:-1].abs().max()
    assert difference < 0.02, f"largest difference {difference:.3f}, allowed .02 for bilinear resampling"
    assert (filmed(lens) - wanted).abs().max() > 0.1, "the lens must have moved something"


# ---- a folder --------------------------------------------------------------------------------------------------------

def write_filmed(folder, lens, **more):
    """A scene of two frames: the pattern, and an object whose box is around a rectangle of the pinhole's image."""
    write_clip(folder / "images", torch.stack([filmed(lens)] * 2, dim=1))
    rectangle = torch.tensor([[u, v] for u in torch.linspace(25, 45, 60) for v in torch.linspace(15, 30, 60)]).double()
    seen = distort(lens, (rectangle - K[:2, 2]) / K.diagonal()[:2]) * K.diagonal()[:2] + K[:2, 2]
    box = [*seen.amin(0).tolist(), *seen.amax(0).tolist()]
    frames = [{"file_path": f"images/{t:06d}.png", "transform_matrix": POSE} | vars(lens) for t in (1, 0)]
    about = {"camera_model": "OPENCV", "fl_x": F, "fl_y": 1.1 * F, "cx": 0.48 * W, "cy": 0.53 * H, "w": W, "h": H,
             "applied_scale": 2.0, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(about | more))
    sight = {"frame": 1, "pose": POSE, "size": [4, 2, 1], "box": box}
    (folder / "tracks.json").write_text(json.dumps({"objects": [{"id": 7, "frames": [sight]}]}))
    (folder / "scene.ply").write_bytes(b"Gaussians")


def test_a_folder_is_straightened_whole(tmp_path, capsys):
    lens, scene, out = LENSES[0], tmp_path / "filmed", tmp_path / "street"
    scene.mkdir()
    write_filmed(scene, lens)
    assert main([str(scene), str(out)]) == 0
    zoom = straighten(lens, K, W, H).zoom
    assert f"2 frames, the focal length {zoom:.4f} times" in capsys.readouterr().out
    cameras = read_cameras(out / "transforms.json", W, H)
    assert [camera.K[0, 0].item() for camera in cameras] == pytest.approx([zoom * F] * 2)
    assert [camera.K[1, 2].item() for camera in cameras] == pytest.approx([0.53 * H] * 2)
    assert json.loads((out / "transforms.json").read_text())["applied_scale"] == 2
    assert (out / "scene.ply").read_bytes() == b"Gaussians"
    x = read_clip(out / "images")
    wanted = straight_frame(filmed(lens), straighten(lens, K, W, H))
    assert x.shape == (3, 2, H, W) and (x[:, 0] - wanted).abs().max() < 0.01
    # the rectangle's corners, through the pinhole at zoom f. The box around a bent side is a little larger
    wanted = torch.cat([(torch.tensor(corner) - K[:2, 2]) * zoom + K[:2, 2] for corner in ([25, 15], [45, 30])])
    box = read_tracks(out / "tracks.json", 2)[7].box[1]
    assert (box - wanted).abs().max() < 0.6, f"{box.tolist()}, wanted {wanted.tolist()}"


@pytest.mark.parametrize("more, said", [
    ({"k4": 0.1}, r"frames\[0\].k4: wanted images without"), ({"camera_model": "OPENCV_FISHEYE"}, "model: wanted"),
    ({"is_fisheye": True}, "is_fisheye: wanted a pinhole"), ({"w": 10}, "w, h: wanted the video's"),
    ({"frames": [{"file_path": "images/000000.png", "transform_matrix": POSE, "k1": "x"}]}, "k1: wanted one finite")])
def test_what_cannot_be_straightened_is_refused_by_name(tmp_path, capsys, more, said):
    (tmp_path / "filmed").mkdir()
    write_filmed(tmp_path / "filmed", LENSES[0], **more)
    assert main([str(tmp_path / "filmed"), str(tmp_path / "street")]) == 2
    error = capsys.readouterr().err
    with pytest.raises(ValueError, match=said):
        raise ValueError(error)
    assert error.startswith("undistort: ") and error.count("\n") == 1


@pytest.mark.parametrize("frames, said", [(1, "got 1"), (3, "got more")])
def test_a_video_has_as_many_frames_as_there_are_cameras(tmp_path, frames, said):
    (tmp_path / "filmed").mkdir()
    write_filmed(tmp_path / "filmed", LENSES[0])
    write_clip(tmp_path / "filmed" / "video.mp4", torch.zeros(3, frames, H, W))
    with pytest.raises(ValueError, match=f"video.mp4: wanted a frame for each of the 2 cameras of .*, {said}"):
        undistort_scene(tmp_path / "filmed", tmp_path / "street")
    assert not (tmp_path / "street" / "transforms.json").exists()


def test_a_scene_is_not_straightened_in_its_own_place(tmp_path):
    write_filmed(tmp_path, LENSES[0])
    with pytest.raises(ValueError, match="wanted another folder than the scene's own"):
        undistort_scene(tmp_path, tmp_path)


def test_without_a_lens_nothing_moves():
    straight = straighten(Lens(), K, W, H)
    assert math.isclose(straight.zoom, 1, abs_tol=1e-9)
    frame = torch.rand(3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (straight_frame(frame, straight) - frame).abs().max() < 1e-4
