"""What the papers' tables share: clips, a training loop for what no script trains, scores, and the tables themselves.

The experiments that use it need trained bases in weights/ and toy clips in --data (python -m mirage_min.data.toy_world
--out data/toy --clips 1600). Steps, seeds and clips are flags: `--steps 2 --seeds 1 --clips 2` shows in a minute or two
that an experiment runs. Whatever is finished, a trained model or its scores, is kept under --runs and not made again
unless a setting changes; a run that was killed continues with the first thing that is not finished (what the training
scripts train, from their checkpoint). The result goes to --out: reproduce/NAME.json with every number, and NAME.md.

Seeds change what is drawn: adapters' first values, clips, crops. The bases are the same for all of them, and so is the
Mirage that several experiments score: it is trained once a seed. The minutes that each part took are in its made.json.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as nnf
from tqdm import tqdm

from experiments import common
from mirage_min.data import desk
from mirage_min.data.pairs import Pairs
from mirage_min.data.pixels import from_bytes, to_bytes
from mirage_min.method.perceptual import Lpips, gram_loss
from mirage_min.networks import weights
from mirage_min.networks.imagenet import Features
from mirage_min.systems.load import system_in
from mirage_min.systems.r3d2 import R3D2
from mirage_min.training import run

BETTER = {"PSNR": max, "SSIM": max, "LPIPS": min, "DISTS": min, "E*warp": min, "vFID": min, "temporal": max}
CROPS, FULL = "actor-centric crops", "full frame"  # as evaluate.py calls them


def flags(doc: str, steps: int) -> argparse.ArgumentParser:
    """The flags of an experiment that trains the methods of a table; steps: of one stage of one method."""
    parser = common.flags(doc)
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of each stage (default {steps})")
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is trained (default 3)")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips that are scored (default 32)")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="toy clips to train on (default data/toy)")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="the bases (default weights)")
    parser.add_argument("--perceptual", type=Path, required=True, help="backbones of LPIPS and Gram")
    parser.add_argument("--vfid", type=Path, help="feature network of vFID (evaluate.py says which); none: no vFID")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/work"), help="models and scores on the way")
    return parser


def with_settings(args: argparse.Namespace, **changed) -> argparse.Namespace:
    """The same flags with some of them changed."""
    return argparse.Namespace(**vars(args) | changed)


# ---- what is made once -----------------------------------------------------------------------------------------------

def once(folder: Path, settings: dict, make: Callable[[Path], None]) -> Path:
    """make(folder), unless it was made before with these settings; what was made with others is thrown away."""
    mark, settings = folder / "made.json", json.loads(json.dumps(settings, default=str))
    if not (mark.exists() and json.loads(mark.read_text())["settings"] == settings):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(json.dumps({"settings": settings}) + "\n")
    if "minutes" not in json.loads(mark.read_text()):
        start = time.time()
        make(folder)
        minutes = round((time.time() - start) / 60, 2)
        mark.write_text(json.dumps({"settings": settings, "minutes": minutes}, indent=2) + "\n")
    return folder


def trained_with(args: argparse.Namespace, **more) -> dict:
    """What a trained model depends on."""
    return {key: getattr(args, key) for key in ("steps", "data", "weights")} | more


def scored_on(args: argparse.Namespace, **more) -> dict:
    """What a model's predictions depend on."""
    return trained_with(args, clips=args.clips, **more)


def python(*argv, accepted: tuple[int, ...] = (0,)) -> None:
    """Run one of the project's own scripts; if it fails, so does this one, with its status."""
    print("$ python", *argv, flush=True)
    status = subprocess.run([sys.executable, *map(str, argv)]).returncode
    if status not in accepted:
        sys.exit(status)


def held_out(args: argparse.Namespace, frames: int = 9, size: str = "96x144") -> Path:
    """Toy clips that no training saw (seeds from 1,000,000), with boxes and exact flow."""
    def make(to: Path) -> None:
        python("-m", "mirage_min.data.toy_world", "--out", to, "--first-seed", 1_000_000, "--clips", args.clips,
               "--frames", frames, "--size", size, "--extras")
    folder = args.runs / f"held_out_{frames}x{size}_{args.clips}"
    return once(folder, {"clips": args.clips, "frames": frames, "size": size}, make)


