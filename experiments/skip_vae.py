"""The 2D VAE with skip connections from encoder to decoder, as R3D2 and img2img-turbo have it (R3D2 A.1)."""

from torch import Tensor, nn
from torch.nn import functional as nnf

from mirage_min.networks.vae_2d import AutoencoderKL


class SkipVAE(nn.Module):
    """An AutoencoderKL whose decoder also sees the encoder's features.

    Three levels, each taken before its downsampling, pass 1 x 1 convolutions that start at zero and are added after the
    decoder's upsampling to the same size.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        c = vae.config.block_out_channels
        self.vae = vae
        self.skips = nn.ModuleList(nn.Conv2d(c[i], c[i + 1], 1, bias=False) for i in range(len(c) - 1))
        for skip in self.skips:
            nn.init.zeros_(skip.weight)

    def decode(self, z: Tensor, mids: list[Tensor]) -> Tensor:
        """z [N, 4, h, w], mids (vae.mids) finest first -> frames [N, 3, H, W]."""
        decoder, z = self.vae.decoder, z / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        h = decoder.mid_block(decoder.conv_in(z))
        last = len(self.skips) - 1
        for i, stage in enumerate(decoder.up_blocks):
            h = stage(h)
            if i <= last:
                h = h + self.skips[last - i](mids[last - i])
        return decoder.conv_out(nnf.silu(decoder.conv_norm_out(h)))
