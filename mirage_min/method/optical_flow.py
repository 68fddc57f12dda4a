"""Optical flow: warping frames along it, the pixels seen in both, the warp error of a video, and a loss on it.

    forward, backward = flow_dis(x_gt), flow_dis(x_gt.flip(2)).flip(2)
    warp_error(x_dr, forward, visible_by_consistency(forward, backward))          # the metric: Mirage §4.1, Table 1
    warp_loss(x_t, x_before, flow_back, visible)                                  # the loss: DiffusionHarmonizer Eq. 5

A flow is [.., 2, .., H, W] in pixels, first to the right, then down. Left out: networks that estimate it. flow_dis is
OpenCV's estimate for real clips; made-up scenes have an exact flow (data/toy_world.py).

    python -m mirage_min.method.optical_flow           # a moving picture fetched back, and how its flicker is measured
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as nnf


def warp(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch x [B, C, H, W] along flow [B, 2, H, W]: y(p) = x(p + flow(p)), bilinear.

    flow is in pixels, first to the right, then down. Returns y in float64, differentiable in x, and `inside`
    [B, 1, H, W], true where p + flow(p) falls between the pixel centres of the frame, and never where the flow is nan.
    ValueError if they do not match.
    """
    B, C, H, W = x.shape
    if flow.shape != (B, 2, H, W):
        raise ValueError(f"wanted a flow {[B, 2, H, W]} for frames {[B, C, H, W]}, got {list(flow.shape)}")
    u = flow[:, 0].double() + torch.arange(W, device=x.device)
    v = flow[:, 1].double() + torch.arange(H, device=x.device)[:, None]
    inside = (u >= 0) & (u <= W - 1) & (v >= 0) & (v <= H - 1)
    grid = torch.stack([(2 * u + 1) / W - 1, (2 * v + 1) / H - 1], dim=-1)  # [B, H, W, 2]
    grid = grid.nan_to_num(0.0, torch.inf, -torch.inf)  # at nan the backward of grid_sample writes to any address
    y = nnf.grid_sample(x.double(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return y, inside[:, None]


@torch.no_grad()
def visible_by_consistency(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of frame t still seen in t + 1 -> bool [B, 1, T-1, H, W], from optical flow both ways.

    forward[:, :, t] of [B, 2, T-1, H, W] leads from frame t to t + 1, backward[:, :, t] from t + 1 to t, in pixels.
    Going and coming back must end near the start: |w(p) + w'(p + w(p))|² < 0.01 (|w(p)|² + |w'(p + w(p))|²) + 0.5, with
    w forward and w' backward fetched along it (Sundaram et al. 2010, with their constants). Points that leave the frame
    are not seen. ValueError if the flows differ in shape or have no pair of frames.
    """
    if forward.shape != backward.shape or forward.shape[2] < 1:
        raise ValueError(f"wanted two flows [B, 2, T-1, H, W] of T ≥ 2, got {list(forward.shape)} and "
                         f"{list(backward.shape)}")
    visible = []
    for w, w_back in zip(forward.unbind(dim=2), backward.unbind(dim=2), strict=True):
        back, inside = warp(w_back, w)
        w = w.double()
        gap = (w + back).square().sum(dim=1)
        length = (w.square() + back.square()).sum(dim=1)
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
    nothing visible is left out (nothing visible at all: nan). ValueError if the shapes do not match.
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
    counted = torch.stack(counts, dim=1) > 0
    errors = torch.where(counted, 1e3 * torch.stack(errors, dim=1), 0)  # not a product: a pair without any is nan
    return (errors.sum(dim=1) / counted.sum(dim=1)).float()


def warp_loss(x: Tensor, other: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """Squared difference of frames x and the frames next to them, fetched along the flow -> [B].

    DiffusionHarmonizer Eq. 5: x is the enhanced frame at t, `other` the one at t - 1 (or t + 1: whatever the flow leads
    to), both [B, C, H, W]; the gradient flows into both. Mean over the pixels that are seen in both frames, sum over
    channels; 0 where there are none.

    flow     [B, 2, H, W] of the truth, from the pixels of x to those of `other`, in pixels (right, down)
    visible  [B, 1, H, W]: where the truth's point in x is also seen in `other`; points that leave the frame never count
    ValueError if the shapes do not match.
    """
    B, C, H, W = x.shape
    if other.shape != x.shape or visible.shape != (B, 1, H, W):
        raise ValueError(f"wanted frames of one shape and visible [B, 1, H, W], got {list(x.shape)}, "
                         f"{list(other.shape)} and {list(visible.shape)}")
    warped, inside = warp(other, flow)
    seen = inside & visible.bool()
    # L_temp = 1/|Ω| Σ_Ω ‖x_t(p) − x_{t−1}(p + w_t(p))‖²                                DiffusionHarmonizer Eq. 5
    squares = torch.where(seen, x - warped, 0).square().sum(dim=(1, 2, 3))
    return (squares / seen.sum(dim=(1, 2, 3)).clamp_min(1)).to(x.dtype)


@torch.no_grad()
def flow_dis(x: Tensor) -> Tensor:
    """Optical flow of real clips by OpenCV's DIS: x [B, 3, T, H, W] -> [B, 2, T-1, H, W], frame t to t + 1, in pixels.

    x is in [-1, 1]. The flow back, from t + 1 to t, is flow_dis(x.flip(2)).flip(2). ImportError where OpenCV is
    missing; ValueError for a single frame, or for frames that are too small for DIS.
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
    return rearrange(flows, "b t h w uv -> b uv t h w").to(x.device)


if __name__ == "__main__":
    torch.manual_seed(0)
    canvas = nnf.interpolate(torch.rand(1, 3, 24, 32), (96, 128), mode="bicubic").clamp(0, 1) * 2 - 1
    truth = torch.stack([canvas[:, :, t : t + 64, 2 * t : 2 * t + 96] for t in range(9)], dim=2)
    flow = torch.tensor([-2.0, -1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 64, 96)
    visible = torch.ones(1, 1, 8, 64, 96)
    fetched, inside = warp(truth[:, :, 1], flow[:, :, 0])
    gap = ((fetched - truth[:, :, 0]).abs() * inside).max()
    print(f"frame 1 fetched back along the flow is frame 0: largest difference {gap:.0e} where it lies in the frame")
    for size in (0.0, 0.05, 0.1):
        x = truth + size * torch.tensor([1.0, -1.0] * 4 + [1.0]).view(1, 1, 9, 1, 1)
        loss = warp_loss(x[:, :, 0], x[:, :, 1], flow[:, :, 0], visible[:, :, 0]).item()
        print(f"flicker of ±{size:.2f}: warp error × 10³ {warp_error(x, flow, visible).item():6.2f}, loss {loss:.3f}")