def train_stage(script: str, args: argparse.Namespace, to: Path, settings: dict, *flags) -> None:
    """One of the training scripts, with settings of its recipe `small`, into the folder `to`."""
    changed = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    python(script, *flags, "--perceptual", args.perceptual, "--out", to, "--device", "cpu", *changed)


def stage_a(args: argparse.Namespace, to: Path, seed: int, **settings) -> None:
    """train_vae.py from the bases."""
    settings = {"steps": args.steps, "seed": seed, "real": 0} | settings
    train_stage("train_vae.py", args, to, settings, "--data", args.data, "--base", args.weights / "base",
                "--vae2d", args.weights / "vae_2d", "--run-folder", to / "run_a")


def stage_h(args: argparse.Namespace, start: Path, to: Path, seed: int, data: Path | None = None, **settings) -> None:
    """train_harmonize.py from the folder `start`, with the Gram loss from the first step, as in `train`; where `start`
    has a stage H, its training continues."""
    settings = {"steps": args.steps, "seed": seed, "real": 0, "gram_from": 0} | settings
    train_stage("train_harmonize.py", args, to, settings, "--data", data or args.data, "--mirage", start,
                "--run-folder", to / "run_h")


def reconstruction(args: argparse.Namespace, seed: int) -> Path:
    """Stage A on toy clips, trained once for all experiments."""
    return once(args.runs / "stage_a" / f"seed_{seed}", trained_with(args), lambda to: stage_a(args, to, seed))


def harmonised(args: argparse.Namespace, seed: int) -> Path:
    """Stages A and H on toy clips: the Mirage of all experiments."""
    start = reconstruction(args, seed)
    return once(args.runs / "mirage" / f"seed_{seed}", trained_with(args), lambda to: stage_h(args, start, to, seed))


def r3d2_base(args: argparse.Namespace) -> Path:
    """The small UNet after train_base.py one_step_2d, as the transformer of Mirage's base has had one_step: trained
    once for all experiments and seeds, 20 times the steps of a stage."""
    def make(to: Path) -> None:
        shutil.copytree(args.weights / "vae_2d", to / "vae_2d", dirs_exist_ok=True)  # of a run that was killed
        bf16 = "yes" if desk.bfloat16_is_faster("cpu") else "no"
        python("train_base.py", "one_step_2d", "--data", args.data, "--runs", to / "runs", "--out", to,
               "--device", "cpu", "--set", f"steps={20 * args.steps}", "--set", f"bf16={bf16}")
    return once(args.runs / "r3d2_base", trained_with(args), make) / "base_2d"


def train_r3d2(args: argparse.Namespace, to: Path, seed: int, data: Path | None = None, **settings) -> None:
    """train_r3d2.py from that UNet: as many steps as Mirage's two stages have together, on as many frames each."""
    settings = {"steps": 2 * args.steps, "batch": 2, "frames": 9, "seed": seed, "real": 0, "gram_from": 0} | settings
    train_stage("train_r3d2.py", args, to, settings, "--data", data or args.data, "--base", r3d2_base(args), "--vae",
                args.weights / "vae_2d", "--run-folder", to / "run")


def read_r3d2(model: Path) -> R3D2:
    """A trained R3D2, which was written as float16, in float32."""
    return R3D2.from_pretrained(model, dtype=torch.float32)


# ---- training --------------------------------------------------------------------------------------------------------

