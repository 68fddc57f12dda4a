"""VAEs made frugal compute what they always do; the plain ones leave alone what a hook has seen."""

import copy

import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.method import injection, lora
from mirage_min.networks import bands, frugal
from mirage_min.networks.bands import TakenCache, normed_conv
from mirage_min.networks.causal_conv import CausalConv3d
from mirage_min.networks.unet_2d import UNet2D, UNet2DConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.training.memory import LiveBytes
from tests import small

C = 4  # latent channels
SMALL = {
    CogVideoXVAE: CogVideoXVAEConfig(block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4,
                                     latent_channels=C),
    WanVAE: WanVAEConfig(base_dim=8, z_dim=C, num_res_blocks=1, latents_mean=(0.3, -0.5, 0.1, 0.0),
                         latents_std=(1.5, 0.7, 2.0, 1.0))}


@pytest.fixture(params=SMALL)
def vae(request):
    """Small, in float64: weights that keep a signal's size, gains and biases that matter."""
    torch.manual_seed(0)
    model = request.param(SMALL[request.param]).double().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.2)
        elif p.numel() == len(p):  # the gain of a norm
            p.normal_(1, 0.3)
        else:
            p.normal_(std=p[0].numel() ** -0.5)
    return model


def cut(monkeypatch, rows):
    """Cut whatever has more than `rows` rows, however small it is."""
    monkeypatch.setattr(bands, "ROWS", rows)
    monkeypatch.setattr(bands, "SMALL", 0)


def close(name, given, wanted):
    assert given.shape == wanted.shape, f"{name}: shape {list(given.shape)}, wanted {list(wanted.shape)}"
    difference = (given - wanted).abs().max() / wanted.std()
    assert difference < 1e-10, f"{name}: largest difference {difference:.1e} of the std, allowed 1e-10"


@pytest.mark.parametrize("rows, H", [(1, 24), (5, 37), (16, 24)])
def test_frugal_is_plain_up_to_rounding(vae, monkeypatch, rows, H):
    """The adapters come along, and the clip that was given stays as it is."""
    cut(monkeypatch, rows)
    lora.add(vae.decoder, "a", 2, 2)
    for p in lora.parameters(vae.decoder, "a"):
        torch.nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 3, 17, H, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x)
        y = vae.decode(z)
        keys = list(vae.state_dict())
        frugal.apply(vae)
        assert list(vae.state_dict()) == keys
        with small.unchanged(x, z):
            z_low, y_low = vae.encode(x), vae.decode(z)
    close("z", z_low, z)
    close("x", y_low, y)


def test_with_gradients_a_frugal_vae_is_the_plain_one(vae, monkeypatch):
    """To the bit, gradients included; and a copy of a frugal VAE is frugal."""
    cut(monkeypatch, 1)
    x = torch.rand(1, 3, 9, 16, 16, dtype=torch.float64, requires_grad=True)

    def run(vae):
        y = vae.decode(vae.encode(x))
        return y, *torch.autograd.grad(y.square().sum(), x)
    wanted = run(vae)
    given = run(copy.deepcopy(frugal.apply(frugal.apply(vae))))
    assert all(torch.equal(a, b) for a, b in zip(given, wanted))
    assert type(vae).__name__.startswith("Frugal") and type(vae) is type(copy.deepcopy(vae))


@torch.no_grad()
def test_a_hook_keeps_what_it_saw(vae, monkeypatch):
    """The input and output of every layer of a plain VAE, kept without a copy while the rest of it runs."""
    cut(monkeypatch, 1)
    seen = []

    def keep(layer, inputs, output):
        for tensor in (*inputs, output):
            if isinstance(tensor, torch.Tensor):
                seen.append((type(layer).__name__, tensor, tensor.clone()))
    for layer in vae.modules():
        layer.register_forward_hook(keep)
    vae.decode(vae.encode(torch.rand(1, 3, 9, 40, 16, dtype=torch.float64)))
    changed = {name for name, tensor, before in seen if not torch.equal(tensor, before)}
    assert len(seen) > 100 and not changed, f"of {len(seen)} tensors seen, those of {changed} were overwritten"


