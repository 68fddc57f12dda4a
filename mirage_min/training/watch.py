"""Watching a training run: a log, loss curves, pictures and the scores of held-out pairs, all in the run's folder.

    log.jsonl       a line {"step": ..., "seconds": ..., term: value} for each call
    losses.png      the terms over the steps
    step_N.png      one clip's middle frame after N steps: naive insertion | ours | truth
    settings.json   the recipe

    python -m mirage_min.training.watch
"""

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.pairs import Pairs
from ..data.pixels import to_uint8
from ..method import metrics
from ..networks import weights
from .processes import print_once, rank

Model = Callable[[Tensor, Tensor], Tensor]  # x_ni, x_gt -> what the networks make of them, all [1, 3, T, H, W]
CAPTION = 14                                # rows of pixels above a picture


class Log:
    """What a run leaves for whoever watches it; the first process writes."""

    def __init__(self, folder: Path, recipe, start: int):
        """A run that resumes at step `start` forgets the lines that were written after its checkpoint.

        ValueError if the log of that run cannot be read.
        """
        self.folder, self.file = folder, folder / "log.jsonl"
        self.start = time.time()
        self.lines: list[dict] = []
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a file that was being written when the run was killed
            leftover.unlink(missing_ok=True)
        if self.file.exists():
            self.lines = [line for line in read_lines(self.file) if line["step"] < start]
        with weights.whole_file(self.file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        with weights.whole_file(folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")

    def __call__(self, step: int, terms: dict[str, Tensor | float]) -> dict[str, str]:
        """Write a line -> the terms as text, for the progress bar."""
        line = {"step": step, "seconds": round(time.time() - self.start, 1)} | {k: float(v) for k, v in terms.items()}
        if rank() == 0:
            self.lines.append(line)
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
        return {k: f"{line[k]:.4f}" for k in terms}

    @torch.no_grad()
    def report(self, step: int, model: Model, shown: tuple[Tensor, Tensor], val: Pairs | None = None,
               lpips=None) -> None:
        """A picture of the clip shown = (x_ni, x_gt), the curves, and the scores of the pairs `val`.

        lpips(frames, frames) -> [N] scores them next to PSNR. Every process computes all of it, because a sharded
        transformer runs in all of them or in none.
        """
        x_ni, x_gt = shown
        ours = model(x_ni, x_gt).float()
        if rank() == 0:
            draw_frames(self.folder / f"step_{step + 1}.png", {
                "naive insertion": x_ni, f"after {step + 1} steps": ours, "truth": x_gt})
            draw_curves(self.folder / "losses.png", self.lines)
        if val is not None:
            print_once(self(step, score(model, val, lpips, ours.device)))


def read_lines(file: Path) -> list[dict]:
    """The lines of a log; half a line at the end, of a run that was killed, is left out. ValueError names the file."""
    lines = []
    for number, text in enumerate(file.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            lines.append({"step": int(line["step"])} | {key: float(value) for key, value in line.items()
                                                        if key != "step"})
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f'{file}, line {number}: wanted {{"step": ..., term: value}}, got {text[:60]!r}'
                             ) from error
    return lines


def score(model: Model, val: Pairs, lpips, device: torch.device) -> dict[str, float]:
    """Mean PSNR and LPIPS of the model's results on held-out pairs: {"val_psnr": ..., "val_lpips": ...}.

    Where pairs have boxes, "val_psnr_actor" and "val_lpips_actor" are those of the crops of their actors.
    """
    scores = defaultdict(list)
    for i in range(len(val)):
        try:
            x_ni, x_gt = (x[None].to(device) for x in val.read(i, lambda n: 0))
            crops = val.crops(i)
        except ValueError as error:  # what only shows when it is read: the run continues without it
            print_once("left out:", error)
            continue
        x = model(x_ni, x_gt).float()
        views = {"": (x, x_gt)}
        if crops:
            views["_actor"] = metrics.cropped(x, crops), metrics.cropped(x_gt, crops)
        for view, (ours, truth) in views.items():
            scores[f"val_psnr{view}"].append(metrics.psnr(ours, truth).item())
            scores[f"val_lpips{view}"].append(metrics.lpips(ours, truth, lpips).item())
    return {name: sum(values) / len(values) for name, values in scores.items()}


def draw_frames(path: Path, videos: dict[str, Tensor]) -> None:
    """The middle frames of videos [1, 3, T, H, W] in [-1, 1], next to each other under their captions."""
    T, H, W = next(iter(videos.values())).shape[2:]
    sheet = Image.new("RGB", (len(videos) * W, CAPTION + H), "white")
    for k, (caption, x) in enumerate(videos.items()):
        title = Image.new("RGB", (W, CAPTION), "white")  # one for each, so that a long one ends with its frame
        ImageDraw.Draw(title).text((2, 1), caption, fill="black")
        sheet.paste(title, (k * W, 0))
        sheet.paste(Image.fromarray(to_uint8(x[0, :, T // 2])), (k * W, CAPTION))
    with weights.whole_file(path) as temporary:
        sheet.save(temporary, "png")


def draw_curves(path: Path, lines: list[dict]) -> None:
    """Write a PNG of every term over the steps, on a logarithmic axis; values of 0 or less are left out."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for term in sorted({key for line in lines for key in line} - {"step", "seconds"}):
        points = [(line["step"], line[term]) for line in lines if line.get(term, 0) > 0]
        if points:
            axes.plot(*zip(*points), label=term)
    axes.set(xlabel="step", yscale="log")
    if axes.lines:  # none before the first line of the log
        axes.legend()
    with weights.whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


if __name__ == "__main__":
    from dataclasses import make_dataclass

    from ..data.toy_world import WorldConfig, make_clip

    clip = make_clip(0, WorldConfig(frames=1))
    shown = clip.x_ni[None], clip.x_gt[None]
    log = Log(Path("watch"), make_dataclass("Recipe", [("steps", int, 100)])(), start=0)
    for step in range(100):  # no training: terms that fall, and a picture that comes nearer
        log(step, {"lpips": 0.3 / (1 + step) + 0.02, "mse": 0.1 * 0.95**step})
    log.report(step, lambda x_ni, x_gt: x_ni.lerp(x_gt, 0.7), shown)
    print("written:", *sorted(str(path) for path in log.folder.iterdir()))
