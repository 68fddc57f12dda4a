"""Mirage Table 4 and Figure 6 in the small: what stage A adds to stage H, and why skips of the 3D encoder do not.

    python -m experiments.mirage_table4 --perceptual DIR         # 50 minutes, and 20 for the Mirage that others share

    H               stage H alone: train_harmonize.py on a stage A of no steps (blocks and LoRA at zero change nothing)
    H, 3D skips     the same, and features of the 3D encoder through zero-initialised 1 x 1 convolutions: Enc-1 at H
                    into Dec-4, Enc-2 at H/2 into Dec-3, whose 5 frames are repeated as the decoder repeats its own
    A + H           both stages, by their scripts

mirage_fig6.png: channel means of Enc-1, of the 2D encoder and of Dec-4 at frame 7 of a clip of 9 (after the paper's
Fig. 6), and how far each feature of frame 7 changes when noise is added to frame j of the input, relative to j = 7.
A 2D encoder's features of a frame change with that frame alone; the 3D encoder's of frame 7 change with earlier frames
too, and through skips that is ghosting. mirage_ghosting.png: frame 7 of the first clip as each method makes it, and
below it the mean absolute difference to the truth.

The paper trains 10,000 steps a stage with LPIPS on VGG; here it is the recipe `small` (SqueezeNet, Gram, MSE).
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments import common, tables
from mirage_min.data.pixels import from_bytes
from mirage_min.method import lora
from mirage_min.networks import weights
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, TRANSFORMER

PAPER = {"H": {"PSNR": 27.89, "LPIPS": 0.083, "vFID": 0.206},
         "H, 3D skips": {"PSNR": 27.50, "LPIPS": 0.099, "vFID": 0.249},
         "A + H": {"PSNR": 28.60, "LPIPS": 0.069, "vFID": 0.178}}
LR = 1e-3  # of recipe `small`
FRAME = 7  # the one that is looked at, of 9


# ---- the three methods -----------------------------------------------------------------------------------------------

def h_alone(args: argparse.Namespace, seed: int) -> Mirage:
    """Stage H on a stage A of no steps."""
    def make(to: Path) -> None:
        tables.stage_a(args, to, seed, steps=0)
        tables.stage_h(args, to, to, seed)
    return Mirage.from_pretrained(tables.once(args.runs / "h_alone" / f"seed_{seed}", tables.trained_with(args), make))


def encoder_features(vae: CogVideoXVAE, x: Tensor) -> list[Tensor]:
    """Enc-1 and Enc-2 of one group x [B, 3, 9, H, W], just before their downsamplings: [B, C0, 9, H, W] and
    [B, C1, 5, H/2, W/2]."""
    found, hooks = [], []
    for stage in vae.encoder.down_blocks[:2]:
        # the downsampling is the stage's last layer: what goes into it is the feature
        hooks.append(stage.layers[-1].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])))
    vae.encode_group(x)
    for hook in hooks:
        hook.remove()
    return found


class Skips(nn.Module):
    """The 3D encoder's features for Dec-4 and Dec-3, through 1 x 1 convolutions that start at zero."""

    def __init__(self, vae: CogVideoXVAE):
        super().__init__()
        c = vae.config.block_out_channels
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 1, bias=False) for a, b in zip(c[:2], vae.inject_channels))
        for conv in self.convs:
            nn.init.zeros_(conv.weight)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[Enc-1, Enc-2] of one group -> what is added to Dec-4 and Dec-3, 9 frames each."""
        fine, coarse = features
        # Dec-3 has 9 frames where Enc-2 has 5: the first stays, the others are doubled, as in the decoder's upsampling
        coarse = torch.cat([coarse[:, :, :1], coarse[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return [conv(f) for conv, f in zip(self.convs, (fine, coarse))]


class Add(nn.Module):
    """Takes a fusion block's place in the decoder: h + f."""

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        """h, f [B, C, T, H, W] -> h + f."""
        return h + f.to(h.dtype)


def with_skips(args: argparse.Namespace, seed: int) -> Mirage:
    """Stage H with 3D skips, which no script offers."""
    torch.manual_seed(seed)
    mirage = Mirage.from_base(args.weights / "base", args.weights / "vae_2d")
    mirage.vae.fusion = nn.ModuleList([Add(), Add()])
    mirage.add_lora(TRANSFORMER, 32, 32.0)
    mirage.add_lora(HARMONISATION, 16, 16.0)
    mirage.skips = Skips(mirage.vae)

    def mids(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = encoder_features(mirage.vae, x)
        return mirage.skips([f.detach() for f in features])

    mirage.mids = mids
    params = [*lora.parameters(mirage.dit, TRANSFORMER), *lora.parameters(mirage.vae.decoder, HARMONISATION),
              *mirage.skips.parameters()]
    judge = tables.perceptual_loss(args, gram=0.1, mse=2.0)
    tables.train(params, lambda x_ni, x_gt: judge(mirage(x_ni), x_gt), args, seed, LR, size=(96, 144))
    return mirage


def both(args: argparse.Namespace, seed: int) -> Mirage:
    """Stages A and H."""
    return Mirage.from_pretrained(tables.harmonised(args, seed))


METHODS = {"H": h_alone, "H, 3D skips": with_skips, "A + H": both}


def predict(args: argparse.Namespace, clips: Path, name: str, seed: int, to: Path) -> None:
    """Train by the method of that name, unless it is trained, and write what it makes of the clips into `to`."""
    mirage = METHODS[name](args, seed)
    tables.predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))


