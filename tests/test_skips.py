"""Skip convolutions: nothing at the start, the published wiring afterwards."""

import pytest
import torch

from mirage_min.method.skips import PUBLISHED_START, Skips
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_tiny import AutoencoderTiny, AutoencoderTinyConfig


def kl():
    return AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16, 24, 24), norm_num_groups=4))


def tiny():
    return AutoencoderTiny(AutoencoderTinyConfig(encoder_block_out_channels=(8,) * 4,
                                                 decoder_block_out_channels=(12,) * 4))


@pytest.fixture(params=[kl, tiny], ids=["AutoencoderKL", "AutoencoderTiny"])
def case(request):
    """(vae, skips of random weights, x, z, features)"""
    torch.manual_seed(0)
    vae = request.param().double()
    skips = Skips(vae.skip_channels()).double()
    x = torch.rand(2, 3, 24, 40, dtype=torch.float64) * 2 - 1
    return vae, skips, x, *vae.encode_with_features(x)


def test_new_skips_change_nothing_and_have_a_gradient(case):
    vae, skips, x, z, features = case
    y = vae.decode(z, skips(features))
    assert torch.equal(y, vae.decode(z))
    (y - x).square().mean().backward()
    for name, p in skips.named_parameters():
        assert p.grad.abs().max() > 0, f"{name} would never train"


def test_a_skip_adds_its_weighted_feature_and_no_other(case):
    """Each against a sum over channels in the test's own words."""
    vae, skips, x, z, features = case
    for p in skips.parameters():
        torch.nn.init.normal_(p)
    made = list(skips(features))
    assert len(made) == len(features) == len(list(skips.parameters()))
    for k, (skip, feature) in enumerate(zip(made, features[::-1]), start=1):
        weight = skips.get_parameter(f"skip_conv_{k}.weight")[:, :, 0, 0]
        wanted = (weight[None, :, :, None, None] * feature[:, None]).sum(dim=2)
        assert skip.shape == wanted.shape
        assert (skip - wanted).abs().max() < 1e-12 * wanted.std()
    assert not torch.equal(vae.decode(z, skips(features)), vae.decode(z))


def test_skips_are_made_only_as_they_are_asked_for(case):
    vae, skips, x, z, features = case
    made = []
    for conv in skips.children():
        conv.register_forward_hook(lambda conv, args, y: made.append(y.shape[-1]))
    coming = skips(features)
    assert made == []
    next(coming)
    assert made == [features[-1].shape[-1]], "the coarsest comes first"


def test_the_names_are_those_of_the_published_files():
    assert list(Skips([(512, 512), (256, 512), (128, 512), (128, 256)]).state_dict()) == [
        f"skip_conv_{k}.weight" for k in (1, 2, 3, 4)]


def test_the_published_start_adds_the_same_sum_to_every_channel():
    skips = Skips([(5, 3)], start=PUBLISHED_START)
    feature = torch.randn(1, 5, 2, 2)
    (skip,) = skips([feature])
    torch.testing.assert_close(skip, 1e-5 * feature.sum(1, keepdim=True).expand(1, 3, 2, 2))


def test_as_many_features_as_skips_are_wanted(case):
    vae, skips, x, z, features = case
    n = len(features)
    with pytest.raises(ValueError, match=f"wanted {n} features, one for each skip, got {n - 1}"):
        skips(features[1:])
