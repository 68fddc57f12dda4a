"""The metrics against scikit-image, scipy, loops and closed forms."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import interpolate

from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method.metrics import (
    actor_crops,
    clip_features,
    cropped,
    dists,
    flow_dis,
    frechet,
    lpips,
    psnr,
    ssim,
    vfid,
    visible_by_consistency,
    warp,
    warp_error,
)
from tests.small import unchanged


def videos(B: int = 2, T: int = 3, H: int = 33, W: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos of smooth colours, a flat and a dark patch and some noise in [-1, 1]."""
    torch.manual_seed(0)
    x = interpolate(torch.rand(B, 3, T, 4, 4).flatten(1, 2), (H, W), mode="bilinear").unflatten(1, (3, T)) * 2 - 1
    x[..., : H // 2, : W // 2] = 0.25
    x[..., H // 2 :, W // 2 :] = -0.98
    return x, (x + 0.2 * torch.randn_like(x) * (torch.rand_like(x) > 0.5)).clamp(-1, 1)


def images(x: torch.Tensor, b: int, t: int) -> np.ndarray:
    return ((x[b, :, t].double() + 1) / 2).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("B, T, H, W", [(2, 3, 33, 26), (1, 1, 11, 12)])
def test_psnr_and_ssim_equal_scikit_image(B, T, H, W):
    x, y = videos(B, T, H, W)
    for b in range(B):
        pairs = [(images(x, b, t), images(y, b, t)) for t in range(T)]
        wanted_psnr = np.mean([peak_signal_noise_ratio(p, q, data_range=1) for p, q in pairs])
        wanted_ssim = np.mean([structural_similarity(p, q, channel_axis=2, data_range=1, gaussian_weights=True,
                                                     sigma=1.5, use_sample_covariance=False) for p, q in pairs])
        for name, got, wanted, tolerance in (("PSNR", psnr(x, y)[b].item(), wanted_psnr, 1e-5),
                                             ("SSIM", ssim(x, y)[b].item(), wanted_ssim, 1e-6)):
            assert abs(got - wanted) <= tolerance, f"{name} {wanted}, got {got}, difference over {tolerance}"


def test_psnr_counts_only_the_masked_pixels():
    x = torch.zeros(1, 3, 3, 4, 5)
    mask = torch.zeros(1, 1, 3, 4, 5, dtype=torch.bool)
    mask[:, :, 0, :2] = mask[:, :, 1, 3:, 1:3] = True  # nothing in the third frame
    y = torch.where(mask, 0.2, 0.9).expand_as(x)
    with unchanged(x, y, mask):
        got = psnr(x, y, mask).item()
    assert abs(got - 20) <= 1e-5, f"an error of 0.1 of the range is 20 dB, got {got}"
    assert psnr(x, x).item() == math.inf
    assert math.isnan(psnr(x, y, torch.zeros_like(mask)).item())


def test_ssim_of_equal_videos_is_one_even_where_they_are_flat():
    x, _ = videos()
    assert (ssim(x, x) - 1).abs().max() <= 1e-7


def test_lpips_and_dists_are_means_over_the_frames_of_each_video():
    x, y = videos(2, 3)
    wanted = torch.stack([(x[b] - y[b]).abs().amax(dim=(0, 2, 3)).mean() for b in range(2)])
    for metric in (lpips, dists):
        got = metric(x.requires_grad_(), y, lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)))
        difference = (got - wanted).abs().max().item()
        assert difference <= 1e-6 and not got.requires_grad, f"{metric.__name__}: {wanted}, got {got}"


def test_metrics_name_the_shapes_they_refuse():
    x, y = videos(1, 2, 12, 12)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"got \[1, 3, 2, 12, 12\] and \[1, 3, 1, 12, 12\]"):
            metric(x, y[:, :, :1])
    with pytest.raises(ValueError, match=r"mask \[1, 1, 2, 12, 12\], got \[1, 12, 12\]"):
        psnr(x, y, torch.ones(1, 12, 12))
    for where in ((..., slice(8)), (..., slice(8), slice(None))):
        with pytest.raises(ValueError, match="11×11"):
            ssim(x[where], y[where])
    with pytest.raises(ValueError, match="wanted T ≥ 2"):
        warp_error(x[:, :, :1], torch.zeros(1, 2, 0, 12, 12), torch.zeros(1, 1, 0, 12, 12))


