"""Wan 2.2's VAE against diffusers' on the same weights, every way of cutting a video, and its shortcuts in loops.

The reference clamps what it decodes to [-1, 1]; the random weights here keep it inside, so that nothing is hidden.
"""

import pytest
import torch
from torch.nn import functional as nnf

from tests import small
from tests.test_vae_wan import close, in_groups, published_config, video
from tests.torchvision_stub import stub

stub()

from diffusers import AutoencoderKLWan  # noqa: E402

from mirage_min.method import injection  # noqa: E402
from mirage_min.networks import bands, frugal, weights  # noqa: E402
from mirage_min.networks.vae_wan22 import Wan22VAE, Wan22VAEConfig, copy_up, mean_down  # noqa: E402

C = 6
MEAN, STD = [0.3, -0.5, 0.1, 0.0, 0.2, -0.1], [1.5, 0.7, 2.0, 1.0, 0.8, 1.2]
SMALL = dict(base_dim=8, decoder_base_dim=12, z_dim=C, num_res_blocks=1, latents_mean=MEAN, latents_std=STD)
PUBLISHED = SMALL | dict(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small random checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan22_vae")
    small.fill_wan_vae(AutoencoderKLWan(**PUBLISHED)).save_pretrained(folder)
    return folder


def ours(folder, dtype=torch.float64):
    return Wan22VAE.from_pretrained(folder, dtype=dtype)


def theirs(folder, dtype=torch.float64):
    return AutoencoderKLWan.from_pretrained(folder).to(dtype).eval()


def statistics(like):
    return (torch.tensor(v, dtype=like.dtype).view(1, -1, 1, 1, 1) for v in (MEAN, STD))


def published_encode(vae, x):
    mu = vae.encode(x).latent_dist.mean
    mean, std = statistics(mu)
    return (mu - mean) / std


def published_decode(vae, z):
    mean, std = statistics(z)
    x = vae.decode(z * std + mean, return_dict=False)[0]
    assert x.abs().max() < 1, "the reference has clamped"
    return x


def latent(B, n, h, w, dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(B, C, n, h, w, dtype=dtype)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, H, W", [(1, 1, 16, 16), (2, 5, 32, 48), (1, 13, 16, 32)])
def test_encode_and_decode_match_the_published_ones(saved, B, T, H, W):
    with torch.no_grad():
        for dtype, rms in ((torch.float64, False), (torch.float32, True)):
            vae, reference, x = ours(saved, dtype), theirs(saved, dtype), video(B, T, H, W, dtype)
            z = vae.encode(x)
            close(z, published_encode(reference, x), 1e-5, rms)
            close(vae.decode(z), published_decode(reference, z), 1e-5, rms)


def test_posterior_matches_the_published_mean_and_log_variance(saved):
    vae, reference, x = ours(saved), theirs(saved), video(1, 5, 16, 32)
    with torch.no_grad():
        expected = reference.encode(x).latent_dist
        mean, logvar = vae.posterior(x)
    close(mean, expected.mean, 1e-5)
    close(logvar, expected.logvar, 1e-5)


def test_gradients_of_the_input_match_the_published_ones(saved):
    vae, reference = ours(saved), theirs(saved)
    for call, published, leaf in ((vae.encode, published_encode, video(1, 9, 16, 16)),
                                  (vae.decode, published_decode, latent(1, 3, 1, 2))):
        leaf.requires_grad_()
        out, out_reference = call(leaf), published(reference, leaf)
        weight = torch.randn_like(out)
        close(*(torch.autograd.grad((y * weight).sum(), leaf)[0] for y in (out, out_reference)), 1e-5)


@pytest.mark.parametrize("H, W", [(24, 40), (9, 16), (31, 17)])
def test_any_size_is_padded_as_by_hand_and_cropped_back(saved, H, W):
    vae, reference, x = ours(saved), theirs(saved), video(1, 5, H, W)
    padded = nnf.pad(x, (0, -W % 16, 0, -H % 16, 0, 0), mode="replicate")
    with torch.no_grad():
        z = vae.encode(x)
        close(z, published_encode(reference, padded), 1e-5)
        assert z.shape == (1, C, 2, -(-H // 16), -(-W // 16))
        close(vae.decode(z)[..., :H, :W], published_decode(reference, z)[..., :H, :W], 1e-5)


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, latents", [([9], [3]), ([1, 4, 4], [1, 1, 1]), ([5, 4], [2, 1]), ([1, 8], [1, 2])])
def test_every_plan_encodes_and_decodes_to_the_same(saved, frames, latents):
    vae, x, z = ours(saved), video(2, 9, 16, 32), latent(2, 3, 1, 2)
    with torch.no_grad():
        close(in_groups(vae.encode_group, x, frames), vae.encode(x), 1e-10)
        close(in_groups(vae.decode_group, z, latents), vae.decode(z), 1e-10)


def test_a_prefix_of_a_video_encodes_and_decodes_to_a_prefix(saved):
    vae, x, z = ours(saved), video(1, 9, 16, 32), latent(1, 3, 1, 2)
    with torch.no_grad():
        assert torch.equal(vae.encode(x[:, :, :5]), vae.encode(x)[:, :, :2])
        assert torch.equal(vae.decode(z[:, :, :2]), vae.decode(z)[:, :, :5])
        assert vae.decode(vae.encode(x[:, :, :7])).shape[2] == 9, "filled up, not dropped"


def test_a_group_leaves_the_cache_it_was_given_alone(saved):
    vae = ours(saved)
    for step, first, second in ((vae.encode_group, video(1, 1, 16, 16), video(1, 4, 16, 16)),
                                (vae.decode_group, latent(1, 1, 1, 1), latent(1, 1, 1, 1))):
        with torch.no_grad():
            _, cache = step(first)
            copy = {key: value.clone() for key, value in cache.items()}
            once, _ = step(second, cache)
            again, _ = step(second, cache)
        assert all(torch.equal(cache[key], copy[key]) for key in copy) and torch.equal(once, again)


@pytest.mark.parametrize("rows", [1, 5])
def test_frugal_is_plain_up_to_rounding_and_leaves_what_it_was_given(saved, monkeypatch, rows):
    monkeypatch.setattr(bands, "ROWS", rows)
    monkeypatch.setattr(bands, "SMALL", 0)
    vae, x = ours(saved), video(1, 9, 32, 48)
    with torch.no_grad():
        z = vae.encode(x)
        y = vae.decode(z)
        frugal.apply(vae)
        assert type(vae).__name__ == "FrugalWan22VAE" and type(vae.encoder).__name__ == "FrugalEncoder"
        before = x.clone(), z.clone()
        close(vae.encode(x), z, 1e-10)
        close(vae.decode(z), y, 1e-10)
    assert torch.equal(x, before[0]) and torch.equal(z, before[1])


# ---- shortcuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c, c_out, time, space, T", [(4, 4, 1, 2, 3), (4, 8, 2, 2, 5), (4, 8, 2, 2, 4),
                                                      (5, 5, 1, 1, 2)])
def test_the_shortcut_down_in_loops(c, c_out, time, space, T):
    """Each output is the mean of n entries in the order channel, frame, row, column; zeros stand before the first."""
    x = torch.randn(1, c, T, 4, 6, dtype=torch.float64)
    out = mean_down(x, c_out, time, space)
    missing, n = -T % time, c * time * space**2 // c_out
    assert out.shape == (1, c_out, (T + missing) // time, 4 // space, 6 // space)
    for o, t, h, w in [(a, b, i, j) for a in range(c_out) for b in range(out.shape[2])
                       for i in range(out.shape[3]) for j in range(out.shape[4])]:
        total = 0.0
        for k in range(o * n, o * n + n):
            channel, rest = divmod(k, time * space**2)
            p, q, r = rest // space**2, rest // space % space, rest % space
            frame = t * time + p - missing
            total += float(x[0, channel, frame, h * space + q, w * space + r]) if frame >= 0 else 0.0
        assert float(out[0, o, t, h, w]) == pytest.approx(total / n, abs=1e-12)


@pytest.mark.parametrize("c, c_out, time, first", [(8, 8, 2, True), (8, 8, 2, False), (8, 4, 1, True)])
def test_the_shortcut_up_in_loops(c, c_out, time, first):
    x = torch.randn(1, c, 3, 2, 3, dtype=torch.float64)
    out = copy_up(x, c_out, time, 2, first)
    lost = time - 1 if first else 0
    assert out.shape == (1, c_out, 3 * time - lost, 4, 6)
    repeats = c_out * time * 4 // c
    for o, t, h, w in [(a, b, i, j) for a in range(c_out) for b in range(out.shape[2])
                       for i in range(4) for j in range(6)]:
        full = t + lost
        k = ((o * time + full % time) * 2 + h % 2) * 2 + w % 2
        assert out[0, o, t, h, w] == x[0, k // repeats, full // time, h // 2, w // 2]


def test_a_patchs_pixels_are_ordered_by_colour_column_and_row(saved):
    vae, x = ours(saved), torch.arange(3 * 4 * 2).view(1, 3, 1, 4, 2)
    patches = vae.encoder.to_patches(x, None, {})
    assert patches[0, :4, 0, 0, 0].tolist() == [0, 2, 1, 3], "of [[0, 1], [2, 3]]"
    assert torch.equal(vae.decoder.to_pixels(patches, None, {}), x)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_official_config_has_the_published_keys_and_shapes():
    config = published_config("wan2.2-ti2v-5b.vae.diffusers.json")
    with torch.device("meta"):
        reference, vae = AutoencoderKLWan.from_config(config), Wan22VAE(weights.read_config(Wan22VAE, config, "2.2"))
    assert vae.config == Wan22VAEConfig()
    keys = {k: v.shape for k, v in vae.state_dict().items()}
    assert keys == {k: v.shape for k, v in reference.state_dict().items()} and len(keys) == 196
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(704.7e6, rel=1e-4)


def test_diffusers_reads_what_we_save(saved, tmp_path):
    vae, z = ours(saved, torch.float32), latent(1, 2, 1, 2, torch.float32)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        close(vae.decode(z), published_decode(theirs(tmp_path, torch.float32), z), 1e-5, rms=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ({"is_residual": False}, "understands is_residual only as True"), ({"patch_size": None}, "patch_size"),
    ({"decoder_base_dim": None}, "decoder_base_dim"), ({"z_dim": 16}, "latents_std must have z_dim=16"),
    ({"dim_mult": [1, 2, 4, 4, 4], "temperal_downsample": [False, True, True, False]}, "must make cells of 16 pixels"),
    ({"shift": 1}, "does not know the field shift")])
def test_a_field_that_would_change_the_result_is_refused_by_name(change, message):
    config = published_config("wan2.2-ti2v-5b.vae.diffusers.json")
    with pytest.raises(ValueError, match=message):
        weights.read_config(Wan22VAE, config | change, "changed")


def test_wan_2_1_is_refused_and_the_pickled_original_with_the_repository_that_has_safetensors():
    with pytest.raises(ValueError, match="is_residual|patch_size|in_channels|decoder_base_dim|z_dim"):
        weights.read_config(Wan22VAE, published_config("wan2.1.vae.diffusers.json"), "2.1")
    with pytest.raises(ValueError, match="Wan-AI/Wan2.2-TI2V-5B-Diffusers"):
        Wan22VAE.from_pretrained("Wan2.2_VAE.pth")


def test_a_group_of_a_wrong_size_and_injected_features_are_refused(saved):
    vae = ours(saved)
    with pytest.raises(ValueError, match=r"16 dividing H and W, got \[1, 3, 1, 24, 16\]"):
        vae.encode_group(video(1, 1, 24, 16))
    with pytest.raises(ValueError, match="takes features at 0 places, got 1"):
        injection.attach(vae, [8])
    with pytest.raises(ValueError, match="no fusion blocks"):
        vae.decode(latent(1, 1, 1, 1), [torch.zeros(1, 8, 1, 8, 8)])
