"""AutoencoderTiny (TAESD), the small image VAE in the latent space of Stable Diffusion, at a fifteenth of the work.

    x [N, 3, H, W] -> encode -> z [N, 4, H/8, W/8] -> decode -> x [N, 3, H, W]
                   -> features [N, 64, H, W], [N, 64, H/2, W/2], [N, 64, H/4, W/4]

It has 64 channels at every size, ReLU, no norms and no posterior. R3D2 takes the encoder's features just before each of
the three downsamplings, passes them through zero convolutions (method/skips.py) and adds the results after each of the
decoder's three upsamplings (R3D2 A.1).

Reads madebyollin/taesd; attribute names are the published checkpoint's keys. Left out: tiling and slicing.

    python -m mirage_min.networks.vae_tiny           # the shapes, and where the skips enter
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import weights
from .checked import Depth
from .vae_2d import add_skip


@dataclass
class AutoencoderTinyConfig:
    """The fields of config.json that shape the network, with the published defaults."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # the same at every size
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[Depth, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Depth, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))"""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(c, c, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 64, H, W] -> like x"""
        return nnf.relu(self.conv(x) + x)


class Downsample(nn.Conv2d):
    """Halve height and width, rounded up: the padding is on all four sides."""

    def __init__(self, c: int):
        super().__init__(c, c, 3, stride=2, padding=1, bias=False)


class Encoder(nn.Module):
    """Images to latents, and the features just before each downsampling, finest first."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        c = one_width(config.encoder_block_out_channels, config.num_encoder_blocks)
        first, *later = config.num_encoder_blocks
        layers = [nn.Conv2d(config.in_channels, c, 3, padding=1), *(Block(c) for _ in range(first))]
        for n in later:
            layers += [Downsample(c), *(Block(c) for _ in range(n))]
        layers += [nn.Conv2d(c, config.latent_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [N, 3, H, W] in [-1, 1] -> (z [N, 4, H/8, W/8], features [N, 64, H/2^i, W/2^i] for i = 0, 1, 2)"""
        x = (x + 1) / 2                                                # from [-1, 1] to [0, 1]
        features = []
        for layer in self.layers:
            if isinstance(layer, Downsample):
                features.append(x)                                     # [N, 64, H/2^i, W/2^i]
            x = layer(x)
        return x, features                                             # x is [N, 4, H/8, W/8]


class Decoder(nn.Module):
    """Latents to images; each of `skips`, coarsest first, is added after an upsampling."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        c = one_width(config.decoder_block_out_channels, config.num_decoder_blocks)
        *earlier, last = config.num_decoder_blocks
        layers = [nn.Conv2d(config.latent_channels, c, 3, padding=1), nn.ReLU()]
        self.upsampling = []  # which layers end one
        for n in earlier:
            layers += [*(Block(c) for _ in range(n)), nn.Upsample(scale_factor=2),
                       nn.Conv2d(c, c, 3, padding=1, bias=False)]
            self.upsampling.append(len(layers) - 1)
        layers += [*(Block(c) for _ in range(last)), nn.Conv2d(c, config.out_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, skips: Iterable[Tensor] = ()) -> Tensor:
        """z [N, 4, h, w], skips [N, 64, 2^i h, 2^i w] for i = 1, 2, 3 -> x [N, 3, 8h, 8w], not clamped.

        ValueError if a skip has another shape; missing ones are left out.
        """
        skips = iter(skips)
        x = torch.tanh(z / 3) * 3                                      # a soft clamp of outliers
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.upsampling:
                x = add_skip(x, next(skips, None))                     # [N, 64, 2^i h, 2^i w]
        return x * 2 - 1                                               # from [0, 1] to [-1, 1]


def one_width(channels: tuple[int, ...], blocks: tuple[int, ...]) -> int:
    """The number of channels at all sizes; ValueError if the config names several, which no published weights have."""
    if len(set(channels)) != 1 or len(channels) != len(blocks):
        raise ValueError(f"block_out_channels must be one number, {len(blocks)} times, got {list(channels)}")
    return channels[0]


class AutoencoderTiny(nn.Module):
    """The tiny image VAE. Images [N, 3, H, W] in [-1, 1]; latents [N, 4, H/8, W/8], Stable Diffusion's."""

    CLASS_NAME = "AutoencoderTiny"
    Config = AutoencoderTinyConfig
    FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "shift_factor": 0.0}
    # latent_magnitude and latent_shift are for latents in 8-bit files.
    IGNORED = {"block_out_channels", "force_upcast", "latent_magnitude", "latent_shift"}
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: AutoencoderTinyConfig = AutoencoderTinyConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] in [-1, 1] -> z [N, 4, H/8, W/8], H/8 and W/8 rounded up, times scaling_factor"""
        return self.encode_with_features(x)[0]

    def encode_with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [N, 3, H, W] in [-1, 1] -> what encode gives, and the encoder's features just before each downsampling,
        finest first: [N, 64, H, W], [N, 64, H/2, W/2], [N, 64, H/4, W/4]."""
        z, features = self.encoder(x)
        return z * self.config.scaling_factor, features

    def skip_channels(self) -> list[tuple[int, int]]:
        """(channels of a feature, channels of the skip that the decoder takes for it), coarsest first."""
        c = self.config
        return [(c.encoder_block_out_channels[0], c.decoder_block_out_channels[0])] * (len(c.num_decoder_blocks) - 1)

    def decode(self, z: Tensor, skips: Iterable[Tensor] = ()) -> Tensor:
        """z [N, 4, h, w] as encode gives it -> x [N, 3, 8h, 8w], not clamped.

        skips: what is added after each upsampling, coarsest first: [N, 64, 2h, 2w], [N, 64, 4h, 4w], [N, 64, 8h, 8w].
        An iterator may make them one by one, as they are needed. ValueError if a skip has another shape.
        """
        return self.decoder(z / self.config.scaling_factor, skips)


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = AutoencoderTiny().eval()
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
    with torch.no_grad():
        x = torch.rand(2, 3, 64, 96) * 2 - 1
        z, features = vae.encode_with_features(x)
        print(f"x {list(x.shape)} -> z {list(z.shape)} -> x {list(vae.decode(z).shape)}")
        print("features, finest first:", *(list(f.shape) for f in features))
        plain = vae.decode(z)
        for i, name in enumerate(("H/4", "H/2", "H")):
            skips = [torch.zeros_like(f) for f in reversed(features)]
            skips[i] += 1
            print(f"a skip of ones at {name} moves the output by {(vae.decode(z, skips) - plain).abs().mean():.4f}")
