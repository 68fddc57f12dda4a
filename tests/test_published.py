"""diffusers' parts that ours are measured against: they do the same work, so they give the same result."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import published
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.systems.mirage import Mirage
from tests.torchvision_stub import stub


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """The same models with few channels and layers."""
    stub()
    pytest.importorskip("diffusers")
    changes = {"COG_1_5_VAE": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
               "COG_1_5_DIT": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1},
               "SD_TURBO": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": (1, 2, 2, 2),
                            "layers_per_block": 1},
               "SD_VAE": {"block_out_channels": (32,) * 4, "layers_per_block": 1}}
    for name, small in changes.items():
        monkeypatch.setattr(published, name, getattr(published, name) | small)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["R3D2", "R3D2-BIG"])
def test_diffusers_r3d2_on_our_weights_gives_what_ours_gives(name):
    ours = published.r3d2(name, "cpu")
    ours.text.copy_(torch.randn(ours.text.shape))
    for p in ours.skips.parameters():
        p.normal_(std=0.1)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        wanted, found = ours.enhance(x), published.DiffusersR3D2(ours)(x)
    off = ((found - wanted).square().mean().sqrt() / wanted.std()).item()
    assert off < 1e-4, f"the difference is {off:.1e} of the deviation"


@pytest.mark.parametrize("T", [1, 9])
def test_diffusers_5b_gives_what_mirage_does_without_its_2d_encoder(monkeypatch, T):
    """Their latents are padded to whole patches of two."""
    made = []

    def in_float32(make, device, dtype):
        made.append(make().eval().requires_grad_(False))
        return made[-1]
    monkeypatch.setattr(published, "random_model", in_float32)
    forward = published.diffusers_5b("cpu")
    ours = Mirage(CogVideoXVAE(CogVideoXVAEConfig(**published.COG_1_5_VAE)),
                  CogVideoXDiT(CogVideoXDiTConfig(**published.COG_1_5_DIT)),
                  AutoencoderKL(AutoencoderKLConfig(**published.SD_VAE)), torch.zeros(1, 226, 4096),
                  published.alpha_bar()).requires_grad_(False).eval()
    for mine, theirs in zip((ours.vae, ours.dit), made):
        mine.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, T, 32, 48) * 2 - 1
    wanted, found = ours.vae.decode(ours.denoise(ours.vae.encode(x))), forward(x)
    assert found.shape == x.shape
    off = ((found - wanted).square().mean().sqrt() / wanted.std()).item()
    assert off < 1e-4, f"the difference is {off:.1e} of the deviation"


def test_both_vaes_of_a_pair_have_the_same_weights(monkeypatch):
    theirs = published.diffusers()
    monkeypatch.setattr(published, "diffusers", lambda: SimpleNamespace(
        AutoencoderKLCogVideoX=theirs.AutoencoderKLCogVideoX, AutoencoderKLWan=lambda: nn.Linear(2, 3)))
    monkeypatch.setattr(published, "WanVAE", lambda: nn.Linear(2, 3))  # the published one takes its time to draw
    frugal = []
    monkeypatch.setattr(published.frugal, "apply", frugal.append)
    pairs = published.vaes("cpu")
    for name, (ours, other) in pairs.items():
        assert all(torch.equal(v, ours.state_dict()[key]) for key, v in other.state_dict().items()), name
    assert isinstance(pairs["CogVideoX"][0], CogVideoXVAE) and frugal == [ours for ours, _ in pairs.values()]
    ours, other = pairs["CogVideoX"]
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    mean = published.their_encode(other, x)
    assert (ours.encode(x) - mean * 0.7).abs().max() < 1e-4 * mean.std(), "ours is scaled"
    assert (ours.decode(mean * 0.7) - published.their_decode(other, mean)).abs().max() < 1e-3
