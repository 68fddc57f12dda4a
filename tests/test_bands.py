"""Both causal VAEs in little memory, by bands of rows and with a cache that is spent, compute what they always do."""

import pytest
import torch

from mirage_min.method import lora
from mirage_min.networks import causal_conv
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig

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


def bands(monkeypatch, rows):
    """Cut whatever has more than `rows` rows, however small it is."""
    monkeypatch.setattr(causal_conv, "ROWS", rows)
    monkeypatch.setattr(causal_conv, "ENOUGH", 0)


def close(name, given, wanted):
    assert given.shape == wanted.shape, f"{name}: shape {list(given.shape)}, wanted {list(wanted.shape)}"
    difference = (given - wanted).abs().max() / wanted.std()
    assert difference < 1e-10, f"{name}: largest difference {difference:.1e} of the std, allowed 1e-10"


@pytest.mark.parametrize("rows, H", [(1, 24), (5, 37), (16, 24)])
def test_bands_of_rows_and_a_cache_that_is_spent_change_nothing(vae, monkeypatch, rows, H):
    """The reference has gradients: whole frames and nothing in place. The adapters come along."""
    bands(monkeypatch, rows)
    lora.add(vae.decoder, "a", 2, 2)
    for p in lora.parameters(vae.decoder, "a"):
        torch.nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 3, 17, H, 16, dtype=torch.float64) * 2 - 1
    z, before = vae.encode(x), x.clone()
    y = vae.decode(z)
    with torch.no_grad():
        z_low, y_low = vae.encode(x), vae.decode(z)
    assert torch.equal(x, before)
    close("z", z_low, z)
    close("x", y_low, y.detach())


def test_in_bands_a_group_leaves_its_cache_alone_unless_it_is_spent_and_hands_out_the_same(vae, monkeypatch):
    bands(monkeypatch, 3)
    first, second = torch.randn(1, C, 5, 2, 3, dtype=torch.float64).split([3, 2], dim=2)
    _, cache = vae.decode_group(first)
    before = {key: value.clone() for key, value in cache.items()}
    wanted, after = vae.decode_group(second, cache)
    with torch.no_grad():
        kept = vae.decode_group(second, cache)
        assert all(torch.equal(cache[key], before[key]) for key in before), "a cache was written over"
        spent = vae.decode_group(second, emptied := causal_conv.Spent(cache))
    assert not emptied, f"what a group does not read is held on to: {list(emptied)}"
    for given, low in (kept, spent):
        close("x", given, wanted)
        assert low.keys() == after.keys()
        for key in after:
            close(key, low[key], after[key])
