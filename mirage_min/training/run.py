"""What the training scripts share apart from the loop: flags, recipes, data, the rate, and how a run ends.

Each script shows its loss and its loop. One that trains something else takes what it can use of this:

    parser = run.flags(__doc__, "stage_a", RECIPES)             # and its own flags
    run.launch(main, parser.parse_args(), RECIPES)              # main(args, recipe)

    for step in run.Steps(args, recipe, start):
        for clips in processes.pieces(recipe):
            x_ni, x_gt, names = run.batch(data, recipe, step, clips, args.device)
            ...                                                 # forward, loss, backward
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

Nothing here knows one script's flags or fields by name. Who computes what: processes.py. What survives: checkpoint.py.

    python -m mirage_min.training.run
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import desk
from ..data.pairs import Pairs
from . import checkpoint, processes
from .checkpoint import may_change

# ---- recipes ---------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Optimisation:
    """The number and size of the steps, which every training script can change by --set.

    Here and in Recipe the numbers are Mirage's (§4.1), for both of its stages.
    """

    steps: int = 10_000
    batch: int = 8                      # clips a step, over all processes
    lr: float = 1e-4
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 1                     # steps over which the rate rises
    cosine: bool = False                # after that it falls as half a cosine; else it is constant, as in the papers
    bf16: bool = True                   # on a CPU that it does not speed up: only where --set bf16=yes says so
    seed: int = 1
    every: int = may_change(200)        # steps between checkpoints, pictures and validations


@dataclasses.dataclass
class Recipe(Optimisation):
    """An Optimisation and its clips: pairs of a naive insertion and the truth."""

    accumulate: int = may_change(1)     # pieces in which a process works through its clips
    frames: int = 9                     # padded to what the VAE takes, as height and width are; the padding counts
    height: int = 512
    width: int = 768
    real: float = 0.0                   # share of clips from the real video
    real_frames: int = 0                # use only this many of its frames; 0: all
    varied: float = 0.0                 # share of clips in other tones, naive insertion and truth alike


def check(recipe) -> None:
    """ValueError for a recipe that has a count below 1, negative steps, or a share outside 0 to 1."""
    for key in ("batch", "accumulate", "frames", "height", "width", "every"):
        if getattr(recipe, key, 1) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(recipe, key)}")
    if getattr(recipe, "steps", 0) < 0:
        raise ValueError(f"steps must not be negative, got {recipe.steps}")
    for key in ("real", "varied"):
        if not 0 <= getattr(recipe, key, 0) <= 1:
            raise ValueError(f"{key} must be a share, from 0 to 1, got {getattr(recipe, key)}")


# ---- the command -----------------------------------------------------------------------------------------------------

def flags(doc: str | None, stage: str, recipes: dict) -> argparse.ArgumentParser:
    """The flags of every training script; doc: the script's docstring, None under python -OO."""
    parser = argparse.ArgumentParser(description=desk.first_line(doc))
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--val", type=Path, help="folder of held-out pairs, scored with every checkpoint")
    parser.add_argument("--real", type=Path, help="a real video, mixed into the batches as its own truth")
    parser.add_argument("--perceptual", type=Path, default=Path("data/perceptual"),
                        help="folder with the weights of the losses' backbones, or auto, which fetches them "
                             "(default data/perceptual)")
    parser.add_argument("--out", type=Path, help="where the trained weights go (default: the run's folder)")
    # not --run: torchrun would take that for its own --run-path, even after the script's name
    parser.add_argument("--run-folder", type=Path, dest="run", metavar="FOLDER",
                        help=f"checkpoints and logs (default runs/{stage}_RECIPE)")
    parser.add_argument("--recipe", choices=list(recipes), default="small", help="settings (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one, else cpu")
    parser.set_defaults(stage=stage)
    return parser


def launch(main: Callable, args: argparse.Namespace, recipes: dict, conv3d: bool = False) -> None:
    """main(args, recipe), alone or as one of torchrun's processes. conv3d: whether 3D convolutions are trained.

    Exit status: 0 done; 2 something is wrong, and one line on stderr says what; 128 + its number after a signal, and
    one line says at which step it came and where the same command continues.
    """
    name = Path(sys.argv[0]).name
    args.run = args.run or Path("runs") / f"{args.stage}_{args.recipe}"
    args.out = args.out or args.run
    args.step = None  # the one that is being taken
    desk.catch_signals()

    def run() -> None:
        recipe = desk.override(recipes[args.recipe], args.set)
        check(recipe)
        args.device = desk.choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        processes.join(args.device)
        asked = any(setting.startswith("bf16=") for setting in args.set)
        if recipe.bf16 and not asked and not desk.bfloat16_is_faster(args.device):
            recipe.bf16 = False
            processes.print_once("bf16=no, for this device is slower in bfloat16")
        if recipe.bf16 and conv3d and desk.bfloat16_spoils_conv3d(args.device):
            if asked:
                raise ValueError("bf16=yes: this processor's AMX spoils the gradients of 3D convolutions; wanted "
                                 "bf16=no, or ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment")
            recipe.bf16 = False
            processes.print_once("bf16=no, for this processor's AMX spoils the gradients of 3D convolutions")
        main(args, recipe)

    def stopped() -> str | None:
        at = "before its first step" if args.step is None else f"in step {args.step}"
        return f" {at}; {checkpoint.way_on(args.run)}" if processes.rank() == 0 else None

    try:
        if status := desk.serve(name, run, stopped):
            sys.exit(status)
    finally:
        processes.leave()


