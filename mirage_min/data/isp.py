"""An object as another camera would process it, in a frame that this camera took (DiffusionHarmonizer Eq. 3).

    I = M ⊙ ISP(x) + (1 − M) ⊙ x

x is the recording and the target, M the object's mask, and ISP a chain of exposure, white balance, a colour matrix,
gamma, contrast, brightness and saturation: one draw of all of them for a whole clip, or the object would flicker.

    x_ni, did = develop_object(x, mask, draws)        # x [3, T, H, W] in [-1, 1], mask [1, T, H, W]; did: {what: value}

DEVIATION: the paper gives no ranges; these are those of a public generator of such pairs (RoboLab).

    python -m mirage_min.data.isp                     # one grey patch through a few draws
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as nnf

from .photometric import luma, uniform

RANGES = {
    "exposure": (-0.6, 0.6),       # stops
    "red": (0.85, 1.20), "green": (0.95, 1.05), "blue": (0.80, 1.25),
    "gamma": (0.8, 1.3), "contrast": (0.85, 1.2), "brightness": (-0.04, 0.04), "saturation": (0.8, 1.25),
    "blend": (0.5, 0.8),           # share of the developed object in what is shown
}
MIXING = 0.035                     # standard deviation of the colour matrix about the identity
FEATHER, OF_HEIGHT = 2.0, 576      # standard deviation of the mask's edge in pixels, on frames so high
LEAST = 0.002                      # share of the clip that an object must cover


def develop_object(x: Tensor, mask: Tensor, draws: Generator) -> tuple[Tensor, dict]:
    """x [3, T, H, W] in [-1, 1] with the object in mask [1, T, H, W] developed by another camera; and what was drawn.

    ValueError if the mask covers less than LEAST of the clip.
    """
    if mask.mean() < LEAST:
        raise ValueError(f"wanted an object that covers {LEAST:.1%} of the clip at least, got {mask.mean():.2%}")
    did = {name: float(uniform(draws, *limits)) for name, limits in RANGES.items()}
    did["matrix"] = (torch.eye(3) + MIXING * torch.randn(3, 3, generator=draws)).tolist()
    M = feather(mask, FEATHER * x.shape[2] / OF_HEIGHT)
    shown = ((x + 1) / 2).clamp(0, 1)  # resizing may leave a value just below 0, which has no power of 2.2
    # I = M ⊙ ISP(x) + (1 − M) ⊙ x                                                     DiffusionHarmonizer Eq. 3
    y = M * develop(shown, did) + (1 - M) * shown
    return y.clamp(0, 1) * 2 - 1, did


def develop(x: Tensor, did: dict) -> Tensor:
    """The chain, on x [3, T, H, W] in [0, 1] as a file has it; like x."""
    linear = x ** 2.2 * 2 ** did["exposure"]
    linear = linear * torch.tensor([did["red"], did["green"], did["blue"]]).view(3, 1, 1, 1)
    linear = torch.einsum("ij,jthw->ithw", torch.tensor(did["matrix"]), linear)
    y = linear.clamp(0, 1) ** (did["gamma"] / 2.2)
    y = (y - 0.5) * did["contrast"] + 0.5 + did["brightness"]
    grey = luma(y)
    y = grey + did["saturation"] * (y - grey)
    return torch.lerp(x, y.clamp(0, 1), did["blend"])


def feather(mask: Tensor, sigma: float) -> Tensor:
    """mask [1, T, H, W] with its edge blurred by a Gaussian of `sigma` pixels."""
    n = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-n, n + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    frames = nnf.pad(mask.transpose(0, 1), (n, n, n, n), mode="replicate")       # [T, 1, H, W]
    frames = nnf.conv2d(nnf.conv2d(frames, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return frames.transpose(0, 1)


if __name__ == "__main__":
    x, mask = torch.zeros(3, 2, 24, 24), torch.zeros(1, 2, 24, 24)
    mask[:, :, 6:18, 6:18] = 1
    for seed in range(4):
        y, did = develop_object(x, mask, torch.Generator().manual_seed(seed))
        colour = [round(v) for v in (127.5 * (y[:, 0, 12, 12] + 1)).tolist()]
        corner = float(127.5 * (y[0, 0, 0, 0] + 1))
        print(f"grey 128 becomes {colour} at {did['exposure']:+.2f} stops; the corner stays {corner:.0f}")
