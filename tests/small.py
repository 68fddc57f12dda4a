"""Mirage with small random networks, for the tests: the shipped classes with smaller numbers."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mirage_min.method.one_step import alpha_bar
from mirage_min.method.skips import Skips
from mirage_min.networks import imagenet, weights
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig
from mirage_min.networks.unet_2d import UNet2D, UNet2DConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_tiny import AutoencoderTiny, AutoencoderTinyConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.networks.vae_wan22 import Wan22VAE, Wan22VAEConfig
from mirage_min.networks.wan_branch import WanBranch, WanBranchConfig
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.r3d2 import R3D2
from mirage_min.systems.world import World, WorldSettings


@contextmanager
def unchanged(*tensors: torch.Tensor):
    """What runs inside must leave these tensors as they are: a function that spoils its inputs spoils a test's too."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    changed = [i for i, (old, tensor) in enumerate(zip(before, tensors)) if not torch.equal(old, tensor)]
    assert not changed, f"of the {len(tensors)} tensors given, {changed} were changed"


def parts(patch_size_t: int | None = None, latent_channels: int = 4):
    """(vae, dit, vae2d), random and seeded."""
    torch.manual_seed(0)
    vae = CogVideoXVAE(CogVideoXVAEConfig(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4,
                                          latent_channels=latent_channels, scaling_factor=0.7))
    dit = CogVideoXDiT(CogVideoXDiTConfig(num_attention_heads=1, attention_head_dim=16, num_layers=1, time_embed_dim=8,
                                          in_channels=latent_channels, out_channels=latent_channels, text_embed_dim=8,
                                          max_text_seq_length=2, sample_height=4, sample_width=6,
                                          patch_size_t=patch_size_t, patch_bias=patch_size_t is None,
                                          use_rotary_positional_embeddings=True))
    vae2d = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1))
    return vae, dit, vae2d


def mirage(patch_size_t: int | None = None, **settings) -> Mirage:
    """A whole Mirage whose fusion blocks do something."""
    torch.manual_seed(1)
    model = Mirage(*parts(patch_size_t), torch.randn(1, 2, 8), alpha_bar(), **settings)
    for block in model.vae.fusion:
        nn.init.normal_(block.weight, std=0.05)
    return model.requires_grad_(False).eval()


def save_cogvideox(folder: Path, patch_size_t: int | None = 2) -> None:
    """base/ and vae_2d/ in diffusers layout: CogVideoX1.5's kind, or with patch_size_t None 2b's."""
    vae, dit, vae2d = parts(patch_size_t)
    vae.save_pretrained(folder / "base" / "vae"), dit.save_pretrained(folder / "base" / "transformer")
    vae2d.save_pretrained(folder / "vae_2d")
    (folder / "base" / "scheduler").mkdir()
    (folder / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "snr_shift_scale": 1.0}))


def r3d2(kl: bool = True, **changes) -> R3D2:
    """A whole R3D2 whose skips do something, with either VAE; changes: of its UNet."""
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 16, 24, 24), norm_num_groups=4)) if kl else (
        AutoencoderTiny(AutoencoderTinyConfig(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(12,) * 4,
                                              num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))))
    unet = UNet2D(UNet2DConfig(**dict(block_out_channels=(8, 16, 16, 16), attention_head_dim=(1, 2, 2, 2),
                                      use_linear_projection=True, norm_num_groups=4, layers_per_block=1,
                                      cross_attention_dim=12) | changes))
    skips = Skips(vae.skip_channels())
    for p in skips.parameters():
        nn.init.normal_(p, std=0.1)
    model = R3D2(unet, vae, skips, torch.randn(1, 7, 12), alpha_bar(zero_terminal_snr=False))
    return model.requires_grad_(False).eval()


def save_wan(folder: Path) -> None:
    """base/ of a small random Wan 2.1."""
    torch.manual_seed(0)
    WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1)).save_pretrained(folder / "base" / "vae")
    WanDiT(WanDiTConfig(num_attention_heads=1, attention_head_dim=24, num_layers=1, ffn_dim=32, freq_dim=16, text_dim=8
                       )).save_pretrained(folder / "base" / "transformer")
    (folder / "base" / "scheduler").mkdir()
    (folder / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}))


def world(two_two: bool = False, **settings) -> World:
    """A whole world model whose branch does something, with either VAE; settings: of the loop."""
    torch.manual_seed(0)
    statistics = dict(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    vae = Wan22VAE(Wan22VAEConfig(base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1, **statistics)) if two_two \
        else WanVAE(WanVAEConfig(base_dim=4, z_dim=4, num_res_blocks=1, **statistics))
    config = dict(num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2, ffn_dim=32,
                  freq_dim=16, text_dim=8)
    branch = WanBranch(WanBranchConfig(**config, vace_layers=(0, 1), vace_in_channels=5))
    for block in branch.vace_blocks:
        nn.init.normal_(block.proj_out.weight, std=0.5)
    text = torch.randn(1, 2, 8)
    return World(vae, WanDiT(WanDiTConfig(**config)), branch, text, WorldSettings(**dict(latents=2, steps=1) | settings)
                 ).requires_grad_(False).eval()


@torch.no_grad()
def fill_wan_vae(model: nn.Module) -> nn.Module:
    """Random weights for diffusers' Wan VAE that keep a signal's size, and gains and biases that matter."""
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            p.normal_(1, 0.3)
        elif name.endswith("bias"):
            p.normal_(std=0.2)
        else:
            p.normal_(std=p[0].numel() ** -0.5)
    for p in model.decoder.conv_out.parameters():
        p.mul_(0.1)
    return model


def save_backbones(folder: Path, vgg_layers: int = 31) -> None:
    """Random backbones for the losses: SqueezeNet whole, VGG-16 up to a layer."""
    torch.manual_seed(0)
    for name, net in (("squeezenet1_1", imagenet.squeezenet()), ("vgg16", imagenet.vgg16())):
        state = {k: v for k, v in net.state_dict().items() if name != "vgg16" or int(k.split(".")[0]) < vgg_layers}
        weights.save_tensors(folder / f"{name}_features.safetensors", state)
