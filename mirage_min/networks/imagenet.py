"""Frozen ImageNet networks: the layers of VGG-16, AlexNet and SqueezeNet 1.1 that perceptual distances read.

    vgg = Features("vgg", folder)
    taps = vgg(x)                             # frames [N, 3, H, W] in [-1, 1] -> [N, C_i, H_i, W_i], finest first

The weights are torchvision's, as safetensors, in a folder that the caller names: vgg16_features, alexnet_features,
squeezenet1_1_features, each with the suffix .safetensors. With torchvision, they are made by

    from torchvision.models import vgg16
    from safetensors.torch import save_file
    save_file(vgg16(weights="IMAGENET1K_V1").features.state_dict(), "vgg16_features.safetensors")

and likewise from alexnet and squeezenet1_1. The folder "auto" fetches them (backbones.py). A file that ends early
(VGG to relu2_2, say) serves the taps it reaches.
Left out: the classifiers, and training any of these networks.

    python -m mirage_min.networks.imagenet    # sizes of the three networks, and the shape of every tap
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from . import backbones
from .weights import fill, load_tensors, save_tensors

FILES = {"vgg": "vgg16_features", "alex": "alexnet_features", "squeeze": "squeezenet1_1_features"}
TAPS = {  # {tap: its index in torchvision's `features`}
    "vgg": {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29},
    "alex": {"relu1": 1, "relu2": 4, "relu3": 7, "relu4": 9, "relu5": 11},
    "squeeze": {"relu1": 1, "fire4": 4, "fire7": 7, "fire9": 9, "fire10": 10, "fire11": 11, "fire12": 12},
}
LEAST = {"alex": 31, "squeeze": 17}  # pixels: the smallest side that survives all poolings; vgg's depends on its file


# ---- the three networks, layer for layer as torchvision numbers them -------------------------------------------------

def vgg16() -> nn.Sequential:
    """VGG-16 up to relu5_3: nothing reads the last pooling of torchvision's `features`."""
    layers, c_in = [], 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for c_out in block:
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True)]
            c_in = c_out
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1])


def alexnet() -> nn.Sequential:
    """AlexNet up to its fifth rectifier."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    )


class Fire(nn.Module):
    """SqueezeNet's block: squeeze to few channels, then expand by a 1×1 and a 3×3 convolution, concatenated."""

    def __init__(self, c_in: int, c_squeeze: int, c_expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, c_squeeze, 1)
        self.expand1x1 = nn.Conv2d(c_squeeze, c_expand, 1)
        self.expand3x3 = nn.Conv2d(c_squeeze, c_expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, c_in, h, w] -> [N, 2 c_expand, h, w]."""
        x = nnf.relu(self.squeeze(x))
        return nnf.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def squeezenet() -> nn.Sequential:
    """SqueezeNet 1.1, all of its `features`."""
    def pool() -> nn.MaxPool2d:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True),
        pool(), Fire(64, 16, 64), Fire(128, 16, 64),
        pool(), Fire(128, 32, 128), Fire(256, 32, 128),
        pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    )


# ---- features --------------------------------------------------------------------------------------------------------

class Features(nn.Module):
    """A frozen network: `features(x [N, 3, H, W] in [-1, 1]) -> taps`, a list of [N, C_i, H_i, W_i], finest first.

    net      "vgg", "alex" or "squeeze"
    weights  a safetensors file, a folder that holds one under the name given in the header, or "auto"
    taps     the names of what is returned, in order; `least`, the smallest side of a frame. Differentiable in x.
    ValueError if the weights are missing or another network's, and for frames that pooling would leave empty.
    """

    def __init__(self, net: str, weights: str | Path):
        super().__init__()
        if net not in FILES:
            raise ValueError(f"net must be one of {sorted(FILES)}, got {net!r}")
        self.net = net
        self.taps, self.layers = _load(net, _find(net, Path(weights)))
        self.least = LEAST.get(net) or 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.layers)
        self.requires_grad_(False)
        # The weights' layout decides that of every activation: up to a quarter faster on a CPU.
        self.to(memory_format=torch.channels_last)
        # ImageNet's mean and std of [0, 1] colours, written for [-1, 1]; LPIPS, Gram and DISTS agree on them.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [N, 3, H, W] in [-1, 1] -> the taps, each [N, C_i, H_i, W_i], finest first."""
        return self.walk(self.layers, x, self.least)

    def walk(self, layers: nn.Sequential, x: Tensor, least: int = 1) -> list[Tensor]:
        """The taps of `layers`: this network's own, or the same with another pooling (DISTS).

        x [N, 3, H, W] in [-1, 1] -> [N, C_i, H_i, W_i], finest first. ValueError for other frames, or smaller than
        `least`.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < least:
            raise ValueError(f"{self.net}: wanted frames [N, 3, H, W] of {least}x{least} at least, got {list(x.shape)}")
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        wanted, taps = [TAPS[self.net][name] for name in self.taps], []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in wanted:
                taps.append(x)
        return taps


def _find(net: str, path: Path) -> Path:
    """The weights file of `net`: the path itself, or in a folder the first whose name starts as it should; "auto":
    the published one, fetched."""
    if str(path) == backbones.AUTO:
        return backbones.fetch(net)
    if path.is_file():
        return path
    files = sorted(path.glob(f"{FILES[net]}*.safetensors"))
    if not files:
        raise ValueError(f"no {net} weights: put {FILES[net]}.safetensors into {path}/ "
                         f"(mirage_min/networks/imagenet.py says how to make it; --perceptual auto fetches it)")
    return files[0]


def _load(net: str, file: Path) -> tuple[list[str], nn.Sequential]:
    """The taps that the file's weights reach, and the layers up to the last of them with those weights."""
    with torch.device("meta"):
        layers = {"vgg": vgg16, "alex": alexnet, "squeeze": squeezenet}[net]()
    state = {key.removeprefix("features."): value for key, value in load_tensors(file)[0].items()
             if not key.startswith("classifier.")}
    taps = [name for name, i in TAPS[net].items() if layers[: i + 1].state_dict().keys() <= state.keys()]
    if not taps:
        raise ValueError(f"{file}: no weights of {net} up to its first tap, got the keys {sorted(state)[:4]}")
    layers = layers[: TAPS[net][taps[-1]] + 1]
    fill(layers, state, file, f"{net} up to {taps[-1]}")
    return taps, layers


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # random weights: the shapes are real
        for net, build in {"vgg": vgg16, "alex": alexnet, "squeeze": squeezenet}.items():
            layers = build()
            save_tensors(Path(folder, f"{FILES[net]}.safetensors"), layers.state_dict())
            features = Features(net, folder)
            print(f"{net}: {sum(p.numel() for p in layers.parameters()) / 1e6:.2f} M parameters; of a frame of 64 x 96")
            for name, tap in zip(features.taps, features(torch.zeros(1, 3, 64, 96)), strict=True):
                print(f"    {name:8} {list(tap.shape[1:])}")