def frames_of(x: Tensor) -> Tensor:
    """A video [B, C, T, H, W] -> its frames [B T, C, H, W]."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def framewise(function: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """A function of frames [N, 3, H, W], on videos [B, 3, T, H, W]."""
    frames = function(*(frames_of(x) for x in videos))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=videos[0].shape[0])


def perceptual_loss(args: argparse.Namespace, gram: float = 0.0, mse: float = 0.0) -> Callable:
    """(x, y) [B, 3, T, H, W] -> L_lpips + gram · L_gram + mse · L_mse, on SqueezeNet and what VGG there is."""
    lpips = Lpips(Features("squeeze", args.perceptual))
    texture = Features("vgg", args.perceptual) if gram else None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = frames_of(x.float()), frames_of(y.float())
        total = lpips(x, y).mean() + mse * nnf.mse_loss(x, y)
        if gram:
            with torch.no_grad():
                taps = texture(y)
            total = total + gram * gram_loss(texture(x), taps).mean()
        return total
    return loss


def train(params: Iterable[nn.Parameter], loss: Callable[[Tensor, Tensor], Tensor], args: argparse.Namespace, seed: int,
          lr: float, size: tuple[int, int] | None = (96, 96), batch: int = 2) -> None:
    """args.steps of AdamW on loss(x_ni, x_gt) [], scheduled, drawn and clipped as in the training scripts.

    The clips are [batch, 3, 9, h, w] in [-1, 1], of this size; None: whole frames.
    """
    data = Pairs(args.data, 9, size)
    params = [p.requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr)
    bar = tqdm(range(args.steps), unit="step", disable=None)
    for step in bar:
        x_ni, x_gt, _ = data.batch([run.draws(seed, step, k) for k in range(batch)])
        with torch.autocast("cpu", torch.bfloat16, enabled=not desk.bfloat16_spoils_conv3d("cpu")):
            value = loss(x_ni, x_gt)
        for group in optimizer.param_groups:
            group["lr"] = lr * run.schedule(step, 50, args.steps, cosine=True)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value.item():.4f}")


# ---- scores ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(clips: Path, to: Path, model: Callable[[Tensor, Tensor], Tensor]) -> None:
    """model(x_ni, x_gt) [1, 3, T, H, W] of every clip, as x_dr for evaluate.py."""
    for path in sorted(clips.glob("*.safetensors")):
        tensors = weights.load_tensors(path)[0]
        x_ni, x_gt = (from_bytes(tensors[key][None]) for key in ("x_ni", "x_gt"))
        weights.save_tensors(to / path.name, {"x_dr": to_bytes(model(x_ni, x_gt)[0]).contiguous()})


def harmonise(clips: Path, folder: Path, models: dict[str, Path], settings: dict, read: Callable | None = None
              ) -> dict[str, Path]:
    """What each trained system makes of the clips, kept under `folder` -> {method: where}. read: that loads one from
    its folder; None: as what the folder holds."""
    return {name: once(folder / name, settings, partial(harmonise_with, model, read, clips))
            for name, model in models.items()}


def harmonise_with(model: Path, read: Callable | None, clips: Path, to: Path) -> None:
    """What the system in the folder `model` makes of the clips."""
    read = read or system_in(model).from_pretrained
    system = read(model)
    predict(clips, to, lambda x_ni, x_gt: system(x_ni))


def evaluate(args: argparse.Namespace, clips: Path, results: dict[str, Path], to: Path, exact: bool = True) -> dict:
    """evaluate.py on several methods -> its scores.json; exact: the clips hold the flow."""
    pred = [flag for name, folder in results.items() for flag in ("--pred", f"{name}={folder}")]
    more = ["--vfid", args.vfid] * bool(args.vfid) + ["--flow", clips] * exact
    python("evaluate.py", *pred, "--ni", clips, "--gt", clips, "--boxes", clips, "--perceptual", args.perceptual, *more,
           "--out", to)
    return json.loads((to / "scores.json").read_text())


def agreement(paper: dict[str, float], ours: dict[str, float | None], better: Callable) -> str:
    """"5 of 6": how many pairs of methods are in the paper's order; better: max or min."""
    names = [name for name in paper if ours.get(name) is not None]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if paper[a] != paper[b]]
    same = sum((better(paper[a], paper[b]) == paper[a]) == (better(ours[a], ours[b]) == ours[a]) for a, b in pairs)
    return f"{same} of {len(pairs)}" if pairs else "–"


# ---- results ---------------------------------------------------------------------------------------------------------

