"""The blocks of Wan's causal 3D VAEs, 2.1 and 2.2: norms, resnet blocks, attention, changes of size (ChopGrad B.4).

Each is called with (x, old, new): x [B, C, T, H, W] are the frames after those that left the cache `old`, None at the
start of a video; its own cache goes into `new` (causal_conv.py). Attribute names are the published keys.

    python -m mirage_min.networks.wan_blocks         # what the changes of size do to a video's first and later groups
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from .causal_conv import Cache, CausalConv3d, each_frame, name_caches


class RMSNorm(nn.Module):
    """x / rms(x) · gamma, over the channels of each position."""

    def __init__(self, c: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> like x; gamma has as many axes after C as x."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / norm) * self.gamma


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(c_in), CausalConv3d(c_in, c_out)
        self.norm2, self.conv2 = RMSNorm(c_out), CausalConv3d(c_out, c_out)
        self.conv_shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]"""
        h = self.conv1(nnf.silu(self.norm1(x)), old, new)
        h = self.conv2(nnf.silu(self.norm2(h)), old, new)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameAttention(nn.Module):
    """Single-head self-attention over the cells of one frame, added to its input."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = RMSNorm(c, dims=2)
        self.to_qkv, self.proj = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> like x; frames do not see each other."""
        B, C, T, H, W = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        q, k, v = qkv.contiguous()  # or PyTorch would hold all H*W x H*W products at once
        y = nnf.scaled_dot_product_attention(q, k, v)                  # [B*T, 1, H*W, C]
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=H))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=B)


class MidBlock(nn.Module):
    """A resnet block, attention within each frame, a resnet block."""

    def __init__(self, c: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c), ResnetBlock(c, c)])
        self.attentions = nn.ModuleList([FrameAttention(c)])

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, C, T, H, W] -> like x"""
        x = self.attentions[0](self.resnets[0](x, old, new))
        return self.resnets[1](x, old, new)


class Downsample(nn.Module):
    """Downsample by two in space and, if `time`, in time: the video's first frame is kept, the rest merge in pairs."""

    def __init__(self, c: int, time: bool, key: str):
        super().__init__()
        self.key = key  # in the cache
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2))
        self.time_conv = nn.Conv3d(c, c, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T', H/2, W/2]; with `time` T' is T/2, rounded up in a video's first group."""
        x = self.resize(x)                                             # [B, C, T, H/2, W/2]
        if self.time_conv is None:
            return x
        # Output k is made of frames 2k - 2, 2k - 1 and 2k, so one frame of the past is enough.
        seen = torch.cat([old[self.key], x], dim=2) if old else x
        new[self.key] = x[:, :, -1:].clone()
        if seen.shape[2] == 1:
            return x
        merged = self.time_conv(seen)                                  # [B, C, T//2, H/2, W/2]
        return merged if old else torch.cat([x[:, :, :1], merged], dim=2)

    def resize(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H/2, W/2], each frame alone."""
        return each_frame(self.resample, x)


class Upsample(nn.Module):
    """Upsample by two in time, if `time` (the video's first frame stays single), then in space."""

    def __init__(self, c: int, c_out: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(c, c_out, 3, padding=1))
        self.time_conv = CausalConv3d(c, 2 * c, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, old: Cache | None, new: Cache) -> Tensor:
        """[B, C, T, H, W] -> [B, c_out, T', 2H, 2W]; with `time` T' is 2T, and 2T - 1 in a video's first group."""
        B, C, T, H, W = x.shape
        # The video's first frame bypasses `time_conv`, so the convolution's history starts from zeros at the second.
        if self.time_conv is not None and not old and T == 1:
            new[self.time_conv.key] = x.new_zeros(B, 2, H, W, C).movedim(-1, 1)
        elif self.time_conv is not None:
            twice = self.time_conv(x if old else x[:, :, 1:], old, new)
            twice = rearrange(twice, "b (two c) t h w -> b (t two) h w c", two=2).movedim(-1, 1)
            x = twice if old else torch.cat([x[:, :, :1], twice], dim=2)  # [B, C, 2T or 2T-1, H, W]
        return self.resize(x)

    def resize(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, c_out, T, 2H, 2W], each frame alone."""
        return each_frame(self.resample, x)


if __name__ == "__main__":
    layers = nn.ModuleDict({"down": Downsample(4, True, "down"), "up": Upsample(4, 2, True)})
    name_caches(layers)
    for name, layer in layers.items():
        old: Cache | None = None
        for T in (1, 4, 4):
            new: Cache = {}
            y = layer(torch.randn(1, 4, T, 8, 8), old, new)
            print(f"{name}: {T} frames of 8 x 8 -> {y.shape[2]} of {y.shape[3]} x {y.shape[4]}")
            old = new
