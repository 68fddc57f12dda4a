"""Which small 3D VAE carries tone: CogVideoX's GroupNorm or Wan's RMS norm, how many groups, how wide?

    python -m experiments.vae_tones --clips data/real/val --vae weights/base/vae weights/vae_wan
    python -m experiments.vae_tones --clips data/real/val --train 10 --real data/real/train --perceptual DIR

The first measures trained VAEs, the second first trains one of each kind with train_base.py, all for as many minutes of
processor time. Clips are those of --clips, which may not have been trained on, and made-up ones, each as it is and in
the tones of another camera, by night, in haze, in grey and with bars (photometric.py). What a VAE makes of a clip is
compared with the clip: PSNR, and the largest shift of the means of red, green and blue, of 255. All are 9 frames of
96 x 144; of recorded clips the middle, made smaller.
"""

import argparse
import math
import resource
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from experiments import common, tables
from experiments.real_card import shift, shrunk
from mirage_min.data.photometric import vary
from mirage_min.data.pixels import from_bytes
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method import metrics
from mirage_min.networks import weights
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.networks.vae_wan import WanVAE

KINDS = "as it is", "camera", "night", "haze", "grey", "bars"
FRAMES, SIZE = 9, (96, 144)
FIRST_SEED = 900_000  # of made-up clips: neither trained on nor those of the cards, for a VAE is chosen by them
VAES = {each.CLASS_NAME: each for each in (CogVideoXVAE, WanVAE)}
VARIANTS = {  # name: (family, settings of train_base.py)
    "GroupNorm, 8 groups": ("cogvideox", {}),
    "GroupNorm, 1 group": ("cogvideox", {"norm_groups": 1}),
    "GroupNorm, 16 groups": ("cogvideox", {"norm_groups": 16}),
    "RMS norm (Wan)": ("wan", {}),
    "GroupNorm, 8 groups, half as wide": ("cogvideox", {"width": 0.5}),
    "RMS norm (Wan), half as wide": ("wan", {"width": 0.5}),
}
SHORT, LONG = 10, 40  # steps of the two runs whose difference says what a step costs


# ---- clips -----------------------------------------------------------------------------------------------------------

