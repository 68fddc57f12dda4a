"""I3D (Carreira and Zisserman 2017), DeepMind's RGB network trained on Kinetics-400: the features of vFID.

    i3d = I3D.from_file(fetch("i3d"))                    # backbones.py fetches it
    i3d(x [B, 3, T, H, W] in [-1, 1]) -> [B, 400]        # logits, as FVD's features (Unterthiner et al. 2018)

Frames are resized to 224 × 224. The names of layers are the published ones; batch norms are folded into the
convolutions. Left out: optical-flow input, training.

    python -m mirage_min.networks.i3d                    # the shape after each layer, of 16 frames
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from .weights import fill, load_tensors

LEAST = 9  # frames: fewer leave nothing for the last pooling
MIXED = {  # channels of the six convolutions of each block
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128)}


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's SAME padding of [B, C, T, H, W] with zeros: ceil(n / stride) outputs, an odd zero at the end."""
    padding = []
    for n, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [total // 2, total - total // 2]
    return nnf.pad(x, padding)


class Unit(nn.Conv3d):
    """A convolution with its batch norm folded in, SAME padding and a rectifier."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T', H', W'], sizes divided by the stride and rounded up"""
        return nnf.relu(super().forward(pad_same(x, self.kernel_size, self.stride)))


class Pool(nn.Module):
    """Maximum with SAME padding; x is not negative, so zeros serve as well as -inf."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W], not negative -> [B, C, T', H', W'], sizes divided by the stride and rounded up"""
        return nnf.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception's block: four branches, concatenated."""

    def __init__(self, c: int, n: tuple[int, ...]):
        super().__init__()
        self.Branch_0 = nn.Sequential()
        self.Branch_0.add_module("Conv3d_0a_1x1", Unit(c, n[0], 1))
        self.Branch_1 = nn.Sequential()
        self.Branch_1.add_module("Conv3d_0a_1x1", Unit(c, n[1], 1))
        self.Branch_1.add_module("Conv3d_0b_3x3", Unit(n[1], n[2], 3))
        self.Branch_2 = nn.Sequential()
        self.Branch_2.add_module("Conv3d_0a_1x1", Unit(c, n[3], 1))
        self.Branch_2.add_module("Conv3d_0b_3x3", Unit(n[3], n[4], 3))
        self.Branch_3 = nn.Sequential(Pool((3, 3, 3), (1, 1, 1)))
        self.Branch_3.add_module("Conv3d_0b_1x1", Unit(c, n[5], 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]"""
        branches = [self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(x)]
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """`i3d(x [B, 3, T, H, W] in [-1, 1], T >= 9) -> [B, 400]`, logits."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        c = 192
        for name, n in MIXED.items():
            self.add_module(name, Mixed(c, n))
            c = n[0] + n[2] + n[4] + n[5]
        self.logits = nn.Conv3d(c, 400, 1)
        flat, cube = Pool((1, 3, 3), (1, 2, 2)), Pool((3, 3, 3), (2, 2, 2))
        last = Pool((2, 2, 2), (2, 2, 2))
        self.before = {"Conv3d_2b_1x1": flat, "Mixed_3b": flat, "Mixed_4b": cube, "Mixed_5b": last}

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, T, H, W] in [-1, 1], resized to 224 x 224 -> logits [B, 400]; ValueError for fewer than 9 frames."""
        B, C, T, H, W = x.shape
        if C != 3 or T < LEAST:
            raise ValueError(f"I3D: wanted videos [B, 3, T, H, W] of {LEAST} frames at least, got {list(x.shape)}")
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = nnf.interpolate(frames, (224, 224), mode="bilinear", align_corners=False)
        x = rearrange(frames, "(b t) c h w -> b c t h w", b=B)
        for name, layer in self.named_children():
            if name in self.before:
                x = self.before[name](x)
            if name != "logits":
                x = layer(x)
        # x [B, 1024, T / 8, 7, 7]
        x = nnf.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x).mean(dim=(2, 3, 4))

    @classmethod
    def from_file(cls, path: str | Path) -> "I3D":
        """From a safetensors file with exactly its tensors; ValueError otherwise. In eval mode, frozen."""
        with torch.device("meta"):
            i3d = cls()
        state, _ = load_tensors(path)
        fill(i3d, state, path, "I3D")
        return i3d.requires_grad_(False).eval()


if __name__ == "__main__":
    with torch.device("meta"):  # shapes alone
        i3d, x = I3D(), torch.zeros(1, 3, 16, 128, 192)
        for name, layer in i3d.named_children():
            layer.register_forward_hook(lambda layer, given, y, name=name: print(f"{name:14} {list(y.shape[1:])}"))
        print("features:", list(i3d(x).shape), f"from {sum(p.numel() for p in i3d.parameters()) / 1e6:.1f} M numbers")
