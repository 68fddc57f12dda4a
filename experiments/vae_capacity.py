"""What the latents of a small 3D VAE hold, against the best linear code of as many numbers.

    python -m experiments.vae_capacity

PSNR in dB on held-out made-up clips, of frames 1 to 8 of 9, for frame 0 has a latent of its own. What was fitted was
fitted on other clips.

    components   blocks of 4 x 8 x 8 pixels from as many principal components as a latent has numbers
    decoded      the clip from its latents, by the VAE's own decoder
    linear       the clip from its latents, by the best linear map: each block from the 5 x 5 latents around it and
                 those of the time before
    directions   how many of the latents' principal directions have a larger standard deviation than the noise that
                 training adds to them (the posterior's)

If `linear` is near `decoded` and far below `components`, it is the encoder that falls short, and a better decoder alone
is not likely to make up for it. A direction that is smaller than its noise holds next to nothing.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as nnf

from experiments import common
from experiments.chopgrad_locality import load_vae
from experiments.model_card import FIRST_SEED
from mirage_min.data.toy_world import WorldConfig, make_clip

VAES = [Path("weights/base/vae"), Path("weights/vae_wan"), Path("weights/vae_wan_48")]
FRAMES, H, W = 9, 96, 144
FITTED_SEED = 800_000  # of the clips that linear maps are fitted on
AROUND = 5             # latents in a row that a block is read from
RIDGE = 1e-3           # of the features' mean square


def blocks(x: Tensor) -> Tensor:
    """Frames 1 to 4k of a clip [3, 4k + 1, H, W] -> [k · H/8 · W/8, 768], in the order of `features`."""
    return rearrange(x[:, 1:], "c (f t) (h p) (w q) -> (f h w) (c t p q)", t=4, p=8, q=8)


def features(z: Tensor) -> Tensor:
    """Latents [C, F, h, w] -> for each after the first what lies around it, [(F - 1) · h · w, C · 2 · 5 · 5]."""
    both = rearrange(torch.stack([z[:, :-1], z[:, 1:]]), "n c f h w -> f (n c) h w")
    near = nnf.unfold(nnf.pad(both, [AROUND // 2] * 4, mode="replicate"), AROUND)
    return rearrange(near, "f n cells -> (f cells) n")


def principal(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, d] -> their mean [d], standard deviations, largest first [d], and directions as columns [d, d]."""
    mean = rows.mean(dim=0)
    variances, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean, variances.clamp(min=0).sqrt().flip(0), directions.flip(1)


def linear_map(features: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The ridge regression of targets [n, e] on features [n, d], as a function [m, d] -> [m, e]."""
    centre, target = features.mean(dim=0), targets.mean(dim=0)
    a = features - centre
    square = a.T @ a
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weight = torch.linalg.solve(square, a.T @ (targets - target))
    return lambda given: (given - centre) @ weight + target


def psnr(mse: float) -> float:
    """dB of a mean square error on [-1, 1]."""
    return 10 * math.log10(4 / mse) if mse else math.inf


@torch.no_grad()
def capacity(vae, fitted: list[Tensor], held_out: list[Tensor]) -> dict[str, float | list[float]]:
    """The figures of one VAE; clips [3, 9, H, W] in [-1, 1]."""
    def latents(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = vae.posterior(x[None])
        return mean[0].double(), logvar[0].double()

    coded = [latents(x) for x in fitted]
    targets = torch.cat([blocks(x).double() for x in fitted])
    mean, _, directions = principal(targets)
    count = coded[0][0].shape[0]
    plane = directions[:, :count]
    read = linear_map(torch.cat([features(z) for z, _ in coded]), targets)
    errors = {"components": [], "decoded": [], "linear": []}
    for x in held_out:
        true = blocks(x).double()
        errors["components"].append((true - mean) - (true - mean) @ plane @ plane.T)
        errors["decoded"].append(true - blocks(vae.decode(vae.encode(x[None]))[0].clamp(-1, 1)))
        errors["linear"].append(true - read(features(latents(x)[0])))
    _, std, axes = principal(torch.cat([z.flatten(1).T for z, _ in coded]))
    variance = torch.cat([logvar.flatten(1).T for _, logvar in coded]).exp().mean(dim=0)
    noise = (axes.square() * variance[:, None]).sum(dim=0).sqrt()  # along each direction
    return {name: psnr(torch.cat(each).square().mean().item()) for name, each in errors.items()} | {
        "numbers": count, "std": std.tolist(), "noise": noise.tolist(), "directions": int((std > noise).sum())}


def report(found: dict[str, dict]) -> str:
    rows = [[f"`{name}`", *(f"{each[key]:.1f}" for key in ("components", "decoded", "linear")),
             f"{each['directions']} of {each['numbers']}"] for name, each in found.items()]
    spectra = "\n".join(f"* `{name}`, std / noise: "
                        + ", ".join(f"{s:.2g} / {n:.2g}" for s, n in zip(each["std"], each["noise"]))
                        for name, each in found.items())
    return ("# What the small VAEs' latents hold\n\nMade by `python -m experiments.vae_capacity`, whose head says what "
            f"the columns are.\n\n{common.table(['dB', 'components', 'decoded', 'linear', 'directions'], rows)}\n\n"
            f"The latents' principal directions, largest first:\n\n{spectra}\n")


def main(args: argparse.Namespace) -> None:
    vaes = {str(folder): load_vae(folder).eval() for folder in args.vae}
    config = WorldConfig(frames=FRAMES, height=H, width=W)
    fitted, held_out = ([make_clip(first + i, config, extras=False).x_gt for i in range(count)]
                        for first, count in ((FITTED_SEED, args.fitted), (FIRST_SEED, args.clips)))
    found = {name: capacity(vae, fitted, held_out) for name, vae in vaes.items()}
    common.save_json(args.out / "vae_capacity.json", found)
    common.save_text(args.out / "vae_capacity.md", report(found))
    print(report(found))


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--vae", type=Path, nargs="+", default=VAES,
                        help="folders of CogVideoX or Wan VAEs (default those of weights/)")
    parser.add_argument("--fitted", type=int, default=100, help="clips that linear maps are fitted on (default 100)")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips (default 32)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
