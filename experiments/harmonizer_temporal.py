"""DiffusionHarmonizer in the small: which keeps a video steady, its past in view or the warp loss?

    python -m experiments.harmonizer_temporal --perceptual DIR       # about 3 hours

    whole             up to four of its outputs in view, and the warp loss on every other batch
    no temporal loss  the same without the warp loss
    no past           every frame by itself (past=0), with the warp loss

All continue the training of one harmonizer that knows single frames. `temporal` is VBench's flicker, as in the paper:
1 − mean |x_t − x_t+1| on [0, 1] over the whole frame, which motion lowers too; the text gives the truth's own.
E*warp takes motion out of it. The paper's numbers are for drives at 1024 x 576 that it was not trained on.
"""

import argparse
from pathlib import Path

from experiments import common, harmonizers, tables
from mirage_min.data.pixels import from_bytes
from mirage_min.networks import weights

METHODS = {"whole": {}, "no temporal loss": {"lambda_warp": 0.0}, "no past": {"past": 0}}
PAPER = {"whole": {"temporal": 0.9827}, "no temporal loss": {"temporal": 0.9806}, "no past": {"temporal": 0.9714}}


def temporal_score(clips: Path, key: str) -> float:
    """Mean of 1 − |x_t − x_t+1| on [0, 1] of the clips in a folder: VBench's temporal flickering."""
    scores = []
    for path in sorted(clips.glob("*.safetensors")):
        x = (from_bytes(weights.load_tensors(path)[0][key]) + 1) / 2
        scores.append(1 - float(x.diff(dim=1).abs().mean()))
    return sum(scores) / len(scores)


def main(args: argparse.Namespace) -> None:
    data, clips, seeds = harmonizers.pairs(args), tables.held_out(args), []
    for seed in range(1, args.seeds + 1):
        start = harmonizers.beginning(args, seed, data)
        folder = args.runs / "harmonizer_temporal" / f"seed_{seed}"
        models = {name: harmonizers.continued(args, seed, data, folder / f"model of {name}", start, **settings)
                  for name, settings in METHODS.items()}
        results = tables.harmonise(clips, folder, models, tables.scored_on(args))
        scores = tables.evaluate(args, clips, results, folder / "scores")
        for name, where in results.items():
            scores["mean"][tables.FULL][name]["temporal"] = temporal_score(where, "x_dr")
        scores["remarks"]["temporal"] = (f"the naive insertion's is {temporal_score(clips, 'x_ni'):.4f}, "
                                         f"the truth's {temporal_score(clips, 'x_gt'):.4f}")
        seeds.append(scores)
    tables.draw_strip(args.out / "reproduce" / "harmonizer_temporal.png", clips, results, (0, 4, 8))
    tables.report("harmonizer_temporal", __doc__, args, {tables.FULL: PAPER}, seeds)


def flags() -> argparse.ArgumentParser:
    return harmonizers.flags(__doc__, steps=1500)


if __name__ == "__main__":
    common.start(main, flags())