# ---- data ------------------------------------------------------------------------------------------------------------

def open_data(args: argparse.Namespace, recipe: Recipe) -> tuple[Pairs, Pairs | None]:
    """The pairs of --data, from which the recipe's crops are cut, and those of --val, whole (None without the flag).

    Pairs that are left out are printed. ValueError if a folder has no usable ones.
    """
    data = Pairs(args.data, recipe.frames, (recipe.height, recipe.width), args.real, recipe.real_frames)
    val = Pairs(args.val, recipe.frames) if args.val else None
    for pair in data.left_out + (val.left_out if val else []):
        processes.print_once("left out:", pair)
    return data, val


def draws(seed: int, step: int, k: int = 0) -> torch.Generator:
    """The random numbers of clip k of a step's batch: a function of (seed, step, k) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + k)


def batch(data: Pairs, recipe: Recipe, step: int, clips: range, device: str) -> tuple[Tensor, Tensor, list[str]]:
    """These clips of a step's batch: x_ni, x_gt [n, 3, frames, height, width] in [-1, 1] on the device; their names."""
    x_ni, x_gt, names = data.batch([draws(recipe.seed, step, k) for k in clips], recipe.real, recipe.varied)
    return x_ni.to(device), x_gt.to(device), names


# ---- steps -----------------------------------------------------------------------------------------------------------

class Steps(tqdm):
    """The steps from `start` on, with a bar where stderr is a terminal: set_postfix shows values next to it."""

    def __init__(self, args: argparse.Namespace, recipe: Optimisation, start: int):
        self.args = args
        hidden = processes.rank() > 0 or desk.no_bar()
        super().__init__(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step", disable=hidden)

    def __iter__(self) -> Iterator[int]:
        for step in super().__iter__():
            self.args.step = step  # for the last line of a run that is interrupted
            desk.heed()
            yield step


def optimizer(params: dict[str, nn.Parameter], recipe: Optimisation) -> torch.optim.AdamW:
    """AdamW over {name: parameter}, with the recipe's rate, β2 and weight decay; β1 is 0.9."""
    return torch.optim.AdamW(params.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                             weight_decay=recipe.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, recipe: Optimisation, step: int) -> None:
    """Set the learning rate of this step, for all parameters: the recipe's rate times `schedule`."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * schedule(step, recipe.warmup, recipe.steps, recipe.cosine)


def schedule(step: int, warmup: int, steps: int, cosine: bool) -> float:
    """The factor on the learning rate: a linear rise over `warmup` steps, then 1, or half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) if cosine else 1.0


def autocast(recipe: Optimisation, device: str | torch.device, keep_copies: bool = True) -> torch.autocast:
    """The context for forward passes: autocast to bfloat16 if the recipe has bf16, else without effect.

    keep_copies: a trained weight becomes bfloat16 once in a context, and not each time that it is used
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=keep_copies)


def due(step: int, recipe: Optimisation) -> bool:
    """Whether a checkpoint is written after this step: after every `recipe.every` steps, and after the last."""
    return (step + 1) % recipe.every == 0 or step + 1 == recipe.steps


# ---- what a run says about itself ------------------------------------------------------------------------------------

def count(params: dict[str, nn.Parameter]) -> str:
    """How many numbers each adapter trains, as text; a parameter's name is its adapter's, a dot and the rest."""
    counts = Counter()
    for name, p in params.items():
        counts[name.partition(".")[0]] += p.numel()
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def about(recipe) -> dict[str, str]:
    """The safetensors metadata of trained weights: how many steps they took, and the recipe as JSON."""
    return {"step": str(recipe.steps), "recipe": json.dumps(dataclasses.asdict(recipe))}


def seen_from(folder: Path, name: str | Path) -> str:
    """The path of the folder `name` relative to `folder`; anything else, such as a hub id, unchanged."""
    return os.path.relpath(name, folder) if Path(name).is_dir() else str(name)


if __name__ == "__main__":
    recipe = desk.override(Recipe(), ["steps=6", "warmup=2", "cosine=yes"])
    print(recipe)
    print("factors on its rate:", [round(schedule(s, recipe.warmup, recipe.steps, recipe.cosine), 2) for s in range(6)])
    for step in range(2):
        numbers = [round(torch.rand((), generator=draws(recipe.seed, step, k)).item(), 3) for k in range(4)]
        print(f"step {step}: the first random number of each of four clips, whoever draws it:", numbers)
    for setting in ("lr=fast", "rate=1e-3"):
        try:
            desk.override(recipe, [setting])
        except ValueError as error:
            print("refused:", error)
