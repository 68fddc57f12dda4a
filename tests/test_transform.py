"""training/transform.py: a new encoder holds nearly what as many principal components do, by numpy's least squares."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.networks import small_base
from mirage_min.networks.wan_blocks import Downsample, FrameAttention, ResnetBlock
from mirage_min.training import transform
from mirage_min.training.transform import begin_as_transform, leave_blocks_out


@pytest.fixture(scope="module")
def videos():
    """Smooth random videos in [-1, 1] that move, and stills."""
    torch.manual_seed(0)
    coarse = torch.randn(6, 3, 5, 6, 8), torch.randn(4, 3, 1, 4, 6)
    smooth = [nnf.interpolate(x, (T, 32, 48), mode="trilinear") for x, T in zip(coarse, (9, 1))]
    return [(x + 0.05 * torch.randn_like(x)).tanh() for x in smooth]


@pytest.fixture(scope="module", params=[False, True], ids=["pixels", "patches"])
def vae(videos, request):
    torch.manual_seed(1)
    vae = small_base.new_vae("wan", z_dim=24, patches=request.param)
    begin_as_transform(vae, videos)
    return vae.eval()


def later_blocks(x):
    """The blocks of 4 frames of 8 x 8 pixels after the first frame, as rows [n, 768]."""
    B, C, T, H, W = x.shape
    cut = x[:, :, 1:].reshape(B, C, (T - 1) // 4, 4, H // 8, 8, W // 8, 8)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, C * 4 * 64).double().numpy()


def error_from(latents, blocks):
    """The mean square error of the best linear map from latents to blocks, both rows."""
    given = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    return np.square(given @ np.linalg.lstsq(given, blocks, rcond=None)[0] - blocks).mean()


@torch.no_grad()
def rows_of(vae, x):
    """Latents after the first, as rows."""
    return vae.posterior(x)[0][:, :, 1:].movedim(1, -1).flatten(0, -2).double().numpy()


def test_the_latents_hold_nearly_what_as_many_principal_components_do(vae, videos):
    x, blocks = videos[0], later_blocks(videos[0])
    s = np.linalg.svd(blocks - blocks.mean(axis=0), compute_uv=False)
    best = np.square(s[24:]).sum() / blocks.size
    found = error_from(rows_of(vae, x), blocks)
    untrained = error_from(rows_of(small_base.new_vae("wan", z_dim=24), x), blocks)
    assert best < found < 1.5 * best < untrained / 3, f"components {best:.4f}, latents {found:.4f}, new {untrained:.4f}"


def test_a_first_frame_is_held_too(vae, videos):
    x = torch.cat([videos[1], videos[0][:, :, :1]])
    blocks = x.reshape(-1, 3, 4, 8, 6, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).double().numpy()
    with torch.no_grad():
        latents = vae.posterior(x)[0].movedim(1, -1).flatten(0, -2).double().numpy()
    variance = np.square(blocks - blocks.mean(axis=0)).mean()
    assert error_from(latents, blocks) < 0.05 * variance


def test_latents_vary_with_their_components_root_and_have_little_noise(vae, videos):
    with torch.no_grad():
        both = [[v.movedim(1, -1).flatten(0, -2) for v in vae.posterior(x)] for x in videos]
    mean, logvar = map(torch.cat, zip(*both))
    std = mean.std(dim=0)
    assert std[0] > 2 * std[-1] > 0 and (std[:-1] > 0.8 * std[1:]).all(), std
    assert torch.allclose(logvar, torch.full_like(logvar, -6.0), atol=1e-4)


def test_a_channel_of_the_latents_is_nearly_a_linear_function_of_the_video(vae, videos):
    x, y = videos[0][:1], videos[0][1:2]
    with torch.no_grad():
        z = {s: vae.posterior(s * x + (1 - s) * y)[0] for s in (0.0, 0.5, 1.0)}
    bend = z[0.5] - (z[0.0] + z[1.0]) / 2
    assert bend.square().mean() < 0.01 * (z[1.0] - z[0.0]).square().mean()


def test_blocks_and_attention_begin_without_effect_and_can_learn(vae, videos):
    for layer in (*vae.encoder.down_blocks, *vae.encoder.mid_block.resnets, *vae.encoder.mid_block.attentions):
        if isinstance(layer, Downsample):
            continue
        last = layer.proj if isinstance(layer, FrameAttention) else layer.conv2
        assert not last.weight.any() and not last.bias.any()
        if isinstance(layer, ResnetBlock) and layer.conv_shortcut is None:
            x = torch.randn(1, layer.conv1.in_channels, 3, 4, 4)
            assert torch.equal(layer(x, None, {}), x)
    vae.posterior(videos[0][:1])[0].square().mean().backward()
    blocks = [layer for layer in vae.encoder.down_blocks if isinstance(layer, ResnetBlock)]
    assert blocks and all(layer.conv2.weight.grad.any() for layer in blocks)
    vae.zero_grad()


def test_a_decoder_gives_the_same_without_its_blocks_which_are_not_trained_then(vae, videos):
    vae = copy.deepcopy(vae)
    z = vae.encode(videos[0][:1]).detach()
    with torch.no_grad():
        whole = vae.decode(z)
    ran = []
    for layer in vae.decoder.modules():
        if isinstance(layer, ResnetBlock):
            layer.conv1.register_forward_hook(lambda *_: ran.append("conv1"))
    leave_blocks_out(vae)
    y = vae.decode(z)
    assert torch.allclose(y, whole, atol=1e-6) and y.std() > 0
    y.square().mean().backward()
    in_block = ("norm1", "conv1", "norm2", "conv2", "attentions")
    for name, p in vae.decoder.named_parameters():
        left_out = name != "norm_out.gamma" and any(part in name.split(".") for part in in_block)
        assert p.requires_grad != left_out and (p.grad is None) == left_out, name
    assert not ran


def test_a_trained_decoder_keeps_its_blocks():
    with pytest.raises(ValueError, match="blocks that add nothing yet .*, got mid_block.resnets.0, which was trained"):
        leave_blocks_out(small_base.new_vae("wan"))
    with pytest.raises(ValueError, match="wanted a VAE of Wan's .*, got CogVideoXVAE"):
        leave_blocks_out(small_base.new_vae())


@pytest.mark.parametrize("keep_last", [False, True])
def test_pairs_of_frames_become_their_largest_means_and_differences(keep_last):
    torch.manual_seed(2)
    layer = Downsample(6, True, "key")
    sizes = torch.tensor([5.0, 0.1, 3.0]).view(1, 3, 1, 1, 1)
    x = torch.zeros(2, 6, 9, 4, 4)
    x[:, :3] = sizes * torch.randn(2, 3, 9, 4, 4)
    x[:, 5] = 7
    with torch.no_grad():
        count = transform.merge_frames(layer, [x], 3, keep_last)
        y = layer.time_conv(x)
    a, b = x[:, :, 1::2], x[:, :, 2::2]
    mean, difference = (a + b) / 2, (b - a) / 2
    assert count == 6 - keep_last
    wanted = [mean[:, i] for i in range(3)] + [difference[:, i] for i in (0, 2, 1)]  # a mean where its channel was
    if not keep_last:
        found = [y[:, i] for i in range(6)]
        assert all(any(torch.allclose(f, w, atol=1e-5) for f in found) for w in wanted)
        assert all(torch.allclose(y[:, i], mean[:, i], atol=1e-5) for i in range(3))
        return
    assert torch.allclose(y[:, 5], torch.full_like(y[:, 5], 7.0)), "apart from the others"
    kept = [i for i, w in enumerate(wanted) if any(torch.allclose(y[:, k], w, atol=1e-5) for k in range(5))]
    assert len(kept) == 5 and {0, 2, 3, 4} <= set(kept), "one of the two small ones is left out"


def test_more_channels_than_the_encoder_passes_on_are_refused(videos):
    with pytest.raises(ValueError, match="z_dim must be less than the 64 channels before the latents, got 64"):
        begin_as_transform(small_base.new_vae("wan", z_dim=64), videos)


@pytest.mark.parametrize("patches, wanted, width", [(False, 3, 2 / 16), (True, 12, 11 / 32)])
def test_a_first_layer_without_room_for_what_enters_is_refused(videos, patches, wanted, width):
    vae = small_base.new_vae("wan", width=width, z_dim=3, patches=patches)
    message = f"base_dim must be {wanted} at least, as many as the values of a patch, got {wanted - 1}"
    with pytest.raises(ValueError, match=message):
        begin_as_transform(vae, videos)


def test_stills_alone_are_refused(videos):
    with pytest.raises(ValueError, match="wanted videos of 5 frames or more among them, got single frames only"):
        begin_as_transform(small_base.new_vae("wan"), videos[1:])


def test_grey_videos_are_no_trouble():
    vae = small_base.new_vae("wan")
    x = torch.zeros(1, 3, 5, 16, 16)
    begin_as_transform(vae, [x])
    with torch.no_grad():
        assert vae.posterior(x)[0].isfinite().all()
