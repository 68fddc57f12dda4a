"""What the reproductions share: clips, a training loop for what the package's own scripts do not train, scores, tables.

Every script is run from the repository's root as `python -m experiments.NAME`. It needs trained bases in weights/ and
toy clips in --data (python -m mirage_min.data.toy_world --out data/toy --clips 1600). Steps, seeds and clips are flags:
`--steps 2 --seeds 1 --clips 2` shows in a minute or two that it runs. Whatever is finished, a trained model or its
scores, is kept under --runs and not made again, unless a setting changed; a run that was killed goes on with the first
thing that is not finished (what the training scripts train, from their checkpoint). The result goes to --out: NAME.json
with every number, and NAME.md.

Seeds change what is drawn: adapters' first values, clips, crops. The bases are the same for all of them, and so is the
Mirage that several scripts score: it is trained once a seed. The minutes that each part took are in its made.json.
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
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from mirage_min.data.pairs import Pairs
from mirage_min.data.video import from_bytes, to_bytes
from mirage_min.method.perceptual import Features, Lpips, gram_loss
from mirage_min.networks import weights
from mirage_min.networks.vae_2d import AutoencoderKL
from mirage_min.systems.mirage import Mirage
from mirage_min.training import run

BETTER = {"PSNR": max, "SSIM": max, "LPIPS": min, "DISTS": min, "E*warp": min, "vFID": min}
REGIONS = ("actor-centric crops", "full frame")


def arguments(doc: str, steps: int) -> argparse.Namespace:
    """The flags that all reproductions have; steps: of one stage of one method."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of each stage (default {steps})")
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is trained (default 3)")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips that are scored (default 32)")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="toy clips to train on (default data/toy)")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="the bases (default weights)")
    parser.add_argument("--perceptual", type=Path, required=True, help="backbones of LPIPS and Gram")
    parser.add_argument("--vfid", type=Path, help="feature network of vFID (evaluate.py says which); none: no vFID")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="models and scores on the way")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduce"), help="where the result goes")
    return parser.parse_args()


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


def trained_with(args, **more) -> dict:
    """What a trained model depends on."""
    return {key: getattr(args, key) for key in ("steps", "data", "weights")} | more


def scored_on(args, **more) -> dict:
    """What a model's predictions depend on."""
    return trained_with(args, clips=args.clips, **more)


def python(*argv, accepted: tuple[int, ...] = (0,)) -> None:
    """Run one of the project's own scripts; its mistake ends this one, too."""
    print("$ python", *argv, flush=True)
    status = subprocess.run([sys.executable, *map(str, argv)]).returncode
    if status not in accepted:
        sys.exit(status)


def held_out(args, frames: int = 9, size: str = "96x144") -> Path:
    """Toy clips that no training saw (seeds from 1,000,000), with boxes and exact flow."""
    folder = args.runs / f"held_out_{frames}x{size}_{args.clips}"
    settings = {"clips": args.clips, "frames": frames, "size": size}
    return once(folder, settings, lambda to: python(
        "-m", "mirage_min.data.toy_world", "--out", to, "--first-seed", 1_000_000, "--clips", args.clips,
        "--frames", frames, "--size", size, "--extras"))


