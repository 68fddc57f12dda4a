"""Two-stage alignment of a generated asset to the object whose place it takes (Mirage §3.3, §8.3).

    s, R, t = coarse_3d(asset, obj, heading)              # x_dst = s·R·x_src + t, from two sets of Gaussians
    scale, shift = fine_2d(boxes_rendered, boxes_gt)      # what is left, by boxes: one affine map for the whole video
    layer = apply_fine(layer, box, scale, shift)          # applied to every frame alike

The paper says what is matched, not how. A reconstructed object is noisy, has floaters and was often seen from one side
only; the asset is whole and uniform. So the coarse stage draws the object's points onto the asset's surface, and what
the object does not show pulls at nothing. DEVIATION: both are taken to stand upright, R turns about the vertical alone.

    python -m mirage_min.data.align              # half of a noisy box, and the similarity that put it where it is
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .splat import Gaussians

Similarity = tuple[Tensor, Tensor, Tensor]  # s [], R [3, 3], t [3]: x_dst = s·R·x_src + t


def umeyama(src: Tensor, dst: Tensor, weights: Tensor | None = None) -> Similarity:
    """The s, R, t that minimise Σ_i w_i |dst_i - (s·R·src_i + t)|² over points [N, 3], weights [N] (Umeyama 1991)."""
    if src.shape != dst.shape or src.shape[1:] != (3,):
        raise ValueError(f"wanted two sets of points [N, 3] of one size, got {list(src.shape)} and {list(dst.shape)}")
    w = torch.ones_like(src[:, :1]) if weights is None else weights[:, None]
    w = w / w.sum()
    src_mean, dst_mean = (w * src).sum(0), (w * dst).sum(0)
    x, y = src - src_mean, dst - dst_mean
    # M = Σ w y xᵀ = U S Vᵀ,   R = U diag(1, 1, det U Vᵀ) Vᵀ
    M = y.T @ (w * x)
    U, _, Vt = torch.linalg.svd(M)
    R = U @ torch.diag(torch.stack([U.new_ones(()), U.new_ones(()), torch.linalg.det(U @ Vt).sign()])) @ Vt
    # s = tr(Rᵀ M) / Σ w |x|²,   t = ȳ - s·R·x̄
    s = (R * M).sum() / (w * x * x).sum()
    return s, R, dst_mean - s * R @ src_mean


# ---- coarse, in 3D ---------------------------------------------------------------------------------------------------

def axes(up, front) -> Tensor:
    """[3, 3]: the columns front (made level), left, up."""
    up, front = (torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in (up, front))
    up = F.normalize(up, dim=0)
    level = front - (front @ up) * up
    if not level.norm() > 1e-3 * front.norm():
        raise ValueError(f"wanted a direction that is not vertical, got {front.tolist()} where {up.tolist()} is up")
    level = F.normalize(level, dim=0)
    return torch.stack([level, torch.linalg.cross(up, level), up], dim=1)


def any_level(up) -> Tensor:
    """[3]: some direction that is not vertical: the coordinate axis farthest from `up`."""
    return torch.eye(3, dtype=torch.float64)[torch.as_tensor(up).abs().argmin()]


def points(gaussians: Gaussians, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Up to 1000 of the centres, in the frame's coordinates [N, 3], without floaters; their opacities [N]."""
    some = torch.randperm(len(gaussians), generator=torch.Generator().manual_seed(0))[:1000]
    x = gaussians.means.detach().cpu()[some].double() @ frame
    gap = torch.cdist(x, x).kthvalue(min(8, len(x)), dim=1).values if len(x) else x[:, 0]
    near = gap <= 3 * gap.median()  # a floater's neighbours are farther, those on a sparse side of the object are not
    if near.sum() < 16:
        raise ValueError(f"wanted at least 16 Gaussians to align, got {len(x)}, of which {int((~near).sum())} float")
    return x[near], gaussians.logit_opacities.detach().cpu()[some][near].double().sigmoid()


def middle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [3] and extent [3] of points' box, 3 % of them left out at either end of every axis."""
    low, high = x.quantile(x.new_tensor([0.03, 0.97]), dim=0)
    return (low + high) / 2, high - low