# ---- what features hold of other frames ------------------------------------------------------------------------------

def features(mirage: Mirage, x: Tensor) -> dict[str, Tensor]:
    """What is said of frame FRAME of x [1, 3, 9, H, W], each [C, H, W] or at half of that."""
    seen: list[Tensor] = []
    dec_4 = mirage.vae.decoder.up_blocks[-1].layers[0]
    hook = dec_4.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mirage.vae.decode(mirage.vae.encode(x))
    hook.remove()
    fine, coarse = encoder_features(mirage.vae, x)
    found = {"Enc-1": fine[:, :, FRAME], "Enc-2 (t = 4 of 5)": coarse[:, :, (FRAME + 1) // 2],
             "2D encoder": mirage.mids(x)[0][:, :, FRAME], "Dec-4": seen[0][:, :, FRAME]}
    return {name: feature[0].float() for name, feature in found.items()}


@torch.no_grad()
def reactions(mirage: Mirage, x: Tensor) -> dict[str, list[float]]:
    """How far each feature of frame FRAME of x [1, 3, 9, H, W] moves with noise in frame j, relative to j = FRAME."""
    clean, moved = features(mirage, x), {}
    noise = 0.1 * torch.randn(x[:, :, 0].shape, generator=torch.Generator().manual_seed(0))
    for j in range(x.shape[2]):
        disturbed = x.clone()
        disturbed[:, :, j] += noise
        for name, feature in features(mirage, disturbed).items():
            moved.setdefault(name, []).append((feature - clean[name]).norm().item())
    return {name: [value / max(values[FRAME], 1e-12) for value in values] for name, values in moved.items()}


@torch.no_grad()
def draw_figure_6(path: Path, mirage: Mirage, x: Tensor, reaction: dict[str, list[float]]) -> None:
    """Draw two frames of x [1, 3, 9, H, W], channel means of features, and their reactions."""
    clean = features(mirage, x)
    figure = Figure(figsize=(18, 2.6), layout="constrained")
    axes = figure.subplots(1, 6)
    for axis, t in zip(axes, (5, FRAME)):
        tables.draw_frame(axis, (x[0, :, t] + 1) / 2, f"input, frame {t}")
    for axis, name in zip(axes[2:], ("Enc-1", "2D encoder", "Dec-4")):
        axis.imshow(clean[name].mean(0), cmap="viridis")
        axis.set_title(f"{name}, frame {FRAME}", fontsize=8)
        axis.set_axis_off()
    for name, values in reaction.items():
        axes[5].plot(values, marker=".", label=name)
    axes[5].set(xlabel="changed input frame", title=f"reaction of frame {FRAME}, relative")
    axes[5].legend(fontsize=7)
    common.save_figure(path, figure, dpi=80)


def draw_ghosting(path: Path, clips: Path, results: dict[str, Path]) -> None:
    """Draw frame FRAME of the first clip by each method, and its difference to the truth."""
    clip = min(clips.glob("*.safetensors"))
    y = weights.load_tensors(clip)[0]["x_gt"][:, FRAME]
    figure = Figure(figsize=(4 * len(results), 5.5), layout="constrained")
    for (above, below), (name, folder) in zip(figure.subplots(2, len(results), squeeze=False).T, results.items()):
        x = weights.load_tensors(folder / clip.name)[0]["x_dr"][:, FRAME]
        tables.draw_frame(above, x, name)
        below.imshow((x.float() - y.float()).abs().mean(0), cmap="magma", vmin=0, vmax=64)
        below.set_axis_off()
    common.save_figure(path, figure, dpi=80)


def main(args: argparse.Namespace) -> None:
    clips, folder = tables.held_out(args), args.out / "reproduce"
    base = Mirage.from_base(args.weights / "base", args.weights / "vae_2d")
    x = from_bytes(weights.load_tensors(min(clips.glob("*.safetensors")))[0]["x_gt"][None])
    reaction = reactions(base, x)
    draw_figure_6(folder / "mirage_fig6.png", base, x, reaction)
    seeds = []
    for seed in range(1, args.seeds + 1):
        runs = args.runs / "mirage_table4" / f"seed_{seed}"
        results = {name: tables.once(runs / name, tables.scored_on(args), partial(predict, args, clips, name, seed))
                   for name in METHODS}
        seeds.append(tables.evaluate(args, clips, results, runs / "scores"))
    draw_ghosting(folder / "mirage_ghosting.png", clips, results)
    tables.report("mirage_table4", __doc__, args, {tables.FULL: PAPER}, seeds,
                  more={f"reaction of frame {FRAME}": reaction})


def flags() -> argparse.ArgumentParser:
    return tables.flags(__doc__, steps=100)


if __name__ == "__main__":
    common.start(main, flags())
