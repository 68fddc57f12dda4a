"""The CogVideoX causal 3D VAE: 8 x 8 pixels and 4 frames to one latent cell of 16 channels (Mirage §3.2, Table 5).

Encoder and decoder work group by group, 8 frames or 2 latents at a time; the first group also takes the remainder.
GroupNorm averages over the frames of a group, so the grouping is part of the network: another grouping gives another
result, and the official one is the one the weights were trained with.

    x [B, 3, 9, H, W] -> encode -> z [B, 16, 3, H/8, W/8] -> decode -> x [B, 3, 9, H, W]

    Enc-1 [128, 9, H, W]        Dec-4 [256, 9, H, W]       <- 2D features at H enter here    (Mirage §3.2.1)
    Enc-2 [128, 5, H/2, W/2]    Dec-3 [256, 9, H/2, W/2]   <- 2D features at H/2 enter here
    Enc-3 [256, 3, H/4, W/4]    Dec-2 [512, 5, H/4, W/4]
    Enc-4 [256, 3, H/8, W/8]    Dec-1 [512, 3, H/8, W/8]       (Table 5: the input of each stage of the decoder)

Attribute names are the published checkpoint's keys. Left out: the quantisation convolutions, which no checkpoint has.

    python -m mirage_min.networks.vae_cogvideox      # the shapes of Table 5
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import checked, weights
from .causal_conv import Cache, CausalConv3d, cut, cut_features, each_frame, in_groups, name_caches

FRAMES, LATENTS = 8, 2            # of one group, as published
TIME = (True, True, False, None)  # whether a stage's change of size includes time; None: the last stage has no change


@dataclass
class CogVideoXVAEConfig:
    """The fields of config.json that shape the network; defaults are CogVideoX-2b's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: checked.Depth = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    scaling_factor: float = 1.15258426

    def __post_init__(self):
        if len(self.block_out_channels) != 4:
            raise ValueError("block_out_channels must be 4 numbers, for three changes of size, got "
                             f"{list(self.block_out_channels)}")