# ---- caches ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def groups(vae, monkeypatch):
    """A frugal VAE, latents of its second group, the cache of its first in a plain dict, and what must come out."""
    cut(monkeypatch, 3)
    first, second = torch.randn(1, C, 5, 2, 3, dtype=torch.float64).split([3, 2], dim=2)
    with torch.no_grad():
        wanted = vae.decode_group(second, vae.decode_group(first)[1])
        _, cache = frugal.apply(vae).decode_group(first)
    return vae, second, cache, wanted


def check_group(given, wanted):
    close("x", given[0], wanted[0])
    assert given[1].keys() == wanted[1].keys()
    for key in wanted[1]:
        close(key, given[1][key], wanted[1][key])


@torch.no_grad()
def test_a_group_takes_over_the_cache_handed_on_and_a_second_reader_is_refused(groups):
    """It does not start the video anew, with or without gradients."""
    vae, second, cache, wanted = groups
    check_group(vae.decode_group(second, cache), wanted)
    assert not cache, f"what a group does not read is held on to: {list(cache)}"
    with pytest.raises(ValueError, match="this cache was taken over by the group after it"):
        vae.decode_group(second, cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="this cache was taken over by the group after it"):
        vae.decode_group(second, cache)


@torch.no_grad()
def test_a_plain_dict_is_left_alone_and_so_is_any_cache_where_gradients_are_on(groups):
    vae, second, cache, wanted = groups
    plain = {key: value.clone() for key, value in cache.items()}
    with small.unchanged(*plain.values(), *cache.values()):
        check_group(vae.decode_group(second, plain), wanted)
        check_group(vae.decode_group(second, plain), wanted)
        with torch.enable_grad():
            check_group(vae.decode_group(second, cache), wanted)
    check_group(vae.decode_group(second, cache), wanted)


def test_a_cache_that_has_been_read_whole_is_still_a_past():
    """CausalConv3d asks `if old`: an emptied cache must not look like the start of a video."""
    taken = TakenCache({"conv": torch.zeros(1)})
    assert taken["conv"] is not None and len(taken) == 0 and taken
    with pytest.raises(KeyError):
        taken["conv"]


# ---- the pieces ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", [3, (3, 1, 1), (2, 5, 3)])
@pytest.mark.parametrize("rows", [2, 4])
@torch.no_grad()
def test_bands_of_rows_are_the_whole_whatever_the_kernel_the_cache_and_the_sum(monkeypatch, kernel, rows):
    """norm, SiLU and convolution of a frame at once against bands of at least `rows` of its 11 rows."""
    torch.manual_seed(0)
    conv, norm = CausalConv3d(3, 2, kernel).double(), torch.randn(1, 3, 1, 11, 1, dtype=torch.float64)
    conv.key = "conv"
    clips, onto = torch.randn(3, 2, 3, 4, 11, 5, dtype=torch.float64), torch.randn(2, 2, 4, 11, 5, dtype=torch.float64)
    cut(monkeypatch, rows)
    seen, old, old_whole = [], None, None

    def norm_rows(band, where):
        seen.append(band.shape[3])
        return band * norm[..., where, :]
    for x, y_before in zip(clips, (None, onto, None)):
        new, new_whole = {}, {}
        wanted = conv(nnf.silu(x * norm), old_whole, new_whole) + (0 if y_before is None else y_before)
        given = normed_conv(norm_rows, conv, x, old, new, onto=None if y_before is None else y_before.clone())
        difference = max((a - b).abs().max() for a, b in zip((given, *new.values()), (wanted, *new_whole.values())))
        assert difference < 1e-12 and new.keys() == new_whole.keys(), f"largest difference {difference:.1e}"
        old, old_whole = new if old is None else TakenCache(new), new_whole
    assert max(seen) < 11, f"the whole frame was worked on at once: bands of {seen}"


