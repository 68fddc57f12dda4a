"""What world_study.py puts in place of the latent memory, and of what is observed: each differs in one thing.

A kind is a World that overrides `blank`, `update` or `control`, the three places where the loop meets its memory. The
networks are the same for all; the branch was trained on what the latent memory shows.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as nnf

from mirage_min.data.toy_world import Clip
from mirage_min.method import latent_memory
from mirage_min.method.camera import Camera
from mirage_min.method.latent_memory import Memory, blocks, cell_camera, pixel_frame, transform
from mirage_min.systems.world import Geometry, World, pad, padded

GAPS = 2, 4  # pixels: how large the points of the RGB cloud are made where nothing is seen between them


def as_kind(kind: type[World], world: World, **settings) -> World:
    """A world model with the same networks, and another memory or other settings."""
    return kind(world.vae, world.dit, world.branch, world.text, replace(world.settings, **settings))


class NoMemory(World):
    """The branch is shown nothing, as a share of the chunks was in training."""

    def update(self, memory, x, new, geometry, cameras):
        return memory


class RgbCloud(World):
    """A point for each pixel of the same frames, with its colour. All frames of a chunk are rendered and encoded."""

    def blank(self, like):
        return Memory.empty(3, like.dtype, like.device)

    def update(self, memory, x, new, geometry, cameras):
        return self.remember(memory, x[0][:, [pixel_frame(f) for f in new]], geometry, cameras)

    def control(self, memory, cameras, like):
        h, w = like.shape[-2:]
        n = pixel_frame(self.settings.latents - 1) + 1
        cameras = cameras + cameras[-1:] * (n - len(cameras))          # where there are fewer, the last one stays
        x, seen = map(torch.stack, zip(*(render(memory, padded(camera)) for camera in cameras)))
        z = self.vae.encode(x.movedim(0, 1)[None])[0]                  # [C, F, h, w]
        mask = torch.stack([known_cells(image, h, w) for image in seen[::4]], dim=1)
        return torch.cat([z, mask])[None]


def render(memory: Memory, camera: Camera) -> tuple[Tensor, Tensor]:
    """A cloud of coloured points as a camera sees it -> x [3, H, W] in [-1, 1], mid-grey where nothing is, and where
    something is [1, H, W]. Gaps are closed by points of 2, then of 4 pixels; H and W are multiples of 4."""
    H, W = camera.height, camera.width
    x, seen = latent_memory.read(memory, camera, H, W)
    for size in GAPS:
        large, there = (image.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)
                        for image in latent_memory.read(memory, camera, H // size, W // size))
        x = torch.where(seen > 0, x, large)
        seen = torch.maximum(seen, there)
    return x, seen


def known_cells(seen: Tensor, h: int, w: int) -> Tensor:
    """Where something is rendered [1, H, W] -> the cells in which half of the pixels are, [1, h, w] of 0 and 1."""
    return (blocks(seen[0], h, w).mean(dim=-1) >= 0.5)[None].to(seen)


class TrueLatents(World):
    """The ceiling: the branch is shown the true frames, encoded. `clip` [3, T, H, W] and `path` have to be set."""

    clip: Tensor
    path: list[Camera]

    def update(self, memory, x, new, geometry, cameras):
        return memory

    def control(self, memory, cameras, like):
        first = frame_of(cameras[0], self.path)
        n = pixel_frame(self.settings.latents - 1) + 1
        at = [min(t, self.clip.shape[1] - 1) for t in range(first, first + n)]
        z = self.vae.encode(pad(self.clip[None, :, at]))               # [1, C, F, h, w]
        return torch.cat([z, torch.ones_like(z[:, :1])], dim=1)


class PixelLift(World):
    """Latents are enlarged to the frame's size, and each pixel is put into the world by its own depth (Table 3)."""

    def update(self, memory, x, new, geometry, cameras):
        z = self.vae.encode(x)[0][:, new]                              # [C, n, h, w]
        large = nnf.interpolate(z.movedim(1, 0), x.shape[-2:], mode="bilinear", align_corners=False)
        return self.remember(memory, large.movedim(0, 1), geometry, cameras)


