"""world_scene.py: every value of a world model's scene at the door, and the ways through it."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_min.data.pixels import from_bytes, to_uint8
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.data.world_scene import Toy, read_depth, read_world_scene, way_through, write_toy

TOY = Toy(3, 5, 32, 48, "loop")


@pytest.fixture
def folder(tmp_path):
    write_toy(tmp_path, TOY)
    return tmp_path


def change(folder, frame=None, **top):
    """Fields of transforms.json, at its top, and of its first frame; None removes one."""
    path = folder / "transforms.json"
    content = json.loads(path.read_text()) | top
    content["frames"][0] |= frame or {}
    content["frames"][0] = {key: value for key, value in content["frames"][0].items() if value is not None}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_made_up_scene_is_read_as_it_was_written(folder):
    clip = make_clip(3, WorldConfig(5, 32, 48, path="loop", static=True))
    scene = read_world_scene(folder)
    assert len(scene.cameras) == len(scene.known) == 5 and scene.toy == TOY and scene.off.depth < 0.03
    for t, known in enumerate(scene.known):
        assert torch.equal(known.frame, from_bytes(torch.from_numpy(to_uint8(clip.x_gt[:, t])).permute(2, 0, 1)))
        wanted = torch.where(clip.depth[0, t].isfinite(), clip.depth[0, t], 0)
        assert torch.equal(known.depth, wanted) and known.dynamic is None
        assert torch.allclose(scene.cameras[t].camera_to_world, clip.c2w[t], atol=1e-5)
        assert torch.equal(scene.cameras[t].K, clip.K) and known.camera is scene.cameras[t]


def test_frames_without_a_name_stand_as_in_the_file_and_named_ones_go_by_number(folder):
    content = json.loads((folder / "transforms.json").read_text())
    del content["frames"][1]["file_path"], content["frames"][1]["depth_file_path"]
    content["frames"][3]["file_path"] = ""
    content["frames"][3]["depth_file_path"] = ""
    (folder / "transforms.json").write_text(json.dumps(content))
    scene = read_world_scene(folder)
    assert len(scene.cameras) == 5 and len(scene.known) == 3 and scene.known[1].camera is scene.cameras[2]
    for k, frame in enumerate(content["frames"]):
        frame |= {"file_path": f"images/{9 + k}", "depth_file_path": "" if k else "depth/000000.npy"}
    content["frames"].reverse()
    (folder / "images" / "000000.png").rename(folder / "images" / "9.png")
    (folder / "transforms.json").write_text(json.dumps(content))
    again = read_world_scene(folder)
    assert len(again.known) == 1 and again.off is None, "one frame alone cannot be checked"
    assert torch.equal(again.cameras[0].K, scene.cameras[0].K) and again.known[0].camera is again.cameras[0]


def test_depth_comes_as_millimetres_or_metres_and_the_unknown_is_0(tmp_path):
    depth = np.array([[1.5, 0.0, np.inf], [np.nan, -2.0, 65.0]], np.float32)
    wanted = torch.tensor([[1.5, 0, 0], [0, 0, 65]])
    np.save(tmp_path / "a.npy", depth)
    np.save(tmp_path / "b.npy", depth[None, :, :, None].astype(np.float64))
    np.savez(tmp_path / "c.npz", depth=depth, conf=np.ones(2))
    np.savez(tmp_path / "d.npz", anything=depth)
    np.save(tmp_path / "f.npy", depth.astype(">f4"))
    Image.fromarray(np.array([[1500, 0, 0], [0, 0, 65000]], np.uint16)).save(tmp_path / "e.png")
    for name in ("a.npy", "b.npy", "c.npz", "d.npz", "e.png", "f.npy"):
        got = read_depth(tmp_path / name)
        assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=1e-6), name


class Trap:
    """What runs if it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", np.array([Trap()], dtype=object), "a.npy: .*allow_pickle"),
    ("a.npy", np.ones((2, 3, 4), np.float32), r"a.npy: wanted depth \[H, W\] of floating-point.*\[2, 3, 4\]"),
    ("a.npy", np.ones((2, 3), np.int32), r"a.npy: wanted depth \[H, W\] of floating-point numbers, got int32"),
    ("a.npy", np.zeros((2, 3), np.float32), "a.npy: wanted depth, got no value above 0 that is finite"),
    ("a.png", np.ones((2, 3), np.uint8), "a.png: wanted 16 bits a pixel, depth in mm, got a picture of mode L"),
    ("a.exr", b"", "a.exr: wanted a 16-bit PNG in mm, or .npy or .npz in metres"),
    ("a.npy", b"text", "a.npy: "), ("a.npz", b"PK no zip", "a.npz: "), ("a.png", b"", "a.png: ")])