def draw_strip(path: Path, clips: Path, results: dict[str, Path], frames: tuple[int, ...]) -> None:
    """Draw these frames of the first clip: naive insertion, each method, truth."""
    name = min(clips.glob("*.safetensors")).name
    truth = weights.load_tensors(clips / name)[0]
    columns = {"naive insertion": truth["x_ni"]}
    columns |= {method: weights.load_tensors(folder / name)[0]["x_dr"] for method, folder in results.items()}
    columns["ground truth"] = truth["x_gt"]
    H, W = truth["x_gt"].shape[-2:]
    figure = Figure(figsize=(3 * len(columns), 3 * len(frames) * H / W + 0.3), layout="constrained")
    for row, t in zip(figure.subplots(len(frames), len(columns), squeeze=False), frames):
        for axis, (method, x) in zip(row, columns.items()):
            draw_frame(axis, x[:, t], f"{method}, frame {t}")
    common.save_figure(path, figure, dpi=80)


def draw_frame(axis, frame: Tensor, title: str) -> None:
    """Draw a frame [3, H, W], uint8 or in [0, 1], under a title."""
    axis.imshow(rearrange(frame, "c h w -> h w c"))
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def cell(values: list, known: float | None) -> str:
    """"22.71 ± 0.17 (17.43)": the mean over seeds, their deviation unless all are equal, and the paper's number."""
    values = [float(value) for value in values if value is not None]
    if not values:
        return "–"
    spread = statistics.stdev(values) if len(set(values)) > 1 and max(values) < math.inf else 0
    text = f"{statistics.mean(values):.3f}" + (f" ± {spread:.3f}" if spread else "")
    return f"{text} ({known})" if known else text


def region_table(region: str, paper: dict[str, dict[str, float]], rows: list[dict]) -> str:
    """Scores of a region, method by method, with the paper's, and how far the order of methods agrees.

    paper: {method: {metric: value}}; rows: of each seed {method: {metric: value or None}}.
    """
    metrics = [m for m in BETTER if any(row.get(m) is not None for row in rows[0].values())]
    title = f"{region}: ours (paper)" if paper else region
    cells = []
    for method in rows[0]:
        known = paper.get(method, {})
        cells.append([method, *(cell([row[method].get(m) for row in rows], known.get(m)) for m in metrics)])
    lines = [common.table([title, *metrics], cells), ""]
    for metric in metrics if paper else ():
        known = {method: row[metric] for method, row in paper.items() if metric in row}
        if not known:
            continue
        agreed = [agreement(known, {m: row[m].get(metric) for m in known}, BETTER[metric]) for row in rows]
        lines.append(f"* {metric}: pairs of methods in the paper's order, seed by seed: {', '.join(agreed)}")
    return "\n".join(lines)


def report(name: str, doc: str, args: argparse.Namespace, paper: dict, seeds: list[dict], *, more: dict | None = None
           ) -> None:
    """Write NAME.json and NAME.md: ours and the paper's numbers, mean ± deviation over seeds, and the order of methods.

    paper: {region: {method: {metric: value}}}; seeds: scores.json of each seed; more: anything else to keep.
    """
    numbers = {key: getattr(args, key) for key in ("steps", "seeds", "clips", "pairs") if hasattr(args, key)}
    command = " ".join([f"python -m experiments.{name}", *(f"--{key} {value}" for key, value in numbers.items())])
    if getattr(args, "start", None):
        command += " --start DIR"
    command += "".join(f" --set {setting}" for setting in getattr(args, "set", ()))
    parts = [f"# {(doc or name).partition(chr(10))[0]}", f"`{command} --perceptual DIR`"]
    parts += [region_table(region, paper.get(region, {}), [seed["mean"][region] for seed in seeds])
              for region in (CROPS, FULL)]
    parts.append("\n".join(f"* {subject}: {remark}" for subject, remark in seeds[0]["remarks"].items()))
    text = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    common.save_json(args.out / "reproduce" / f"{name}.json",
                     {"command": command, "paper": paper, "seeds": seeds} | (more or {}))
    common.save_text(args.out / "reproduce" / f"{name}.md", text)
    print(text)
