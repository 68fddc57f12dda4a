"""Wan's VAE against diffusers' on the same weights, every way of cutting a video, and the cache.

The reference clamps what it decodes to [-1, 1]; the random weights here keep it inside, so that nothing is hidden.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.torchvision_stub import stub

stub()

from diffusers import AutoencoderKLWan  # noqa: E402

from mirage_min.networks import frugal, wan_blocks, weights  # noqa: E402
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig  # noqa: E402
from mirage_min.training.memory import LiveBytes  # noqa: E402
from tests import small  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
SMALL = dict(base_dim=8, z_dim=3, num_res_blocks=1, latents_mean=[0.3, -0.5, 0.1], latents_std=[1.5, 0.7, 2.0])
PATCHES = SMALL | dict(dim_mult=[1, 2, 4], temperal_downsample=[True, True], patch_size=2, in_channels=12,
                       out_channels=12)


def published_config(name: str) -> dict:
    path = CONFIGS / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/checkpoint_configs/{name}")
    return json.loads(path.read_text())


def save(folder, **config):
    torch.manual_seed(0)
    small.fill_wan_vae(AutoencoderKLWan(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small random checkpoint."""
    return save(tmp_path_factory.mktemp("wan_vae"), **SMALL)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """One whose frames enter as patches of 2 x 2 pixels."""
    return save(tmp_path_factory.mktemp("wan_vae_patches"), **PATCHES)


def ours(folder, dtype=torch.float64):
    return WanVAE.from_pretrained(folder, dtype=dtype)


def theirs(folder, dtype=torch.float64):
    return AutoencoderKLWan.from_pretrained(folder).to(dtype).eval()


def statistics(like):
    return (torch.tensor(SMALL[n], dtype=like.dtype).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))


def published_encode(vae, x):
    mu = vae.encode(x).latent_dist.mean
    mean, std = statistics(mu)
    return (mu - mean) / std


def published_decode(vae, z):
    mean, std = statistics(z)
    x = vae.decode(z * std + mean, return_dict=False)[0]
    assert x.abs().max() < 1, "the reference has clamped"
    return x


