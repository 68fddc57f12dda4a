"""The example scene folder: a toy scene as a reconstruction would have it, in the formats of scene.py.

The street is made of the pixels of three frames: each becomes a Gaussian at the point that was seen, as large as the
pixel is there. Vehicles are made of their surfaces: in scene.ply as a reconstruction leaves them (seen from one side,
noisy, anisotropic, with floaters, in the scene's light), in asset.ply as a generator makes them (whole and uniform, in
its own size and orientation, its proportions a little off, in another light).

    python -m mirage_min.data.toy_world --scene example_scene
    python -m mirage_min.data.toy_scene
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..networks.weights import whole_file
from . import toy_render, toy_world
from .align import mask_box
from .scene import moved
from .scene_cameras import OPENGL_TO_OPENCV
from .splat import Gaussians, quaternions, save_ply
from .toy_light import Light, shade
from .toy_render import SKY, Scene
from .toy_shapes import FACES, Body, Points, albedo
from .video import write_clip

Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # toy world (y down) to the file's
SPACING = 0.08                # metres between the asset's Gaussians
NOISE = 0.05                  # metres, of a reconstructed surface
DRIFT = (0.16, -0.08, 0.0)    # metres: poses are never exact, so a reconstruction is a little off its object


def from_box(body: Body) -> Tensor:
    """[4, 4]: x forward, y left, z up from the middle of the box -> the body's own x right, y down, z forward."""
    return torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, -float(body.size[1]) / 2], [1, 0, 0, 0], [0, 0, 0, 1]])


def gaussians(means: Tensor, rgb: Tensor, scales: Tensor, quats: Tensor, opacity: float = 0.97) -> Gaussians:
    """Points [N, 3], linear colours [N, 3], sizes [N, 3] along the axes of the rotations [N, 4] -> SH of degree 0."""
    sh = (rgb.clamp(0, 1) ** (1 / 2.2) - 0.5) / 0.28209479177387814
    return Gaussians(means, scales.log(), quats, torch.full((len(means),), opacity).logit(), sh[:, None])


def street(scene: Scene, config: toy_world.WorldConfig, t: int) -> Gaussians:
    """What frame t shows without any vehicle, back-projected; world coordinates of the toy world."""
    away = torch.eye(4).repeat(config.frames, 1, 1)
    away[:, 2, 3] = -1e4
    empty = replace(scene, bodies=[b if b.size is None else replace(b, pose=away) for b in scene.bodies])
    hits = toy_render.cast(empty, toy_render.intrinsics(config), (config.height, config.width), t, 1)
    rgb = toy_render.frame(empty, config, t)[1].flatten(1).T
    origin, sky = scene.c2w[t, :3, 3], hits.body == SKY
    depth = torch.where(sky, 200.0, hits.depth)
    ray = nnf.normalize(torch.where(sky[:, None], hits.local, hits.point - origin), dim=1)
    ray = ray / (ray @ scene.c2w[t, :3, 2])[:, None]                   # z = 1 in the camera
    n = torch.where(sky[:, None], -nnf.normalize(ray, dim=1), hits.normal)
    # p = o + z·d(u, v) on the plane n: ∂p/∂u = z/f (e_u − d (n·e_u) / (n·d)), and the same for v
    facing = (n * ray).sum(1, keepdim=True).clamp(max=-0.03)
    J = torch.stack([e - ray * (n @ e)[:, None] / facing for e in scene.c2w[t, :3, :2].T], dim=2)
    J = J * (depth / toy_render.intrinsics(config)[0, 0])[:, None, None]
    U, S, _ = torch.linalg.svd(J)
    U[:, :, 2] *= torch.linalg.det(U)[:, None]
    scales = torch.stack([0.35 * S[:, 0], 0.35 * S[:, 1], 0.1 * S[:, 1]], dim=1)
    return gaussians(origin + depth[:, None] * ray, rgb, scales, quaternions(U))


def grid_over(face: Tensor, spacing: float) -> Tensor:
    """Points [N, 3] about `spacing` metres apart on a face with four corners [4, 3], in order around it."""
    across, down = (max(1, round(((face[i] - face[0]).norm() / spacing).item())) for i in (1, 3))
    u, v = (torch.arange(n) / n + 0.5 / n for n in (across, down))
    u, v = (w.reshape(-1, 1) for w in torch.meshgrid(u, v, indexing="ij"))
    return (1 - v) * torch.lerp(face[0], face[1], u) + v * torch.lerp(face[3], face[2], u)


