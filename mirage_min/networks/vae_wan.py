"""The Wan 2.1 causal 3D VAE: 8 x 8 pixels and 4 frames to one latent cell of 16 channels (ChopGrad B.4, C.2).

The first frame gets its own latent; after that, each group of four frames shares one. Only the causal convolutions look
across frames: the norm sees one position, attention one frame. So the result does not depend on the groups, as long
as the first has 4k + 1 frames and every later one a multiple of 4. The blocks are in wan_blocks.py.

    Enc-1 [ 96, 9, H, W]                                    Dec-4 [ 96, 9, H, W]
    Enc-2 [192, 9, H/2, W/2]  -> 2D features leave here     Dec-3 [192, 9, H/2, W/2]  <- and enter here
    Enc-3 [384, 5, H/4, W/4]                                Dec-2 [384, 5, H/4, W/4]
    Enc-4 [384, 3, H/8, W/8]  -> z [16, 3, H/8, W/8] ->     Dec-1 [384, 3, H/8, W/8]

The 2D features come from this encoder, run on single frames; they leave before its first change of the frame rate and
enter after the decoder's last. Attribute names are the published keys (diffusers layout). Wan 2.2's VAE: vae_wan22.py.

    python -m mirage_min.networks.vae_wan            # the shapes, and that two groupings of a video agree
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import checked, weights
from .causal_conv import Cache, CausalConv3d, cut, cut_features, in_groups, name_caches
from .wan_blocks import Downsample, MidBlock, ResnetBlock, RMSNorm, Upsample

FRAMES = 4  # per latent; a video's first frame has a latent to itself
Layer = Callable[[Tensor, Cache | None, Cache], Tensor]


@dataclass
class WanVAEConfig:
    """The fields of config.json that shape the network, as every published Wan 2.1 has them."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: checked.Depth = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # as the published config spells it
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None  # a frame enters, and leaves, as squares of so many pixels, which become channels
    latents_mean: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                                       0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    latents_std: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                      3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    CELL: ClassVar[int] = 8  # pixels, the side of a latent cell

    def __post_init__(self):
        patch = self.patch_size or 1
        if patch * 2 ** (len(self.dim_mult) - 1) != self.CELL:
            raise ValueError(f"patch_size and dim_mult must make cells of {self.CELL} pixels, got "
                             f"patch_size={self.patch_size} and {len(self.dim_mult)} values, dim_mult="
                             f"{list(self.dim_mult)}")
        if not self.in_channels == self.out_channels == 3 * patch**2:
            raise ValueError(f"in_channels and out_channels must be {3 * patch**2} with patch_size={self.patch_size}, "
                             f"got {self.in_channels} and {self.out_channels}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1 or sum(self.temperal_downsample) != 2:
            raise ValueError(f"temperal_downsample must have one value less than dim_mult={list(self.dim_mult)} and be "
                             f"true twice, got {list(self.temperal_downsample)}")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std must have z_dim={self.z_dim} values each, got "
                             f"{len(self.latents_mean)} and {len(self.latents_std)}")


