"""How good a harmonised video is: PSNR, SSIM, LPIPS, DISTS, warp error and vFID (Mirage §4.1, Table 1).

    psnr(x_dr, x_gt)                                   # [B] decibels, one number for each video
    lpips(x_dr, x_gt, Lpips(Features("alex", folder)))
    forward, backward = flow_dis(x_gt), flow_dis(x_gt.flip(2)).flip(2)
    warp_error(x_dr, forward, visible_by_consistency(forward, backward))

    python -m mirage_min.method.metrics                # PSNR, SSIM, warp error on a moving video; vFID's closed form

Videos are [B, 3, T, H, W] in [-1, 1]; nothing is resized, cropped or clamped. Each docstring states the conventions on
which published numbers differ. Not here: the network behind vFID, which the caller brings.
"""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mirage_min.method.perceptual import Dists, Lpips, per_video

# ---- frame by frame against the truth --------------------------------------------------------------------------------


@torch.no_grad()
def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB -> [B]: 10 log10(range² / MSE_t) of each frame, then the mean over frames.

    The range is 2 on [-1, 1], which is 1 on [0, 1]. mask [B, 1, T, H, W], bool or weights: only those pixels count, and
    frames without any are left out (no such pixel in a whole video: nan). Equal frames: inf.
    """
    _same_videos(x, y)
    mask = torch.ones_like(x[:, :1]) if mask is None else mask.to(x.device)
    if mask.shape != x[:, :1].shape:
        raise ValueError(f"wanted a mask {list(x[:, :1].shape)}, got {list(mask.shape)}")
    weights = mask.double().expand_as(x)
    # MSE_t = Σ_p m_p (x_p − y_p)² / Σ_p m_p,   PSNR_t = 10 log10(2² / MSE_t)
    mse = (weights * (x.double() - y.double()).square()).sum(dim=(1, 3, 4)) / weights.sum(dim=(1, 3, 4))
    return _mean(10 * torch.log10(4 / mse), weights.sum(dim=(1, 3, 4)) > 0)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Of the values [B, n] those that count, their mean [B]; nan if there are none, or one of them is."""
    return (torch.where(counts, values, 0).sum(dim=1) / counts.sum(dim=1)).float()


