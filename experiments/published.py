"""The published models that ours are measured against: diffusers' classes, and the sizes of the official weights.

Everything here has random weights: what a model costs does not depend on them.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from mirage_min.method.one_step import alpha_bar
from mirage_min.networks import frugal
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.mirage import Mirage

COG_BLOCKS = {"down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4}
COG_1_5_VAE = {"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "scaling_factor": 0.7}
COG_1_5_DIT = {"num_attention_heads": 48, "num_layers": 42, "sample_width": 300, "sample_height": 300,
               "patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
WAN_DIT = {"1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
           "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}}


def diffusers() -> ModuleType:
    """The module. It needs no torchvision, but stumbles over one that was built for another torch: that is hidden."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # what Python takes for "not installed"
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError("this needs diffusers: pip install diffusers") from error


def random_model(make: Callable[[], nn.Module], device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen module with random weights, made where it will live; on "meta" it has shapes and no weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# ---- 3D VAEs, ours and diffusers' ------------------------------------------------------------------------------------

def vaes(device: str) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (ours, diffusers') of the official sizes, with the same random weights, float32."""
    theirs, pairs = diffusers(), {}
    makers = {"CogVideoX": (lambda: CogVideoXVAE(CogVideoXVAEConfig(**COG_1_5_VAE)),
                            lambda: theirs.AutoencoderKLCogVideoX(**COG_BLOCKS, **COG_1_5_VAE)),
              "Wan": (WanVAE, theirs.AutoencoderKLWan)}
    torch.manual_seed(0)
    for name, (make_ours, make_theirs) in makers.items():
        pairs[name] = random_model(make_ours, device), random_model(make_theirs, device)
        pairs[name][0].load_state_dict(pairs[name][1].state_dict())
        frugal.apply(pairs[name][0])
    return pairs


def their_encode(vae: nn.Module, x: Tensor) -> Tensor:
    """x [B, 3, T, H, W] -> the posterior's mean [B, C, F, h, w], not scaled."""
    return vae.encode(x).latent_dist.mean


def their_decode(vae: nn.Module, z: Tensor) -> Tensor:
    """z [B, C, F, h, w], not scaled -> x [B, 3, T, H, W]."""
    return vae.decode(z).sample


# ---- the whole of Mirage ---------------------------------------------------------------------------------------------

def mirage_5b(device: str, dtype: torch.dtype = torch.bfloat16) -> Mirage:
    """Mirage on CogVideoX1.5-5B, with stable diffusion's 2D encoder."""
    table = alpha_bar()  # not on the device: on "meta" it would have no values to pick one from

    def make() -> Mirage:
        mirage = Mirage(CogVideoXVAE(CogVideoXVAEConfig(**COG_1_5_VAE)),
                        CogVideoXDiT(CogVideoXDiTConfig(**COG_1_5_DIT)), AutoencoderKL(AutoencoderKLConfig(**SD_VAE)),
                        torch.zeros(1, 226, 4096), table)
        frugal.apply(mirage.vae)
        return mirage
    return random_model(make, device, dtype)


def mirage_wan(size: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Mirage:
    """Mirage on Wan 2.1 of a size, "1.3B" or "14B"; its own encoder supplies the features (ChopGrad B.4)."""
    def make() -> Mirage:
        mirage = Mirage(WanVAE(), WanDiT(WanDiTConfig(**WAN_DIT[size])), None, torch.zeros(1, 512, 4096), None, t=200)
        frugal.apply(mirage.vae)
        return mirage
    return random_model(make, device, dtype)


def diffusers_5b(device: str) -> Callable[[Tensor], Tensor]:
    """The same of diffusers' parts, x_NI [1, 3, T, H, W] -> x_DR: encode, one call of the transformer, decode.

    It does less than ours: diffusers' decoder has no place for the 2D encoder's features.
    """
    theirs = diffusers()
    vae = random_model(lambda: theirs.AutoencoderKLCogVideoX(**COG_BLOCKS, **COG_1_5_VAE), device, torch.bfloat16)
    dit = random_model(lambda: theirs.CogVideoXTransformer3DModel(**COG_1_5_DIT), device, torch.bfloat16)
    scale = COG_1_5_VAE["scaling_factor"]
    holder = SimpleNamespace(transformer=dit, vae_scale_factor_spatial=8)

    def forward(x: Tensor) -> Tensor:
        z = their_encode(vae, x) * scale
        latents = z.shape[2]
        padded = torch.cat([z[:, :, : latents % 2], z], dim=2)  # patches hold two latents
        rotary = theirs.CogVideoXPipeline._prepare_rotary_positional_embeddings(
            holder, x.shape[3], x.shape[4], padded.shape[2], torch.device(device))
        text = torch.zeros(1, 226, 4096, dtype=x.dtype, device=device)
        out = dit(padded.transpose(1, 2), text, torch.tensor([199], device=device), image_rotary_emb=rotary,
                  return_dict=False)
        v = out[0].transpose(1, 2)[:, :, -latents:]
        a = float(alpha_bar()[199])
        return their_decode(vae, (a**0.5 * z - (1 - a) ** 0.5 * v) / scale)
    return forward