def stage_a(args, to: Path, seed: int, **settings) -> None:
    """train_vae.py from the bases; settings of its recipe `small`."""
    settings = {"steps": args.steps, "seed": seed, "real": 0} | settings
    python("train_vae.py", "--data", args.data, "--base", args.weights / "base", "--vae2d", args.weights / "vae_2d",
           "--perceptual", args.perceptual, "--out", to, "--run", to / "run_a", "--device", "cpu",
           *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")))


def stage_h(args, start: Path, to: Path, seed: int, data: Path | None = None, **settings) -> None:
    """train_harmonize.py from the folder `start`, with the Gram loss from the first step, as in `train`; where `start`
    has a stage H, that one goes on."""
    settings = {"steps": args.steps, "seed": seed, "real": 0, "gram_from": 0} | settings
    python("train_harmonize.py", "--data", data or args.data, "--mirage", start, "--perceptual", args.perceptual,
           "--out", to, "--run", to / "run_h", "--device", "cpu",
           *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")))


def reconstruction(args, seed: int) -> Path:
    """Stage A on toy clips, trained once for all scripts."""
    return once(args.runs / "stage_a" / f"seed_{seed}", trained_with(args), lambda to: stage_a(args, to, seed))


def harmonised(args, seed: int) -> Path:
    """Stages A and H on toy clips: the Mirage of all scripts."""
    start = reconstruction(args, seed)
    return once(args.runs / "mirage" / f"seed_{seed}", trained_with(args), lambda to: stage_h(args, start, to, seed))


# ---- training --------------------------------------------------------------------------------------------------------

def perceptual_loss(args, gram: float = 0.0, mse: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """L_lpips + gram · L_gram + mse · L_mse of two videos [B, 3, T, H, W], on SqueezeNet and on what VGG there is."""
    lpips = Lpips(Features("squeeze", args.perceptual))
    texture = Features("vgg", args.perceptual) if gram else None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        frames = [rearrange(v.float(), "b c t h w -> (b t) c h w") for v in (x, y)]
        total = lpips(*frames).mean() + mse * F.mse_loss(*frames)
        if gram:
            with torch.no_grad():
                taps = texture(frames[1])
            total = total + gram * gram_loss(texture(frames[0]), taps).mean()
        return total
    return loss


def train(params: Iterable[nn.Parameter], loss: Callable[[Tensor, Tensor], Tensor], args, seed: int, lr: float,
          size: tuple[int, int] | None = (96, 96), batch: int = 2) -> None:
    """args.steps of AdamW on loss(x_ni, x_gt), scheduled, drawn and clipped as in the training scripts."""
    data, params = Pairs(args.data, 9, size), [p.requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr)
    for step in (bar := tqdm(range(args.steps), unit="step")):
        x_ni, x_gt, _ = data.batch([run.draws(seed, step, k) for k in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(x_ni, x_gt)
        for group in optimizer.param_groups:
            group["lr"] = lr * run.schedule(step, 50, args.steps, cosine=True)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{value.item():.4f}")


class SkipVAE(nn.Module):
    """AutoencoderKL whose decoder also sees the encoder's features: R3D2's and img2img-turbo's skip connections.

    Three levels, each before its downsampling, through 1 x 1 convolutions that start at zero, are added after the
    decoder's upsampling to the same size (R3D2 A.1).
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        c = vae.config.block_out_channels
        self.vae, self.skips = vae, nn.ModuleList(nn.Conv2d(c[i], c[i + 1], 1, bias=False) for i in range(len(c) - 1))
        for skip in self.skips:
            nn.init.zeros_(skip.weight)

    def decode(self, z: Tensor, mids: list[Tensor]) -> Tensor:
        """z [N, 4, h, w], mids finest first -> frames [N, 3, H, W]"""
        decoder, z = self.vae.decoder, z / self.vae.config.scaling_factor
        z = z if self.vae.post_quant_conv is None else self.vae.post_quant_conv(z)
        h, last = decoder.mid_block(decoder.conv_in(z)), len(self.skips) - 1
        for i, stage in enumerate(decoder.up_blocks):
            h = stage(h)
            if i <= last:
                h = h + self.skips[last - i](mids[last - i])
        return decoder.conv_out(F.silu(decoder.conv_norm_out(h)))


def framewise(function: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """A function of frames [N, 3, H, W], on videos [B, 3, T, H, W]."""
    B = videos[0].shape[0]
    frames = [rearrange(x, "b c t h w -> (b t) c h w") for x in videos]
    return rearrange(function(*frames), "(b t) c h w -> b c t h w", b=B)


# ---- scores and tables -----------------------------------------------------------------------------------------------

@torch.no_grad()
def predict(clips: Path, to: Path, model: Callable[[Tensor, Tensor], Tensor]) -> None:
    """model(x_ni, x_gt) [1, 3, T, H, W] of every clip, as x_dr for evaluate.py."""
    for path in sorted(clips.glob("*.safetensors")):
        tensors = weights.load_tensors(path)[0]
        x_ni, x_gt = (from_bytes(tensors[key][None]) for key in ("x_ni", "x_gt"))
        weights.save_tensors(to / path.name, {"x_dr": to_bytes(model(x_ni, x_gt)[0]).contiguous()})


def harmonise(clips: Path, folder: Path, models: dict[str, Path], settings: dict) -> dict[str, Path]:
    """What each trained Mirage makes of the clips, kept under `folder` -> {method: where}."""
    def make(to: Path, model: Path) -> None:
        mirage = Mirage.from_pretrained(model)
        predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))
    return {name: once(folder / name, settings, lambda to: make(to, model)) for name, model in models.items()}


def picture(path: Path, clips: Path, results: dict[str, Path], frames: tuple[int, ...]) -> None:
    """These frames of the first clip: naive insertion, each method, truth."""
    name = min(clips.glob("*.safetensors")).name
    truth = weights.load_tensors(clips / name)[0]
    columns = {"naive insertion": truth["x_ni"]}
    columns |= {method: weights.load_tensors(folder / name)[0]["x_dr"] for method, folder in results.items()}
    columns["ground truth"] = truth["x_gt"]
    H, W = truth["x_gt"].shape[-2:]
    figure = Figure(figsize=(3 * len(columns), 3 * len(frames) * H / W + 0.3), layout="constrained")
    for row, t in zip(figure.subplots(len(frames), len(columns), squeeze=False), frames):
        for axis, (method, x) in zip(row, columns.items()):
            axis.imshow(rearrange(x[:, t], "c h w -> h w c"))
            axis.set_title(f"{method}, frame {t}", fontsize=8)
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


def evaluate(args, clips: Path, results: dict[str, Path], to: Path, exact: bool = True) -> dict:
    """evaluate.py on several methods -> its scores.json; exact: the clips hold the flow."""
    pred = [flag for name, folder in results.items() for flag in ("--pred", f"{name}={folder}")]
    more = ["--vfid", args.vfid] * bool(args.vfid) + ["--flow", clips] * exact
    python("evaluate.py", *pred, "--ni", clips, "--gt", clips, "--boxes", clips, "--perceptual", args.perceptual, *more,
           "--out", to)
    return json.loads((to / "scores.json").read_text())


def agreement(paper: dict[str, float], ours: dict[str, float | None], better) -> str:
    """"5 of 6": how many pairs of methods stand in the paper's order."""
    names = [name for name in paper if ours.get(name) is not None]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if paper[a] != paper[b]]
    same = sum((better(paper[a], paper[b]) == paper[a]) == (better(ours[a], ours[b]) == ours[a]) for a, b in pairs)
    return f"{same} of {len(pairs)}" if pairs else "–"


def report(name: str, doc: str, args, paper: dict[str, dict[str, dict[str, float]]], seeds: list[dict],
           more: dict = {}) -> None:
    """NAME.json and NAME.md: the paper's numbers beside ours, mean ± deviation over seeds, and the order of methods.

    paper: {region: {method: {metric: value}}}; seeds: scores.json of each seed; more: anything else to keep.
    """
    command = f"python -m experiments.{name} --steps {args.steps} --seeds {args.seeds} --clips {args.clips}"
    lines = [f"# {doc.partition(chr(10))[0]}", "", f"`{command} --perceptual DIR`", ""]
    for region in REGIONS:
        theirs, rows = paper.get(region, {}), [s["mean"][region] for s in seeds]
        metrics = [m for m in BETTER if any(row[m] is not None for row in rows[0].values())]
        lines += [f"| {region}: ours (paper) | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
        for method in rows[0]:
            cells = []
            for metric in metrics:
                values = [float(row[method][metric]) for row in rows if row[method][metric] is not None]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and max(values) < math.inf else ""
                ours = f"{statistics.mean(values):.3f}{spread}" if values else "–"
                known = theirs.get(method, {}).get(metric)
                cells.append(f"{ours} ({known})" if known else ours)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
        for metric in metrics if theirs else ():
            known = {m: row[metric] for m, row in theirs.items() if metric in row}
            agreed = [agreement(known, {m: row[m][metric] for m in known}, BETTER[metric]) for row in rows]
            lines.append(f"* {metric}: pairs of methods in the paper's order, seed by seed: {', '.join(agreed)}")
        lines.append("")
    lines += [f"* {what}: {remark}" for what, remark in seeds[0]["remarks"].items()]
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "paper": paper, "seeds": seeds} | more
    for suffix, text in (("json", json.dumps(result, indent=2)), ("md", "\n".join(lines))):
        with weights.whole_file(args.out / f"{name}.{suffix}") as file:
            file.write_text(text + "\n")
    print("\n".join(lines))