def recorded(path: Path) -> Tensor:
    """The middle of a clip [3, T, h, w] in [-1, 1], in time and space, as the VAEs see it here."""
    x = weights.load_tensors(path)[0]["x"]
    start = max(0, (x.shape[1] - FRAMES) // 2)
    x = shrunk(from_bytes(x[:, start : start + FRAMES]), 2 * SIZE[1])
    top, left = ((n - wanted) // 2 for n, wanted in zip(x.shape[2:], SIZE))
    return x[:, :, top : top + SIZE[0], left : left + SIZE[1]]


def read_clips(args: argparse.Namespace) -> dict[str, Tensor]:
    """{name: [3, T, H, W]}. ValueError if --clips holds none."""
    files = sorted(args.clips.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{args.clips}: wanted clips, *.safetensors, as real_clips.py writes them, found none")
    clips = {path.stem: recorded(path) for path in files}
    for seed in range(FIRST_SEED, FIRST_SEED + args.toy):
        clips[f"toy {seed}"] = make_clip(seed, WorldConfig(FRAMES, *SIZE)).x_gt
    return clips


# ---- figures ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def carried(vae: CogVideoXVAE | WanVAE, clips: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """{kind: {"psnr": of each clip, "shift": of each clip}}; the same variations for every VAE."""
    found = {kind: {"psnr": [], "shift": []} for kind in KINDS}
    for i, x in enumerate(clips.values()):
        for kind in KINDS:
            shown = vary(x, Generator().manual_seed(i), kind)[None]
            y = vae.decode(vae.encode(shown)).clamp(-1, 1)
            found[kind]["psnr"].append(metrics.psnr(y, shown).item())
            found[kind]["shift"].append(max(abs(v) for v in shift(y[0], shown[0])))
    return found


def read_vae(folder: Path) -> CogVideoXVAE | WanVAE:
    """A small VAE of either class, in float32. ValueError for another."""
    name = weights.read_json(folder / weights.CONFIG).get("_class_name")
    if name not in VAES:
        raise ValueError(f"{folder}: wanted a VAE of {' or '.join(VAES)}, got {name}")
    return VAES[name].from_pretrained(folder, dtype=torch.float32)


# ---- training, all for as long ---------------------------------------------------------------------------------------

def train(args: argparse.Namespace, family: str, settings: dict, steps: int, to: Path) -> float:
    """train_base.py vae, into the folder `to` -> the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [word for key, value in (settings | {"steps": steps}).items() for word in ("--set", f"{key}={value}")]
    tables.python("train_base.py", "vae", "--family", family, "--data", args.data, "--real", args.real,
                  "--perceptual", args.perceptual, "--runs", to / f"run_{steps}", "--out", to / f"out_{steps}",
                  "--device", "cpu", *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train_for(args: argparse.Namespace, family: str, settings: dict, to: Path) -> None:
    """As many steps as take args.train minutes of processor time, by what a step of this VAE costs."""
    short, long = (train(args, family, settings, steps, to) for steps in (SHORT, LONG))
    steps = max(1, round(60 * args.train * (LONG - SHORT) / max(long - short, 1e-3)))
    train(args, family, settings, steps, to)
    (to / f"out_{steps}" / f"base{'_wan' * (family == 'wan')}" / "vae").rename(to / "vae")


def trained(args: argparse.Namespace) -> dict[str, Path]:
    """{name of a variant: its VAE}, each made once. ValueError without --real or --perceptual."""
    if args.real is None or args.perceptual is None:
        raise ValueError("--train wants --real and --perceptual, as train_base.py does")
    folders = {}
    for name, (family, settings) in VARIANTS.items():
        made_of = {"minutes": args.train, "family": family, "data": args.data, "real": args.real} | settings
        make = partial(train_for, args, family, settings)
        folders[name] = tables.once(args.runs / "vae_tones" / name, made_of, make) / "vae"
    return folders


# ---- the table -------------------------------------------------------------------------------------------------------

def report(args: argparse.Namespace, found: dict[str, dict]) -> str:
    """The text of vae_tones.md."""
    rows = []
    for name, kinds in found.items():
        cells = [f"{mean(kinds[kind]['psnr']):.1f} / {mean(kinds[kind]['shift']):.1f}" for kind in KINDS]
        worst = max(max(kinds[kind]["shift"]) for kind in KINDS)
        rows.append([name, *cells, f"{worst:.1f}"])
    trained_for = f"Each was trained for {args.train:g} minutes of one core. " if args.train else ""
    count = len(next(iter(found.values()))[KINDS[0]]["psnr"])
    text = (f"{trained_for}Means over {count} clips: PSNR in dB / the largest shift of a colour's mean, of 255. Last: "
            "the largest of all.")
    return "\n\n".join(["# How small VAEs carry tone", "Made by `python -m experiments.vae_tones`.", text,
                        common.table(["", *KINDS, "worst"], rows)]) + "\n"


def mean(values: list[float]) -> float:
    """An exact clip has an infinite PSNR, which is left out."""
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else math.inf


def main(args: argparse.Namespace) -> None:
    if not args.train and not args.vae:
        raise ValueError("wanted --vae FOLDER or --train MINUTES")
    folders = {str(folder): folder for folder in args.vae} | (trained(args) if args.train else {})
    clips = read_clips(args)
    found = {name: carried(read_vae(folder), clips) for name, folder in folders.items()}
    common.save_json(args.out / "vae_tones.json", {"minutes": args.train, "clips": list(clips), "vaes": found})
    text = report(args, found)
    common.save_text(args.out / "vae_tones.md", text)
    print(text)


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--vae", type=Path, nargs="+", default=[], metavar="DIR", help="folders of trained VAEs")
    parser.add_argument("--train", type=float, default=0, metavar="MINUTES", help="train each variant so long first")
    parser.add_argument("--clips", type=Path, default=Path("data/real/val"), help="(default data/real/val)")
    parser.add_argument("--toy", type=int, default=8, help="made-up clips to measure on (default 8)")
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="toy clips to train on (default data/toy)")
    parser.add_argument("--real", type=Path, help="recorded clips to train on")
    parser.add_argument("--perceptual", type=Path, help="folder with squeezenet1_1_features.safetensors, to train")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/work"), help="models and clips on the way")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
