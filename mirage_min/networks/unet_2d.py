"""UNet2DConditionModel, the network of Stable Diffusion: what R3D2, Difix and img2img-turbo run once on each image.

    z [N, 4, h, w] ──conv_in──> down_blocks ──> mid_block ──> up_blocks ──conv_out──> ε [N, 4, h, w]
                                    └────────── skips ───────────┘

Every layer is a resnet block, conditioned on the timestep, followed in most stages by a transformer, conditioned on the
text (unet_attention.py). The way down pushes its tensors on a stack, and the way up pops them. A stage halves the size
and rounds up, so any size works, and the way up crops to the size of what it pops: 135 x 240 latents, 1080 x 1920
pixels, become 68 x 120, 34 x 60, 17 x 30.

Reads SD-Turbo and SD 2.1 (linear projections, heads 64 wide, text 1024 wide) and SD 1.5 (convolutions, 8 heads, text
768 wide); attribute names are the published keys. Left out: SDXL's further embeddings, class labels, ControlNet's
inputs.

    python -m mirage_min.networks.unet_2d            # the shapes at odd sizes, and what t does
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from . import checked, weights
from .rotary import angles
from .unet_attention import Transformer

ATTENDING, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass
class UNet2DConfig:
    """The fields of config.json that shape the network; a field that the file lacks has the published default."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: checked.Depth = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8  # despite its name the number of heads, of all stages or each
    use_linear_projection: bool = False
    norm_num_groups: int = 32

    def heads(self) -> tuple[int, ...]:
        """The number of attention heads of each stage, finest first; one for each of block_out_channels."""
        n = self.attention_head_dim
        return (n,) * len(self.block_out_channels) if isinstance(n, int) else n


