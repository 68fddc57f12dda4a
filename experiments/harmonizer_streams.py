"""DiffusionHarmonizer in the small: each of its five streams of pairs left out once.

    python -m experiments.harmonizer_streams --perceptual DIR        # about 6 hours

    all         pairs of the five streams, as many of each
    no NAME     the same without one, and so with fewer pairs

Trained from nothing, each for as many steps, on single frames; scored on held-out insertions, which are nearest to the
streams `relighting` and `shadows`. In the paper, FID on drives that it was not trained on rises from 101.27 to 104.63
without the ISP, 102.15 without relighting, 104.28 without shadows, 103.42 without re-insertion, 105.29 without
artifacts: another measure, on another kind of clip.
"""

import argparse
from pathlib import Path

from experiments import common, harmonizers, tables

STREAMS = "isp", "relighting", "shadows", "reinsertion", "artifacts"


def without(pairs: Path, stream: str, to: Path) -> Path:
    """A folder of links to all pairs but those of a stream. ValueError if none or all of them are its own."""
    found = sorted(pairs.glob("*.safetensors"))
    left = [path for path in found if not path.name.startswith(f"{stream}_")]
    if not left or len(left) == len(found):
        raise ValueError(f"{pairs}: wanted pairs of {stream} and of others, found {len(left)} others of {len(found)}")
    to.mkdir(parents=True, exist_ok=True)
    for path in left:
        link = to / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    return to


def main(args: argparse.Namespace) -> None:
    pairs, clips, seeds = harmonizers.pairs(args), tables.held_out(args), []
    data = {"all": pairs} | {f"no {name}": without(pairs, name, args.runs / f"streams_{args.pairs}_no_{name}")
                             for name in STREAMS}
    for seed in range(1, args.seeds + 1):
        folder, models = args.runs / "harmonizer_streams" / f"seed_{seed}", {}
        for name, where in data.items():
            if args.start:
                models[name] = harmonizers.continued(args, seed, where, folder / f"model of {name}", args.start,
                                                     temporal_from=args.steps)
            else:
                models[name] = harmonizers.beginning(args, seed, where, name)
        results = tables.harmonise(clips, folder, models, tables.scored_on(args))
        seeds.append(tables.evaluate(args, clips, results, folder / "scores"))
    tables.report("harmonizer_streams", __doc__, args, {}, seeds)


def flags() -> argparse.ArgumentParser:
    return harmonizers.flags(__doc__, steps=1500)


if __name__ == "__main__":
    common.start(main, flags())