def test_a_crop_holds_the_actor_with_a_quarter_on_every_side_and_follows_it_inside_the_frame():
    H, W = 100, 160
    boxes = torch.tensor([
        [60.0, 40, 100, 60],    # 40 x 20: the window is 60 wide, and 32 high, for 30 would be too low
        [0, 0, 0, 0],           # hidden
        [10, 80, 40, 100],      # smaller, in a corner: the window keeps its size and is pushed inside
        [150, 40, 190, 60],     # half of it beyond the border: what is inside counts, 10 x 20
        [170, 40, 190, 60],     # all of it
    ])
    wanted = [(slice(34, 66), slice(50, 110)), None, (slice(68, 100), slice(0, 60)),
              (slice(34, 66), slice(100, 160)), None]
    got = actor_crops(boxes, H, W)
    assert got == wanted, f"wanted {wanted}, got {got}"
    for box, crop in zip(boxes.tolist(), got, strict=True):
        if crop and box[2] <= W:
            rows, columns = crop
            assert columns.start <= box[0] and box[2] <= columns.stop and rows.start <= box[1] and box[3] <= rows.stop
    assert actor_crops(torch.zeros(3, 4), H, W) == [None] * 3, "an actor that is never seen"
    assert actor_crops(torch.tensor([[0.0, 0, 160, 100]]), H, W) == [(slice(0, H), slice(0, W))], "an actor all over"


def test_cropped_cuts_each_frame_at_its_own_place_and_leaves_out_frames_without_a_crop():
    x = torch.arange(2 * 3 * 5 * 6.0).view(1, 2, 3, 5, 6)
    crops = [(slice(0, 2), slice(1, 4)), None, (slice(3, 5), slice(0, 3))]
    y = cropped(x, crops)
    assert torch.equal(y[:, :, 0], x[:, :, 0, 0:2, 1:4]) and torch.equal(y[:, :, 1], x[:, :, 2, 3:5, 0:3])
    assert y.shape == (1, 2, 2, 2, 3)
    with pytest.raises(ValueError, match="the actor is hidden all the time"):
        cropped(x, [None] * 3)


def test_warp_equals_bilinear_interpolation_in_loops():
    torch.manual_seed(0)
    H, W = 5, 7
    x, flow = torch.rand(1, 2, H, W, dtype=torch.float64), 2 * torch.randn(1, 2, H, W, dtype=torch.float64)
    flow[0, :, 0, 0] = 0
    flow[0, :, 1, 1] = torch.tensor([W - 2.0, H - 2.0])  # exactly the last pixel
    for k, (u, v) in enumerate([(W - 0.6, 1.0), (1.0, H - 0.6), (W, 1.0), (1.0, H), (-0.4, 1.0), (1.0, -0.4)]):
        flow[0, :, 2, k] = torch.tensor([u - k, v - 2.0])  # half a pixel and one beyond each border: outside
    with unchanged(x, flow):
        y, inside = warp(x, flow)
    for i in range(H):
        for j in range(W):
            u, v = j + flow[0, 0, i, j].item(), i + flow[0, 1, i, j].item()
            assert inside[0, 0, i, j].item() == (0 <= u <= W - 1 and 0 <= v <= H - 1), f"inside at {(i, j)}"
            if inside[0, 0, i, j]:
                a, b = min(int(u), W - 2), min(int(v), H - 2)
                top = (a + 1 - u) * x[0, :, b, a] + (u - a) * x[0, :, b, a + 1]
                bottom = (a + 1 - u) * x[0, :, b + 1, a] + (u - a) * x[0, :, b + 1, a + 1]
                difference = ((b + 1 - v) * top + (v - b) * bottom - y[0, :, i, j]).abs().max().item()
                assert difference <= 1e-12, f"at {(i, j)}: difference {difference:.1e} > 1e-12"


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


def test_a_frame_that_is_not_finite_is_not_left_out():
    x = torch.zeros(1, 3, 4, 12, 12)
    x[:, :, 2, 5, 5] = math.nan
    flow, seen = torch.zeros(1, 2, 3, 12, 12), torch.ones(1, 1, 3, 12, 12, dtype=torch.bool)
    assert psnr(x, torch.ones_like(x)).isnan() and warp_error(x, flow, seen).isnan()


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


def random_covariance(d: int, rank: int) -> torch.Tensor:
    a = torch.randn(d, rank, dtype=torch.float64)
    return a @ a.T


def test_the_frechet_distance_equals_its_closed_form_for_covariances_that_share_their_axes():
    torch.manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    s1, s2 = torch.rand(2, 6, dtype=torch.float64) + 0.1
    mu1, mu2 = torch.randn(2, 6, dtype=torch.float64)
    wanted = ((mu1 - mu2).square().sum() + (s1 - s2).square().sum()).item()
    cov1, cov2 = axes * s1.square() @ axes.T, axes * s2.square() @ axes.T
    with unchanged(mu1, cov1, mu2, cov2):
        got = frechet(mu1, cov1, mu2, cov2)
    assert abs(got - wanted) <= 1e-10 * wanted, f"closed form {wanted}, got {got}"


@pytest.mark.parametrize("rank", [9, 4])
def test_the_frechet_distance_equals_the_matrix_square_root(rank):
    torch.manual_seed(1)
    cov1, cov2, mu = random_covariance(9, rank), random_covariance(9, 9), torch.randn(9, dtype=torch.float64)
    wanted = (mu.square().sum() + (cov1 + cov2).trace()).item() - 2 * np.trace(sqrtm((cov1 @ cov2).numpy())).real
    got = frechet(mu, cov1, torch.zeros_like(mu), cov2)
    assert abs(got - wanted) <= 1e-6 * wanted, f"scipy's sqrtm gives {wanted}, got {got}"


