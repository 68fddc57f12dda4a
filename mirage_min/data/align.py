"""Two-stage alignment of a generated asset to the object whose place it takes (Mirage §3.3, §8.3).

    s, R, t = coarse_3d(asset, obj, heading)              # x_dst = s·R·x_src + t, from two sets of Gaussians
    scale, shift = fine_2d(boxes_rendered, boxes_gt)      # the rest, by boxes: one affine map for the whole video
    boxes = move_boxes(boxes_rendered, scale, shift)      # build_pairs.py moves the camera by the same map

The paper says what is matched, not how. A reconstructed object is noisy, has floaters and was often seen from one side
only; the asset is whole and uniform. So the coarse stage draws the object's points onto the asset's surface, and parts
of the asset that the object lacks do not matter. DEVIATION: both are taken to be upright: R turns about the vertical.

    python -m mirage_min.data.align              # half of a noisy box, and the similarity that put it where it is
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as nnf

from .splat import Gaussians

Similarity = tuple[Tensor, Tensor, Tensor]  # s [], R [3, 3], t [3]: x_dst = s·R·x_src + t


def umeyama(src: Tensor, dst: Tensor, weights: Tensor | None = None) -> Similarity:
    """The s, R, t that minimise Σ_i w_i |dst_i - (s·R·src_i + t)|² over points [N, 3], weights [N] (Umeyama 1991).

    This closed form needs a counterpart for every point. An asset and an object have none, so coarse_3d does not use
    it; the tests do, to find a true similarity. ValueError unless src and dst are [N, 3] of one N.
    """
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
    """The directions up [3] and front [3] -> [3, 3] float64: the unit columns front (made level), left, up.

    ValueError if front is vertical.
    """
    up, front = (torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in (up, front))
    up = nnf.normalize(up, dim=0)
    level = front - (front @ up) * up
    if not level.norm() > 1e-3 * front.norm():
        raise ValueError(f"wanted a direction that is not vertical, got {front.tolist()} where {up.tolist()} is up")
    level = nnf.normalize(level, dim=0)
    return torch.stack([level, torch.linalg.cross(up, level), up], dim=1)


def any_level(up) -> Tensor:
    """[3]: some direction that is not vertical: the coordinate axis farthest from `up`."""
    return torch.eye(3, dtype=torch.float64)[torch.as_tensor(up).abs().argmin()]


def points(gaussians: Gaussians, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Up to 1000 of the centres, in the frame's coordinates [N, 3], without floaters; their opacities [N].

    frame [3, 3]: its axes as columns. ValueError if fewer than 16 are left.
    """
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
    """The angle, in radians and up to half a turn, of the level direction in which points [N, 3] extend most.

    Of all level directions d it has the largest Σ w (d·(x - c))², with weights w [N] and c the centre of middle(x).
    """
    p, q = (x - middle(x)[0])[:, :2].T
    return torch.atan2(2 * (w * p * q).sum(), (w * (p * p - q * q)).sum()).item() / 2


def upright(angle: float) -> Tensor:
    """The rotation [3, 3] by an angle in radians about the third axis."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def surface_normals(x: Tensor) -> tuple[Tensor, Tensor]:
    """The surface that points x [N, 3] sample: at each, its normal [N, 3], of either sign, and its flatness [N].

    Both come from the 12 nearest points, itself among them. Along the normal they spread least; with
    λ1 <= λ2 <= λ3 the eigenvalues of their scatter, flatness is 1 - λ1 / λ2: 1 on a plane, small at edges.
    """
    around = x[torch.cdist(x, x).topk(12, largest=False).indices]              # [N, 12, 3]
    around = around - around.mean(1, keepdim=True)
    spread, directions = torch.linalg.eigh(around.mT @ around)                 # λ [N, 3], rising; their axes [N, 3, 3]
    return directions[:, :, 0], 1 - spread[:, 0] / spread[:, 1].clamp(min=1e-12)


def step_onto_planes(x: Tensor, n: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How points x [N, 3] turn, grow and move to cover the distances r [N] along their normals n [N, 3]; weights w [N].

    -> the θ [] (radians, about the third axis), σ [] and τ [3] of least Σ w_i² (n_i·(θ ẑ×x_i + σ x_i + τ) - r_i)²:
    one step of Gauss-Newton, for θ ẑ×x + σ x + τ is the motion (1 + σ) R(θ) x + τ - x to first order.
    """
    a, b, _ = x.T
    turn = n[:, 1] * a - n[:, 0] * b                                           # n·(ẑ×x)
    growth = (n * x).sum(1)
    J = torch.cat([turn[:, None], growth[:, None], n], dim=1)                  # [N, 5]: d(n·motion) / d(θ, σ, τ)
    theta, sigma, *tau = torch.linalg.lstsq(w[:, None] * J, (w * r)[:, None]).solution[:, 0]
    return theta, sigma, torch.stack(tau)