@torch.no_grad()
def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) -> [B], 1 for equal videos: mean over pixels, channels and frames.

    An 11×11 Gaussian window with σ 1.5, each colour channel by itself, only windows that lie wholly inside the frame.
    Equals scikit-image with gaussian_weights=True, sigma=1.5, use_sample_covariance=False.
    """
    _same_videos(x, y)
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window needs frames of 11×11 pixels at least, got {list(x.shape)}")
    return per_video(_ssim_of_frames, x, y, pixels=2**19).float()


def _ssim_of_frames(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of frames [N, 3, H, W] -> [N]."""
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2  # flat patches have variances that float32 would cancel away
    c1, c2 = 0.01**2, 0.03**2
    rows, columns = (_gaussian_band(n, x) for n in x.shape[-2:])
    # A Gaussian window is separable, and as a pair of banded matrices twice as fast as a float64 convolution.
    mx, my, xx, yy, xy = (rows @ m @ columns.T for m in (x, y, x * x, y * y, x * y))
    # SSIM = (2 μx μy + c1)(2 σxy + c2) / ((μx² + μy² + c1)(σx² + σy² + c2))                        Wang et al. Eq. 13
    numerator = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    denominator = (mx.square() + my.square() + c1) * (xx - mx.square() + yy - my.square() + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def _gaussian_band(n: int, like: Tensor) -> Tensor:
    """[n - 10, n]: row i averages positions i … i + 10 with the weights of a Gaussian."""
    window = torch.exp(-torch.arange(-5, 6, dtype=like.dtype, device=like.device).square() / (2 * 1.5**2))
    band = torch.zeros(n - 10, n, dtype=like.dtype, device=like.device)
    for i, weight in enumerate(window / window.sum()):
        band.diagonal(i).fill_(weight)
    return band


@torch.no_grad()
def lpips(x: Tensor, y: Tensor, model: Lpips) -> Tensor:
    """LPIPS v0.1 of each frame at its own size, mean over frames -> [B]. The field evaluates with alex."""
    return per_video(model, x, y)


@torch.no_grad()
def dists(x: Tensor, y: Tensor, model: Dists) -> Tensor:
    """DISTS of each frame at its own size (no resize to 256), mean over frames -> [B]."""
    return per_video(model, x, y)


def _same_videos(x: Tensor, y: Tensor) -> None:
    if x.ndim != 5 or x.shape != y.shape:
        raise ValueError(f"wanted two videos [B, 3, T, H, W] of one shape, got {list(x.shape)} and {list(y.shape)}")


def actor_crops(boxes: Tensor, H: int, W: int) -> list[tuple[slice, slice] | None]:
    """Rows and columns of each frame's actor-centric crop; None where no part of the actor's box lies in the frame.

    boxes [T, 4]: x0, y0, x1, y1 in pixels, all zeros for a hidden actor. Mirage §4.1 says "actor-centric crops" and no
    more. Here one window a video, as large as the actor's largest box and a quarter of it on every side, 32 pixels at
    least (LPIPS' networks need 31), follows the centre of the box and is pushed inside the frame.
    """
    boxes = torch.minimum(boxes.double().clamp_min(0), torch.tensor([W, H, W, H]))
    low, high = boxes[:, :2], boxes[:, 2:]
    shown = (high > low).all(dim=1)
    largest = ((high - low) * shown[:, None]).amax(dim=0) * 1.5
    w, h = (min(max(math.ceil(side), 32), limit) for side, limit in zip(largest.tolist(), (W, H)))
    corners = (((low + high - torch.tensor([w, h])) / 2).round().clamp_min(0)).minimum(torch.tensor([W - w, H - h]))
    return [(slice(y, y + h), slice(x, x + w)) if seen else None
            for (x, y), seen in zip(corners.long().tolist(), shown.tolist())]


def cropped(x: Tensor, crops: list[tuple[slice, slice] | None]) -> Tensor:
    """The crops of a video [B, C, T, H, W], a window for each frame (actor_crops) -> [B, C, T', h, w], frames without
    one left out. ValueError if none has one."""
    if not any(crops):
        raise ValueError("no frame has a crop: the actor is hidden all the time")
    return torch.stack([x[:, :, t][(..., *crop)] for t, crop in enumerate(crops) if crop], dim=2)


# ---- stability over time ---------------------------------------------------------------------------------------------

def warp(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch x [B, C, H, W] along flow [B, 2, H, W]: y(p) = x(p + flow(p)), bilinear.

    flow is in pixels, first to the right, then down. Returns y in float64 and inside [B, 1, H, W], true where
    p + flow(p) falls between the pixel centres of the frame.
    """
    H, W = x.shape[-2:]
    u = flow[:, 0].double() + torch.arange(W, device=x.device)
    v = flow[:, 1].double() + torch.arange(H, device=x.device)[:, None]
    inside = (u >= 0) & (u <= W - 1) & (v >= 0) & (v <= H - 1)
    grid = torch.stack([(2 * u + 1) / W - 1, (2 * v + 1) / H - 1], dim=-1)  # [B, H, W, 2]
    y = F.grid_sample(x.double(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return y, inside[:, None]


@torch.no_grad()
def visible_by_consistency(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of frame t still seen in t + 1 -> bool [B, 1, T-1, H, W], from optical flow both ways.

    forward[:, :, t] [B, 2, T-1, H, W] leads from frame t to t + 1, backward[:, :, t] from t + 1 to t. Going and coming
    back must end near the start: |w(p) + w'(p + w(p))|² < 0.01 (|w(p)|² + |w'(p + w(p))|²) + 0.5, with w forward and w'
    backward fetched along it (Sundaram et al. 2010, with their constants). Points that leave the frame are not seen.
    """
    if forward.shape != backward.shape or forward.shape[2] < 1:
        raise ValueError(f"wanted two flows [B, 2, T-1, H, W] of T ≥ 2, got {list(forward.shape)} and "
                         f"{list(backward.shape)}")
    visible = []
    for w, w_back in zip(forward.unbind(dim=2), backward.unbind(dim=2), strict=True):
        back, inside = warp(w_back, w)
        w = w.double()
        gap, length = ((w + back).square().sum(dim=1), (w.square() + back.square()).sum(dim=1))
        # |w(p) + w'(p + w(p))|² < 0.01 (|w|² + |w'|²) + 0.5
        visible.append(inside & (gap < 0.01 * length + 0.5)[:, None])
    return torch.stack(visible, dim=2)


@torch.no_grad()
def warp_error(x: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """Flow warping error E*_warp of videos x -> [B], already × 10³: tables write 1.2 for a mean square of 0.0012.

    flow [B, 2, T-1, H, W] leads from the pixels of frame t to t + 1, in pixels (right, down); frame t + 1 is fetched
    back along it and compared with frame t. Mirage takes the flow of the ground truth, not of x. visible
    [B, 1, T-1, H, W]: where frame t's point is still seen in t + 1; points that leave the frame never count. Squared
    difference on the [0, 1] scale, mean over visible pixels and channels of a pair, then over pairs; a pair with
    nothing visible is left out (nothing visible at all: nan).
    """
    B, C, T, H, W = x.shape
    if T < 2 or flow.shape != (B, 2, T - 1, H, W) or visible.shape != (B, 1, T - 1, H, W):
        raise ValueError(f"wanted T ≥ 2, flow [B, 2, T-1, H, W] and visible [B, 1, T-1, H, W] for a video "
                         f"{list(x.shape)}, got {list(flow.shape)} and {list(visible.shape)}")
    errors, counts = [], []
    for t in range(T - 1):
        warped, inside = warp(x[:, :, t + 1], flow[:, :, t])
        seen = inside & visible[:, :, t].bool()
        squares = (seen * ((x[:, :, t] - warped) / 2).square()).sum(dim=(1, 2, 3))
        # E_t = Σ_p m(p) ‖x_t(p) − x_{t+1}(p + w_t(p))‖² / (C Σ_p m(p))                                  Lai et al. 2018
        counts.append(seen.sum(dim=(1, 2, 3)))
        errors.append(squares / (C * counts[-1]))
    return _mean(1e3 * torch.stack(errors, dim=1), torch.stack(counts, dim=1) > 0)


@torch.no_grad()
def flow_dis(x: Tensor) -> Tensor:
    """Optical flow of real clips by OpenCV's DIS: x [B, 3, T, H, W] -> [B, 2, T-1, H, W], frame t to t + 1, in pixels.

    The flow back, from t + 1 to t, is flow_dis(x.flip(2)).flip(2).
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("flow_dis needs OpenCV: pip install opencv-python-headless") from error
    if x.shape[2] < 2 or min(x.shape[3:]) < 12:
        raise ValueError(f"flow_dis wants videos [B, 3, T, H, W] of 2 frames of 12×12 at least, got {list(x.shape)}")
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    luma = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1, 1)
    grey = (((x + 1) * 127.5).clamp(0, 255) * luma).sum(dim=1).round().byte().cpu().numpy()     # [B, T, H, W]
    flows = [torch.stack([torch.from_numpy(dis.calc(a, b, None)) for a, b in pairwise(v)]) for v in grey]
    return rearrange(flows, "B t H W uv -> B uv t H W").to(x.device)


# ---- distributions ---------------------------------------------------------------------------------------------------

def frechet(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians with means [d] and covariances [d, d], in float64.

    d² = |μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½). Finite and real where a covariance lacks rank (negative eigenvalues of
    rounding count as 0), as it does for fewer clips than features.
    """
    mu1, cov1, mu2, cov2 = (a.double() for a in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # tr (C1 C2)^½ = tr (C1^½ C2 C1^½)^½: the right side is symmetric, so nothing turns complex where rank is missing.
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    # d² = |μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½)                                             Dowson and Landau 1982
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def vfid(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of clip features [n_a, d] and [n_b, d], one row a clip.

    A covariance estimated from n clips has rank n - 1 at most, and the distance is biased upwards the more the fewer
    they are: with n ≤ d a warning says so, and only figures at equal n and equal network may be compared.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"wanted features [n, d] of 2 clips at least on both sides, got {list(a.shape)} and "
                         f"{list(b.shape)}: one clip has no covariance")
    n, d = min(len(a), len(b)), a.shape[1]
    if n <= d:
        warnings.warn(f"vFID of {d} features from {n} clips: the covariance has rank {n - 1} at most; compare only "
                      f"with figures from as many clips", stacklevel=2)
    a, b = a.double(), b.double()
    return frechet(a.mean(dim=0), a.T.cov(), b.mean(dim=0), b.T.cov())


@torch.no_grad()
def clip_features(network: Callable[[Tensor], Tensor], x: Tensor, shortest: int = 10) -> Tensor:
    """One feature a clip: network(x [B, 3, T, H, W] in [-1, 1]) -> [B, d].

    Clips shorter than `shortest` frames, which I3D's strides need, are played to and fro until they have that many: 9
    frames become 0 … 8, 7. Any resizing is the network's own.
    """
    T = x.shape[2]
    period = max(1, 2 * (T - 1))
    there_and_back = [min(t % period, period - t % period) for t in range(max(T, shortest))]
    features = network(x[:, :, there_and_back])
    if features.ndim != 2 or len(features) != len(x):
        raise ValueError(f"wanted features [{len(x)}, d] of {len(x)} clips, the network gave {list(features.shape)}")
    return features


if __name__ == "__main__":
    torch.manual_seed(0)
    canvas = F.interpolate(torch.rand(1, 3, 24, 32), (96, 128), mode="bicubic").clamp(0, 1) * 2 - 1
    truth = torch.stack([canvas[:, :, t : t + 64, 2 * t : 2 * t + 96] for t in range(9)], dim=2)
    flow = torch.tensor([-2.0, -1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 64, 96)
    visible = torch.ones(1, 1, 8, 64, 96)
    flicker = 0.1 * torch.tensor([1.0, -1.0] * 4 + [1.0]).view(1, 1, 9, 1, 1)
    candidates = {
        "the truth": truth,
        "noise, new in each frame": truth + 0.1 * torch.randn_like(truth),
        "one steady colour cast": truth + 0.1 * torch.randn(1, 3, 1, 1, 1),
        "flicker": truth + flicker,
        "one frame late": truth.roll(1, dims=2),
    }
    print(f"{'':28}   PSNR   SSIM  warp × 10³")
    for name, x in candidates.items():
        print(f"{name:28} {psnr(x, truth).item():6.2f} {ssim(x, truth).item():6.3f} "
              f"{warp_error(x, flow, visible).item():11.3f}")
    a = torch.randn(4000, 8, dtype=torch.float64)
    print(f"vFID of N(0, 1) and N(0.5, 1) in 8 dimensions: {vfid(a, a + 0.5):.4f}, closed form {8 * 0.25}")