def test_vfid_of_features_with_known_moments_equals_the_closed_form_for_gaussians(recwarn):
    torch.manual_seed(3)
    x = torch.randn(50, 4, dtype=torch.float64)
    white = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0] * 49**0.5  # mean 0, covariance 1, exactly
    s, shift = torch.tensor([0.5, 1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.0, 0.5])
    got = vfid(white, white[torch.randperm(50)] * s + shift)
    wanted = (shift.square().sum() + (s - 1).square().sum()).item()  # commuting covariances: |Δμ|² + Σ (σ1 − σ2)²
    assert abs(got - wanted) <= 1e-6 * wanted, f"closed form {wanted}, got {got}"
    assert vfid(white, white.flip(0)) <= 1e-9 and not recwarn.list, "50 clips are enough for 4 features"


def test_vfid_of_few_clips_equals_the_nuclear_norm_and_says_they_are_few():
    torch.manual_seed(2)
    a, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64) + 1
    da, db = (a - a.mean(0)) / 2, (b - b.mean(0)) / 6**0.5
    # tr (C_a C_b)^½ is the sum of singular values of D_a D_bᵀ where C = Dᵀ D.
    wanted = ((a.mean(0) - b.mean(0)).square().sum() + da.square().sum() + db.square().sum()
              - 2 * torch.linalg.matrix_norm(da @ db.T, "nuc")).item()
    with pytest.warns(UserWarning, match="8 features from 5 clips: the covariance has rank 4 at most"):
        got = vfid(a, b)
    assert abs(got - wanted) <= 1e-6 * wanted, f"nuclear norm gives {wanted}, got {got}"
    with pytest.raises(ValueError, match=r"2 clips at least .* got \[1, 8\] and \[7, 8\]"):
        vfid(a[:1], b)


def test_short_clips_are_played_to_and_fro_for_the_feature_network():
    for T, wanted in ((9, [0, 1, 2, 3, 4, 5, 6, 7, 8, 7]), (1, [0] * 10), (3, [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]),
                      (11, list(range(11)))):
        x = torch.arange(T).float().view(1, 1, T, 1, 1).expand(2, 3, T, 4, 4)
        got = clip_features(lambda v: v[:, 0, :, 0, 0], x)
        assert got.tolist() == [wanted, wanted], f"{T} frames became {got[0].tolist()}"


def test_a_network_that_gives_no_feature_for_each_clip_is_refused():
    with pytest.raises(ValueError, match=r"wanted features \[2, d\] of 2 clips, the network gave \[2, 3, 1\]"):
        clip_features(lambda v: v[:, :, :1, 0, 0], torch.zeros(2, 3, 12, 4, 4))


def test_dis_is_shown_the_luma_in_bytes_and_the_frames_in_pairs(monkeypatch):
    seen = []

    def calc(a, b, start):
        seen.append((a, b))
        return np.stack([np.full(a.shape, len(seen)), np.full(a.shape, -len(seen))], axis=-1).astype(np.float32)
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(
        DISOPTICAL_FLOW_PRESET_MEDIUM=1, DISOpticalFlow_create=lambda preset: SimpleNamespace(calc=calc)))
    x, _ = videos(2, 3, 12, 15)
    flow = flow_dis(x)
    for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for given, frame in zip(seen[2 * b + t], (t, t + 1)):
            rgb = np.clip(255 * images(x, b, frame), 0, 255)
            wanted = 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]  # ITU-R BT.601
            difference = np.abs(given - wanted).max()
            assert given.dtype == np.uint8 and difference <= 0.501, f"grey of frame {frame} is {difference:.2f} off"
        assert flow[b, :, t].flatten(1).unique(dim=1).flatten().tolist() == [2 * b + t + 1, -(2 * b + t + 1)]


def test_dis_flow_finds_a_translation_in_both_directions():
    pytest.importorskip("cv2", reason="needs pip install opencv-python-headless")
    torch.manual_seed(0)
    canvas = interpolate(torch.rand(1, 3, 16, 24), (96, 144), mode="bicubic").clamp(0, 1) * 2 - 1
    x = torch.stack([canvas[:, :, 8 + 2 * t : 72 + 2 * t, 20 - 3 * t : 116 - 3 * t] for t in range(3)], dim=2)
    forward, backward = flow_dis(x), flow_dis(x.flip(2)).flip(2)
    assert forward.shape == (1, 2, 2, 64, 96)
    for name, flow, wanted in (("forward", forward, (3, -2)), ("backward", backward, (-3, 2))):
        found = flow[..., 8:-8, 8:-8].flatten(3).median(dim=3).values
        assert (found - torch.tensor(wanted)[None, :, None]).abs().max() <= 0.2, f"{name}: {wanted}, found {found}"
    error, still = (warp_error(x, w, visible_by_consistency(w, b)).item()
                    for w, b in ((forward, backward), (0 * forward, 0 * backward)))
    assert error <= still / 20, f"warp error along DIS flow {error}, with no flow {still}"
