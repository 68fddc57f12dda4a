"""How good a harmonised video is: PSNR, SSIM, LPIPS, DISTS and vFID (Mirage §4.1, Table 1).

    psnr(x_dr, x_gt)                                   # [B] decibels, one number for each video
    lpips(x_dr, x_gt, Lpips(Features("alex", folder)))

Videos are [B, 3, T, H, W] in [-1, 1]; nothing is resized, cropped or clamped. Each docstring states the conventions on
which published numbers differ. Videos of different shapes are a ValueError everywhere. The table's other column, the
warp error, is in optical_flow.py. Left out: the network that vFID reads its features from, which the caller brings.

    python -m mirage_min.method.metrics                # PSNR, SSIM, warp error on a moving video; vFID's closed form
"""

import math
import warnings
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as nnf

from .perceptual import Dists, Lpips

# ---- frame by frame against the truth --------------------------------------------------------------------------------


@torch.no_grad()
def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB -> [B]: 10 log10(range² / MSE_t) of each frame, then the mean over frames.

    The range is 2 on [-1, 1], which is 1 on [0, 1]. mask [B, 1, T, H, W], bool or weights: only those pixels count, and
    frames without any are left out (no such pixel in a whole video: nan). Equal frames: inf. ValueError if x, y and
    mask do not match.
    """
    _same_videos(x, y)
    mask = torch.ones_like(x[:, :1]) if mask is None else mask.to(x.device)
    if mask.shape != x[:, :1].shape:
        raise ValueError(f"wanted a mask {list(x[:, :1].shape)}, got {list(mask.shape)}")
    weights = mask.double().expand_as(x)
    # MSE_t = Σ_p m_p (x_p − y_p)² / Σ_p m_p,   PSNR_t = 10 log10(2² / MSE_t)
    mse = (weights * (x.double() - y.double()).square()).sum(dim=(1, 3, 4)) / weights.sum(dim=(1, 3, 4))
    counted = weights.sum(dim=(1, 3, 4)) > 0
    decibels = torch.where(counted, 10 * torch.log10(4 / mse), 0)  # not a product: a frame without pixels is nan
    return (decibels.sum(dim=1) / counted.sum(dim=1)).float()


@torch.no_grad()
def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) -> [B], 1 for equal videos: mean over pixels, channels and frames.

    An 11×11 Gaussian window with σ 1.5, each colour channel by itself, only windows that lie wholly inside the frame.
    Equals scikit-image with gaussian_weights=True, sigma=1.5, use_sample_covariance=False. ValueError if x and y do not
    match or a frame is smaller than the window.
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
    """LPIPS v0.1 of each frame at its own size, mean over frames, of videos x, y [B, 3, T, H, W] in [-1, 1] -> [B].

    0 for equal videos, and the lower the nearer. The field evaluates with alex. ValueError if x and y do not match.
    """
    return per_video(model, x, y)


@torch.no_grad()
def dists(x: Tensor, y: Tensor, model: Dists) -> Tensor:
    """DISTS of each frame at its own size (no resize to 256), mean over frames, of videos x, y as for lpips -> [B].

    0 for equal videos, and the lower the nearer. ValueError if x and y do not match.
    """
    return per_video(model, x, y)


def per_video(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, pixels: int = 2**21) -> Tensor:
    """Mean over its frames of `distance(frames_x, frames_y) -> [N]`, for videos x, y [B, 3, T, H, W] -> [B].

    Frames go through in micro-batches of at most `pixels` pixels (but one frame at least), so memory does not grow with
    the clip. ValueError if x and y do not match.
    """
    _same_videos(x, y)
    B, C, T, H, W = x.shape
    n = max(1, pixels // (H * W))
    xs, ys = (rearrange(v, "b c t h w -> (b t) c h w").split(n) for v in (x, y))
    distances = torch.cat([distance(frames_x, frames_y) for frames_x, frames_y in zip(xs, ys, strict=True)])
    return rearrange(distances, "(b t) -> b t", b=B).mean(dim=1)


def _same_videos(x: Tensor, y: Tensor) -> None:
    if x.ndim != 5 or x.shape != y.shape:
        raise ValueError(f"wanted two videos [B, 3, T, H, W] of one shape, got {list(x.shape)} and {list(y.shape)}")


def actor_crops(boxes: Tensor, H: int, W: int) -> list[tuple[slice, slice] | None]:
    """Rows and columns of each frame's actor-centric crop; None where no part of the actor's box lies in the frame.

    boxes [T, 4]: x0, y0, x1, y1 in pixels, all zeros for a hidden actor; H and W are the frame's. Mirage §4.1 says
    "actor-centric crops" and no more. Here each video has one window, as large as the actor's largest box and a quarter
    of it on every side, at least 32 pixels (LPIPS' networks need 31). It follows the centre of the box and is pushed
    inside the frame.
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


# ---- distributions ---------------------------------------------------------------------------------------------------

def frechet(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians with means [d] and covariances [d, d], in float64.

    d² = |μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½). Finite and real where a covariance lacks rank, as it does for fewer
    clips than features: eigenvalues that rounding has made negative count as 0.
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

    A covariance estimated from n clips has rank n - 1 at most, and the fewer the clips, the more the distance is
    overestimated: with n ≤ d a warning says so. Compare only figures at equal n and of one network. ValueError unless
    both sets have 2 clips at least and features of one size.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"wanted features [n, d] of 2 clips at least on both sides, got {list(a.shape)} and "
                         f"{list(b.shape)}: one clip has no covariance")
    n, d = min(len(a), len(b)), a.shape[1]
    if n <= d:
        warnings.warn(f"vFID of {d} features from {n} clips: the covariance has rank {n - 1} at most; compare only "
                      f"with figures from as many clips", stacklevel=2)
    a, b = a.double(), b.double()
    return frechet(a.mean(dim=0), a.T.cov().view(d, d), b.mean(dim=0), b.T.cov().view(d, d))


@torch.no_grad()
def clip_features(network: Callable[[Tensor], Tensor], x: Tensor, shortest: int = 10) -> Tensor:
    """One feature a clip: network(x [B, 3, T, H, W] in [-1, 1]) -> [B, d].

    I3D's strides need `shortest` frames: a shorter clip is played forwards and backwards until it has that many, so 9
    frames become 0 … 8, 7. Any resizing is the network's own. ValueError if the network gives anything but [B, d].
    """
    T = x.shape[2]
    period = max(1, 2 * (T - 1))
    there_and_back = [min(t % period, period - t % period) for t in range(max(T, shortest))]
    features = network(x[:, :, there_and_back])
    if features.ndim != 2 or len(features) != len(x):
        raise ValueError(f"wanted features [{len(x)}, d] of {len(x)} clips, the network gave {list(features.shape)}")
    return features


if __name__ == "__main__":
    from .optical_flow import warp_error

    torch.manual_seed(0)
    canvas = nnf.interpolate(torch.rand(1, 3, 24, 32), (96, 128), mode="bicubic").clamp(0, 1) * 2 - 1
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
