"""What reconstructions come with: INRIA's cameras.json, and nerfstudio's world next to the world of its cameras."""

import json

import pytest
import torch

from mirage_min.data import scene, toy_scene, toy_world
from mirage_min.data.scene_cameras import scene_cameras, to_the_cameras_world
from mirage_min.data.splat import load_ply, quaternions, rotations, save_ply

T, H, W = 3, 48, 72
COLMAP_TO_JSON = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]).double()  # what ns-process-data applies


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy scene as a folder."""
    folder = tmp_path_factory.mktemp("toy") / "scene"
    toy_scene.write_scene(folder, 0, toy_world.WorldConfig(T, H, W))
    return folder


@pytest.fixture
def folder(toy, tmp_path):
    """The same, to be changed; its pictures are those of the first."""
    for file in toy.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def replaced(path, content):
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content))


# ---- INRIA's cameras.json --------------------------------------------------------------------------------------------

def as_inria(folder):
    """cameras.json for transforms.json, camera by camera: the columns of a pose with OpenCV's axes, y and z turned."""
    about = json.loads((folder / "transforms.json").read_text())
    shots = []
    for i, frame in enumerate(about["frames"]):
        M = frame["transform_matrix"]
        shots.append({"id": i, "img_name": f"{i:06d}", "width": W, "height": H, "fx": about["fl_x"],
                      "fy": about["fl_y"], "position": [M[r][3] for r in range(3)],
                      "rotation": [[M[r][0], -M[r][1], -M[r][2]] for r in range(3)]})
    return shots[::-1]  # in another order than the pictures


def test_inrias_cameras_are_those_of_transforms_json(folder):
    wanted = scene.read_scene(folder).cameras
    shots = as_inria(folder)
    (folder / "transforms.json").unlink()
    replaced(folder / "cameras.json", shots)
    found = scene.read_scene(folder).cameras
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a.K, b.K) and torch.allclose(a.world_to_camera, b.world_to_camera, atol=1e-5)
        assert (a.width, a.height) == (b.width, b.height)


@pytest.mark.parametrize("change, said", [
    ({"width": 36}, "width, height: wanted the video's 72x48, got 36x48"), ({"fx": 0}, r"cameras\[0\].fx: wanted"),
    ({"rotation": [[1, 0, 0]] * 3}, r"cameras\[0\].rotation: wanted a rotation"),
    ({"rotation": [1, 0, 0]}, "rotation: wanted 3x3 finite numbers"), ({"position": None}, "position: wanted 3 finite"),
    ({"img_name": "nowhere"}, "there is no such picture")])
def test_a_camera_of_inrias_that_is_none_is_refused_with_its_field(folder, change, said):
    shots = as_inria(folder)
    replaced(folder / "cameras.json", [shots[0] | change, *shots[1:]])
    (folder / "transforms.json").unlink()
    with pytest.raises(ValueError, match=f"cameras.json: .*{said}"):
        scene.read_scene(folder)


@pytest.mark.parametrize("content, said", [({}, "cameras: wanted a list"), ([], "cameras: wanted a list"),
                                           ([7], r"cameras\[0\]: wanted an object")])
def test_a_list_of_no_cameras_is_refused(tmp_path, content, said):
    replaced(tmp_path / "cameras.json", content)
    with pytest.raises(ValueError, match=f"cameras.json: {said}"):
        scene_cameras(tmp_path, W, H)


# ---- nerfstudio's world ----------------------------------------------------------------------------------------------

def orientation(seed):
    """A rotation and a translation [4, 4], as nerfstudio chooses one from the cameras."""
    draws = torch.Generator().manual_seed(seed)
    M = torch.eye(4, dtype=torch.float64)
    M[:3, :3] = rotations(torch.randn(1, 4, generator=draws, dtype=torch.float64))[0]
    M[:3, 3] = torch.randn(3, generator=draws, dtype=torch.float64) * 5
    return M


