"""AutoencoderKL, the image VAE of Stable Diffusion, whose encoder supplies Mirage's 2D latents (Mirage §3.2.1).

A causal video VAE mixes frames; this one sees each frame alone, so its features are temporally agnostic: the fine
detail of one frame, untouched by its neighbours. Mirage takes them at full and at half resolution (`mids`), just before
the encoder downsamples, and injects them into the video decoder (injection.py).

    x [N, 3, H, W] -> encode -> z [N, 4, H/8, W/8] -> decode -> x [N, 3, H, W]
                   -> mids   -> [N, 128, H, W], [N, 256, H/2, W/2], [N, 512, H/4, W/4]

img2img-turbo, Difix and R3D2-BIG take features at other places, the inputs of the four down blocks, and add what their
skip convolutions (method/skips.py) make of them to the inputs of the four up blocks.

Reads sd-vae-ft-mse, sd-turbo and sdxl; attribute names are the published checkpoint's keys. Left out: tiling, slicing
and the posterior's sample (the mean is used).

    python -m mirage_min.networks.vae_2d             # the shapes, and that a frame's features are its own
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import checked, weights


@dataclass
class AutoencoderKLConfig:
    """The fields of config.json that shape the network; a field that the file lacks has the published default."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: checked.Depth = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]"""
        h = self.conv1(nnf.silu(self.norm1(x)))
        h = self.conv2(nnf.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention of every position to every position of its frame, one head as wide as the features."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> like x"""
        N, C, H, W = x.shape
        h = rearrange(self.group_norm(x), "n c h w -> n 1 (h w) c")    # [N, 1, HW, C]
        h = nnf.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "n 1 (h w) c -> n c h w", h=H)