def long_axis(x: Tensor, w: Tensor) -> float:
    """The angle, up to 180°, of the level direction in which points extend most: of their weighted second moments."""
    p, q = (x - middle(x)[0])[:, :2].T
    return torch.atan2(2 * (w * p * q).sum(), (w * (p * p - q * q)).sum()).item() / 2


def upright(angle: float) -> Tensor:
    """[3, 3]: a turn about the third axis."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def refine(src: Tensor, dst: Tensor, w: Tensor, start: Similarity, steps: int = 12) -> tuple[Similarity, Tensor]:
    """Draw dst onto the surface that src is a sample of: Gauss-Newton on the distances along that surface's normals.

    -> the similarity, and its robust chamfer distance, with one half of src: the other may lie where dst was never seen
    """
    around = src[torch.cdist(src, src).topk(12, largest=False).indices]
    around = around - around.mean(1, keepdim=True)
    spread, directions = torch.linalg.eigh(around.mT @ around)
    normals, flat = directions[:, :, 0], 1 - spread[:, 0] / spread[:, 1].clamp(min=1e-12)  # no trust in edges
    s, R, t = start
    for _ in range(steps):
        x = s * src @ R.T + t
        gap, j = torch.cdist(dst, x).min(1)
        x, n = x[j], normals[j] @ R.T
        # Geman and McClure: weights w / (1 + (gap / 2 median)²)²
        root = flat[j] * w.sqrt() / (1 + (gap / (2 * gap.median() + 1e-9)).square())
        # n·(x + θ ẑ×(x - c) + σ (x - c) + τ) = n·dst, by least squares in θ, σ, τ
        c = x.mean(0)
        (a, b, _), r = (x - c).T, (n * (dst - x)).sum(1)
        J = torch.cat([torch.stack([n[:, 1] * a - n[:, 0] * b, (n * (x - c)).sum(1)], dim=1), n], dim=1)
        theta, sigma, *tau = torch.linalg.lstsq(root[:, None] * J, (root * r)[:, None]).solution[:, 0]
        Q = upright(theta.item())
        s, R, t = s * (1 + sigma), Q @ R, (1 + sigma) * Q @ (t - c) + c + torch.stack(tau)
    d = torch.cdist(dst, s * src @ R.T + t)
    there, back = ((gap / 0.03 / middle(dst)[1].norm()).square() for gap in (d.amin(1), d.amin(0)))
    back = back[back <= back.median()]
    return (s, R, t), (w * there / (1 + there)).sum() / w.sum() + (back / (1 + back)).mean()


def coarse_3d(asset: Gaussians, obj: Gaussians, heading=None, up=(0, -1, 0), asset_up=(0, -1, 0),
              asset_front=(0, 0, 1)) -> Similarity:
    """The similarity that puts the asset where the object is -> s [], R [3, 3], t [3], as the object's means.

    heading [3]: where the object's front points in the world, from its track, right to less than 90°. Without it the
    shapes alone tell front from rear. up is the world's; asset_up and asset_front are in the asset's own coordinates.
    The defaults are OpenCV's y down and a front towards z; an asset with z up has asset_up=(0, 0, 1).
    """
    A, B = axes(asset_up, asset_front), axes(up, any_level(up) if heading is None else heading)
    (src, _), (dst, w) = points(asset, A), points(obj, B)
    # robust moments; the extent is that of the height, which is whole where one side is missing
    (src_middle, src_size), (_, dst_size), one = middle(src), middle(dst), torch.ones_like(src[:, 0])
    s, turn = dst_size[2] / src_size[2], long_axis(dst, w) - long_axis(src, one)
    turn = (turn + math.pi / 2) % math.pi - math.pi / 2  # the heading is the first axis now: front is within 90° of it
    found = []
    for angle, along in ((turn, 0), (turn - 0.35, 0), (turn + 0.35, 0), (0, 0), (turn, -0.2), (turn, 0.2)):
        for Q in [upright(angle)] + [upright(angle + math.pi)] * (heading is None):
            # an end of the object may be missing: the middle may lie farther along the asset's length
            t = Q @ (middle(dst @ Q)[0] + along * s * src_size * src_size.new_tensor([1, 0, 0]) - s * src_middle)
            found.append(refine(src[:250], dst[:250], w[:250], (s, Q, t)))
    (s, R, t), _ = refine(src, dst, w, min(found, key=lambda pair: pair[1])[0])
    if not s > 0:
        raise ValueError(f"asset and object cannot be aligned: the scale became {s.item():.3g}")
    return tuple(v.to(obj.means) for v in (s, B @ R @ A.T, B @ t))


# ---- fine, in the image ----------------------------------------------------------------------------------------------

def fine_2d(boxes_rendered: Tensor, boxes_gt: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """One scaling and one displacement for a whole video: ((sx, sy), (dx, dy)).

    Boxes [T, 4] are x0, y0, x1, y1 in pixels; frames where one is empty do not count. A frame's box is scaled about its
    own centre, then moved by (dx, dy) pixels.
    """
    (c, size), (c_gt, size_gt) = centres(boxes_rendered), centres(boxes_gt)
    both = (size > 0).all(1) & (size_gt > 0).all(1)
    if not both.any():
        raise ValueError("no frame has both a rendered and an annotated box")
    # (sx, sy) = mean over t of size_gt / size,   (dx, dy) = mean over t of c_gt - c
    # DEVIATION: the paper averages differences; those of sizes would depend on the distance, ratios do not
    return tuple((size_gt / size)[both].mean(0).tolist()), tuple((c_gt - c)[both].mean(0).tolist())


def mask_box(alpha: Tensor) -> Tensor:
    """The box [4] x0, y0, x1, y1 (edges, in pixels) of what of a mask [H, W] is at least 0.5; zeros if nothing is."""
    ys, xs = (alpha >= 0.5).nonzero(as_tuple=True)
    if len(ys) == 0:
        return torch.zeros(4)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float().cpu()


def centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 4] -> centres [..., 2] and sizes [..., 2]"""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def move_boxes(boxes: Tensor, scale: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """What fine_2d found, applied to boxes [..., 4]."""
    c, size = centres(boxes)
    c, half = c + c.new_tensor(shift), size * c.new_tensor(scale) / 2
    return torch.cat([c - half, c + half], dim=-1)


def apply_fine(image: Tensor, box: Tensor, scale: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """What fine_2d found, applied to a rendered layer [C, H, W] whose box [4] is x0, y0, x1, y1; zeros from outside.

    Bilinear. Colours must be premultiplied by alpha, as they are when rendered over black.
    """
    H, W = image.shape[-2:]
    # the pixel at p shows what was at c + (p - d - c) / s
    u, v = ((c + (torch.arange(n).to(image) + 0.5 - d - c) / s) * 2 / n - 1
            for n, c, s, d in zip((W, H), centres(box)[0].tolist(), scale, shift))
    grid = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)
    return F.grid_sample(image[None], grid[None], padding_mode="zeros", align_corners=False)[0]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] -> [...]; 0 for empty ones."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = centres(a)[1].clamp(min=0).prod(-1) + centres(b)[1].clamp(min=0).prod(-1) - inside
    return torch.where(union > 0, inside / union.where(union > 0, 1), 0)


