"""Optical flow, the warp error and the warp loss against loops, closed forms and exact motion."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method.optical_flow import flow_dis, visible_by_consistency, warp, warp_error, warp_loss
from tests.small import unchanged


def test_warp_equals_bilinear_interpolation_in_loops():
    torch.manual_seed(0)
    H, W = 5, 7
    x, flow = torch.rand(1, 2, H, W, dtype=torch.float64), 2 * torch.randn(1, 2, H, W, dtype=torch.float64)
    flow[0, :, 0, 0] = 0
    flow[0, :, 1, 1] = torch.tensor([W - 2.0, H - 2.0])  # exactly the last pixel
    for k, (u, v) in enumerate([(W - 0.6, 1.0), (1.0, H - 0.6), (W, 1.0), (1.0, H), (-0.4, 1.0), (1.0, -0.4)]):
        flow[0, :, 2, k] = torch.tensor([u - k, v - 2.0])  # half a pixel and one beyond each border: outside
    wanted = warp_in_loops(x[0], flow[0])
    with unchanged(x, flow):
        y, inside = warp(x, flow)
    for i in range(H):
        for j in range(W):
            assert inside[0, 0, i, j].item() == (wanted[i][j] is not None), f"inside at {(i, j)}"
            if inside[0, 0, i, j]:
                difference = (wanted[i][j] - y[0, :, i, j]).abs().max().item()
                assert difference <= 1e-12, f"at {(i, j)}: difference {difference:.1e} > 1e-12"
    with pytest.raises(ValueError, match=r"wanted a flow \[1, 2, 5, 7\] .*, got \[1, 2, 5, 6\]"):
        warp(x, flow[..., :6])


def warp_in_loops(x: torch.Tensor, flow: torch.Tensor) -> list[list]:
    """x [C, H, W] at p + flow(p) for every pixel p, by four neighbours; None where that is outside the frame."""
    C, H, W = x.shape
    out = [[None] * W for _ in range(H)]
    for i in range(H):
        for j in range(W):
            u, v = j + flow[0, i, j].item(), i + flow[1, i, j].item()
            if 0 <= u <= W - 1 and 0 <= v <= H - 1:
                a, b = min(int(u), W - 2), min(int(v), H - 2)
                top = (a + 1 - u) * x[:, b, a] + (u - a) * x[:, b, a + 1]
                bottom = (a + 1 - u) * x[:, b + 1, a] + (u - a) * x[:, b + 1, a + 1]
                out[i][j] = (b + 1 - v) * top + (v - b) * bottom
    return out


def moving_ramp(T: int, H: int, W: int, du: float, dv: float) -> torch.Tensor:
    """A brightness ramp of slope (0.02, 0.05) a pixel that moves by (du, dv) pixels a frame."""
    u, v, t = torch.arange(W), torch.arange(H)[:, None], torch.arange(T)[:, None, None]
    ramp = 0.02 * (u - t * du) + 0.05 * (v - t * dv)
    return ramp.double().expand(1, 3, T, H, W)


def test_warp_error_is_zero_for_a_video_that_moves_exactly_by_the_flow():
    du, dv = 1.25, -0.75
    x = moving_ramp(4, 12, 17, du, dv)
    flow, all_seen = torch.tensor([du, dv]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 12, 17), torch.ones(1, 1, 3, 12, 17)
    assert warp_error(x, flow, all_seen).item() <= 1e-12
    # Fetched from elsewhere, the ramp is off by its slope times the displacement's error, halved on the [0, 1] scale.
    for name, wrong, (eu, ev) in (("reversed", -flow, (2 * du, 2 * dv)), ("swapped", flow.flip(1), (du - dv, dv - du))):
        wanted, got = 1e3 * ((0.02 * eu + 0.05 * ev) / 2) ** 2, warp_error(x, wrong, all_seen).item()
        assert abs(got - wanted) <= 1e-6 * wanted, f"flow {name}: {wanted}, got {got}"


def test_a_flicker_of_known_size_has_its_closed_form_warp_error():
    torch.manual_seed(0)
    canvas = torch.rand(1, 3, 20, 30)
    moving = torch.stack([canvas[:, :, t : t + 12, 2 * t : 2 * t + 16] for t in range(5)], dim=2) * 2 - 1
    flicker = 0.06 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).view(1, 1, 5, 1, 1)
    flow, seen = torch.tensor([-2.0, -1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 4, 12, 16), torch.ones(1, 1, 4, 12, 16)
    got = warp_error(moving + flicker, flow, seen).item()
    assert abs(got - 3.6) <= 1e-4, f"±0.03 of the range: 10³ · 0.06² = 3.6, got {got}"


@pytest.mark.parametrize("a", [0.03, 0.2])
def test_the_warp_error_of_flicker_is_that_of_its_steps_whatever_moves_beneath(a):
    """A brightness b_t added to a video that moves by its flow: 10^3 times the mean of (b_t+1 - b_t)^2 / 4."""
    b = torch.tensor([0.0, a, -a, -a, 2 * a], dtype=torch.float64)
    du, dv = -0.6, 1.7
    x = moving_ramp(5, 14, 19, du, dv) + b.view(1, 1, 5, 1, 1)
    flow = torch.tensor([du, dv]).view(1, 2, 1, 1, 1).expand(1, 2, 4, 14, 19)
    wanted = 1e3 * b.diff().square().mean().item() / 4  # a²(1 + 4 + 0 + 9) / 4 / 4
    got = warp_error(x, flow, torch.ones(1, 1, 4, 14, 19)).item()
    assert abs(got - wanted) <= 1e-5 * wanted, f"closed form {wanted}, got {got}"


def test_the_truth_of_a_toy_scene_moves_by_its_exact_flow():
    clip = make_clip(3, WorldConfig(frames=3, grain=0.0))
    x, flow, visible = clip.x_gt[None], clip.flow[None], clip.visible[None]
    moved, still = warp_error(x, flow, visible).item(), warp_error(x, 0 * flow, visible).item()
    assert moved <= still / 3, f"along its flow {moved:.3f}, as if nothing moved {still:.3f}"


def test_warp_error_counts_only_visible_pixels_and_leaves_out_pairs_without_any():
    x = torch.zeros(2, 3, 3, 4, 6)
    x[:, :, 1, :, 3:] = 0.2  # both pairs differ by 0.1 of the range in the right half
    x[:, :, 1, :, :3] = 1.0
    seen = torch.zeros(2, 1, 2, 4, 6, dtype=torch.bool)
    seen[0, :, 0, :, 3:] = True
    with unchanged(x, seen):
        got = warp_error(x, torch.zeros(2, 2, 2, 4, 6), seen)
    assert abs(got[0].item() - 10) <= 1e-5, f"10³ · 0.1² = 10 over the visible half, got {got[0].item()}"
    assert math.isnan(got[1].item()), "a video of which nothing is visible has no warp error"


def test_the_warp_error_of_a_frame_that_is_not_finite_is_not_finite():
    x = torch.zeros(1, 3, 4, 12, 12)
    x[:, :, 2, 5, 5] = math.nan
    flow, seen = torch.zeros(1, 2, 3, 12, 12), torch.ones(1, 1, 3, 12, 12, dtype=torch.bool)
    assert warp_error(x, flow, seen).isnan()


def test_a_video_of_one_frame_has_no_warp_error():
    with pytest.raises(ValueError, match="wanted T ≥ 2"):
        warp_error(torch.zeros(1, 3, 1, 12, 12), torch.zeros(1, 2, 0, 12, 12), torch.zeros(1, 1, 0, 12, 12))


# ---- the warp loss --------------------------------------------------------------------------------------------------


def test_the_warp_loss_and_its_gradients_are_those_of_the_equation_in_loops():
    """DiffusionHarmonizer Eq. 5, a pixel at a time: (x(p) - other(p + w(p)))² over what both frames show."""
    torch.manual_seed(0)
    B, H, W = 2, 5, 6
    x, other = (torch.randn(B, 3, H, W, dtype=torch.float64, requires_grad=True) for _ in range(2))
    flow, visible = 1.5 * torch.randn(B, 2, H, W, dtype=torch.float64), torch.rand(B, 1, H, W) > 0.3
    wanted = []
    for b in range(B):
        fetched, terms = warp_in_loops(other[b], flow[b]), []
        for i in range(H):
            for j in range(W):
                if visible[b, 0, i, j] and fetched[i][j] is not None:
                    terms.append((x[b, :, i, j] - fetched[i][j]).square().sum())
        assert 4 < len(terms) < H * W
        wanted.append(sum(terms) / len(terms))
    wanted, share = torch.stack(wanted), torch.tensor([1.0, 2.0])
    got = warp_loss(x, other, flow, visible)
    want_grads = torch.autograd.grad((share * wanted).sum(), (x, other))
    got_grads = torch.autograd.grad((share * got).sum(), (x, other))
    for name, a, b in (("loss", got, wanted), ("x's gradient", got_grads[0], want_grads[0]),
                       ("the other frame's gradient", got_grads[1], want_grads[1])):
        assert (a - b).abs().max() <= 1e-12, f"{name}: largest difference {(a - b).abs().max():.1e} > 1e-12"


def test_the_warp_loss_of_the_truth_is_small_and_of_a_flicker_its_square():
    clip = make_clip(3, WorldConfig(frames=2, grain=0.0))
    x, flow, visible = clip.x_gt[None], clip.flow[None], clip.visible[None]
    along, still = (warp_loss(x[:, :, 0], x[:, :, 1], w, visible[:, :, 0]).item() for w in (flow[:, :, 0],
                                                                                           0 * flow[:, :, 0]))
    assert along <= still / 3, f"along its flow {along:.4f}, as if nothing moved {still:.4f}"
    x = torch.zeros(1, 3, 8, 8)
    got = warp_loss(x, x + 0.1, torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8)).item()
    assert abs(got - 0.03) <= 1e-7, f"three channels, each 0.1 off: 0.03, got {got}"


def test_where_nothing_is_seen_in_both_frames_the_warp_loss_is_zero_and_so_is_its_gradient():
    x, other = torch.full((1, 3, 4, 4), math.inf, requires_grad=True), torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = warp_loss(x, other, torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    loss.sum().backward()
    assert loss.item() == 0 and other.grad.abs().max() == 0 and x.grad.abs().max() == 0


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_an_unknown_flow_is_never_seen_and_its_gradient_writes_nowhere_else(unknown):
    x, other = torch.rand(2, 1, 3, 8, 8, requires_grad=True)
    flow, visible = torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8)
    known = visible.clone()
    flow[:, :, 2:4], known[:, :, 2:4] = unknown, 0
    loss = warp_loss(x, other, flow, visible)
    assert torch.equal(loss, warp_loss(x, other, 0 * visible.expand(1, 2, 8, 8), known))
    for grad in torch.autograd.grad(loss.sum(), (x, other)):
        assert grad.isfinite().all() and grad[:, :, 2:4].abs().max() == 0 < grad.abs().max()


def test_the_warp_loss_names_the_shapes_it_refuses():
    x, flow, visible = torch.zeros(1, 3, 4, 6), torch.zeros(1, 2, 4, 6), torch.ones(1, 1, 4, 6)
    for wrong in ((x, x[..., :5], flow, visible), (x, x, flow, visible[..., :5]), (x, x, flow[..., :5], visible)):
        with pytest.raises(ValueError, match=r"\[1, ., 4, 5\]"):
            warp_loss(*wrong)


# ---- optical flow of real clips -------------------------------------------------------------------------------------


def test_flow_of_one_frame_or_of_tiny_ones_is_refused():
    pytest.importorskip("cv2")
    for shape in ((1, 3, 1, 16, 16), (1, 3, 2, 11, 16)):
        with pytest.raises(ValueError, match=r"2 frames of 12×12 at least, got \[1, 3, "):
            flow_dis(torch.zeros(shape))
    assert flow_dis(torch.zeros(1, 3, 2, 12, 12)).shape == (1, 2, 1, 12, 12)
    with pytest.raises(ValueError, match="T ≥ 2"):
        visible_by_consistency(torch.zeros(1, 2, 0, 8, 8), torch.zeros(1, 2, 0, 8, 8))


def test_flow_consistency_finds_exactly_what_a_moving_square_covers():
    H, W, step = 12, 20, 4
    forward, backward = torch.zeros(1, 2, 1, H, W), torch.zeros(1, 2, 1, H, W)
    forward[:, 0, 0, 3:8, 5:10] = step
    backward[:, 0, 0, 3:8, 5 + step : 10 + step] = -step
    forward[:, 1, 0, 0, :] = -1  # the top row leaves the frame
    backward[:, 1, 0, 0, :] = 1
    wanted = torch.ones(H, W, dtype=torch.bool)
    wanted[3:8, 10 : 10 + step] = False
    wanted[0] = False
    with unchanged(forward, backward):
        got = visible_by_consistency(forward, backward)
    assert got.shape == (1, 1, 1, H, W) and got.dtype == torch.bool
    assert torch.equal(got[0, 0, 0], wanted), f"{(got[0, 0, 0] != wanted).sum()} pixels differ"


def test_dis_is_shown_the_luma_in_bytes_and_the_frames_in_pairs(monkeypatch):
    seen = []

    def calc(a, b, start):
        seen.append((a, b))
        return np.stack([np.full(a.shape, len(seen)), np.full(a.shape, -len(seen))], axis=-1).astype(np.float32)
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(
        DISOPTICAL_FLOW_PRESET_MEDIUM=1, DISOpticalFlow_create=lambda preset: SimpleNamespace(calc=calc)))
    torch.manual_seed(0)
    x = 2.2 * torch.rand(2, 3, 3, 12, 15) - 1.1  # a little beyond the colours there are
    flow = flow_dis(x)
    for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for given, frame in zip(seen[2 * b + t], (t, t + 1)):
            rgb = np.clip(255 * (x[b, :, frame].permute(1, 2, 0).numpy() + 1) / 2, 0, 255)
            wanted = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]  # ITU-R BT.601
            difference = np.abs(given - wanted).max()
            assert given.dtype == np.uint8 and difference <= 0.501, f"grey of frame {frame} is {difference:.2f} off"
        assert flow[b, :, t].flatten(1).unique(dim=1).flatten().tolist() == [2 * b + t + 1, -(2 * b + t + 1)]


def test_dis_flow_finds_a_translation_in_both_directions():
    pytest.importorskip("cv2", reason="needs pip install opencv-python-headless")
    torch.manual_seed(0)
    canvas = nnf.interpolate(torch.rand(1, 3, 16, 24), (96, 144), mode="bicubic").clamp(0, 1) * 2 - 1
    x = torch.stack([canvas[:, :, 8 + 2 * t : 72 + 2 * t, 20 - 3 * t : 116 - 3 * t] for t in range(3)], dim=2)
    forward, backward = flow_dis(x), flow_dis(x.flip(2)).flip(2)
    assert forward.shape == (1, 2, 2, 64, 96)
    for name, flow, wanted in (("forward", forward, (3, -2)), ("backward", backward, (-3, 2))):
        found = flow[..., 8:-8, 8:-8].flatten(3).median(dim=3).values
        assert (found - torch.tensor(wanted)[None, :, None]).abs().max() <= 0.2, f"{name}: {wanted}, found {found}"
    error, still = (warp_error(x, w, visible_by_consistency(w, b)).item()
                    for w, b in ((forward, backward), (0 * forward, 0 * backward)))
    assert error <= still / 20, f"warp error along DIS flow {error}, with no flow {still}"
