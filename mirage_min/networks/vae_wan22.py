"""The Wan 2.2 causal 3D VAE, TI2V-5B's: 16 x 16 pixels and 4 frames to one latent cell of 48 channels.

It is Wan 2.1's (vae_wan.py), with the same convolutions, caches and groups, and frames that enter as patches of 2 x 2
pixels. Two additions:
  - each block that halves or doubles has a shortcut without parameters, which takes means, or copies, of its input;
  - the decoder is wider than the encoder.

    patches [ 12, 9, H/2, W/2]                                          pixels  [ 12, 9, H/2, W/2]
    Enc-1   [160, 9, H/4, W/4]                                          Dec-4   [256, 9, H/2, W/2]
    Enc-2   [320, 5, H/8, W/8]                                          Dec-3   [512, 9, H/2, W/2]
    Enc-3   [640, 3, H/16, W/16]                                        Dec-2   [1024, 9, H/4, W/4]
    Enc-4   [640, 3, H/16, W/16]  -> z [48, 3, H/16, W/16] ->           Dec-1   [1024, 5, H/8, W/8]

Left out: 2D features, which enter Wan 2.1's.

    python -m mirage_min.networks.vae_wan22          # the shapes, and that two groupings of a video agree
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import vae_wan
from .causal_conv import Cache, CausalConv3d
from .vae_wan import Layer, WanVAE, WanVAEConfig
from .wan_blocks import Downsample, MidBlock, ResnetBlock, RMSNorm, Upsample


@dataclass
class Wan22VAEConfig(WanVAEConfig):
    """The fields of config.json that shape the network, as the published Wan 2.2 has them."""

    base_dim: int = 160
    z_dim: int = 48
    latents_mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
    latents_std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int | None = 2
    decoder_base_dim: int = 256

    CELL: ClassVar[int] = 16


def mean_down(x: Tensor, c_out: int, time: int, space: int) -> Tensor:
    """x [B, C, T, H, W] -> [B, c_out, ⌈T/time⌉, H/space, W/space]: means of neighbours and of neighbouring channels.

    Where T does not divide, as in a video's first group, zeros come before the first frame.
    """
    if missing := -x.shape[2] % time:
        x = nnf.pad(x, (0, 0, 0, 0, missing, 0))
    x = rearrange(x, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=time, q=space, r=space)
    return reduce(x, "b (o n) t h w -> b o t h w", "mean", o=c_out)


def copy_up(x: Tensor, c_out: int, time: int, space: int, first: bool) -> Tensor:
    """x [B, C, T, H, W] -> [B, c_out, T·time, H·space, W·space]: copies; the inverse of `mean_down` where it has one.

    first  whether this is a video's first group, whose first frame stays one frame
    """
    x = x.repeat_interleave(c_out * time * space * space // x.shape[1], dim=1)
    x = rearrange(x, "b (o p q r) t h w -> b o (t p) (h q) (w r)", p=time, q=space, r=space)
    return x[:, :, time - 1 :] if first else x


class DownBlock(nn.Module):
    """Resnet blocks and, unless `time` is None, a Downsample, which includes time if `time` is true; and a shortcut."""

    def __init__(self, c_in: int, c_out: int, n: int, time: bool | None, key: str):
        super().__init__()
        self.c_out, self.factors = c_out, (2 if time else 1, 1 if time is None else 2)
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n))
        self.downsampler = None if time is None else Downsample(c_out, time, f"{key}.downsampler")

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T', H', W']; `old` and `new` as in CausalConv3d.forward."""
        # First, because a frugal resnet block may overwrite its input.
        shortcut = mean_down(x, self.c_out, *self.factors)
        for resnet in self.resnets:
            x = resnet(x, old, new)
        if self.downsampler is not None:
            x = self.downsampler(x, old, new)
        return x + shortcut


class UpBlock(nn.Module):
    """Resnet blocks and, unless `time` is None, an Upsample, which includes time if `time` is true, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, n: int, time: bool | None):
        super().__init__()
        self.c_out, self.factors = c_out, (2 if time else 1, 2)
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n))
        self.upsampler = None if time is None else Upsample(c_out, c_out, time)

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T', H', W']; `old` and `new` as in CausalConv3d.forward."""
        shortcut = None if self.upsampler is None else copy_up(x, self.c_out, *self.factors, first=not old)
        for resnet in self.resnets:
            x = resnet(x, old, new)
        return x if self.upsampler is None else self.upsampler(x, old, new) + shortcut