if __name__ == "__main__":
    draws = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(3000, 3, generator=draws) - 1
    x = x / x.abs().amax(1, keepdim=True) * torch.tensor([0.9, 0.7, 2.2])      # the surface of a box
    x[(x[:, 2] > 0.9) & (x[:, 1] < 0), 1] = 0                                  # with a hood
    asset, seen = x[:1500], x[1500:][x[1500:] @ torch.tensor([1.0, -0.5, 1.0]) > 0]
    seen = seen + 0.03 * torch.randn(seen.shape, generator=draws)
    R = axes((0, -1, 0), (0.6, 0, 0.8)) @ axes((0, -1, 0), (0, 0, 1)).T
    seen = 2.5 * seen @ R.T.float() + torch.tensor([10.0, 0, 30])
    asset, seen = (Gaussians(p, 0 * p, F.pad(p, (1, 0), value=1), 2 + 0 * p[:, 0], p[:, None]) for p in (asset, seen))
    s, Q, t = coarse_3d(asset, seen, heading=(1, 0, 1))
    front = Q[:, 2].tolist()
    print(f"made with s 2.5,   front (0.60, 0, 0.80), t (10, 0, 30)\n"
          f"found     s {s:.3f}, front ({front[0]:.3f}, {front[1]:.3f}, {front[2]:.3f}), t {t.tolist()}")
