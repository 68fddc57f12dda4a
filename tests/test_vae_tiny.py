"""AutoencoderTiny against diffusers' own, live, on small random weights and on the official config."""

import pytest
import torch

from mirage_min.networks.vae_tiny import AutoencoderTiny, AutoencoderTinyConfig
from mirage_min.networks.weights import read_config
from tests.torchvision_stub import stub

stub()
diffusers = pytest.importorskip("diffusers", reason="parity is measured against diffusers: pip install diffusers")

SMALL = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (12,) * 4}
BEFORE_DOWNSAMPLING, AFTER_UPSAMPLING = (1, 5, 9), (6, 11, 16)  # layers of the published encoder and decoder


def published(**changes):
    """diffusers' AutoencoderTiny, small and random, in float64."""
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(**SMALL | changes).double().eval()


@pytest.fixture
def pair(tmp_path):
    """Makes (diffusers' VAE, ours loaded from what diffusers saved)."""
    def make(**changes):
        theirs = published(**changes)
        theirs.save_pretrained(tmp_path)
        return theirs, AutoencoderTiny.from_pretrained(tmp_path)
    return make


def assert_equal_in_float64(what, ours, theirs):
    difference, tolerance = (ours - theirs).abs().max().item(), 1e-9 * theirs.std().item()
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)}, diffusers {list(theirs.shape)}"
    assert difference <= tolerance, f"{what}: largest difference {difference:.1e}, tolerance {tolerance:.1e}"


@pytest.mark.parametrize("N, H, W", [(1, 32, 48), (2, 41, 57), (1, 8, 8), (3, 17, 1), (1, 1, 1)])
@torch.no_grad()
def test_encode_features_and_decode_equal_the_published_ones_at_any_size(pair, N, H, W):
    theirs, ours = pair()
    x = torch.rand(N, 3, H, W, dtype=torch.float64) * 2 - 1
    seen = []
    hooks = [theirs.encoder.layers[i].register_forward_hook(lambda layer, args, y: seen.append(y))
             for i in BEFORE_DOWNSAMPLING]
    wanted = theirs.encode(x).latents
    for hook in hooks:
        hook.remove()
    z, features = ours.encode_with_features(x)
    assert_equal_in_float64("encode", z, wanted)
    assert torch.equal(ours.encode(x), z)
    assert len(features) == len(seen) == 3
    for i, (f, s) in enumerate(zip(features, seen)):
        assert_equal_in_float64(f"features[{i}]", f, s)
    z = 4 * torch.randn_like(wanted)  # beyond the soft clamp too
    assert_equal_in_float64("decode", ours.decode(z), theirs.decode(z).sample)


@torch.no_grad()
def test_a_skip_is_added_after_each_upsampling_coarsest_first(pair):
    theirs, ours = pair()
    z = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    skips = [torch.randn(2, 12, 5 * s, 3 * s, dtype=torch.float64) for s in (2, 4, 8)]
    for i, skip in zip(AFTER_UPSAMPLING, skips):
        theirs.decoder.layers[i].register_forward_hook(lambda layer, args, y, skip=skip: y + skip)
    wanted = theirs.decode(z).sample
    assert_equal_in_float64("decode with skips", ours.decode(z, skips), wanted)
    assert_equal_in_float64("skips made on the way", ours.decode(z, (skip for skip in skips)), wanted)
    assert (ours.decode(z) - wanted).abs().max() > 0.1 * wanted.std()
    with pytest.raises(ValueError, match=r"skip must have the shape.*\[2, 12, 10, 6\], got \[1, 12, 10, 6\]"):
        ours.decode(z, [skip[:1] for skip in skips])


def test_gradients_of_input_and_skips_equal_the_published_ones(pair):
    theirs, ours = pair()
    x = (torch.rand(1, 3, 16, 24, dtype=torch.float64) * 2 - 1).requires_grad_()
    (wanted,) = torch.autograd.grad(theirs.decode(theirs.encode(x).latents).sample.square().mean(), x)
    (given,) = torch.autograd.grad(ours.decode(ours.encode(x)).square().mean(), x)
    assert_equal_in_float64("gradient", given, wanted)


@pytest.mark.parametrize("changes", [
    {"scaling_factor": 0.5, "latent_channels": 16},
    {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (2, 1),
     "num_decoder_blocks": (1, 2)}], ids=["16 latents", "two sizes"])
@torch.no_grad()
def test_the_other_shapes_of_the_network_equal_the_published_ones(pair, changes):
    theirs, ours = pair(**changes)
    scale = theirs.config.scaling_factor
    x = torch.rand(1, 3, 24, 40, dtype=torch.float64) * 2 - 1
    z = theirs.encode(x).latents
    assert_equal_in_float64("encode", ours.encode(x), z * scale)  # scaled as pipelines do around the published one
    assert_equal_in_float64("decode", ours.decode(z * scale), theirs.decode(z).sample)


@pytest.mark.parametrize("dtype, of_std", [(torch.float32, 1e-5), (torch.bfloat16, None), (torch.float16, None)])
@torch.no_grad()
def test_lower_precision_rounds_no_more_than_the_published_one(pair, dtype, of_std):
    theirs, ours = pair()
    x = torch.rand(2, 3, 33, 47, dtype=torch.float64) * 2 - 1
    wanted = theirs.decode(theirs.encode(x).latents).sample
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), x.to(dtype)
    given, publisheds = ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x).latents).sample
    assert given.dtype == dtype
    rms, rms_published = (((v.double() - wanted).square().mean().sqrt() / wanted.std()).item()
                          for v in (given, publisheds))
    assert rms <= (of_std or 1.25 * rms_published), f"RMS {rms:.1e} of the std, diffusers' own {rms_published:.1e}"


TAESD = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "block_out_channels": [64] * 4, "in_channels": 3,
         "encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4, "force_upcast": False,
         "latent_channels": 4, "latent_magnitude": 3, "latent_shift": 0.5, "num_decoder_blocks": [3, 3, 3, 1],
         "num_encoder_blocks": [1, 3, 3, 3], "out_channels": 3, "scaling_factor": 1.0, "upsampling_scaling_factor": 2}


def test_the_official_config_gives_the_published_keys_and_shapes():
    with torch.device("meta"):
        ours = AutoencoderTiny(read_config(AutoencoderTiny, TAESD, "taesd")).state_dict()
        theirs = diffusers.AutoencoderTiny.from_config(TAESD).state_dict()
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1], f"differ at {sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:5]}"
    assert sum(tensor.numel() for tensor in ours.values()) == 1_222_532 + 1_222_531


@pytest.mark.parametrize("name, value", [("act_fn", "gelu"), ("upsampling_scaling_factor", 4), ("shift_factor", 0.1),
                                         ("upsample_fn", "bilinear"), ("tiling", True)])
def test_a_field_that_would_change_the_result_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read_config(AutoencoderTiny, TAESD | {name: value}, "config.json")


def test_several_widths_are_refused():
    with pytest.raises(ValueError, match=r"one number, 4 times, got \[64, 64, 32, 32\]"):
        AutoencoderTiny(AutoencoderTinyConfig(decoder_block_out_channels=(64, 64, 32, 32)))


def test_skip_channels_name_the_features_and_what_the_decoder_takes(pair):
    assert pair()[1].skip_channels() == [(8, 12)] * 3
