"""A latent spatial memory: latent cells kept as points in the world, and read out at any camera.

This is the memory of the *world model* called Mirage ("Latent Spatial Memory for Video World Models", arXiv
2606.09828), not of Mirage, the harmoniser. A cloud of coloured points would have to be rendered and encoded; this
memory directly gives what a video network takes as input, a latent and a mask of where there is one:

    add     p = c2w · (d · K⁻¹ [j+½, i+½, 1]),   M ← M ∪ {(p, z_ij)}
    read    q = w2c · p,   ẑ_ij = the z of the nearest q with ⌊K q / q_z⌋ = (j, i),   0 and mask 0 where there is none

Among points at one depth the oldest wins, so the result is defined to the bit: it depends neither on threads or device
nor, where depths differ, on the order of the points. Gradients reach the features, not the geometry.

The released code sorts by depth and writes with duplicate indices, which PyTorch leaves undefined; it also places cells
by their index instead of their centre and averages depth over edges and holes. None of this is kept (DEVIATIONS.md).
Left out: depth and camera estimation, and merging of points.

    python -m mirage_min.method.latent_memory    # a street seen 41 times: growth, a readout, the released scatter
"""

import time
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .camera import Camera

NEAR = 0.01  # what is nearer than this, in the unit of the poses, is not seen


