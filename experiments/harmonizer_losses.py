"""DiffusionHarmonizer in the small: what the patch loss is for, against LPIPS on whole frames and L2 alone.

    python -m experiments.harmonizer_losses --perceptual DIR         # about 3 hours

    patch     L2 + squared VGG features on random squares (Eq. 4)
    LPIPS     L2 + LPIPS (VGG) on whole frames
    L2        nothing else

The paper says that LPIPS leaves high-frequency artifacts and that without either the result is too smooth. Both would
show in harmonizer_losses.png: the power of the error, result − truth, by horizontal frequency, over that of L2. A
grid of period n pixels is a peak at the multiples of 1/n; latents are 8 pixels wide, the transformer's patches 16.
`grid` is how far these multiples stick out of their neighbours.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import common, harmonizers, tables
from mirage_min.data.pixels import from_bytes
from mirage_min.networks import weights

METHODS = {"patch": {}, "LPIPS": {"lambda_patch": 0.0, "lambda_lpips": 1.0, "lpips": "vgg"},
           "L2": {"lambda_patch": 0.0}}
PERIOD = 16  # pixels


def spectrum(d: Tensor) -> Tensor:
    """Mean power [W // 2 + 1] of frames d [..., H, W] by horizontal frequency k / W, of rows under a Hann window."""
    W = d.shape[-1]
    power = torch.fft.rfft(d * torch.hann_window(W), dim=-1).abs().square()
    return power.flatten(0, -2).mean(dim=0)


def residual_spectrum(clips: Path, results: Path) -> Tensor:
    """That of result − truth, over all clips in a folder."""
    powers = []
    for path in sorted(results.glob("*.safetensors")):
        x, truth = (from_bytes(weights.load_tensors(folder / path.name)[0][key])
                    for folder, key in ((results, "x_dr"), (clips, "x_gt")))
        powers.append(spectrum(x - truth))
    return torch.stack(powers).mean(dim=0)


def grid(power: Tensor, W: int) -> float:
    """Mean ratio of the power at the multiples of 1 / PERIOD to that two bins away; 1: no grid."""
    bins = torch.arange(1, PERIOD // 2) * W // PERIOD
    return float((2 * power[bins] / (power[bins - 2] + power[bins + 2])).mean())


def draw_spectra(path: Path, powers: dict[str, Tensor]) -> None:
    """The power of each method over that of L2, by frequency."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, n = figure.subplots(), len(powers["L2"])
    frequency = torch.arange(1, n) / (2 * (n - 1))
    for name, power in powers.items():
        axes.plot(frequency, (power / powers["L2"])[1:], label=name)
    for k in range(1, PERIOD // 2):
        axes.axvline(k / PERIOD, color="lightgrey", linewidth=0.5, zorder=0)
    axes.set(xlabel="cycles a pixel, across", ylabel="power of result − truth, over that of L2", yscale="log")
    axes.legend()
    common.save_figure(path, figure)


def main(args: argparse.Namespace) -> None:
    data, clips, seeds, spectra = harmonizers.pairs(args), tables.held_out(args), [], []
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "harmonizer_losses" / f"seed_{seed}"
        models = {}
        for name, settings in METHODS.items():  # the loss matters from the first step through pixels on
            settings = settings | {"temporal_from": 2 * args.steps}
            if not args.start:
                settings |= {"steps": 2 * args.steps} | harmonizers.latents(args)
            models[name] = harmonizers.continued(args, seed, data, folder / f"model of {name}", args.start, **settings)
        results = tables.harmonise(clips, folder, models, tables.scored_on(args))
        scores = tables.evaluate(args, clips, results, folder / "scores")
        spectra.append({name: residual_spectrum(clips, where) for name, where in results.items()})
        W = 2 * (len(spectra[-1]["L2"]) - 1)
        text = ", ".join(f"{name} {grid(power, W):.2f}" for name, power in spectra[-1].items())
        scores["remarks"]["grid"] = f"power at multiples of 1/{PERIOD} over that next to them: {text}"
        seeds.append(scores)
    mean = {name: torch.stack([each[name] for each in spectra]).mean(dim=0) for name in METHODS}
    draw_spectra(args.out / "reproduce" / "harmonizer_losses.png", mean)
    tables.report("harmonizer_losses", __doc__, args, {}, seeds,
                  more={"spectra": {name: power.tolist() for name, power in mean.items()}})


def flags() -> argparse.ArgumentParser:
    return harmonizers.flags(__doc__, steps=1500)


if __name__ == "__main__":
    common.start(main, flags())
