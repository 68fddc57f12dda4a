"""The metrics against scikit-image, scipy, loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as nnf

from mirage_min.method.metrics import (
    actor_crops,
    clip_features,
    cropped,
    dists,
    frechet,
    lpips,
    per_video,
    psnr,
    ssim,
    vfid,
)
from tests.small import unchanged


def videos(B: int = 2, T: int = 3, H: int = 33, W: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos of smooth colours, a flat and a dark patch and some noise in [-1, 1]."""
    torch.manual_seed(0)
    x = nnf.interpolate(torch.rand(B, 3, T, 4, 4).flatten(1, 2), (H, W), mode="bilinear").unflatten(1, (3, T)) * 2 - 1
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
    for metric in (psnr, ssim, lambda x, y: per_video(torch.sub, x, y)):
        with pytest.raises(ValueError, match=r"got \[1, 3, 2, 12, 12\] and \[1, 3, 1, 12, 12\]"):
            metric(x, y[:, :, :1])
    with pytest.raises(ValueError, match=r"mask \[1, 1, 2, 12, 12\], got \[1, 12, 12\]"):
        psnr(x, y, torch.ones(1, 12, 12))
    for where in ((..., slice(8)), (..., slice(8), slice(None))):
        with pytest.raises(ValueError, match="11×11"):
            ssim(x[where], y[where])


def test_a_frame_that_is_not_finite_is_not_left_out():
    x = torch.zeros(1, 3, 4, 12, 12)
    x[:, :, 2, 5, 5] = math.nan
    assert psnr(x, torch.ones_like(x)).isnan()


def test_micro_batches_of_frames_give_the_same_mean():
    x, y = (v.double() for v in videos(2, 5))

    def distance(a, b):
        return (a - b).abs().amax(dim=(1, 2, 3))
    wanted = torch.stack([torch.stack([distance(x[b : b + 1, :, t], y[b : b + 1, :, t])[0] for t in range(5)]).mean()
                          for b in range(2)])
    for n in (1, 3, 100):  # frames to a micro-batch: each alone, straddling two videos, all at once
        sizes = []
        got = per_video(lambda a, b: (sizes.append(len(a)), distance(a, b))[1], x, y, pixels=n * 33 * 26 + 7)
        difference = (got - wanted).abs().max().item()
        assert difference <= 1e-12, f"{n} frames a batch: largest difference {difference:.1e} > 1e-12"
        assert sizes == {1: [1] * 10, 3: [3, 3, 3, 1], 100: [10]}[n], f"micro-batches {sizes}"


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
    assert vfid(white, white.flip(0)) <= 1e-9
    assert vfid(white[:5], white) > 0 and not recwarn.list, "5 clips are enough for the rank of 4 features"
    with pytest.warns(UserWarning, match="4 features from 4 clips: the covariance has rank 3 at most"):
        vfid(white[:4], white)


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