def repeat_frames(x: Tensor, T: int) -> Tensor:
    """x [B, C, F, h, w] -> [B, C, T, h, w]: repeat each frame equally often, except the first where T is odd.

    That one stays single, as in the encoder: 3 latents give 1 + 2 x 2 = 5 frames, 2 give 4, 1 gives 1.
    """
    F, single = x.shape[2], T % 2
    if T == F:
        return x
    count = torch.tensor([1] * single + [(T - single) // (F - single)] * (F - single), device=x.device)
    x = rearrange(x, "b c t h w -> b t h w c")  # the order in memory, in which repeating copies whole frames
    return rearrange(x.repeat_interleave(count, dim=1, output_size=T), "b t h w c -> b c t h w")


class Conv(nn.Module):
    """A causal convolution under the published name `.conv`; the frames before a video are its first one, repeated."""

    def __init__(self, c_in: int, c_out: int, kernel=3):
        super().__init__()
        self.conv = CausalConv3d(c_in, c_out, kernel, first="repeat")

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W], the frames after those in `old` -> [B, C', T, H, W]; writes its own tail to `new`."""
        return self.conv(x, old, new)


class SpatialNorm(nn.Module):
    """GroupNorm whose gain and bias are read from the latent cell that a pixel is in: f' = norm(f) · y(z) + b(z)."""

    def __init__(self, c: int, c_z: int, groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_y = Conv(c_z, c, kernel=1)
        self.conv_b = Conv(c_z, c, kernel=1)

    def forward(self, f: Tensor, z: Tensor) -> Tensor:
        """f [B, C, T, H, W], z [B, Cz, F, h, w] -> like f."""
        h, w = z.shape[-2:]
        y, b = self.gain_and_bias(z, f.shape[2])
        f = rearrange(self.norm_layer(f), "b c t (h p) (w q) -> b t h p w q c", h=h, w=w)
        # f' = norm(f) · y(z) + b(z)
        return rearrange(torch.addcmul(b, f, y), "b t h p w q c -> b c t (h p) (w q)")

    def gain_and_bias(self, z: Tensor, T: int) -> list[Tensor]:
        """z [B, Cz, F, h, w] -> y(z) and b(z) of T frames, each [B, T, h, 1, w, 1, C]: a cell's pixels share one value.

        A 1 x 1 convolution commutes with nearest upsampling: convolve at the size of the latent, then repeat.
        """
        return [rearrange(repeat_frames(conv(z, None, {}), T), "b c t h w -> b t h 1 w 1 c")
                for conv in (self.conv_y, self.conv_b)]


def new_norm(c: int, config: CogVideoXVAEConfig, c_z: int | None) -> nn.Module:
    """A norm of c channels: in the decoder, which knows a latent of c_z channels, SpatialNorm; else GroupNorm."""
    if c_z is None:
        return nn.GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
    return SpatialNorm(c, c_z, config.norm_num_groups)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with SpatialNorm in the decoder and GroupNorm in the encoder."""

    def __init__(self, c_in: int, c_out: int, config: CogVideoXVAEConfig, c_z: int | None = None):
        super().__init__()
        self.norm1, self.conv1 = new_norm(c_in, config, c_z), Conv(c_in, c_out)
        self.norm2, self.conv2 = new_norm(c_out, config, c_z), Conv(c_out, c_out)
        self.conv_shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
        """x [B, C, T, H, W]; z is (latent,) in the decoder and () in the encoder."""
        h = self.conv1(nnf.silu(self.norm1(x, *z)), old, new)
        h = self.conv2(nnf.silu(self.norm2(h, *z)), old, new)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width and, in the first two stages, average pairs of frames."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        self.conv, self.time = nn.Conv2d(c, c, 3, stride=2), time

    def forward(self, x: Tensor, *_) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or ⌈T/2⌉, H/2, W/2]; of an odd T the first frame stays single."""
        T = x.shape[2]
        if self.time and T > 1:
            pairs = (x[:, :, T % 2 :: 2] + x[:, :, T % 2 + 1 :: 2]) / 2
            x = torch.cat([x[:, :, : T % 2], pairs], dim=2)            # [B, C, ⌈T/2⌉, H, W]
        return self.resize(x)

    def resize(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H/2, W/2], each frame alone."""
        return each_frame(lambda frames: self.conv(nnf.pad(frames, (0, 1, 0, 1))), x)


class Upsample(nn.Module):
    """Double height and width and, in the first two stages, repeat every frame but a group's lone first one."""

    def __init__(self, c: int, time: bool):
        super().__init__()
        self.conv, self.time = nn.Conv2d(c, c, 3, padding=1), time

    def forward(self, x: Tensor, *_) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or 2T - T % 2, 2H, 2W]"""
        T = x.shape[2]
        x = self.resize(x)                                             # [B, C, T, 2H, 2W]
        if self.time:  # after the convolution, which sees single frames: the same result at half the work
            x = repeat_frames(x, 2 * T - T % 2)
        return x

    def resize(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, 2H, 2W], each frame alone."""
        return each_frame(lambda frames: self.conv(nnf.interpolate(frames, scale_factor=2.0)), x)


class Stage(nn.Module):
    """Resnet blocks, then a change of size: one stage of the encoder or of the decoder, or the middle of either.

    Encoder and decoder call the layers one by one: a call to the stage would hold its input in memory until its end.
    """

    def __init__(self, c_in: int, c_out: int, n: int, config: CogVideoXVAEConfig, c_z: int | None = None,
                 down: bool | None = None, up: bool | None = None):
        """`down` and `up` say whether the change of size includes time; None means no change of size."""
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, config, c_z) for i in range(n))
        self.downsamplers = None if down is None else nn.ModuleList([Downsample(c_out, down)])
        self.upsamplers = None if up is None else nn.ModuleList([Upsample(c_out, up)])

    @property
    def layers(self) -> list[nn.Module]:
        """Called with (x, z, old, new) in turn."""
        return [*self.resnets, *(self.downsamplers or self.upsamplers or ())]


