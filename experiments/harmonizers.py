"""What the experiments on DiffusionHarmonizer share: pairs of all five streams, and small harmonizers trained on them.

A harmonizer's training has two parts of --steps steps each after as many on latents: single frames, then batches of
which every other one is temporal. Methods that differ in the second part alone share the first. With --start FOLDER
there is one part only, which continues that harmonizer.
"""

import argparse
from functools import partial
from pathlib import Path

from experiments import tables


def flags(doc: str, steps: int) -> argparse.ArgumentParser:
    """Those of tables.py, the VAE and the number of pairs."""
    parser = tables.flags(doc, steps)
    parser.add_argument("--vae", type=Path, default=Path("weights/vae_wan_48"),
                        help="Wan's (default weights/vae_wan_48)")
    parser.add_argument("--pairs", type=int, default=400, help="pairs of all streams to train on (default 400)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="a harmonizer to continue in place of a new one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="of the recipe small, for every method but where it has a value of its own")
    return parser


def pairs(args: argparse.Namespace) -> Path:
    """Pairs of made-up scenes, the five streams in turn, with exact flow."""
    def make(to: Path) -> None:
        tables.python("-m", "mirage_min.data.streams", "--out", to, "--count", args.pairs, "--workers", 2)
    return tables.once(args.runs / f"streams_{args.pairs}", {"pairs": args.pairs}, make)


def train(args: argparse.Namespace, to: Path, seed: int, data: Path, base: Path | None = None, **settings) -> None:
    """train_online.py, from nothing or continuing `base`, into the folder `to`."""
    settings = {"steps": args.steps, "seed": seed, "latent_until": 0} | settings
    start = ("--base", base) if base else ()
    given = [word for setting in args.set for word in ("--set", setting)]  # before the methods' own, which count
    tables.train_stage("train_online.py", args, to, settings, "--vae", args.vae, "--data", data, *start, *given,
                       "--run-folder", to / "run")


def latents(args: argparse.Namespace) -> dict:
    """The settings of the part that learns from latents."""
    return {"latent_until": args.steps, "latent_clips": min(1_000, 16 * args.steps)}


def beginning(args: argparse.Namespace, seed: int, data: Path, name: str = "all") -> Path:
    """A harmonizer after latents and single frames, or --start. name: of the data, for its folder."""
    if args.start:
        return args.start
    never = 2 * args.steps
    make = partial(train, args, seed=seed, data=data, steps=never, temporal_from=never, **latents(args))
    settings = tables.trained_with(args, pairs=args.pairs, streams=name, given=args.set)
    return tables.once(args.runs / "harmonizer_beginning" / name / f"seed_{seed}", settings, make)


def continued(args: argparse.Namespace, seed: int, data: Path, folder: Path, start: Path | None,
              **settings) -> Path:
    """The second part of the training, which continues `start`, or begins anew; kept in `folder`."""
    settings = {"temporal_from": 0} | settings
    make = partial(train, args, seed=seed, data=data, base=start, **settings)
    kept = tables.trained_with(args, pairs=args.pairs, start=start, given=args.set, **settings)
    return tables.once(folder, kept, make)