class Encoder(vae_wan.Encoder):
    """Frames to the features from which quant_conv makes the mean and log-variance."""

    def __init__(self, config: Wan22VAEConfig):
        nn.Module.__init__(self)
        c = [config.base_dim * m for m in (1, *config.dim_mult)]
        time = [*config.temperal_downsample, None]
        self.patch = config.patch_size or 1
        self.conv_in = CausalConv3d(config.in_channels, c[0])
        self.down_blocks = nn.ModuleList(
            DownBlock(c[i], c[i + 1], config.num_res_blocks, time[i], f"encoder.down_blocks.{i}")
            for i in range(len(time)))
        self.mid_block = MidBlock(c[-1])
        self.norm_out = RMSNorm(c[-1])
        self.conv_out = CausalConv3d(c[-1], 2 * config.z_dim)
        self.first_halving = time.index(True)

    def layers_by_rate(self) -> tuple[list[Layer], list[Layer]]:
        """The layers in order: those before the first change of the frame rate, and the rest."""
        n = self.first_halving
        return ([self.to_patches, self.conv_in, *self.down_blocks[:n]],
                [*self.down_blocks[n:], self.mid_block, self.output])


class Decoder(vae_wan.Decoder):
    """Latents to frames."""

    def __init__(self, config: Wan22VAEConfig):
        nn.Module.__init__(self)
        c = [config.decoder_base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        time = [*reversed(config.temperal_downsample), None]
        self.conv_in = CausalConv3d(config.z_dim, c[0])
        self.mid_block = MidBlock(c[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(c[i], c[i + 1], config.num_res_blocks + 1, time[i]) for i in range(len(time)))
        self.norm_out = RMSNorm(c[-1])
        self.patch = config.patch_size or 1
        self.conv_out = CausalConv3d(c[-1], config.out_channels)
        self.last_doubling = max(i for i in range(len(time)) if time[i])

    def layers_by_rate(self) -> tuple[list[Layer], list[Layer]]:
        """The layers in order: those up to the last change of the frame rate, and the rest."""
        n = self.last_doubling + 1
        return ([self.conv_in, self.mid_block, *self.up_blocks[:n]],
                [*self.up_blocks[n:], self.output, self.to_pixels])


class Wan22VAE(WanVAE):
    """Wan 2.2's causal 3D VAE. Videos [B, 3, T, H, W] in [-1, 1]; latents [B, 48, F, ⌈H/16⌉, ⌈W/16⌉], normalised.

    `encode` and `posterior` take any size: they repeat the last row and column up to a multiple of 16. A group must
    have such a size. A decoded video is 16 times as large as its latent: crop it, decode(z)[..., :H, :W].
    """

    Config = Wan22VAEConfig
    HALVES = Encoder, Decoder
    FIXED = {"is_residual": True, "attn_scales": [], "dropout": 0.0}
    IGNORED = WanVAE.IGNORED | {"clip_output"}
    PUBLISHED = "Wan-AI/Wan2.2-TI2V-5B-Diffusers, subfolder vae"  # the original Wan2.2_VAE.pth is pickled
    inject_channels, feature_channels = [], []  # no 2D features enter

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, T, H, W] in [-1, 1] -> mean and log-variance, not normalised, each [B, 48, F, h, w]."""
        H, W = x.shape[3:]
        cell = self.config.CELL
        if H % cell or W % cell:
            # DEVIATION: the published encode fails here.
            x = nnf.pad(x, (0, -W % cell, 0, -H % cell, 0, 0), mode="replicate")
        return super().posterior(x)

    def posterior_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor, Cache]:
        """A video's first 4k + 1 frames [B, 3, T, H, W], or its next 4k -> (mean, log-variance, each [B, 48, F, h, w];
        the cache for the next group). ValueError unless 16 divides H and W, and for another number of frames."""
        cell = self.config.CELL
        if x_g.shape[3] % cell or x_g.shape[4] % cell:
            raise ValueError(f"x_g must be [B, 3, T, H, W] with {cell} dividing H and W, got {list(x_g.shape)}")
        return super().posterior_group(x_g, cache)

    def mids2d(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, T, H, W] -> [], since no 2D features enter this decoder."""
        return []


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = Wan22VAE(Wan22VAEConfig(base_dim=16, decoder_base_dim=16, num_res_blocks=1))
    x = torch.rand(1, 3, 9, 64, 96) * 2 - 1
    with torch.no_grad():
        z, _ = vae.encode_group(x)  # all nine frames as one group
        whole, _ = vae.decode_group(z)
        print(f"z {list(z.shape)}, x {list(whole.shape)}")
        print(f"by 1, 4, 4 frames z differs by {(vae.encode(x) - z).abs().max():.1e}, "
              f"by 1, 1, 1 latents x differs by {(vae.decode(z) - whole).abs().max():.1e}")
        print(f"of 60 x 90 pixels: z {list(vae.encode(x[..., :60, :90]).shape)}")
