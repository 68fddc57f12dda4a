"""The published models that ours are measured against: diffusers' classes, and the sizes of the official weights.

Everything here has random weights: what a model costs does not depend on them.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from mirage_min.method.one_step import alpha_bar
from mirage_min.method.schedules import WAN
from mirage_min.method.skips import Skips
from mirage_min.networks import frugal
from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig
from mirage_min.networks.dit_cosmos import CosmosDiT
from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig
from mirage_min.networks.unet_2d import UNet2D, UNet2DConfig
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_tiny import AutoencoderTiny
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.networks.vae_wan22 import Wan22VAE, Wan22VAEConfig
from mirage_min.networks.wan_branch import WanBranch, WanBranchConfig
from mirage_min.systems.harmonizer import Harmonizer
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.r3d2 import R3D2
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import DOVE
from mirage_min.systems.restore_folder import Settings as RestorerSettings
from mirage_min.systems.world import World

COG_BLOCKS = {"down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4}
COG_1_5_VAE = {"block_out_channels": (128, 256, 256, 512), "layers_per_block": 3, "scaling_factor": 0.7}
COG_1_5_DIT = {"num_attention_heads": 48, "num_layers": 42, "sample_width": 300, "sample_height": 300,
               "patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
SD_TURBO = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
COG_1_5_SCHEDULE = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction",
                    "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}
WAN_2_2_DIT = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
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


# ---- the other systems of video, ours alone --------------------------------------------------------------------------

def dove(device: str, dtype: torch.dtype = torch.bfloat16) -> Restorer:
    """DOVE: CogVideoX1.5-5B as a Restorer that enlarges four times."""
    def make() -> Restorer:
        return Restorer(frugal.apply(CogVideoXVAE(CogVideoXVAEConfig(**COG_1_5_VAE))),
                        CogVideoXDiT(CogVideoXDiTConfig(**COG_1_5_DIT)), torch.zeros(1, 226, 4096), COG_1_5_SCHEDULE,
                        DOVE)
    return random_model(make, device, dtype)


def artifact_remover(device: str, dtype: torch.dtype = torch.bfloat16, size: str = "1.3B") -> Restorer:
    """ChopGrad's removal of artifacts: Wan 2.1 of a size as a Restorer."""
    def make() -> Restorer:
        return Restorer(frugal.apply(WanVAE()), WanDiT(WanDiTConfig(**WAN_DIT[size])), torch.zeros(1, 512, 4096), WAN,
                        RestorerSettings("artifacts"))
    return random_model(make, device, dtype)


def harmonizer(device: str, dtype: torch.dtype = torch.bfloat16) -> Harmonizer:
    """DiffusionHarmonizer on Cosmos-Predict2 0.6B, wired as its release."""
    return random_model(lambda: Harmonizer(frugal.apply(WanVAE()), CosmosDiT()), device, dtype)


def world(device: str, dtype: torch.dtype = torch.bfloat16) -> World:
    """The world model called Mirage on Wan 2.2 TI2V-5B, with the side branch of Spatia's release."""
    def make() -> World:
        branch = WanBranch(WanBranchConfig(**WAN_2_2_DIT, vace_layers=tuple(range(0, 30, 4)), vace_in_channels=49))
        vae = frugal.apply(Wan22VAE(Wan22VAEConfig()))
        return World(vae, WanDiT(WanDiTConfig(**WAN_2_2_DIT)), branch, torch.zeros(1, 512, 4096))
    return random_model(make, device, dtype)


# ---- the whole of R3D2 -----------------------------------------------------------------------------------------------

def r3d2(name: str, device: str, dtype: torch.dtype = torch.float32) -> R3D2:
    """R3D2 on SD-Turbo's UNet: "R3D2" with TAESD, "R3D2-BIG" with AutoencoderKL, of skips that do something."""
    table = alpha_bar(zero_terminal_snr=False)  # not on the device: on "meta" it would have no values to pick one from

    def make() -> R3D2:
        vae = frugal.apply(AutoencoderTiny() if name == "R3D2" else AutoencoderKL(AutoencoderKLConfig(**SD_VAE)))
        unet = frugal.apply(UNet2D(UNet2DConfig(**SD_TURBO)))
        return R3D2(unet, vae, Skips(vae.skip_channels(), 0.01), torch.zeros(1, 77, 1024), table)
    return random_model(make, device, dtype)


class DiffusersR3D2(nn.Module):
    """The same pipeline of diffusers' parts, on the weights of `ours`; its skips are hooks where ours has its own."""

    def __init__(self, ours: R3D2):
        super().__init__()
        theirs, kl = diffusers(), isinstance(ours.vae, AutoencoderKL)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        make_vae = partial(theirs.AutoencoderKL, **SD_VAE, **blocks) if kl else theirs.AutoencoderTiny
        self.unet = random_model(lambda: theirs.UNet2DConditionModel(**SD_TURBO), "meta")
        self.vae = random_model(make_vae, "meta")
        self.unet.load_state_dict(ours.unet.state_dict(), assign=True)
        self.vae.load_state_dict(ours.vae.state_dict(), assign=True)
        self.skips, self.features, self.kl = ours.skips, [], kl
        self.register_buffer("text", ours.text)
        self.alpha_bar, self.t = float(ours.alpha_bar[ours.t]), ours.t
        if kl:
            for block in self.vae.encoder.down_blocks:
                block.register_forward_pre_hook(self.keep)
            for block, conv in zip(self.vae.decoder.up_blocks, self.skips.children()):
                block.register_forward_pre_hook(partial(self.add, conv))
        else:  # after the last block of each size, and after the convolution that follows an upsampling
            for k in (1, 5, 9):
                self.vae.encoder.layers[k].register_forward_hook(self.keep)
            for k, conv in zip((6, 11, 16), self.skips.children()):
                self.vae.decoder.layers[k].register_forward_hook(partial(self.add, conv))

    def keep(self, module: nn.Module, given: tuple, out: Tensor | None = None) -> None:
        """A hook of the encoder: what enters a layer, or leaves it, is a feature."""
        self.features.append(given[0] if out is None else out)

    def add(self, conv: nn.Module, module: nn.Module, given: tuple, out: Tensor | None = None) -> Tensor:
        """A hook of the decoder: what enters a layer, or leaves it, with the skip of the latest feature added."""
        return (given[0] if out is None else out) + conv(self.features.pop())

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] in [-1, 1], of multiples of 8 -> the same shape."""
        a, scale = self.alpha_bar, self.vae.config.scaling_factor
        z = (self.vae.encode(x).latent_dist.mean if self.kl else self.vae.encode(x).latents) * scale
        eps = self.unet(z, self.t, self.text.expand(len(x), -1, -1), return_dict=False)[0]
        z0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
        return self.vae.decode(z0 / scale, return_dict=False)[0]