def video(B, T, H, W, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.rand(B, 3, T, H, W, dtype=dtype) * 2 - 1


def latent(B, n, h, w, dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(B, 3, n, h, w, dtype=dtype)


def close(a, b, bound, rms=False):
    """a against the reference b: the largest difference, or its root mean square, relative to b's std."""
    difference = (a - b).double()
    size = difference.square().mean().sqrt() if rms else difference.abs().max()
    assert a.shape == b.shape
    assert size <= bound * b.double().std(), f"difference {size:.2e}, bound {bound:.0e} of std {b.std():.2e}"


# ---- parity ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-13, 0.0])
def test_the_norm_of_a_vanishing_position_is_the_published_one(saved, size):
    x = size * torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    mine, reference = (vae.encoder.down_blocks[0].norm1 for vae in (ours(saved), theirs(saved)))
    difference, tolerance = (mine(x) - reference(x)).abs().max(), 1e-12 * (1 + reference(x).abs().max())
    assert difference <= tolerance, f"values of {size}: largest difference {difference:.1e}, allowed {tolerance:.1e}"


@pytest.mark.parametrize("B, T, H, W", [(1, 1, 16, 24), (2, 5, 24, 16), (1, 9, 27, 38), (1, 17, 16, 16), (2, 33, 8, 8)])
def test_encode_and_decode_match_the_published_ones(saved, B, T, H, W):
    """27 x 38: what does not divide is lost on the way down, as published."""
    with torch.no_grad():
        for dtype, rms in ((torch.float64, False), (torch.float32, True)):
            vae, reference, x = ours(saved, dtype), theirs(saved, dtype), video(B, T, H, W, dtype)
            z = vae.encode(x)
            close(z, published_encode(reference, x), 1e-5, rms)
            close(vae.decode(z), published_decode(reference, z), 1e-5, rms)


@pytest.mark.parametrize("B, T, H, W", [(1, 1, 16, 24), (2, 9, 24, 16)])
def test_frames_in_patches_match_the_published_ones(patches, B, T, H, W):
    vae, reference, x = ours(patches), theirs(patches), video(B, T, H, W)
    with torch.no_grad():
        z = vae.encode(x)
        assert z.shape == (B, 3, 1 + (T - 1) // 4, H // 8, W // 8)
        close(z, published_encode(reference, x), 1e-5)
        close(vae.decode(z), published_decode(reference, z), 1e-5)
        small.fill_wan_vae(vae)
        for a, b in ((vae.encode(x), frugal.apply(vae).encode(x)), (vae.decode(z), frugal.apply(vae).decode(z))):
            close(b, a, 1e-10)
    (features,) = vae.mids2d(x)
    assert features.shape == (B, 8, T, H // 2, W // 2) and vae.feature_channels == [8] and vae.inject_channels == [8]
    with pytest.raises(ValueError, match=r"with 2 dividing H and W, got \[1, 3, 1, 15, 16\]"):
        vae.encode(torch.zeros(1, 3, 1, 15, 16))


def test_posterior_matches_the_published_mean_and_log_variance(saved):
    vae, reference, x = ours(saved), theirs(saved), video(1, 5, 16, 16)
    with torch.no_grad():
        for model in (vae, reference):
            model.quant_conv.weight.mul_(200)  # far enough that both ends of the log-variance are cut
        expected = reference.encode(x).latent_dist
        mean, logvar = vae.posterior(x)
    assert logvar.min() == -30 and logvar.max() == 20
    close(mean, expected.mean, 1e-5)
    close(logvar, expected.logvar, 1e-5)


def test_gradients_of_the_input_match_the_published_ones(saved):
    vae, reference = ours(saved), theirs(saved)
    for call, published, leaf in ((vae.encode, published_encode, video(1, 9, 16, 16)),
                                  (vae.decode, published_decode, latent(1, 3, 2, 3))):
        leaf.requires_grad_()
        out, out_reference = call(leaf), published(reference, leaf)
        weight = torch.randn_like(out)
        close(*(torch.autograd.grad((y * weight).sum(), leaf)[0] for y in (out, out_reference)), 1e-5)


def test_features_of_a_frame_are_what_the_published_encoder_has_before_it_first_changes_the_rate(saved):
    vae, reference, x = ours(saved), theirs(saved), video(2, 6, 16, 24)
    seen = []
    blocks = reference.encoder.down_blocks
    first = next(i for i, b in enumerate(blocks) if getattr(b, "mode", "") == "downsample3d")
    blocks[first - 1].register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.no_grad():
        for frame in x.unbind(dim=2):
            reference.encode(frame.unsqueeze(2))
        (features,) = vae.mids2d(x)
    assert features.shape == (2, 16, 6, 8, 12) and vae.inject_channels == [16]
    close(features, torch.cat(seen, dim=2), 1e-5)


def test_features_enter_behind_the_decoders_last_change_of_the_rate(saved):
    vae, reference, z = ours(saved), theirs(saved), latent(2, 3, 2, 3)
    features = torch.randn(2, 16, 9, 8, 12, dtype=z.dtype)
    groups = [features[:, :, :1], features[:, :, 1:5], features[:, :, 5:]]

    class Add(nn.Module):
        def forward(self, h, f):
            return h + f * h.abs().mean()

    vae.fusion = nn.ModuleList([Add()])
    todo = iter(groups)
    last = max(i for i, b in enumerate(reference.decoder.up_blocks)
               if b.upsamplers is not None and b.upsamplers[0].mode == "upsample3d")
    reference.decoder.up_blocks[last].register_forward_hook(lambda m, args, h: h + next(todo) * h.abs().mean())
    with torch.no_grad():
        expected = published_decode(reference, z)
        close(vae.decode(z, inject=[features]), expected, 1e-5)
        cache, pieces = None, []
        for i, f in enumerate(groups):
            x_g, cache = vae.decode_group(z[:, :, i : i + 1], cache, [f])
            pieces.append(x_g)
        close(torch.cat(pieces, dim=2), expected, 1e-5)


def test_features_without_a_place_to_enter_are_refused(saved):
    with pytest.raises(ValueError, match="injection.attach"):
        ours(saved).decode(latent(1, 1, 2, 2), inject=[torch.zeros(1, 16, 1, 8, 8)])


def test_bfloat16_stays_within_three_percent_of_float32(saved):
    """Root-mean-square, relative to the output's std; both models have the weights rounded to bfloat16."""
    low, high = ours(saved, torch.bfloat16), ours(saved, torch.bfloat16).float()
    x, z = video(1, 5, 16, 24).bfloat16(), latent(1, 2, 2, 3).bfloat16()
    with torch.no_grad():
        assert low.encode(x).dtype == torch.bfloat16
        close(low.encode(x).float(), high.encode(x.float()), 3e-2, rms=True)
        close(low.decode(z).float(), high.decode(z.float()), 3e-2, rms=True)


def test_a_position_that_is_all_zero_stays_finite():
    vae = WanVAE(WanVAEConfig(**SMALL))
    x = torch.zeros(1, 3, 1, 8, 8, requires_grad=True)
    vae.encoder.conv_in.bias.data.zero_()  # the first norm then sees only zeros
    (grad,) = torch.autograd.grad(vae.encode(x).sum(), x)
    assert grad.isfinite().all()


# ---- groups and caches ----------------------------------------------------------------------------------------------


def in_groups(step, x, plan):
    cache, out = None, []
    for group in x.split(plan, dim=2):
        y, cache = step(group, cache)
        out.append(y)
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("plan", [[17], [1, 16], [1, 8, 4, 4], [5, 4, 8], [13, 4]])
def test_every_plan_of_frames_encodes_to_the_same(saved, plan):
    vae, x = ours(saved), video(2, 17, 16, 24)
    with torch.no_grad():
        close(in_groups(vae.encode_group, x, plan), vae.encode(x), 1e-10)


@pytest.mark.parametrize("plan", [[5], [1, 4], [2, 3], [3, 1, 1], [1, 2, 2]])
def test_every_plan_of_latents_decodes_to_the_same(saved, plan):
    vae, z = ours(saved), latent(2, 5, 2, 3)
    with torch.no_grad():
        close(in_groups(vae.decode_group, z, plan), vae.decode(z), 1e-10)
    vae, z = ours(saved, torch.float32), z.float()
    with torch.no_grad():
        close(in_groups(vae.decode_group, z, plan), vae.decode(z), 1e-5)


def test_official_groups_tile_the_video(saved):
    vae = ours(saved)
    for T in (1, 5, 9, 33):
        for groups, n in ((vae.encode_groups(T), T), (vae.decode_groups(1 + T // 4), 1 + T // 4)):
            assert groups[0].start == 0 and groups[-1].stop == n
            assert all(a.stop == b.start for a, b in pairwise(groups))
    assert [g.stop - g.start for g in vae.encode_groups(9)] == [1, 4, 4]
    assert [g.stop - g.start for g in vae.decode_groups(3)] == [1, 1, 1]


def test_a_group_leaves_the_cache_it_was_given_alone_and_can_be_repeated(saved):
    vae = ours(saved)
    for step, first, second in ((vae.encode_group, video(1, 1, 16, 16), video(1, 4, 16, 16)),
                                (vae.decode_group, latent(1, 1, 2, 2), latent(1, 1, 2, 2))):
        with torch.no_grad():
            _, cache = step(first)
            copy = {key: value.clone() for key, value in cache.items()}
            once, after = step(second, cache)
            again, after_again = step(second, cache)
        assert after is not cache and after.keys() == cache.keys() == copy.keys()
        assert all(torch.equal(cache[key], copy[key]) for key in copy)
        assert torch.equal(once, again) and all(torch.equal(after[key], after_again[key]) for key in after)
        owned = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in after.values()}
        assert sum(owned.values()) == sum(v.numel() * v.element_size() for v in after.values()), "a view of more"


def test_two_videos_can_be_decoded_side_by_side(saved):
    vae, (a, b) = ours(saved), latent(2, 3, 2, 2).split(1)
    caches, out = [None, None], [[], []]
    with torch.no_grad():
        for g in vae.decode_groups(3):
            for i, z in enumerate((a, b)):
                x, caches[i] = vae.decode_group(z[:, :, g], caches[i])
                out[i].append(x)
        for pieces, z in zip(out, (a, b)):
            assert torch.equal(torch.cat(pieces, dim=2), vae.decode(z))


def test_no_latent_sees_a_later_frame_and_no_frame_a_later_latent(saved):
    vae, x, z = ours(saved), video(1, 13, 8, 8), latent(1, 4, 1, 1)
    with torch.no_grad():
        for t in range(13):
            other = x.clone()
            other[:, :, t] += 1
            moved = (vae.encode(other) - vae.encode(x)).abs().amax(dim=(0, 1, 3, 4)) > 0
            assert int(moved.nonzero()[0]) == -(-t // 4), f"of the latents, frame {t} reaches {moved}"
        for k in range(4):
            other = z.clone()
            other[:, :, k] += 1
            moved = (vae.decode(other) - vae.decode(z)).abs().amax(dim=(0, 1, 3, 4)) > 0
            assert int(moved.nonzero()[0]) == max(4 * k - 3, 0), f"of the frames, latent {k} reaches {moved}"


@pytest.mark.parametrize("T, full", [(1, 1), (2, 5), (4, 5), (5, 5), (6, 9), (8, 9)])
def test_frames_are_never_dropped_but_the_last_repeated(saved, T, full):
    vae, x = ours(saved), video(2, T, 8, 16)
    assert vae.legal_length(T) == full
    filled = torch.cat([x] + [x[:, :, -1:]] * (full - T), dim=2)
    with torch.no_grad():
        assert torch.equal(vae.encode(x), vae.encode(filled))
        assert vae.decode(vae.encode(x)).shape == filled.shape


def test_a_group_of_a_wrong_length_is_refused(saved):
    vae = ours(saved)
    with pytest.raises(ValueError, match=r"T = 4k \+ 1 here, got \[1, 3, 4, 8, 8\]"):
        vae.encode_group(video(1, 4, 8, 8))
    _, cache = vae.encode_group(video(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"T = 4k \+ 0 here, got \[1, 3, 3, 8, 8\]"):
        vae.encode_group(video(1, 3, 8, 8), cache)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_official_config_has_the_published_keys_and_shapes():
    config = published_config("wan2.1.vae.diffusers.json")
    with torch.device("meta"):
        reference, vae = AutoencoderKLWan.from_config(config), WanVAE(weights.read_config(WanVAE, config, "2.1"))
    assert vae.config == WanVAEConfig()
    assert {k: v.shape for k, v in vae.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert vae.inject_channels == [192]


def test_wan_2_2_is_refused_by_a_field_that_differs():
    config = published_config("wan2.2-ti2v-5b.vae.diffusers.json")
    for field, said in (("is_residual", "understands is_residual only as"),
                        ("decoder_base_dim", "understands decoder_base_dim only as"),
                        ("patch_size", "patch_size and dim_mult must make cells of 8 pixels, got patch_size=2 and 4"),
                        ("in_channels", "must be 3 with patch_size=None, got 12 and 3")):
        official = published_config("wan2.1.vae.diffusers.json")
        with pytest.raises(ValueError, match=said):
            weights.read_config(WanVAE, official | {field: config[field]}, "one field of 2.2")
    with pytest.raises(ValueError, match="is_residual|patch_size|in_channels|decoder_base_dim"):
        weights.read_config(WanVAE, config, "2.2")


@pytest.mark.parametrize("change", [{"attn_scales": [0.5]}, {"temperal_downsample": [False, True]},
                                    {"temperal_downsample": [True, True, True]}])
def test_a_field_that_would_change_the_result_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        weights.read_config(WanVAE, published_config("wan2.1.vae.diffusers.json") | change, "changed")


def test_the_pickled_original_is_refused_with_the_repository_that_has_safetensors():
    with pytest.raises(ValueError, match="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        WanVAE.from_pretrained("Wan2.1_VAE.pth")


def test_diffusers_reads_what_we_save(saved, tmp_path):
    vae, z = ours(saved, torch.float32), latent(1, 2, 2, 3, torch.float32)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        close(vae.decode(z), published_decode(theirs(tmp_path, torch.float32), z), 1e-5, rms=True)


# ---- little memory --------------------------------------------------------------------------------------------------


def test_without_gradients_the_official_network_holds_far_less_than_the_published_one():
    """Bytes of tensors alive at once, counted on the meta device."""
    with torch.device("meta"):
        vae, reference = WanVAE(), AutoencoderKLWan()
        z, held = torch.empty(1, 16, 3, 32, 32), []
    for model in (frugal.apply(vae), reference):
        with torch.no_grad(), LiveBytes(model) as live:
            model.decode(z)
        held.append(live.peak / 2**20)
    assert held[0] <= 0.75 * held[1], f"{held[0]:.0f} MiB, published {held[1]:.0f} MiB, allowed 0.75 of it"


def test_attention_does_not_hold_the_products_of_all_cells(monkeypatch):
    """PyTorch's attention takes its frugal path only for tensors whose channels lie next to each other."""
    taken, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v):
        taken.extend((q, k, v))
        return attention(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    wan_blocks.FrameAttention(8)(torch.randn(1, 8, 2, 3, 5))
    assert len(taken) == 3 and all(x.shape == (2, 1, 15, 8) and x.stride(-1) == 1 for x in taken)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_statistics_of_another_number_of_channels_are_refused(name):
    with pytest.raises(ValueError, match="latents_mean and latents_std must have z_dim=3 values each, got "):
        WanVAEConfig(**SMALL | {name: SMALL[name][:2]})
