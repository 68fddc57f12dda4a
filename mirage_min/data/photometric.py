"""Photometric variation: one clip in the tones of many cameras, hours and weathers.

A network that has seen one drive learns that drive's tones, and shifts every other scene towards them. So training
shows each clip under one draw of exposure, white balance, gamma, contrast, saturation, black level and sensor noise:
the same for all its frames, as one camera would have filmed it. Some draws go further: night, haze, greyscale, bars
along two edges, a fade, frames of one colour.

    x = vary(x, draws)                        # x [3, T, H, W] in [-1, 1] -> the same scene, filmed otherwise

    python -m mirage_min.data.photometric     # a contact sheet: photometric.png
"""

import torch
from torch import Generator, Tensor

LUMA = (0.299, 0.587, 0.114)  # BT.601, what a greyscale camera would see

# {kind: how often}. `as it is` leaves the clip alone; every other kind begins with `camera`.
KINDS = {"as it is": 0.15, "camera": 0.53, "night": 0.08, "haze": 0.06, "grey": 0.04, "bars": 0.06, "fade": 0.04,
         "one colour": 0.04}


def vary(x: Tensor, draws: Generator, kind: str | None = None) -> Tensor:
    """x [3, T, H, W] in [-1, 1] -> like x. One draw for the whole clip; `kind` is drawn if None.

    ValueError unless kind is a key of KINDS.
    """
    if kind is None:
        kind = draw_kind(draws)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "as it is":
        return x
    x = (x + 1) / 2                                                    # in [0, 1], as the camera's file has it
    if kind == "night":
        x = x * uniform(draws, 0.06, 0.35)
    if kind == "haze":
        veil = uniform(draws, 0.2, 0.6)
        x = x * (1 - veil) + veil * uniform(draws, 0.6, 1.0)
    x = camera(x, draws)
    if kind == "grey":
        x = luma(x).expand_as(x)
    elif kind == "bars":
        x = bars(x, draws)
    elif kind == "fade":
        x = fade(x, draws)
    elif kind == "one colour":
        x = one_colour(x, draws)
    return x.clamp(0, 1) * 2 - 1


def camera(x: Tensor, draws: Generator) -> Tensor:
    """Exposure, white balance, gamma, contrast, saturation, black level, grain. x [3, T, H, W] in [0, 1]."""
    balance = torch.exp(0.3 * (2 * torch.rand(3, generator=draws) - 1)).view(3, 1, 1, 1)
    x = x * balance * torch.exp(uniform(draws, -0.9, 0.4))
    x = x.clamp(1e-4, 1) ** torch.exp(uniform(draws, -0.6, 0.6))
    grey = luma(x)
    x = grey + uniform(draws, 0.3, 1.5) * (x - grey)
    x = 0.5 + uniform(draws, 0.75, 1.35) * (x - 0.5) + uniform(draws, -0.05, 0.1)
    grain = uniform(draws, 0.0, 1.5) / 255
    return x.clamp(0, 1) + grain * torch.randn(x.shape, generator=draws)


def bars(x: Tensor, draws: Generator) -> Tensor:
    """x [3, T, H, W] in [0, 1] with bars of one dark tone above and below, or left and right."""
    H, W = x.shape[-2:]
    tone = uniform(draws, 0.0, 0.08)
    across = integer(draws, 2)
    n = int((H if across else W) * uniform(draws, 0.05, 0.3))
    x = x.clone()
    edges = (x[:, :, :n], x[:, :, H - n :]) if across else (x[..., :n], x[..., W - n :])
    for edge in edges:
        edge.fill_(tone)
    return x


def fade(x: Tensor, draws: Generator) -> Tensor:
    """x [3, T, H, W] in [0, 1], fading to black or white over its frames, or from there to the clip."""
    T = x.shape[1]
    share = torch.linspace(0, 1, T).view(1, T, 1, 1) if T > 1 else torch.full((1, 1, 1, 1), 0.5)
    if integer(draws, 2):
        share = share.flip(1)
    return torch.lerp(x, torch.full_like(x, float(integer(draws, 2))), share)


def one_colour(x: Tensor, draws: Generator) -> Tensor:
    """x [3, T, H, W] with all frames, or all from one on, of one colour: grey as often as not."""
    colour = torch.rand(3, generator=draws).view(3, 1, 1, 1)
    if integer(draws, 2):
        colour = colour[:1].expand(3, 1, 1, 1)
    start = 0 if integer(draws, 2) else integer(draws, x.shape[1])
    x = x.clone()
    x[:, start:] = colour
    return x


def luma(x: Tensor) -> Tensor:
    """x [3, T, H, W] -> [1, T, H, W]"""
    return (torch.tensor(LUMA, dtype=x.dtype).view(3, 1, 1, 1) * x).sum(0, keepdim=True)


def draw_kind(draws: Generator) -> str:
    """A key of KINDS, as often as it says."""
    k = torch.multinomial(torch.tensor(list(KINDS.values())), 1, generator=draws)
    return list(KINDS)[int(k)]


def uniform(draws: Generator, low: float, high: float) -> Tensor:
    """A random number [] between low and high."""
    return low + (high - low) * torch.rand((), generator=draws)


def integer(draws: Generator, n: int) -> int:
    """One of 0 … n - 1."""
    return int(torch.randint(n, (), generator=draws))


if __name__ == "__main__":
    from PIL import Image

    from .pixels import to_uint8
    from .toy_world import WorldConfig, make_clip

    x = make_clip(0, WorldConfig(frames=3)).x_gt
    draws = torch.Generator().manual_seed(0)
    rows = []
    for kind in KINDS:
        varied = [vary(x, draws, kind) for _ in range(4)]
        rows.append(torch.cat([v[:, -1] for v in varied], dim=2))      # [3, H, 4 W]: last frames
        shift = torch.stack([(v - x).mean(dim=(1, 2, 3)) for v in varied]).abs().amax() * 127.5
        print(f"{kind:10s}: the means move by up to {shift:5.1f} of 255")
    Image.fromarray(to_uint8(torch.cat(rows, dim=1))).save("photometric.png")
    print("photometric.png: a row for each kind, four draws")