class UNet2D(nn.Module):
    """Predicts ε from a latent image, a timestep and a text.

    Set `activation_checkpointing` to keep only the input of each layer for backward and run the layer again there.
    """

    CLASS_NAME = "UNet2DConditionModel"
    Config = UNet2DConfig
    FIXED = {
        "act_fn": "silu", "norm_eps": 1e-5, "dropout": 0.0, "center_input_sample": False, "flip_sin_to_cos": True,
        "freq_shift": 0, "downsample_padding": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_scale_factor": 1, "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None, "only_cross_attention": False, "dual_cross_attention": False,
        "mid_block_only_cross_attention": None, "cross_attention_norm": None, "num_attention_heads": None,
        "attention_type": "default",
        "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
        "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
        "timestep_post_act": None, "time_cond_proj_dim": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "class_embed_type": None, "class_embeddings_concat": False, "num_class_embeds": None,
        "projection_class_embeddings_input_dim": None, "addition_embed_type": None, "addition_time_embed_dim": None,
    }
    # upcast_attention: PyTorch's attention sums in float32 anyway.
    IGNORED = {"sample_size", "addition_embed_type_num_heads", "upcast_attention"}
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: UNet2DConfig = UNet2DConfig()):
        super().__init__()
        check(config)
        self.config = config
        self.activation_checkpointing = False
        widths, n = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])

        c = widths[0]     # channels of the stream
        skips = [c]       # channels of each tensor that the way down leaves for the way up
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            c_in = []
            for _ in range(n):
                c_in.append(c)
                c = widths[i]
                skips.append(c)
            if i < last:
                skips.append(c)
            attending = n if kind in ATTENDING else 0
            self.down_blocks.append(Stage(config, i, c_in, attending, down=i < last))

        self.mid_block = Stage(config, last, [c, c], attending=1)

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(last + 1)), config.up_block_types):
            c_in = []
            for _ in range(n + 1):
                c_in.append(c + skips.pop())
                c = widths[i]
            attending = n + 1 if kind in ATTENDING else 0
            self.up_blocks.append(Stage(config, i, c_in, attending, up=i > 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=1e-5)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, t: int | Tensor, text: Tensor, views: int = 1) -> Tensor:
        """z [N, 4, h, w], t in 0 .. 999 as an int or [N], text [N, L, cross_attention_dim] -> ε [N, 4, h, w].

        Any h, w and L. views: this many consecutive images, "(b v)", share their self-attention. In the shapes below,
        i counts the stages, C_i is block_out_channels[i], and h/2^i is rounded up.
        ValueError for other shapes, or if N is not a multiple of `views`.
        """
        self._check(z, text, views)
        N, C, h, w = z.shape
        time = self.time_embedding(torch.as_tensor(t, device=z.device).expand(N), z.dtype)
        time = nnf.silu(time)                                          # [N, 4 C_0]
        context = time, text, views

        x = self.conv_in(z)                                            # [N, C_0, h, w]
        skips = [x]
        for stage in self.down_blocks:
            for layer in stage.layers():
                x = self.run(layer, x, *context)                       # [N, C_i, h/2^i, w/2^i]
                skips.append(x)
            for downsample in stage.downsamplers:
                x = downsample(x)                                      # [N, C_i, h/2^(i+1), w/2^(i+1)]
                skips.append(x)

        for layer in self.mid_block.layers():
            x = self.run(layer, x, *context)                           # [N, C_3, h/8, w/8]

        for stage in self.up_blocks:
            for layer in stage.layers():
                x = torch.cat([x, skips.pop()], dim=1)                 # [N, C_x + C_skip, h/2^i, w/2^i]
                x = self.run(layer, x, *context)                       # [N, C_i, h/2^i, w/2^i]
            for upsample in stage.upsamplers:
                x = upsample(x, size=skips[-1].shape[-2:])             # [N, C_i, h/2^(i-1), w/2^(i-1)]

        return self.conv_out(nnf.silu(self.conv_norm_out(x)))          # [N, 4, h, w]

    def run(self, layer: "Layer", x: Tensor, time: Tensor, text: Tensor, views: int) -> Tensor:
        """layer(x [N, C, h, w], time, text, views); where activations are checkpointed, backward computes it again."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, time, text, views, use_reentrant=False)
        return layer(x, time, text, views)

    def _check(self, z: Tensor, text: Tensor, views: int) -> None:
        c = self.config
        if z.ndim != 4 or z.shape[1] != c.in_channels:
            raise ValueError(f"z must be [N, {c.in_channels}, h, w], got {list(z.shape)}")
        if text.ndim != 3 or text.shape[0] != z.shape[0] or text.shape[2] != c.cross_attention_dim:
            raise ValueError(f"text must be [N={z.shape[0]}, L, cross_attention_dim={c.cross_attention_dim}], "
                             f"got {list(text.shape)}")
        if views < 1 or z.shape[0] % views:
            raise ValueError(f"{z.shape[0]} images are not groups of {views} views")


def check(config: UNet2DConfig) -> None:
    """ValueError for a config that names other stages than these, or not one entry for each."""
    n = len(config.block_out_channels)
    for i, name in enumerate(("down_block_types", "up_block_types")):
        kinds = getattr(config, name)
        known = [ATTENDING[i], PLAIN[i]]
        if len(kinds) != n or not set(kinds) <= set(known):
            raise ValueError(f"{name} must be {n} of {known}, as block_out_channels has {n} entries, got {list(kinds)}")
    if len(config.heads()) != n:
        raise ValueError(f"attention_head_dim must be one number or {n}, got {list(config.heads())}")


class Layer(NamedTuple):
    """A resnet block and, in an attending stage, the transformer after it."""

    resnet: "ResnetBlock"
    transformer: Transformer | None

    def __call__(self, x: Tensor, time: Tensor, text: Tensor, views: int) -> Tensor:
        x = self.resnet(x, time)
        return x if self.transformer is None else self.transformer(x, text, views)


class Stage(nn.Module):
    """Layers of one size, the first `attending` of them with a transformer; then perhaps a change of size."""

    def __init__(self, config: UNet2DConfig, i: int, c_in: list[int], attending: int, down=False, up=False):
        super().__init__()
        c, heads, groups = config.block_out_channels[i], config.heads()[i], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(config, c_x, c) for c_x in c_in)
        self.attentions = nn.ModuleList(
            Transformer(c, heads, config.cross_attention_dim, groups, config.use_linear_projection)
            for _ in range(attending))
        self.downsamplers = nn.ModuleList([Downsample(c)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c)] if up else [])

    def layers(self) -> Iterator[Layer]:
        """The layers in order, without the change of size."""
        return starmap(Layer, zip_longest(self.resnets, self.attentions))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time)))"""

    def __init__(self, config: UNet2DConfig, c_in: int, c: int):
        super().__init__()
        groups = config.norm_num_groups
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], c)
        self.norm2 = nn.GroupNorm(groups, c, eps=1e-5)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [N, C, h, w], time [N, 4 C_0] after its SiLU -> [N, C', h, w]"""
        h = self.conv1(nnf.silu(self.norm1(x)))                        # [N, C, h, w]
        h = h + self.time_emb_proj(time)[:, :, None, None]             # the same at every position
        h = self.conv2(nnf.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width, rounded up: the padding is on all four sides, unlike the VAE's."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, C, ⌈h/2⌉, ⌈w/2⌉]"""
        return self.conv(x)                                            # [N, C, h/2, w/2]


class Upsample(nn.Module):
    """Double height and width by repetition, crop to the wanted size, convolve."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x [N, C, ⌈h/2⌉, ⌈w/2⌉], size (h, w) -> [N, C, h, w]"""
        h, w = size
        return self.conv(nnf.interpolate(x, scale_factor=2.0)[:, :, :h, :w])


class TimeEmbedding(nn.Module):
    """Cosines and sines of t, then two layers."""

    def __init__(self, c: int):
        super().__init__()
        self.c = c
        self.linear_1 = nn.Linear(c, 4 * c)
        self.linear_2 = nn.Linear(4 * c, 4 * c)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t [N] -> [N, 4 C_0]; in float32 up to the sine: bfloat16 would round 399 to 400."""
        a = angles(t.float(), self.c)                                  # [N, C_0 / 2]
        return self.linear_2(nnf.silu(self.linear_1(torch.cat([a.cos(), a.sin()], dim=-1).to(dtype))))


if __name__ == "__main__":
    torch.manual_seed(0)
    unet = UNet2D(UNet2DConfig(block_out_channels=(16, 32, 64, 64), attention_head_dim=(1, 2, 4, 4), norm_num_groups=8,
                               cross_attention_dim=24)).eval()
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters")
    text = torch.randn(2, 7, 24)
    with torch.no_grad():
        for h, w in ((8, 16), (17, 15), (1, 1)):
            z = torch.randn(2, 4, h, w)
            print(f"z {list(z.shape)} -> ε {list(unet(z, 199, text).shape)}")
        z = torch.randn(2, 4, 8, 16)
        print(f"t 199 against 999, mean change: {(unet(z, 199, text) - unet(z, 999, text)).abs().mean():.4f}")