@torch.no_grad()
def test_fusion_on_tall_frames_goes_one_by_one_in_place(monkeypatch):
    vae = small.parts()[0].double()
    injection.attach(vae, [5, 6])
    block = vae.fusion.double()[0]
    torch.nn.init.normal_(block.weight, std=0.2)
    h, f = torch.randn(2, 8, 3, 33, 5, dtype=torch.float64), torch.randn(2, 5, 3, 33, 5, dtype=torch.float64)
    wanted = block(h, f)
    frugal.apply(vae)
    calls, conv2d = [], nnf.conv2d
    monkeypatch.setattr(nnf, "conv2d", lambda x, *a, **k: (calls.append(len(x)), conv2d(x, *a, **k))[1])
    assert block(h, f) is h
    difference = (h - wanted).abs().max()
    assert calls == [2, 2, 2], f"frames to a convolution, of two clips: {calls}"
    assert difference < 1e-12, f"largest difference {difference:.1e}, allowed 1e-12"


# ---- the image VAE ---------------------------------------------------------------------------------------------------

@pytest.fixture
def images():
    """(plain, frugal), of the same random weights"""
    torch.manual_seed(0)
    plain = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16, 24, 24), norm_num_groups=4))
    return plain, frugal.apply(copy.deepcopy(plain))


@torch.no_grad()
def test_the_image_vae_computes_the_same_in_place_and_holds_less(images):
    x, found = torch.rand(2, 3, 64, 48) * 2 - 1, []
    for vae in images:
        z, features = vae.encode_with_features(x)
        kept = [feature.clone() for feature in features]
        draws = torch.Generator().manual_seed(1)
        skips = [torch.randn(2, c, *f.shape[-2:], generator=draws)
                 for f, (_, c) in zip(features[::-1], vae.skip_channels())]
        with small.unchanged(z, *skips), LiveBytes(vae) as live:
            y = vae.decode(z, iter(skips))
        found.append(([z, *features, y, vae.decode(z)], live.peak))
        assert all(torch.equal(a, b) for a, b in zip(features, kept)), "a feature was spoilt"
    (plain, most), (in_place, less) = found
    for a, b in zip(plain, in_place):
        difference = (a - b).abs().max().item()
        assert difference <= 1e-6 * a.std().item(), f"largest difference {difference:.1e}"
    assert less < 0.85 * most, f"{less} bytes, plain {most}"


def test_with_gradients_the_image_vae_is_the_plain_one(images):
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    grads = [torch.autograd.grad(vae.decode(vae.encode(x)).square().mean(), list(vae.parameters())) for vae in images]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_a_skip_of_another_shape_is_refused_in_place_too(images):
    with pytest.raises(ValueError, match="a skip must have the shape"):
        images[1].decode(torch.randn(2, 4, 2, 3), [torch.randn(1, 24, 2, 3)])


# ---- the UNet --------------------------------------------------------------------------------------------------------

UNET = dict(block_out_channels=(16, 24), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12,
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


@torch.no_grad()
def test_the_unet_computes_the_same_by_pieces_of_tokens_and_holds_less(monkeypatch):
    """Of 2 x 1,024 tokens 300 at a time: the last piece is shorter."""
    monkeypatch.setattr(frugal, "TOKENS", 300)
    torch.manual_seed(0)
    plain = UNet2D(UNet2DConfig(**UNET)).double()
    in_pieces = frugal.apply(copy.deepcopy(plain))
    z, text = torch.randn(2, 4, 32, 32, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    peaks, results = [], []
    for unet in (plain, in_pieces):
        with small.unchanged(z, text), LiveBytes(unet) as live:
            results.append(unet(z, 199, text, views=2))
        peaks.append(live.peak)
    close("ε", results[1], results[0])
    assert peaks[1] < 0.7 * peaks[0], f"{peaks[1]} bytes, plain {peaks[0]}"


def test_with_gradients_the_unet_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(frugal, "TOKENS", 5)
    torch.manual_seed(0)
    plain = UNet2D(UNet2DConfig(**UNET))
    z, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 12)
    grads = [torch.autograd.grad(unet(z, 199, text).square().mean(), list(unet.parameters()))
             for unet in (plain, frugal.apply(copy.deepcopy(plain)))]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