def surface(scene: Scene, b: int, t: int, light: Light, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points on a grid over body b, their normals, both in its coordinates, and their linear colours: all [N, 3]."""
    body, R = scene.bodies[b], scene.bodies[b].pose[t, :3, :3]
    points, normals, colors = [], [], []
    for k, part in enumerate(body.parts):
        p = [grid_over(part.corners[list(face)], spacing) for face in FACES]
        n = torch.cat([normal.expand_as(q) for normal, q in zip(part.normals, p)])
        p = torch.cat(p)
        inside = torch.stack([(p @ other.normals.T < other.offsets - 1e-3).all(dim=1) for other in body.parts]).any(0)
        p, n = p[~inside], n[~inside]
        if len(p):
            points.append(p)
            normals.append(n)
            colors.append(albedo(body, k, Points(p, n @ R.T, torch.zeros(len(p))), scene.seed))
    points, normals, colors = torch.cat(points), torch.cat(normals), torch.cat(colors)
    one = torch.ones(len(points))
    return points, normals, shade(colors, normals @ R.T, light, one, one)


def reconstructed(scene: Scene, b: int, t: int, draws: torch.Generator) -> Gaussians:
    """Vehicle b as a scene's reconstruction has it, in its own coordinates; its light is that of frame t."""
    def normal(*shape):
        return torch.randn(*shape, generator=draws)

    points, normals, rgb = surface(scene, b, t, scene.light, 0.09)
    pose = scene.bodies[b].pose
    cameras = ((scene.c2w[:, None, :3, 3] - pose[:, None, :3, 3]) @ pose[:, :3, :3])[:, 0]             # [T, 3]
    seen = ((cameras[:, None] - points) * normals).sum(-1).amax(0) > 0
    points, rgb = points[seen], rgb[seen]
    points = points + NOISE * normal(len(points), 3) + torch.tensor(DRIFT)
    shell = gaussians(points, rgb, 0.04 * torch.exp(0.5 * normal(len(points), 3)), normal(len(points), 4))
    N = len(points) // 20
    low, high = points.amin(0), points.amax(0)
    around = low + (torch.rand(N, 3, generator=draws) * 1.6 - 0.3) * (high - low)
    sizes = 0.08 * torch.exp(0.5 * normal(N, 3))
    return Gaussians.cat([shell, gaussians(around, rgb[:N], sizes, normal(N, 4), opacity=0.3)])


def generated(scene: Scene, b: int, t: int, draws: torch.Generator) -> Gaussians:
    """Vehicle b as a generator makes it: whole, uniform, in the naive light, one unit long, turned a little."""
    points, _, rgb = surface(scene, b, t, scene.naive, SPACING)
    points = points * (1 + 0.05 * torch.randn(3, generator=draws).clamp(-1.5, 1.5))
    angle = float(torch.empty(()).uniform_(-0.3, 0.3, generator=draws))
    R = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    size = torch.full_like(points, 0.03)
    whole = gaussians(points, rgb, size, torch.tensor([1.0, 0, 0, 0]).expand(len(points), 4))
    return whole.transformed(1 / float(scene.bodies[b].size[2]), R, torch.tensor([0.1, -0.05, 0.02]))


def write_scene(folder: Path, seed: int, config: toy_world.WorldConfig) -> None:
    """The scene of a seed as a scene folder."""
    write_folder(folder, toy_world.sample_scene(seed, config), config)


def write_folder(folder: Path, scene: Scene, config: toy_world.WorldConfig) -> None:
    """A scene, its first vehicle (whose asset it is) and the others tracked, as a scene folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator().manual_seed(scene.seed)
    T, H, W = config.frames, config.height, config.width
    K = toy_render.intrinsics(config)
    write_clip(folder / "images", toy_world.render(scene, config, extras=False).x_gt, config.fps)
    cameras = Z_UP @ scene.c2w @ OPENGL_TO_OPENCV.float()
    frames = [{"file_path": f"images/{t:06d}.png", "transform_matrix": cameras[t].tolist()} for t in range(T)]
    write_json(folder / "transforms.json", {"w": W, "h": H, "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]),
                                            "cx": float(K[0, 2]), "cy": float(K[1, 2]), "frames": frames})

    vehicles = [b for b, body in enumerate(scene.bodies) if body.size is not None]
    reference = T // 2
    bodies = [toy_render.cast(scene, K, (H, W), t, 2).body.view(H, 2, W, 2) for t in range(T)]
    still = [moved(street(scene, config, t), Z_UP) for t in sorted({0, T // 2, T - 1})]
    parts = [replace(p, ids=torch.zeros(len(p), dtype=torch.int64)) for p in still]
    objects = []
    for b in vehicles:
        body = scene.bodies[b]
        entries = []
        g = moved(reconstructed(scene, b, reference, draws), Z_UP @ body.pose[reference])
        parts.append(replace(g, ids=torch.full((len(g),), b + 1)))
        for t in range(T):
            box = mask_box((bodies[t] == b).float().mean(dim=(1, 3)))
            entries.append({"frame": t, "pose": (Z_UP @ body.pose[t] @ from_box(body)).tolist(), "box": box.tolist(),
                            "size": body.size[[2, 0, 1]].tolist(), "visible": bool(box.any())})
        objects.append({"id": b + 1, "category": "car", "reference": reference, "frames": entries})
    write_json(folder / "tracks.json", {"objects": objects})
    save_ply(folder / "scene.ply", Gaussians.cat(parts))
    save_ply(folder / "asset.ply", generated(scene, 0, reference, draws))


def write_json(path: Path, content: dict) -> None:
    """One line of JSON, written atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    scene = toy_world.sample_scene(0, toy_world.WorldConfig(frames=3))
    for name, make in (("reconstructed", reconstructed), ("generated", generated)):
        g = make(scene, 0, 1, torch.Generator().manual_seed(0))
        size = (g.means.amax(0) - g.means.amin(0)).tolist()  # with floaters, if it is reconstructed
        print(f"the actor, {name:13}: {len(g):5} Gaussians, width, height, length {[round(s, 2) for s in size]}")
    print(f"the actor itself:{'':32} {[round(s, 2) for s in scene.bodies[0].size.tolist()]} m")