class Downsample(nn.Module):
    """Halve height and width. The padding is on the right and below only, so an odd size loses its last half pixel."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ⌊H/2⌋, ⌊W/2⌋]"""
        return self.conv(nnf.pad(x, (0, 1, 0, 1)))                     # [N, C, H/2, W/2]


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]"""
        return self.conv(nnf.interpolate(x, scale_factor=2.0))         # [N, C, 2H, 2W]


class Stage(nn.Module):
    """Resnet blocks, then a change of size: one stage of the encoder or of the decoder."""

    def __init__(self, c_in: int, c_out: int, n: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n))
        self.downsamplers = nn.ModuleList([Downsample(c_out)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample(c_out)]) if up else None

    def features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]: the resnet blocks, without the change of size."""
        for resnet in self.resnets:
            x = resnet(x)
        return x

    def resize(self, x: Tensor) -> Tensor:
        """[N, C', H, W] -> [N, C', ⌊H/2⌋, ⌊W/2⌋] or [N, C', 2H, 2W], or x itself in a stage that keeps the size."""
        for layer in self.downsamplers or self.upsamplers or ():
            x = layer(x)
        return x

    def layers(self) -> Iterator[nn.Module]:
        """All layers in order, for a caller that must free each layer's input as soon as the layer has run."""
        return chain(self.resnets, self.downsamplers or self.upsamplers or ())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], halved, doubled or as it was"""
        return self.resize(self.features(x))


class Middle(nn.Module):
    """A resnet block, attention, a resnet block, at the coarsest size."""

    def __init__(self, c: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)]) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> like x"""
        x = self.resnets[0](x)
        for attention in self.attentions or ():
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Frames to the mean and log-variance of the latent, as the two halves of the channels."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        c, n, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, c[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(c[max(i - 1, 0)], c[i], n, groups, down=i < len(c) - 1) for i in range(len(c)))
        self.mid_block = Middle(c[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 2·4, H/8, W/8]: mean, then log-variance, for quant_conv."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """The last down block's output [N, 512, H/8, W/8] -> [N, 2·4, H/8, W/8]: the rest of forward."""
        return self.conv_out(nnf.silu(self.conv_norm_out(self.mid_block(x))))


def add_skip(x: Tensor, skip: Tensor | None) -> Tensor:
    """x + skip, both [N, C, H, W]; x itself where skip is None. ValueError if the shapes differ."""
    if skip is None:
        return x
    check_skip(x, skip)
    return x + skip


def check_skip(x: Tensor, skip: Tensor) -> None:
    """ValueError unless x and skip are both [N, C, H, W] of one shape; broadcasting would hide a mistake."""
    if skip.shape != x.shape:
        raise ValueError(f"a skip must have the shape of what it is added to, {list(x.shape)}, got {list(skip.shape)}")


class Decoder(nn.Module):
    """Latents to frames; each of `skips`, coarsest first, is added to the input of an up block."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        c, n, groups = config.block_out_channels[::-1], config.layers_per_block + 1, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, c[0], 3, padding=1)
        self.mid_block = Middle(c[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Stage(c[max(i - 1, 0)], c[i], n, groups, up=i < len(c) - 1) for i in range(len(c)))
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], config.out_channels, 3, padding=1)

    add_skip = staticmethod(add_skip)  # frugal.py replaces it

    def forward(self, z: Tensor, skips: Iterable[Tensor] = ()) -> Tensor:
        """z [N, 4, h, w] after post_quant_conv -> x [N, 3, 8h, 8w]; skips as in AutoencoderKL.decode."""
        skips = iter(skips)
        x = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            x = self.add_skip(x, next(skips, None))
            for layer in stage.layers():
                x = layer(x)
        return self.conv_out(nnf.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The image VAE. Frames [N, 3, H, W] in [-1, 1]; latents [N, 4, H/8, W/8], scaled to about unit variance."""

    CLASS_NAME = "AutoencoderKL"
    Config = AutoencoderKLConfig
    FIXED = {"act_fn": "silu", "down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D",
             "shift_factor": None, "latents_mean": None, "latents_std": None}
    IGNORED = {"sample_size", "force_upcast"}
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: AutoencoderKLConfig = AutoencoderKLConfig()):
        super().__init__()
        self.config = config
        c_z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c_z, 2 * c_z, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c_z, c_z, 1) if config.use_post_quant_conv else None

    @staticmethod
    def translate_key(name: str) -> str:
        """Older files name the attention's layers differently; nothing else in the network has these names."""
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            name = name.replace(f".{old}.", f".{new}.")
        return name

    def mids(self, frames: Tensor, count: int | None = None) -> list[Tensor]:
        """The encoder's features just before each downsampling, finest first; each frame is seen alone.

        frames [N, 3, H, W] in [-1, 1] -> [N, C0, H, W], [N, C1, H/2, W/2], [N, C2, H/4, W/4]: the first `count` of
        them, or all. The encoder runs only as far as they need. ValueError for a `count` below 1 or above its stages'.
        """
        stages = self.encoder.down_blocks[:-1]
        if count is not None and not 1 <= count <= len(stages):
            raise ValueError(f"count must be 1 to {len(stages)}, the downsamplings of this encoder, got {count}")
        features = [stages[0].features(self.encoder.conv_in(frames))]
        for finer, coarser in pairwise(stages[:count]):
            features.append(coarser.features(finer.resize(features[-1])))
        return features

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, 3, H, W] in [-1, 1] -> (mean, log-variance) of the latent, unscaled, each [N, 4, H/8, W/8]."""
        return self._moments(self.encoder(x))

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] in [-1, 1] -> the posterior's mean times scaling_factor, [N, 4, H/8, W/8]"""
        return self.posterior(x)[0] * self.config.scaling_factor

    def encode_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [N, 3, H, W] in [-1, 1] -> what encode gives, and the inputs of the four down blocks, finest first:
        [N, 128, H, W], [N, 128, H/2, W/2], [N, 256, H/4, W/4], [N, 512, H/8, W/8]."""
        features = [self.encoder.conv_in(x)]
        for stage in self.encoder.down_blocks:
            features.append(stage(features[-1]))
        mean, _ = self._moments(self.encoder.finish(features.pop()))
        return mean * self.config.scaling_factor, features

    def skip_channels(self) -> list[tuple[int, int]]:
        """(channels of a feature, channels of the skip that the decoder takes for it), coarsest first."""
        c = self.config.block_out_channels
        return [(c[max(i - 1, 0)], c[min(i + 1, len(c) - 1)]) for i in reversed(range(len(c)))]

    def decode(self, z: Tensor, skips: Iterable[Tensor] = ()) -> Tensor:
        """z [N, 4, h, w] as encode gives it -> x [N, 3, 8h, 8w], not clamped.

        skips: what is added to the input of each up block, coarsest first: [N, 512, h, w], [N, 512, 2h, 2w],
        [N, 512, 4h, 4w], [N, 256, 8h, 8w]. An iterator may make them one by one, as they are needed; missing ones are
        left out. ValueError if a skip has another shape.
        """
        z = z / self.config.scaling_factor
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), skips)


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8))
    with torch.no_grad():
        x = torch.rand(5, 3, 64, 96) * 2 - 1
        z = vae.encode(x)
        print(f"x {list(x.shape)} -> z {list(z.shape)} -> x {list(vae.decode(z).shape)}")
        before = vae.mids(x)
        x[2] += 0.5
        for old, new in zip(before, vae.mids(x)):
            changed = (new - old).abs().amax(dim=(1, 2, 3)) > 0
            print(f"mids {list(new.shape)}: a change of frame 2 reaches frames {changed.nonzero().flatten().tolist()}")