class Encoder(nn.Module):
    """Frames to the mean and log-variance of the latent."""

    def __init__(self, config: CogVideoXVAEConfig):
        super().__init__()
        c = config.block_out_channels
        self.conv_in = Conv(config.in_channels, c[0])
        self.down_blocks = nn.ModuleList(
            Stage(c[max(i - 1, 0)], c[i], config.layers_per_block, config, down=TIME[i]) for i in range(4))
        self.mid_block = Stage(c[-1], c[-1], 2, config)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, c[-1], eps=1e-6)
        self.conv_out = Conv(c[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """x [B, 3, T, H, W], one group -> [B, 32, F, h, w]: mean, then log-variance."""
        x = self.conv_in(x, old, new)
        for stage in [*self.down_blocks, self.mid_block]:
            for layer in stage.layers:
                x = layer(x, (), old, new)
        return self.output(x, (), old, new)

    def output(self, x: Tensor, z: tuple[Tensor, ...], old: Cache | None, new: Cache) -> Tensor:
        """The last norm and convolution, [B, C, T, H, W] -> [B, C', T, H, W]; z as in ResnetBlock.forward."""
        return self.conv_out(nnf.silu(self.norm_out(x, *z)), old, new)


class Decoder(nn.Module):
    """Latents to frames; the last two stages, which run at the output's frame rate, take in the 2D features."""

    def __init__(self, config: CogVideoXVAEConfig):
        super().__init__()
        c, c_z = config.block_out_channels[::-1], config.latent_channels
        self.conv_in = Conv(c_z, c[0])
        self.mid_block = Stage(c[0], c[0], 2, config, c_z)
        self.up_blocks = nn.ModuleList(
            Stage(c[max(i - 1, 0)], c[i], config.layers_per_block + 1, config, c_z, up=TIME[i]) for i in range(4))
        self.norm_out = SpatialNorm(c[-1], c_z, config.norm_num_groups)
        self.conv_out = Conv(c[-1], config.out_channels)

    def forward(self, z: Tensor, old: Cache | None, new: Cache, fusion: nn.ModuleList | None = None,
                inject: list[Tensor] | None = None) -> Tensor:
        """z [B, 16, F, h, w], one group -> [B, 3, T, H, W].

        fusion, inject: the Cross-Modal Fusion Blocks and the features of these frames; Dec-4's first, then Dec-3's
        """
        h = self.conv_in(z, old, new)
        for stage, place in zip([self.mid_block, *self.up_blocks], [None, None, None, 1, 0], strict=True):
            if inject is not None and place is not None:
                h = fusion[place](h, inject[place])
            for layer in stage.layers:
                h = layer(h, (z,), old, new)
        return self.output(h, (z,), old, new)

    output = Encoder.output


class CogVideoXVAE(nn.Module):
    """CogVideoX's causal 3D VAE. Videos [B, 3, T, H, W] in [-1, 1]; latents [B, 16, F, H/8, W/8], scaled."""

    CLASS_NAME = "AutoencoderKLCogVideoX"
    Config = CogVideoXVAEConfig
    FIXED = {"act_fn": "silu", "down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D",
             "temporal_compression_ratio": 4, "use_quant_conv": False, "use_post_quant_conv": False,
             "shift_factor": None, "latents_mean": None, "latents_std": None}
    IGNORED = {"sample_height", "sample_width", "force_upcast",
               "invert_scale_latents"}  # concerns the image-to-video pipeline alone
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: CogVideoXVAEConfig = CogVideoXVAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.fusion = None  # injection.attach puts the Cross-Modal Fusion Blocks here
        name_caches(self)

    @property
    def inject_channels(self) -> list[int]:
        """Channels of the decoder where 2D features enter, finest first: Dec-4, Dec-3."""
        return [self.config.block_out_channels[1], self.config.block_out_channels[2]]

    def legal_length(self, T: int) -> int:
        """The smallest 8k + 1 that is at least T. Clips of these lengths keep their length, and fill their groups."""
        return -(-(T - 1) // FRAMES) * FRAMES + 1

    def encode_groups(self, T: int) -> list[slice]:
        """The official groups of T frames: 8 at a time, the first with the remainder."""
        return _groups(T, FRAMES)

    def decode_groups(self, F: int) -> list[slice]:
        """The official groups of F latents: 2 at a time, the first with the remainder."""
        return _groups(F, LATENTS)

    def posterior_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor, Cache]:
        """Frames of one group -> (mean, log-variance), unscaled, each [B, 16, F, h, w], and the cache for the next."""
        new: Cache = {}
        x_g = x_g.contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = self.encoder(x_g, cache, new).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20), new

    def encode_group(self, x_g: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Frames of one group [B, 3, T, H, W] -> (z_g [B, 16, F, h, w], the cache for the next group)."""
        mean, _, new = self.posterior_group(x_g, cache)
        return mean * self.config.scaling_factor, new

    def decode_group(self, z_g: Tensor, cache: Cache | None = None,
                     inject: list[Tensor] | None = None) -> tuple[Tensor, Cache]:
        """Latents of one group [B, 16, F, h, w] -> (x_g [B, 3, T, H, W], the cache for the next group).

        `inject` holds the 2D features of these frames, finest first: [B, C0, T, H, W], [B, C1, T, H/2, W/2]. ValueError
        if it is given and there are no fusion blocks, or if their shapes do not fit.
        """
        if inject is not None and self.fusion is None:
            raise ValueError("inject was given, but this VAE has no fusion blocks: call injection.attach first")
        new: Cache = {}
        z_g = (z_g / self.config.scaling_factor).contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(z_g, cache, new, self.fusion, inject), new

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, T, H, W] in [-1, 1] -> mean and log-variance, not scaled, each [B, 16, F, h, w].

        As published, h and w are H/8 and W/8 rounded down, which drops the remaining rows and columns; and unless T is
        8k or 8k + 1, `decode` returns another number of frames. Pad to whole cells and `legal_length`.
        """
        mean, logvar = in_groups(self.posterior_group, cut(x, self.encode_groups(x.shape[2])))
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1] -> posterior mean · scaling_factor [B, 16, F, h, w]; see `posterior` for sizes
        that do not divide."""
        return self.posterior(x)[0] * self.config.scaling_factor

    def decode(self, z: Tensor, inject: list[Tensor] | None = None) -> Tensor:
        """z [B, 16, F, h, w] as encode gives it -> x [B, 3, T, H, W], not clamped; T is 4F, or 4F - 3 where F is odd.

        `inject` holds the 2D features of the whole clip, finest first: [B, C0, T, H, W], [B, C1, T, H/2, W/2].
        """
        F = z.shape[2]
        frames = self.encode_groups(4 * F - 3 * (F % 2))
        x, = in_groups(self.decode_group, cut(z, self.decode_groups(F)), cut_features(inject, frames))
        return x


def _groups(n: int, size: int) -> list[slice]:
    first = n if n < 2 * size else size + n % size
    return [slice(0, first)] + [slice(i, i + size) for i in range(first, n, size)]


if __name__ == "__main__":
    torch.manual_seed(0)
    vae = CogVideoXVAE(CogVideoXVAEConfig(layers_per_block=1))  # Mirage Table 5's channels, fewer layers
    stages = {f"Enc-{i + 1}": stage for i, stage in enumerate(vae.encoder.down_blocks)}
    stages |= {f"Dec-{i + 1}": stage for i, stage in enumerate(vae.decoder.up_blocks)}
    for name, stage in stages.items():
        stage.layers[0].register_forward_pre_hook(
            lambda layer, inputs, name=name: print(f"  {name} input {list(inputs[0].shape[1:])}"))
    with torch.no_grad():
        x = torch.rand(1, 3, 9, 32, 48) * 2 - 1
        print(f"x {list(x.shape)}")
        z = vae.encode(x)
        print(f"z {list(z.shape)}")
        print(f"x {list(vae.decode(z).shape)}")