@dataclass
class Memory:
    """N latent cells as points, the oldest first; `add` returns a new Memory and does not change the old one."""

    points: Tensor    # [N, 3] in the world, in the unit that poses and depth share
    features: Tensor  # [N, C] latents, normalised as the network expects them: 0 is the mean latent

    @classmethod
    def empty(cls, channels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "Memory":
        """A memory without points, for latents of this many channels in this dtype; points are at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        return cls(torch.empty(0, 3, dtype=wide, device=device), torch.empty(0, channels, dtype=dtype, device=device))

    def __len__(self) -> int:
        return len(self.points)


def pixel_frame(f: int) -> int:
    """The frame whose camera and depth belong to latent f of a causal video VAE: the last of those that it encodes.

    Latent 0 encodes frame 0, and latent f the frames 4f − 3 to 4f.
    """
    return 4 * f


def add(memory: Memory, z: Tensor, depth: Tensor, camera: Camera, *, dynamic: Tensor | None = None,
        sky: Tensor | None = None, known: float | None = None) -> Memory:
    """A memory with the cells of one latent frame added, except those of unknown depth: M ← M ∪ {(p, z)}.

    z        [C, h, w]
    depth    [H, W] along the camera's z axis, not along the ray; 0, inf and nan are unknown
    camera   of the H x W frame; H and W are whole multiples of h and w
    dynamic  [H, W] bool, where something moves: a cell is left out if any of its pixels is
    sky      [H, W] bool: a cell is left out if most of its pixels are sky
    known    a fraction of the depth, such as .05: a cell is also left out if the memory, seen by this camera, already
             has a point within that fraction of its depth. This bounds the growth; the paper adds all cells.
    ValueError for shapes that do not fit together and a camera that is not finite.
    """
    channels = memory.features.shape[1]
    if z.ndim != 3 or z.shape[0] != channels:
        raise ValueError(f"z must be [{channels}, h, w], got {list(z.shape)}")
    h, w = z.shape[1:]
    for name, image in (("depth", depth), ("dynamic", dynamic), ("sky", sky)):
        if image is not None and image.shape != (camera.height, camera.width):
            raise ValueError(f"{name} must be [H, W] = [{camera.height}, {camera.width}], the camera's size, "
                             f"got {list(image.shape)}")
    K, w2c = cell_camera(camera, h, w)
    d = cell_depth(depth.to(memory.points), h, w)                      # [h, w]
    keep = d > 0
    if dynamic is not None:
        keep &= ~blocks(dynamic.to(d.device), h, w).any(dim=-1)
    if sky is not None:
        keep &= blocks(sky.to(d.device), h, w).double().mean(dim=-1) <= 0.5
    if known is not None:
        seen = nearest(memory, camera, h, w)[1].view(h, w)
        keep &= ~((seen - d).abs() <= known * d)

    # p = c2w · (d · K⁻¹ [j+½, i+½, 1])
    i, j = torch.meshgrid(torch.arange(h).to(d) + 0.5, torch.arange(w).to(d) + 0.5, indexing="ij")
    c2w = torch.linalg.inv(w2c)
    to_world = torch.cat([c2w[:3, :3] @ torch.linalg.inv(K), c2w[:3, 3:]], dim=1)
    points = torch.stack(transform(to_world, j * d, i * d, d), dim=-1)  # [h, w, 3]
    cells = rearrange(z, "c h w -> h w c").to(memory.features)
    return Memory(torch.cat([memory.points, points[keep]]), torch.cat([memory.features, cells[keep]]))


def read(memory: Memory, camera: Camera, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The memory as a camera sees it, on h x w cells: z [C, h, w], 0 where it sees no point, and mask [1, h, w].

    The mask is 1 where z was read, else 0. Both have the dtype of the features. ValueError for a camera that is not
    finite, or whose frame is not a whole multiple of h x w.
    """
    first, _ = nearest(memory, camera, h, w)
    seen = first < len(memory)
    z = memory.features.new_zeros(h * w, memory.features.shape[1])
    z[seen] = memory.features[first[seen]]
    return rearrange(z, "(h w) c -> c h w", h=h), seen.view(1, h, w).to(z.dtype)


def nearest(memory: Memory, camera: Camera, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The point that each cell shows, and its depth: indices [h*w], N where there is none, and depth [h*w], inf there.

    Both are minima over the points of a cell: first of their depth, then of the index among those at that depth. A
    minimum does not depend on the order in which it is taken. ValueError as in `read`.
    """
    K, w2c = cell_camera(camera, h, w)
    x, y, z = transform(K @ w2c[:3], *memory.points.detach().unbind(dim=1))
    # (u, v) = K q / q_z, in cells
    u, v = x / z, y / z
    inside = (z > NEAR) & (u >= 0) & (u < w) & (v >= 0) & (v < h)
    nowhere = h * w  # one cell more, for the points that are not seen
    cell = torch.where(inside, v.floor() * w + u.floor(), nowhere).long()

    depth = z.new_full((h * w + 1,), torch.inf).scatter_reduce(0, cell, z, "amin")
    N = len(memory)
    index = torch.arange(N, device=z.device)
    candidate = torch.where(z == depth[cell], index, N)
    first = index.new_full((h * w + 1,), N).scatter_reduce(0, cell, candidate, "amin")
    return first[:nowhere], depth[:nowhere]


# ---- geometry --------------------------------------------------------------------------------------------------------

def cell_camera(camera: Camera, h: int, w: int) -> tuple[Tensor, Tensor]:
    """K [3, 3] in cells of an h x w grid, and world to camera [4, 4], both in float64. ValueError as in `read`."""
    if min(h, w) < 1 or camera.height % h or camera.width % w:
        raise ValueError(f"a frame of {camera.height} x {camera.width} pixels cannot be cut into {h} x {w} cells of "
                         f"whole pixels: pad frame and depth as the VAE does")
    K, w2c = camera.resized(w, h).K.double(), camera.world_to_camera.double()
    if not (K.isfinite().all() and w2c.isfinite().all()):
        raise ValueError(f"the camera is not finite: K {camera.K.tolist()}, pose {camera.world_to_camera.tolist()}")
    return K, w2c


def cell_depth(depth: Tensor, h: int, w: int) -> Tensor:
    """Depth [H, W] -> [h, w]: the median of a cell's known pixels if at least half of them are known, and else 0.

    Of an even number it is the nearer of the two in the middle: at an edge, their mean would lie on neither surface.
    """
    pixels = blocks(depth, h, w)                                       # [h, w, pixels of a cell]
    known = (pixels > 0) & pixels.isfinite()
    median = torch.where(known, pixels, torch.nan).nanmedian(dim=-1).values
    return torch.where(2 * known.sum(dim=-1) >= pixels.shape[-1], median, 0)


def blocks(image: Tensor, h: int, w: int) -> Tensor:
    """An image [H, W], H and W whole multiples of h and w -> [h, w, pixels of a cell]"""
    return rearrange(image, "(h p) (w q) -> h w (p q)", h=h, w=w)


def transform(M: Tensor, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """M [3, 4] on points: the three coordinates of M · [x, y, z, 1].

    x, y, z have one shape, as each result has. The sum is written out, because a matrix product may round the same
    point in two ways, depending on its place in the array.
    """
    return [a * x + b * y + c * z + d for a, b, c, d in M.to(x)]


if __name__ == "__main__":
    torch.manual_seed(0)
    h, w, H, W = 44, 80, 176, 320
    K = torch.tensor([[225.0, 0, W / 2], [0, 225, H / 2], [0, 0, 1]])
    road = 1.5 * 225 / (torch.arange(H) + 0.5 - H / 2).clamp(min=5)    # 1.5 m below the camera, then a wall
    depth = road[:, None] * (1 + 0.05 * torch.rand(H, W))
    poses = torch.eye(4).repeat(41, 1, 1)
    poses[:, 2, 3] = torch.arange(41) / 4
    cameras = [Camera.from_pose(K, pose, W, H) for pose in poses]
    union, bounded = Memory.empty(48), Memory.empty(48)
    for camera in cameras:
        z = torch.randn(48, h, w)
        union = add(union, z, depth, camera)
        bounded = add(bounded, z, depth, camera, known=0.05)
        if len(union) == h * w:
            print(f"read where it was added: equal {torch.equal(read(union, camera, h, w)[0], z)}")
    print(f"41 frames of {h} x {w} cells: {len(union)} points, or {len(bounded)} that differ by more than 5 % in depth")

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(21):
        start = time.perf_counter()
        read(union, cameras[0], h, w)
        seconds.append(time.perf_counter() - start)
    print(f"a readout: {1000 * sorted(seconds)[10]:.0f} ms on one thread, the median of 21")

    # The released code writes from far to near, with duplicate indices: the nearest stays if writes come in order.
    ours, mask = read(union, cameras[0], h, w)
    cells, w2c = cell_camera(cameras[0], h, w)
    x, y, z = transform(cells @ w2c[:3], *union.points.unbind(dim=1))
    order = ((z > NEAR) & (x >= 0) & (x < w * z) & (y >= 0) & (y < h * z)).nonzero().squeeze(1)
    order = order[z[order].argsort(descending=True)]
    cell = ((y / z).floor() * w + (x / z).floor()).long()[order]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        wrong = []
        for _ in range(5):
            theirs = torch.zeros(48, h * w)
            theirs[:, cell] = union.features[order].T
            differs = (theirs.view(48, h, w) != ours).any(dim=0) & (mask[0] > 0)
            wrong.append(float(differs.double().sum() / mask.sum()))
        print(f"the release's scatter, {threads} thread(s): {min(wrong):.0%} to {max(wrong):.0%} of the cells wrong")
    torch.set_num_threads(threads_before)