class UpBlock(nn.Module):
    """Resnet blocks and, unless `time` is None, an Upsample, which includes time if `time` is true."""

    def __init__(self, c_in: int, c_out: int, n: int, time: bool | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(n))
        self.upsamplers = None if time is None else nn.ModuleList([Upsample(c_out, c_out // 2, time)])


class Encoder(nn.Module):
    """Frames to the features from which quant_conv makes the mean and log-variance."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        c = [config.base_dim * m for m in config.dim_mult]
        self.patch = config.patch_size or 1
        self.conv_in = CausalConv3d(config.in_channels, c[0])
        self.down_blocks = nn.ModuleList()  # one flat list, as published
        for i, c_out in enumerate(c):
            c_in = [c[max(i - 1, 0)]] + [c_out] * (config.num_res_blocks - 1)
            self.down_blocks.extend(ResnetBlock(n, c_out) for n in c_in)
            if i < len(c) - 1:
                key = f"encoder.down_blocks.{len(self.down_blocks)}"
                self.down_blocks.append(Downsample(c_out, config.temperal_downsample[i], key))
        self.mid_block = MidBlock(c[-1])
        self.norm_out = RMSNorm(c[-1])
        self.conv_out = CausalConv3d(c[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, 3, T, H, W], one group -> [B, 2·C, F, h, w], for quant_conv."""
        full_rate, lower = self.layers_by_rate()
        for layer in full_rate + lower:
            x = layer(x, old, new)
        return x

    def layers_by_rate(self) -> tuple[list[Layer], list[Layer]]:
        """The layers in order: those before the first change of the frame rate, and the rest."""
        layers = [self.to_patches, self.conv_in, *self.down_blocks, self.mid_block, self.output]
        first = next(i for i, layer in enumerate(layers) if getattr(layer, "time_conv", None) is not None)
        return layers[:first], layers[first:]

    def to_patches(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, 3, T, H, W] -> [B, 3·p², T, H/p, W/p]: a patch's pixels become channels, by colour, column, row.

        ValueError unless p divides H and W.
        """
        if self.patch == 1:
            return x
        if x.shape[3] % self.patch or x.shape[4] % self.patch:
            raise ValueError(f"x must be [B, 3, T, H, W] with {self.patch} dividing H and W, got {list(x.shape)}")
        patches = rearrange(x, "b c t (h q) (w r) -> b t h w (c r q)", q=self.patch, r=self.patch)
        return patches.movedim(-1, 1)  # channels last in memory

    def output(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """The last norm and convolution, [B, C, T, H, W] -> [B, C', T, H, W]."""
        return self.conv_out(nnf.silu(self.norm_out(x)), old, new)


class Decoder(nn.Module):
    """Latents to frames; 2D features enter after the last block that changes the frame rate."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        c = [config.base_dim * m for m in reversed(config.dim_mult)]
        time = [*reversed(config.temperal_downsample), None]
        self.conv_in = CausalConv3d(config.z_dim, c[0])
        self.mid_block = MidBlock(c[0])
        # An upsampler halves the channels even where the next block doubles them again.
        self.up_blocks = nn.ModuleList(
            UpBlock(c[i - 1] // 2 if i else c[0], c[i], config.num_res_blocks + 1, time[i]) for i in range(len(c)))
        self.norm_out = RMSNorm(c[-1])
        self.patch = config.patch_size or 1
        self.conv_out = CausalConv3d(c[-1], config.out_channels)
        self.last_doubling = max(i for i in range(len(c)) if time[i])

    def forward(self, z: Tensor, old: Cache | None, new: Cache, fusion: nn.ModuleList | None = None,
                inject: list[Tensor] | None = None) -> Tensor:
        """z [B, C, F, h, w], one group -> [B, 3, T, H, W]; fusion, inject: [the fusion block], [its features]."""
        lower, full_rate = self.layers_by_rate()
        h = z
        for layer in lower:
            h = layer(h, old, new)
        if inject is not None:
            h = fusion[0](h, inject[0])
        for layer in full_rate:
            h = layer(h, old, new)
        return h

    def layers_by_rate(self) -> tuple[list[Layer], list[Layer]]:
        """The layers in order: those up to the last change of the frame rate, and the rest."""
        lower, full_rate = [self.conv_in, self.mid_block], []
        for i, block in enumerate(self.up_blocks):
            rate = lower if i <= self.last_doubling else full_rate
            rate.extend([*block.resnets, *(block.upsamplers or ())])
        return lower, [*full_rate, self.output, self.to_pixels]

    def to_pixels(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, 3·p², T, H/p, W/p] -> [B, 3, T, H, W], the inverse of the encoder's `to_patches`."""
        if self.patch == 1:
            return x
        return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=self.patch, r=self.patch)

    output = Encoder.output


class WanVAE(nn.Module):
    """Wan 2.1's causal 3D VAE. Videos [B, 3, T, H, W] in [-1, 1]; latents [B, 16, F, H/8, W/8], normalised."""

    CLASS_NAME = "AutoencoderKLWan"
    Config = WanVAEConfig
    HALVES = Encoder, Decoder
    FIXED = {"is_residual": False, "decoder_base_dim": None, "attn_scales": [], "dropout": 0.0}
    IGNORED = {"scale_factor_temporal", "scale_factor_spatial"}  # follow from the fields above
    PUBLISHED = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, subfolder vae"  # the original Wan2.1_VAE.pth is pickled
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: WanVAEConfig = WanVAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = (half(config) for half in self.HALVES)
        self.quant_conv, self.post_quant_conv = (nn.Conv3d(c, c, 1) for c in (2 * config.z_dim, config.z_dim))
        self.fusion = None  # injection.attach puts the Cross-Modal Fusion Block here
        name_caches(self)

    @property
    def inject_channels(self) -> list[int]:
        """Channels of the decoder where 2D features enter: one place, at H/2."""
        return [self.decoder.up_blocks[self.decoder.last_doubling].upsamplers[0].resample[1].out_channels]

    @property
    def feature_channels(self) -> list[int]:
        """Channels of the features that `mids2d` returns."""
        return [self.config.base_dim * self.config.dim_mult[self.config.temperal_downsample.index(True)]]

    def legal_length(self, T: int) -> int:
        """The smallest 4k + 1 that is at least T. Clips of these lengths keep their length."""
        return -(-(T - 1) // FRAMES) * FRAMES + 1

    def encode_groups(self, T: int) -> list[slice]:
        """The official groups of T = 4k + 1 frames: 1, then 4 at a time."""
        return [slice(0, 1)] + [slice(i, i + FRAMES) for i in range(1, T, FRAMES)]

    def decode_groups(self, F: int) -> list[slice]:
        """The official groups of F latents: 1 at a time."""
        return [slice(i, i + 1) for i in range(F)]

    def posterior_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor, Cache]:
        """A video's first 4k + 1 frames [B, 3, T, H, W], or its next 4k -> (mean, log-variance, each [B, 16, F, h, w],
        not normalised; the cache for the next group). ValueError for another number of frames."""
        remainder = 0 if cache else 1  # the first group has a frame more
        if x_g.shape[2] % FRAMES != remainder:
            raise ValueError(f"x_g must be [B, 3, T, H, W] with T = {FRAMES}k + {remainder} here, "
                             f"got {list(x_g.shape)}")
        new: Cache = {}
        h = self.encoder(x_g.contiguous(memory_format=torch.channels_last_3d), cache, new)
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), new

    def encode_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Frames of one group [B, 3, T, H, W] -> (z_g [B, 16, F, h, w], the cache for the next group)."""
        mean, _, new = self.posterior_group(x_g, cache)
        return self.normalise(mean), new

    def decode_group(self, z_g: Tensor, cache: Cache | None = None,
                     inject: list[Tensor] | None = None) -> tuple[Tensor, Cache]:
        """Latents of one group [B, 16, F, h, w], any F -> (x_g [B, 3, T, H, W], the cache for the next group).

        T is 4F, or 4F - 3 in a video's first group. `inject` is the 2D features of these frames, [[B, C, T, H/2, W/2]].
        ValueError if it is given and there is no fusion block, or if its shape does not fit.
        """
        if inject is not None and self.fusion is None:
            raise ValueError("inject was given, but this VAE has no fusion blocks: call injection.attach first")
        new: Cache = {}
        mean, std = self._statistics(z_g)
        z_g = self.post_quant_conv(z_g * std + mean).contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(z_g, cache, new, self.fusion, inject), new

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, T, H, W] in [-1, 1] -> mean and log-variance, not normalised, each [B, 16, F, h, w]."""
        T = x.shape[2]
        # DEVIATION: the published encode drops the frames beyond the last 4k + 1; here the last one is repeated.
        if T < self.legal_length(T):
            x = nnf.pad(x, (0, 0, 0, 0, 0, self.legal_length(T) - T), mode="replicate")
        mean, logvar = in_groups(self.posterior_group, cut(x, self.encode_groups(x.shape[2])))
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1] -> normalised posterior mean [B, 16, F, h, w]; any T, padded to 4k + 1."""
        return self.normalise(self.posterior(x)[0])

    def decode(self, z: Tensor, inject: list[Tensor] | None = None) -> Tensor:
        """z [B, 16, F, h, w] as encode gives it -> x [B, 3, 4F - 3, H, W], not clamped; `inject` for the whole clip."""
        # DEVIATION: the published decode clamps to [-1, 1], where the gradient of a loss on x would be lost.
        F = z.shape[2]
        frames = self.encode_groups(4 * F - 3)
        x, = in_groups(self.decode_group, cut(z, self.decode_groups(F)), cut_features(inject, frames))
        return x

    def normalise(self, mu: Tensor) -> Tensor:
        """Latents as `posterior` has them, [B, 16, F, h, w] -> as `encode` has them: of about unit variance."""
        mean, std = self._statistics(mu)
        # z = (μ − mean) / std
        return (mu - mean) / std

    def mids2d(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, T, H, W] -> 2D features of its frames, each encoded alone (ChopGrad B.4): [[B, C, T, H/2, W/2]]."""
        full_rate, _ = self.encoder.layers_by_rate()
        features = []
        for h in x.contiguous(memory_format=torch.channels_last_3d).split(1, dim=2):
            for layer in full_rate:
                h = layer(h, None, {})  # a video of one frame: nobody reads its cache
            features.append(h)
        return [torch.cat(features, dim=2)]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tensor([self.config.latents_mean, self.config.latents_std], dtype=like.dtype, device=like.device)
        return both.view(2, 1, -1, 1, 1, 1).unbind()


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(base_dim=16, num_res_blocks=1))
    x = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        z, _ = vae.encode_group(x)  # all nine frames as one group
        whole, _ = vae.decode_group(z)
        print(f"z {list(z.shape)}, x {list(whole.shape)}, 2D features {[list(m.shape) for m in vae.mids2d(x)]}")
        print(f"by 1, 4, 4 frames z differs by {(vae.encode(x) - z).abs().max():.1e}, "
              f"by 1, 1, 1 latents x differs by {(vae.decode(z) - whole).abs().max():.1e}")