class Release(World):
    """The release's lift and readout: cells by their index, depth averaged over edges and holes, rounding, and a write
    with duplicate indices, here from far to near."""

    any_order = False

    def remember(self, memory, z, geometry, cameras):
        for i, camera in enumerate(cameras):
            memory = release_add(memory, z[:, i], geometry.depth[i], camera)
        return memory

    def shown(self, memory, views, like):
        h, w = like.shape[-2:]
        order = Generator().manual_seed(len(memory)) if self.any_order else None
        found = [torch.cat(release_read(memory, view, h, w, order)) for view in views]
        return torch.stack(found, dim=1)[None]


class ReleaseAnyOrder(Release):
    """The same where writes come in any order, as PyTorch allows."""

    any_order = True


def release_add(memory: Memory, z: Tensor, depth: Tensor, camera: Camera) -> Memory:
    """latent_memory.add as the release does it: z [C, h, w], depth [H, W], whole cells in a frame; no masks."""
    h, w = z.shape[1:]
    K, w2c = cell_camera(camera, h, w)
    known = torch.where(depth.isfinite(), depth, 0)[None, None].to(memory.points)
    d = nnf.interpolate(known, (h, w), mode="bilinear", align_corners=False)[0, 0]
    i, j = torch.meshgrid(torch.arange(h).to(d), torch.arange(w).to(d), indexing="ij")
    c2w = torch.linalg.inv(w2c)
    to_world = torch.cat([c2w[:3, :3] @ torch.linalg.inv(K), c2w[:3, 3:]], dim=1)
    points = torch.stack(transform(to_world, j * d, i * d, d), dim=-1)
    keep = d > 0
    return Memory(torch.cat([memory.points, points[keep]]), torch.cat([memory.features, z.movedim(0, -1)[keep]]))


def release_read(memory: Memory, camera: Camera, h: int, w: int, order: Generator | None) -> tuple[Tensor, Tensor]:
    """latent_memory.read as the release does it. The last write to a cell stays; `order` None: they come from far to
    near, a generator: in any order."""
    K, w2c = cell_camera(camera, h, w)
    x, y, z = transform(K @ w2c[:3], *memory.points.unbind(dim=1))
    u, v = (x / z).round(), (y / z).round()
    inside = ((z > 0) & (u >= 0) & (u < w) & (v >= 0) & (v < h)).nonzero().squeeze(1)
    if order is None:
        turn = inside[z[inside].argsort(descending=True, stable=True)]
    else:
        turn = inside[torch.randperm(len(inside), generator=order)]
    cell = (v * w + u).long()[turn]
    last = torch.full((h * w,), -1).scatter_reduce(0, cell, torch.arange(len(cell)), "amax")
    features = memory.features.new_zeros(h * w, memory.features.shape[1])
    features[last >= 0] = memory.features[turn[last[last >= 0]]]
    return features.T.reshape(-1, h, w), (last >= 0).view(1, h, w).to(features)


# ---- what is observed ------------------------------------------------------------------------------------------------

class Known:
    """The depth of a toy clip, by the frame whose camera is asked for.

    moving  whether what moves during the clip is left out of the memory
    noise   the standard deviation of a relative error of the depth, which is smooth over about a quarter of the frame
    """

    def __init__(self, clip: Clip, path: list[Camera], moving: bool = True, noise: float = 0.0, seed: int = 0):
        self.clip, self.path, self.moving, self.noise, self.seed = clip, path, moving, noise, seed

    def __call__(self, frames: Tensor, cameras: list[Camera]) -> Geometry:
        at = [frame_of(camera, self.path) for camera in cameras]
        depth = torch.stack([self.wrong(self.clip.depth[0, t], t) for t in at])
        return Geometry(depth, self.clip.moving[0, at] > 0 if self.moving else None)

    def wrong(self, depth: Tensor, t: int) -> Tensor:
        """The depth [H, W] of frame t with the error."""
        draws = Generator().manual_seed(1000 * self.seed + t)
        coarse = torch.randn(1, 1, 4, 6, generator=draws)
        smooth = nnf.interpolate(coarse, depth.shape, mode="bicubic", align_corners=False)[0, 0]
        return depth * (1 + self.noise * smooth / smooth.std())


def frame_of(camera: Camera, path: list[Camera]) -> int:
    """Which of a path's cameras this is; the same poses on the way out and back are two."""
    return next(t for t, other in enumerate(path) if other is camera)
