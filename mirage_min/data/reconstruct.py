"""3D Gaussians fitted to the frames of a scene that does not move: what a reconstruction of it looks like.

    g = back_project(frames, depths, cameras, 3000, draws)     # where a laser would have put the first points
    g = fit(g, frames, cameras, steps=60, draws=draws)
    x, depth = film(g, other_cameras)                          # [3, T, H, W] in [-1, 1]

The loss is the L1 distance of a random window of a random frame; the optimiser is Adam, with a rate for each kind of
number as in 3D Gaussian Splatting (Kerbl et al. 2023). DEVIATION: that takes 30,000 steps and adds and removes
Gaussians on the way; here a few dozen steps have accordingly larger rates, and the number stays.

    python -m mirage_min.data.reconstruct          # the error of a frame that was seen and of one that was not
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as nnf

from ..method.camera import Camera
from .photometric import integer
from .splat import Gaussians, render

RATES = {"means": 0.01, "log_scales": 0.02, "quats": 0.01, "logit_opacities": 0.05, "sh": 0.02}  # of Adam, a step
C0 = 0.28209479177387814   # the constant spherical harmonic
FAR = 150.0                # metres: where the sky is put


def cameras_of(c2w: Tensor, K: Tensor, size: tuple[int, int]) -> list[Camera]:
    """A path [T, 4, 4], camera to world, as cameras of `size` rows and columns."""
    return [Camera(K, torch.linalg.inv(pose), size[1], size[0]) for pose in c2w]


def back_project(frames: list[Tensor], depths: list[Tensor], cameras: list[Camera], count: int, draws: Generator
                 ) -> Gaussians:
    """About `count` round Gaussians, on pixels drawn from all frames [3, H, W] in [-1, 1] at their depths [H, W].

    A depth of inf is the sky.
    """
    parts = []
    each = max(1, count // len(frames))
    for frame, depth, camera in zip(frames, depths, cameras, strict=True):
        H, W = depth.shape
        i = torch.randperm(H * W, generator=draws)[:each]
        v, u = i // W, i % W
        z = depth.flatten()[i].clamp(max=FAR)
        ray = torch.stack([u + 0.5, v + 0.5, torch.ones(len(i))], dim=1) @ torch.linalg.inv(camera.K).T
        c2w = torch.linalg.inv(camera.world_to_camera)
        means = (ray * z[:, None]) @ c2w[:3, :3].T + c2w[:3, 3]
        # so wide that their neighbours, √(H W / each) pixels away, are met
        width = 0.5 * z / camera.K[0, 0] * (H * W / each) ** 0.5
        rgb = (frame.flatten(1)[:, i].T + 1) / 2
        quats = torch.tensor([1.0, 0, 0, 0]).repeat(len(i), 1)
        parts.append(Gaussians(means, width.log()[:, None].expand(-1, 3).contiguous(), quats,
                               torch.full((len(i),), 1.5), ((rgb - 0.5) / C0)[:, None]))
    return Gaussians.cat(parts)


def fit(g: Gaussians, frames: list[Tensor], cameras: list[Camera], steps: int, draws: Generator,
        window: tuple[int, int] = (48, 48)) -> Gaussians:
    """`steps` steps of Adam towards frames [3, H, W] in [-1, 1]; each step sees a random window of one of them."""
    params = {name: getattr(g, name).detach().clone().requires_grad_() for name in RATES}
    optimizer = torch.optim.Adam([{"params": [params[name]], "lr": rate} for name, rate in RATES.items()])
    for _ in range(steps):
        k = integer(draws, len(frames))
        camera, (rows, columns) = random_window(cameras[k], window, draws)
        truth = (frames[k][:, rows, columns] + 1) / 2
        loss = nnf.l1_loss(render(replace(g, **params), camera)[0], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(g, **{name: p.detach() for name, p in params.items()})


def random_window(camera: Camera, window: tuple[int, int], draws: Generator) -> tuple[Camera, tuple[slice, slice]]:
    """A camera that sees `window` rows and columns of another, or all that it has; and which those are."""
    h, w = min(window[0], camera.height), min(window[1], camera.width)
    top, left = integer(draws, camera.height - h + 1), integer(draws, camera.width - w + 1)
    K = camera.K.clone()
    K[0, 2] -= left
    K[1, 2] -= top
    return Camera(K, camera.world_to_camera, w, h), (slice(top, top + h), slice(left, left + w))


@torch.no_grad()
def film(g: Gaussians, cameras: list[Camera]) -> tuple[Tensor, Tensor]:
    """What the cameras see of it: [3, T, H, W] in [-1, 1], and its depth [1, T, H, W], inf where there is nothing."""
    shots = [render(g, camera) for camera in cameras]
    return torch.stack([rgb for rgb, _, _ in shots], dim=1) * 2 - 1, torch.stack([z for _, _, z in shots], dim=1)


if __name__ == "__main__":
    from .toy_render import intrinsics
    from .toy_world import WorldConfig, sample_scene
    from .toy_world import render as render_scene

    config = WorldConfig(frames=3, height=48, width=72, static=True)
    draws = torch.Generator().manual_seed(0)
    scene = sample_scene(0, config)
    clip = render_scene(scene, config)
    cameras = cameras_of(scene.c2w, intrinsics(config), (48, 72))
    seen = cameras[::2]
    frames, depths = clip.x_gt[:, ::2].unbind(1), clip.depth[0, ::2].unbind(0)
    g = back_project(frames, depths, seen, 600, draws)
    for steps in (0, 20):
        x, _ = film(fit(g, frames, seen, steps, draws), cameras)
        error = ((x - clip.x_gt).abs().mean(dim=(0, 2, 3)) * 127.5).tolist()
        print(f"{len(g)} Gaussians after {steps:2} steps: mean difference {error[0]:.1f} and {error[2]:.1f} of 255 in "
              f"the frames that were seen, {error[1]:.1f} in the one between")
