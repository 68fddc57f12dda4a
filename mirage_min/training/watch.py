"""Watching a training run: a log, loss curves, pictures and the scores of held-out pairs, all in the run's folder.

    python -m mirage_min.training.watch
"""

import dataclasses
import json
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..data.video import to_uint8
from ..method import metrics
from ..networks import weights
from . import run


class Log:
    """What a run leaves for whoever watches it; the first process writes.

    log.jsonl       a line {"step": ..., "seconds": ..., term: value} for each call
    losses.png      the terms over the steps
    step_N.png      one clip's middle frame after N steps: naive insertion | now | truth
    """

    def __init__(self, folder: Path, recipe, start: int):
        """A run that goes on from step `start` forgets the lines that were written after its checkpoint."""
        self.folder, self.file, self.start, self.lines = folder, folder / "log.jsonl", time.time(), []
        if run.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):  # of a file that was being written when the run was killed
                leftover.unlink()
            if self.file.exists():
                whole = [line for line in self.file.read_text().splitlines() if line.endswith("}")]
                self.lines = [line for line in map(json.loads, whole) if line["step"] < start]
            with weights.whole_file(self.file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            with weights.whole_file(folder / "settings.json") as temporary:
                temporary.write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")

    def __call__(self, step: int, terms: dict[str, Tensor | float]) -> dict[str, str]:
        """Writes a line; returns it for the progress bar."""
        line = {"step": step, "seconds": round(time.time() - self.start, 1)} | {k: float(v) for k, v in terms.items()}
        if run.rank() == 0:
            self.lines.append(line)
            with open(self.file, "a") as f:
                f.write(json.dumps(line) + "\n")
        return {k: f"{line[k]:.4f}" for k in terms}

    @torch.no_grad()
    def look(self, step: int, now, shown: tuple[Tensor, Tensor], val=None, lpips=None) -> None:
        """Pictures, and scores of the pairs `val`; now(x_ni, x_gt) -> what the model makes of them [1, 3, T, H, W].

        Scored are whole frames and, where a pair has boxes, the crop of its actor. Every process does all of it: a
        sharded transformer runs in all of them or in none.
        """
        x = now(*shown).float()
        if run.rank() == 0:
            strip = torch.cat([shown[0], x, shown[1]], dim=4)[0, :, x.shape[2] // 2]
            with weights.whole_file(self.folder / f"step_{step + 1}.png") as temporary:
                Image.fromarray(to_uint8(strip)).save(temporary, "png")
            figure = Figure(figsize=(8, 4), layout="constrained")
            axes = figure.subplots()
            for term in sorted({k for line in self.lines for k in line} - {"step", "seconds"}):
                points = [(line["step"], line[term]) for line in self.lines if line.get(term, 0) > 0]
                if points:
                    axes.plot(*zip(*points), label=term)
            axes.set(xlabel="step", yscale="log")
            if axes.lines:  # none before the first line of the log
                axes.legend()
            with weights.whole_file(self.folder / "losses.png") as temporary:
                figure.savefig(temporary, format="png", dpi=100)
        if val is not None:
            scores: dict[str, list[float]] = {}
            for i in range(len(val)):
                try:
                    x_ni, y = (v[None].to(x.device) for v in val.read(i, lambda n: 0))
                except ValueError as error:  # what only shows when it is read: the run goes on without it
                    run.say("left out:", error)
                    continue
                x_i, crops = now(x_ni, y).float(), val.crops(i)
                views = {"": (x_i, y)}
                if crops:
                    views["_actor"] = metrics.cropped(x_i, crops), metrics.cropped(y, crops)
                for part, (a, b) in views.items():
                    scores.setdefault(f"val_psnr{part}", []).append(metrics.psnr(a, b).item())
                    scores.setdefault(f"val_lpips{part}", []).append(metrics.lpips(a, b, lpips).item())
            run.say(self(step, {k: sum(v) / len(v) for k, v in scores.items()}))


if __name__ == "__main__":
    from dataclasses import make_dataclass

    from ..data.toy_world import WorldConfig, make_clip

    clip = make_clip(0, WorldConfig(frames=1))
    shown = clip.x_ni[None], clip.x_gt[None]
    log = Log(Path("watch"), make_dataclass("Recipe", [("steps", int, 100)])(), start=0)
    for step in range(100):  # no training: terms that fall, and a picture that comes nearer
        log(step, {"lpips": 0.3 / (1 + step) + 0.02, "mse": 0.1 * 0.95**step})
    log.look(step, lambda x_ni, x_gt: x_ni.lerp(x_gt, 0.7), shown)
    print("written:", *sorted(str(path) for path in log.folder.iterdir()))