def test_a_depth_file_of_another_kind_is_refused_in_one_line(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif name.endswith(".png"):
        Image.fromarray(content).save(tmp_path / name)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as error:
        read_depth(tmp_path / name)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="gone.npy: no such file"):
        read_depth(tmp_path / "gone.npy")


@pytest.mark.parametrize("header", [False, True])
def test_a_depth_picture_that_is_broken_or_too_large_is_one_line(tmp_path, header):
    """Pillow raises a SyntaxError within the pixels, and an error of its own for a picture beyond all memory."""
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(1, 2**16, (200, 300)).astype(np.uint16)).save(file)
    data = bytearray(file.read_bytes())
    if header:
        data[16:24] = 2 * (100_000).to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        second = data.index(b"IDAT", data.index(b"IDAT") + 4)
        data[second : second + 4] = b"\0\1\2\3"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="a.png: ") as error:
        read_depth(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_every_broken_array_file_is_a_valueerror_of_one_line(tmp_path, name):
    """Cut off in many places, and with each of its first bytes changed: numpy raises a dozen kinds of error."""
    depth = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    (np.save if name == "a.npy" else np.savez)(tmp_path / name, depth)
    whole = (tmp_path / name).read_bytes()
    changed = [whole[:at] for at in range(0, len(whole), 3)]
    changed += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(min(200, len(whole)))]
    for content in changed:
        (tmp_path / name).write_bytes(content)
        try:
            read_depth(tmp_path / name)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)


def test_black_in_a_mask_is_left_out(folder):
    mask = np.full((32, 48), 255, np.uint8)
    mask[:8, :16] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    change(folder, frame={"mask_path": "mask.png"})
    known = read_world_scene(folder).known
    assert torch.equal(known[0].dynamic, torch.from_numpy(mask == 0)) and known[1].dynamic is None


@pytest.mark.parametrize("frame, message", [
    ({"depth_file_path": None}, r"frames\[0\].depth_file_path: wanted the depth of the first frame"),
    ({"file_path": "images/gone.png"}, "images/gone.png"),
    ({"depth_file_path": "gone.npy"}, "gone.npy: no such file"),
    ({"mask_path": "gone.png"}, "gone.png: no such file"),
    ({"mask_path": "small.png"}, "small.png: wanted the first frame's 48x32, got 6x4"),
    ({"depth_file_path": "small.npy"}, "small.npy: wanted the first frame's 48x32, got 6x4"),
    ({"depth_file_path": 7}, r"frames\[0\].depth_file_path: wanted text, got 7"),
    ({"w": 50}, r"frames\[0\]: w, h: wanted the video's 48x32, got 50x32")])
def test_what_is_missing_or_of_another_size_is_named(folder, frame, message):
    np.save(folder / "small.npy", np.ones((4, 6), np.float32))
    Image.new("L", (6, 4), 255).save(folder / "small.png")
    if "file_path" in frame:
        (folder / "images" / "000000.png").unlink()
    change(folder, frame=frame)
    with pytest.raises(ValueError, match=message):
        read_world_scene(folder)


def test_a_place_that_holds_no_scene_and_a_toy_that_is_none_are_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="wanted a folder with transforms.json or geometry.npz"):
        read_world_scene(empty)
    with pytest.raises(ValueError, match="gone: no such folder"):
        read_world_scene(empty / "gone")
    change(folder, toy_world={"seed": 3})
    with pytest.raises(ValueError, match="transforms.json: toy_world.frames: wanted an integer"):
        read_world_scene(folder)


# ---- geometry.npz ----------------------------------------------------------------------------------------------------

