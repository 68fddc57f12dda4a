"""What the experiments on restorers share: what they are scored on, and small restorers trained by train_restore.py.

The training has two parts of --steps steps each. The first learns from latents that were encoded once, and starts from
nothing: it takes the place of the paper's pretrained base, and all methods of a seed share it. The second is what a
table compares: latents on, or through pixels in one of several ways. With --start FOLDER there is the second part
alone, which continues that restorer with every seed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from experiments import tables
from mirage_min.data.degradations import central_mask, low_resolution
from mirage_min.data.masks import hide
from mirage_min.data.pixels import from_bytes, to_bytes
from mirage_min.networks import weights
from mirage_min.systems.restore import Restorer

INPUT = "input"  # the degraded videos' row; evaluate.py calls it the naive insertion
SCALE = 4
LR = 3e-4        # of the second part


def flags(doc: str, steps: int, start: bool = True) -> argparse.ArgumentParser:
    """Those of tables.py, the VAE and, if `start`, a restorer to continue."""
    parser = tables.flags(doc, steps)
    parser.set_defaults(start=None)
    parser.add_argument("--vae", type=Path, default=Path("weights/vae_wan_48"),
                        help="Wan's (default weights/vae_wan_48)")
    if start:
        parser.add_argument("--start", type=Path, metavar="DIR", help="a restorer to continue in place of a new one")
    return parser


# ---- what is scored: held-out clips whose x_ni is degraded -----------------------------------------------------------

def held_out(args: argparse.Namespace, name: str, degrade: Callable[[Tensor, torch.Generator], Tensor]) -> Path:
    """tables.held_out with degrade(x_gt, draws) in place of the naive insertions, both [3, T, H, W] in [-1, 1]."""
    clips = tables.held_out(args)

    def make(to: Path) -> None:
        for seed, path in enumerate(sorted(clips.glob("*.safetensors"))):
            tensors, about = weights.load_tensors(path)
            x = degrade(from_bytes(tensors["x_gt"]), torch.Generator().manual_seed(seed))
            weights.save_tensors(to / path.name, tensors | {"x_ni": to_bytes(x).contiguous()}, about)
    return tables.once(args.runs / f"{clips.name}_{name}", {"clips": args.clips}, make)


def enlarged(x_gt: Tensor, draws: torch.Generator) -> Tensor:
    """A fourth of the size, degraded as in training, and bilinear again."""
    small = low_resolution(x_gt, SCALE, draws).transpose(0, 1)
    return nnf.interpolate(small, x_gt.shape[-2:], mode="bilinear").transpose(0, 1)


def with_hole(x_gt: Tensor, draws: torch.Generator) -> Tensor:
    """Grey in the middle."""
    return hide(x_gt, central_mask(*x_gt.shape[-2:]))


def score(args: argparse.Namespace, clips: Path, results: dict[str, Path], to: Path) -> dict:
    """tables.evaluate, in which the first row is called what it is."""
    scores = tables.evaluate(args, clips, results, to)
    for region, rows in scores["mean"].items():
        scores["mean"][region] = {INPUT if name == "naive insertion" else name: row for name, row in rows.items()}
    return scores


# ---- training --------------------------------------------------------------------------------------------------------

def train(args: argparse.Namespace, to: Path, seed: int, flags: tuple, **settings) -> None:
    """train_restore.py, into the folder `to`, whose weights are float32. flags: --recipe, --data and perhaps --base."""
    settings = {"steps": args.steps, "seed": seed, "latent_until": 0, "real": 0, "half": "no"} | settings
    tables.train_stage("train_restore.py", args, to, settings, *flags, "--vae", args.vae, "--run-folder", to / "run")


def latent_clips(args: argparse.Namespace) -> int:
    """How many clips the first part encodes."""
    return min(600, 8 * args.steps)


def beginning(args: argparse.Namespace, seed: int, name: str, *flags, **settings) -> Path:
    """The first part, kept under `name`: a restorer that learned from latents alone; or --start."""
    if args.start:
        return args.start
    settings = {"latent_until": args.steps, "latent_clips": latent_clips(args)} | settings

    def make(to: Path) -> None:
        train(args, to, seed, flags, **settings)
    kept = tables.trained_with(args, vae=args.vae, flags=flags, **settings)
    return tables.once(args.runs / "restorer_beginning" / name / f"seed_{seed}", kept, make)


def continued(args: argparse.Namespace, seed: int, folder: Path, start: Path, *flags, **settings) -> Path:
    """The second part, from `start`; kept in `folder`."""
    settings = {"lr": LR} | settings

    def make(to: Path) -> None:
        train(args, to, seed, (*flags, "--base", start), **settings)
    return tables.once(folder, tables.trained_with(args, vae=args.vae, flags=flags, start=start, **settings), make)


def read(folder: Path) -> Callable[[Tensor], Tensor]:
    """A trained restorer as a function of videos [1, 3, T, H, W] that are degraded and as large as the truth."""
    restorer = Restorer.from_pretrained(folder, dtype=torch.float32)

    def restore(x_in: Tensor) -> Tensor:
        if restorer.masked:
            return restorer(x_in, central_mask(*x_in.shape[-2:])[None, :, None])
        return restorer.restore(x_in)
    return restore