def into_nerfstudio(folder, M, sigma, applied=None, applied_scale=None):
    """What ns-train and ns-export leave: each Gaussian at σ (R x + t), and M A and σ a in the dataparser's file.

    By a loop over Gaussians, for colours of degree 0; only what is asserted below is changed.
    """
    g = load_ply(folder / "scene.ply")
    assert g.sh.shape[1] == 1
    R, t = M[:3, :3], M[:3, 3]
    for i, x in enumerate(g.means.double()):
        g.means[i] = sigma * (R @ x + t)
    g.log_scales += torch.log(torch.tensor(sigma))
    g.quats = quaternions((R @ rotations(g.quats.double()))).float()
    (folder / "scene.ply").unlink()
    save_ply(folder / "scene.ply", g)
    about = json.loads((folder / "transforms.json").read_text())
    A = torch.eye(4, dtype=torch.float64)
    scale = sigma
    if applied is not None:
        about["applied_transform"] = applied.tolist()
        A[:3] = applied
    if applied_scale is not None:
        about["applied_scale"] = applied_scale
        scale *= applied_scale
    replaced(folder / "transforms.json", about)
    replaced(folder / "dataparser_transforms.json", {"transform": (M @ A)[:3].tolist(), "scale": scale})


@pytest.mark.parametrize("applied, applied_scale", [(None, None), (COLMAP_TO_JSON, None), (COLMAP_TO_JSON, 0.3)])
def test_nerfstudios_gaussians_come_back_to_the_world_of_its_cameras(toy, folder, applied, applied_scale):
    into_nerfstudio(folder, orientation(1), 0.07, applied, applied_scale)
    wanted, found = scene.read_scene(toy), scene.read_scene(folder)
    assert wanted.objects.keys() == found.objects.keys()
    for name, a, b in [("still", wanted.still, found.still), *((i, wanted.objects[i], found.objects[i])
                                                               for i in wanted.objects)]:
        assert len(a) == len(b), name
        for field, tolerance in (("means", 1e-3), ("log_scales", 1e-4)):
            difference = (getattr(a, field) - getattr(b, field)).abs().max()
            assert difference < tolerance, f"{name}.{field}: {difference:.1e}, allowed {tolerance} (scene of 200 m)"
        turned = (rotations(a.quats) - rotations(b.quats)).abs().max()
        assert turned < 1e-4, f"{name}: axes differ by {turned:.1e}"


def test_gaussians_in_colmaps_own_world_are_named_by_the_identity(folder):
    """gsplat's and INRIA's, next to cameras that ns-process-data has turned by applied_transform."""
    about = json.loads((folder / "transforms.json").read_text())
    replaced(folder / "transforms.json", about | {"applied_transform": COLMAP_TO_JSON.tolist()})
    replaced(folder / "dataparser_transforms.json", {"transform": torch.eye(4)[:3].tolist(), "scale": 1})
    s, R, t = to_the_cameras_world(folder)
    x = torch.tensor([1.0, 2, 3]).double()
    assert s == 1 and (s * R @ x + t).tolist() == [1, 3, -2]


@pytest.mark.parametrize("parsed, applied, said", [
    ({"transform": (2 * COLMAP_TO_JSON).tolist(), "scale": 1}, None, "dataparser_.*transform: wanted a rotation"),
    ({"transform": [[1, 0, 0, 0]], "scale": 1}, None, "transform: wanted 3x4 finite numbers"),
    ({"transform": COLMAP_TO_JSON.tolist(), "scale": 0}, None, "scale: wanted"),
    ({"transform": COLMAP_TO_JSON.tolist()}, None, "scale: wanted .* got nothing"),
    ({"transform": COLMAP_TO_JSON.tolist(), "scale": 1}, [[-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]],
     "transforms.json: applied_transform: wanted a rotation"),
    ({"transform": COLMAP_TO_JSON.tolist(), "scale": 1}, 3, "applied_transform: wanted 3x4 finite numbers")])
def test_a_transform_that_is_none_is_refused_with_its_field(folder, parsed, applied, said):
    about = json.loads((folder / "transforms.json").read_text())
    replaced(folder / "transforms.json", about | ({} if applied is None else {"applied_transform": applied}))
    replaced(folder / "dataparser_transforms.json", parsed)
    with pytest.raises(ValueError, match=said):
        scene.read_scene(folder)
