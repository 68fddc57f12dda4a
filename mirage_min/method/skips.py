"""Skip convolutions from an image VAE's encoder to its decoder (R3D2 A.1): fine detail need not pass the latent.

    z, features = vae.encode_with_features(x)      # finest first
    x = vae.decode(z, skips(features))             # each made as the decoder reaches its place, coarsest first

Each feature has one 1 x 1 convolution. R3D2 starts them at zero: a new skip changes nothing, and yet it has a gradient,
since its feature is not zero. img2img-turbo and Difix start at 1e-5, the same for every weight. Names and shapes are
those of their files (`decoder.skip_conv_1.weight`, the coarsest, and so on), with no bias. R3D2 says "zero
convolutions", and names neither bias nor kernel.

    python -m mirage_min.method.skips
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PUBLISHED_START = 1e-5  # img2img-turbo, Difix


class Skips(nn.Module):
    """A convolution for each feature of the encoder, coarsest first: skip_conv_1, skip_conv_2, ..."""

    def __init__(self, channels: list[tuple[int, int]], start: float = 0.0):
        """channels: (of a feature, of its skip), coarsest first (a VAE's skip_channels()). All weights are `start`."""
        super().__init__()
        for k, (c_in, c_out) in enumerate(channels, start=1):
            conv = nn.Conv2d(c_in, c_out, 1, bias=False)
            nn.init.constant_(conv.weight, start)
            self.add_module(f"skip_conv_{k}", conv)

    def forward(self, features: list[Tensor]) -> Iterator[Tensor]:
        """Features [N, C, h, w], finest first -> the skips [N, C', h, w], coarsest first, each made when it is needed.

        At full size one skip is as large as all that the decoder holds, so they are not all made at once. ValueError
        unless there is a feature for each convolution.
        """
        if len(features) != len(self._modules):
            raise ValueError(f"wanted {len(self._modules)} features, one for each skip, got {len(features)}")
        return self._make(list(features))

    def _make(self, features: list[Tensor]) -> Iterator[Tensor]:
        for conv in self.children():
            yield conv(features.pop())  # popped, so that a feature which nobody else holds is freed at once


if __name__ == "__main__":
    from ..networks.vae_2d import AutoencoderKL, AutoencoderKLConfig

    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(16, 32, 32, 32), norm_num_groups=8))
    skips = Skips(vae.skip_channels())
    print(f"{sum(p.numel() for p in skips.parameters()):,} parameters, in -> out: {vae.skip_channels()}")
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    z, features = vae.encode_with_features(x)
    y, plain = vae.decode(z, skips(features)), vae.decode(z)
    print(f"new skips change the output by {(y - plain).abs().max():.1e}")
    (y - x).square().mean().backward()
    for name, p in skips.named_parameters():
        print(f"{name}: gradient {p.grad.abs().mean():.1e}")