def geometry(clip, **changes) -> dict:
    K = clip.K.clone()
    K[:2, 2] -= 0.5                                                    # centres at integers
    given = dict(depths=clip.depth[0].numpy(), intrinsics=K.expand(5, 3, 3).numpy(), poses_c2w=clip.c2w.numpy(),
                 frames=np.stack([to_uint8(clip.x_gt[:, t]) for t in range(5)]), original_size=np.array([32, 48]))
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_the_releases_file_gives_the_same_scene(folder, tmp_path_factory):
    clip, elsewhere = make_clip(3, TOY.config()), tmp_path_factory.mktemp("npz")
    masks = np.ones((5, 32, 48), np.uint8)
    masks[0, :4] = 0
    np.savez(elsewhere / "geometry.npz", **geometry(clip, masks=masks))
    wanted, scene = read_world_scene(folder), read_world_scene(elsewhere)
    assert len(scene.known) == 5 and scene.toy is None and scene.off.depth < 0.03
    for a, b in zip(wanted.known, scene.known):
        assert torch.equal(a.frame, b.frame) and torch.equal(a.depth, b.depth)
        assert torch.allclose(a.camera.K, b.camera.K.float()) and b.camera.width == 48
        assert torch.allclose(a.camera.world_to_camera, b.camera.world_to_camera.float(), atol=1e-4)
    assert torch.equal(scene.known[0].dynamic, torch.from_numpy(masks[0] == 0)) and not scene.known[1].dynamic.any()
    np.savez(elsewhere / "geometry.npz", **geometry(clip, frames=None))
    with pytest.raises(ValueError, match="geometry.npz: wanted frames, uint8 .*, or first_frame.png or clip.mp4"):
        read_world_scene(elsewhere)
    Image.fromarray(to_uint8(clip.x_gt[:, 0])).save(elsewhere / "first_frame.png")
    alone = read_world_scene(elsewhere / "geometry.npz")
    assert len(alone.known) == 1 and len(alone.cameras) == 5
    assert torch.equal(alone.known[0].frame, wanted.known[0].frame)


@pytest.mark.parametrize("changes, message", [
    (dict(intrinsics=None), "geometry.npz: wanted intrinsics too, got depths"),
    (dict(poses_c2w=np.ones((4, 4, 4))), r"poses_c2w: wanted numbers \[5, 4, 4\], got float64 \[4, 4, 4\]"),
    (dict(depths=np.ones((5, 4))), "depths: wanted numbers"),
    (dict(poses_c2w=np.ones((5, 4, 4))), r"poses_c2w\[0\]: wanted a rotation and a translation"),
    (dict(intrinsics=np.full((5, 3, 3), np.nan)), "intrinsics: wanted finite numbers"),
    (dict(intrinsics=np.zeros((5, 3, 3))), "intrinsics: wanted finite numbers, focal lengths above 0"),
    (dict(intrinsics=np.eye(3)[None].repeat(5, 0) + 1), "intrinsics: .* 0 0 1 in the last row"),
    (dict(depths=np.zeros((5, 32, 48))), r"depths\[0\]: wanted depth, got no value above 0"),
    (dict(extra=np.array([Trap()], dtype=object)), "geometry.npz: .*allow_pickle")])
def test_a_releases_file_that_does_not_fit_is_refused_by_its_field(tmp_path, changes, message):
    np.savez(tmp_path / "geometry.npz", **geometry(make_clip(3, TOY.config()), **changes))
    with pytest.raises(ValueError, match=message):
        read_world_scene(tmp_path)


# ---- ways ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["drive", "out_and_back", "loop"])
def test_ways_begin_at_the_first_camera_and_the_closed_ones_end_there(folder, name):
    scene = read_world_scene(folder)
    for given in (scene, replace(scene, toy=None)):
        cameras = way_through(given, name, 9)
        poses = torch.stack([camera.camera_to_world for camera in cameras])
        assert len(cameras) == 9 and torch.allclose(poses[0], scene.cameras[0].camera_to_world, atol=1e-4)
        assert torch.allclose(poses[0], poses[-1], atol=1e-4) == (name != "drive")
        gone = poses[4, :3, 3] - poses[0, :3, 3]
        assert gone @ poses[0, :3, 2] > 0.3, "ahead"
        if given.toy is None:
            depth = scene.known[0].depth
            far = 0.3 * float(depth[depth > 0].median())
            assert float(gone @ poses[0, :3, 2]) == pytest.approx(far if name != "drive" else far / 2, rel=1e-3)
    start = scene.cameras[0].camera_to_world
    for given in (scene, replace(scene, toy=None)):
        if given.toy and name == "drive":
            with pytest.raises(ValueError, match="a drive through a made-up scene has a speed: wanted way=0, got 0.25"):
                way_through(given, name, 9, way=0.25)
            continue
        far = way_through(given, name, 9, way=0.25)[8 if name == "drive" else 4].camera_to_world
        gone = far[:3, 3] - start[:3, 3]
        assert float(gone.norm() if given.toy else gone @ start[:3, 2]) == pytest.approx(0.25, rel=1e-3)
