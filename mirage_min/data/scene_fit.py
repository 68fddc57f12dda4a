"""Do depth and poses fit each other? Another unit, rays for z, poses turned round: the commonest mistakes, found.

Frames with depth are projected into each other. Where they fit, a point has in the other frame the depth and the colour
that are seen there. Both are asked for, because a plane road has the same depth wherever a camera stands on it: only
colour tells how far it went. Where another factor on depth makes colours agree much better, the factor is named.

What cannot be seen: a wrong unit where the camera hardly moves, a factor near 1, and a single frame alone.

    python -m mirage_min.data.scene_fit          # a made-up scene: depth in metres, in millimetres, and poses inverted
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..method.camera import Camera
from ..method.latent_memory import NEAR, transform

LARGEST = 0.05   # the error of depth, relative, that may be
BETTER = 0.67    # of the colours' error: a factor on depth that leaves less than this is the right one
OVERLAP = 0.2    # the share of a frame that another must see for the two to be compared
FRAMES = 8       # that are compared at most
FACTORS = torch.logspace(-4, 4, 41).tolist()


@dataclass
class Known:
    """A frame whose depth is known."""

    frame: Tensor            # [3, H, W] in [-1, 1]
    depth: Tensor            # [H, W] along the camera's z, float32; 0: unknown
    dynamic: Tensor | None   # [H, W] bool, what is left out; None: nothing is
    camera: Camera


@dataclass
class Misfit:
    """How far frames are off where they are projected into each other, the mean over the pairs that see each other."""

    depth: float   # the median of |z − d| / d, z a point's depth, d the one that is seen there
    colour: float  # the mean difference, of 255
    pairs: int

    def __str__(self) -> str:
        return f"{self.depth:.1%} in depth and {self.colour:.1f} of 255 in colour"


def check_fit(known: list[Known], source) -> Misfit | None:
    """The misfit of frames with depth; None if no two of them see the same.

    ValueError, which begins with `source`, if depth is off by more than LARGEST, or if a factor on it makes colours
    agree better by far (BETTER).
    """
    known = known[:: -(-len(known) // FRAMES)]
    pairs = sorted({(0, b) for b in range(1, len(known))} | set(pairwise(range(len(known)))))
    pairs = [(known[a], known[b]) for a, b in pairs]
    off = misfit(pairs)
    if off is None:
        return None
    tried = {factor: misfit(pairs, factor) for factor in FACTORS}
    tried = {factor: found for factor, found in tried.items() if found is not None and found.pairs >= off.pairs}
    factor, best = min(tried.items(), key=lambda item: item[1].colour)
    mends = best.colour < BETTER * off.colour
    if off.depth > LARGEST or mends:
        hint = (f"with depth times {factor:.3g} by {best}: is it in another unit?" if mends else
                "are poses camera to world, and is depth along z?")
        raise ValueError(f"{source}: depth and poses do not fit: frames projected into each other are off by {off}; "
                         f"{hint}")
    return off


def misfit(pairs: list[tuple[Known, Known]], factor: float = 1.0) -> Misfit | None:
    """The misfit of pairs with all depth times `factor`; None if in no pair the second sees OVERLAP of the first.

    What moves is left out. A point that is hidden in the other frame counts: the median bears with it.
    """
    errors = [error for error in (misfit_of_pair(a, b, factor) for a, b in pairs) if error is not None]
    if not errors:
        return None
    depth, colour = torch.tensor(errors, dtype=torch.float64).mean(dim=0).tolist()
    return Misfit(depth, colour, len(errors))


def misfit_of_pair(a: Known, b: Known, factor: float) -> tuple[float, float] | None:
    """The errors in depth and colour of a's points where b sees them; None if it sees less than OVERLAP of them."""
    H, W = a.depth.shape
    step = max(1, round((H * W / 10_000) ** 0.5))
    i, j = torch.meshgrid(torch.arange(0, H, step), torch.arange(0, W, step), indexing="ij")
    use = a.depth[i, j] > 0
    if a.dynamic is not None:
        use &= ~a.dynamic[i, j]
    i, j = i[use], j[use]
    d = factor * a.depth[i, j].double()
    # q = K_b · w2c_b · c2w_a · (d · K_a⁻¹ [j+½, i+½, 1])
    to_b = b.camera.world_to_camera.double() @ a.camera.camera_to_world.double()
    M = torch.cat([to_b[:3, :3] @ torch.linalg.inv(a.camera.K.double()), to_b[:3, 3:]], dim=1)
    x, y, z = transform(b.camera.K.double() @ M, (j + 0.5) * d, (i + 0.5) * d, d)
    u, v = x / z, y / z
    inside = (z > factor * NEAR) & (u >= 0) & (u < W) & (v >= 0) & (v < H)
    u, v = torch.where(inside, u, 0).long(), torch.where(inside, v, 0).long()
    inside &= b.depth[v, u] > 0
    if b.dynamic is not None:
        inside &= ~b.dynamic[v, u]
    if inside.sum() < max(1, OVERLAP * len(d)):
        return None
    i, j, u, v = (index[inside] for index in (i, j, u, v))
    depth = z[inside] / (factor * b.depth[v, u].double()) - 1
    colour = 127.5 * (a.frame[:, i, j] - b.frame[:, v, u])
    return float(depth.abs().median()), float(colour.abs().mean())


if __name__ == "__main__":
    from .toy_world import WorldConfig, make_clip

    clip = make_clip(5, WorldConfig(5, path="loop", static=True))
    depth = torch.where(clip.depth[0].isfinite(), clip.depth[0], 0)
    cameras = [Camera.from_pose(clip.K, pose, 144, 96) for pose in clip.c2w]
    right = [Known(clip.x_gt[:, t], depth[t], None, cameras[t]) for t in range(5)]
    millimetres = [replace(known, depth=1000 * known.depth) for known in right]
    inverted = [replace(known, camera=replace(known.camera, world_to_camera=known.camera.camera_to_world))
                for known in right]
    for name, known in (("metres", right), ("millimetres", millimetres), ("inverted", inverted)):
        try:
            print(f"{name}: off by {check_fit(known, 'the scene')}")
        except ValueError as error:
            print(f"{name}: {error}")