def refine(src: Tensor, dst: Tensor, w: Tensor, start: Similarity, steps: int = 12) -> Similarity:
    """Draw dst [M, 3], weights w [M], onto the surface that src [N, 3] is a sample of: Gauss-Newton from `start`.

    In each step a point of dst looks for the nearest of src as it lies now; what counts is the distance along that
    one's normal, so that dst may slide along the surface. step_onto_planes takes the nearest points about their mean c,
    with weights flatness · √w / (1 + (gap / 2 median)²), gap being the distance to the nearest: edges and outliers
    count for little. Then x becomes (1 + σ) R(θ) (x - c) + c + τ.
    """
    normals, flat = surface_normals(src)
    s, R, t = start
    for _ in range(steps):
        x = s * src @ R.T + t
        gap, nearest = torch.cdist(dst, x).min(1)
        x, n = x[nearest], normals[nearest] @ R.T
        # squared in the sum, w / (1 + (gap / 2 median)²)²: Geman and McClure 1987
        root = flat[nearest] * w.sqrt() / (1 + (gap / (2 * gap.median() + 1e-9)).square())
        c = x.mean(0)
        theta, sigma, tau = step_onto_planes(x - c, n, (n * (dst - x)).sum(1), root)
        # x -> (1 + σ) R(θ) (x - c) + c + τ
        Q = upright(theta.item())
        s, R = s * (1 + sigma), Q @ R
        t = (1 + sigma) * Q @ (t - c) + c + tau
    return s, R, t


def misfit(src: Tensor, dst: Tensor, w: Tensor, similarity: Similarity) -> Tensor:
    """The robust chamfer distance [] of dst, weights w, and the moved src, by which starts are compared.

    The unit of distance is 3 % of the object's diagonal. Of the distances from src only the smaller half count: the
    rest of the asset may lie where the object was never seen.
    """
    s, R, t = similarity
    d = torch.cdist(dst, s * src @ R.T + t) / 0.03 / middle(dst)[1].norm()
    there = d.amin(1).square()
    back = d.amin(0).square()
    back = back[back <= back.median()]
    return (w * there / (1 + there)).sum() / w.sum() + (back / (1 + back)).mean()


def coarse_3d(asset: Gaussians, obj: Gaussians, heading=None, up=(0, -1, 0), asset_up=(0, -1, 0),
              asset_front=(0, 0, 1)) -> Similarity:
    """The similarity that puts the asset where the object is -> s [], R [3, 3], t [3], as the object's means.

    heading [3]: where the object's front points in the world, from its track, right to less than 90°. Without it the
    shapes alone tell front from rear. up is the world's; asset_up and asset_front are in the asset's own coordinates.
    The defaults are OpenCV's y down and a front towards z; an asset with z up has asset_up=(0, 0, 1).
    ValueError for fewer than 16 Gaussians without floaters, flat shapes, a vertical heading, or a scale that becomes 0.
    """
    A = axes(asset_up, asset_front)
    B = axes(up, any_level(up) if heading is None else heading)
    src, _ = points(asset, A)
    dst, w = points(obj, B)
    for name, x in (("asset", src), ("object", dst)):
        if not (middle(x)[1] > 0).all():
            raise ValueError(f"asset and object cannot be aligned: the {name} has no length, width or height")
    # robust moments; the extent is that of the height, which is whole where one side is missing
    src_middle, src_size = middle(src)
    s = middle(dst)[1][2] / src_size[2]
    turn = long_axis(dst, w) - long_axis(src, torch.ones_like(src[:, 0]))
    turn = (turn + math.pi / 2) % math.pi - math.pi / 2  # the heading is the first axis now: front is within 90° of it
    length = src_size * src_size.new_tensor([1, 0, 0])
    found = []
    for angle, along in ((turn, 0), (turn - 0.35, 0), (turn + 0.35, 0), (0, 0), (turn, -0.2), (turn, 0.2)):
        for Q in [upright(angle)] + [upright(angle + math.pi)] * (heading is None):
            # an end of the object may be missing: the middle may lie farther along the asset's length
            t = Q @ (middle(dst @ Q)[0] + along * s * length - s * src_middle)
            found.append(refine(src[:250], dst[:250], w[:250], (s, Q, t)))
    best = min(found, key=lambda similarity: misfit(src[:250], dst[:250], w[:250], similarity))
    s, R, t = refine(src, dst, w, best)
    if not s > 0:
        raise ValueError(f"asset and object cannot be aligned: the scale became {s.item():.3g}")
    return tuple(v.to(obj.means) for v in (s, B @ R @ A.T, B @ t))


# ---- fine, in the image ----------------------------------------------------------------------------------------------

def fine_2d(boxes_rendered: Tensor, boxes_gt: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """One scaling and one displacement for a whole video: ((sx, sy), (dx, dy)).

    Boxes [T, 4] are x0, y0, x1, y1 in pixels; frames where one is empty do not count. A frame's box is scaled about its
    own centre, then moved by (dx, dy) pixels. ValueError if no frame has both boxes.
    """
    c, size = centres(boxes_rendered)
    c_gt, size_gt = centres(boxes_gt)
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
    """Boxes [..., 4] x0, y0, x1, y1 -> centres [..., 2] and sizes [..., 2]"""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def move_boxes(boxes: Tensor, scale: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """Boxes [..., 4], each scaled about its centre and then shifted, by what fine_2d found -> [..., 4]"""
    c, size = centres(boxes)
    c, half = c + c.new_tensor(shift), size * c.new_tensor(scale) / 2
    return torch.cat([c - half, c + half], dim=-1)


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
    asset, seen = (Gaussians(p, 0 * p, nnf.pad(p, (1, 0), value=1), 2 + 0 * p[:, 0], p[:, None]) for p in (asset, seen))
    s, Q, t = coarse_3d(asset, seen, heading=(1, 0, 1))
    front = Q[:, 2].tolist()
    print(f"made with s 2.5,   front (0.60, 0, 0.80), t (10, 0, 30)\n"
          f"found     s {s:.3f}, front ({front[0]:.3f}, {front[1]:.3f}, {front[2]:.3f}), t {t.tolist()}")
