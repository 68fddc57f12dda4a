"""A training run: its flags, processes and checkpoint. What the training scripts share; the loop is in each script.

A checkpoint holds what is trained, the optimiser and the step. Clip k of step s is drawn by a generator seeded with
(seed, s, k) and by nothing else, so the place in the data and the state of every random number are one integer, the
step. Killed at any moment and started again, by as many processes as there are then, a run goes on as if nothing had
happened, and on a CPU ends bit-equal.

    python train_harmonize.py ...                               # one process
    torchrun --nproc-per-node=8 train_harmonize.py ...          # the same batch shared by eight

No process is wrapped in DDP: ChopGrad runs several backwards a step, under which DDP is silently wrong. Every clip's
loss is weighted by its share of the whole batch, so gradients just add up: over groups and tiles of a clip, clips,
accumulated pieces, and by one `reduce` over the processes.

    python -m mirage_min.training.run
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..networks import weights

BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
RESULT_IS_THE_SAME = {"steps", "every", "accumulate", "checkpoint_decoder", "checkpoint_dit", "shard"}  # so may change


# ---- the command line ------------------------------------------------------------------------------------------------

def flags(doc: str, stage: str, recipes: dict) -> argparse.ArgumentParser:
    """The flags that both stages have."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="folder of pairs (default data/toy)")
    parser.add_argument("--val", type=Path, help="folder of held-out pairs, scored with every checkpoint")
    parser.add_argument("--real", type=Path, help="a real video, its own truth, mixed into the batches")
    parser.add_argument("--perceptual", type=Path, default=Path("data/perceptual"),
                        help="folder with the weights of the losses' backbones (default data/perceptual)")
    parser.add_argument("--out", type=Path, default=Path("weights"),
                        help=f"where {stage}.safetensors goes (default weights: in place of the shipped one)")
    # not --run: torchrun would take that for its own --run-path, even behind the script's name
    parser.add_argument("--run-folder", type=Path, dest="run", metavar="FOLDER",
                        help=f"checkpoints and logs (default runs/{stage}_RECIPE)")
    parser.add_argument("--recipe", choices=list(recipes), default="small", help="settings (default small)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if it is there, else cpu")
    parser.set_defaults(stage=stage)
    return parser


def launch(main, args: argparse.Namespace, recipes: dict) -> None:
    """main(args, recipe), alone or as one of torchrun's processes; what is wrong is one line, and exit status 2."""
    args.run = args.run or Path("runs") / f"{args.stage}_{args.recipe}"
    try:
        recipe = override(recipes[args.recipe], args.set)
        check(recipe)
        args.device = choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        if "WORLD_SIZE" in os.environ:
            cuda = args.device.startswith("cuda")
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if cuda else "gloo")
        main(args, recipe)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def override(recipe, settings: list[str]):
    """A copy of the recipe dataclass with `key=value` settings applied; ValueError for a key it does not have."""
    fields = {f.name: f.type for f in dataclasses.fields(recipe)}
    changes = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in fields:
            raise ValueError(f"--set {setting}: unknown key {key!r}, there are {', '.join(fields)}")
        kind = type(getattr(recipe, key))
        try:
            changes[key] = BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"--set {setting}: {key} must be {kind.__name__}, got {value!r}") from None
    return dataclasses.replace(recipe, **changes)


def check(recipe) -> None:
    """ValueError for what no recipe can mean."""
    for key in ("batch", "accumulate", "frames", "height", "width", "every"):
        if getattr(recipe, key, 1) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(recipe, key)}")


def choose_device(name: str) -> str:
    """The device of this name; "auto" is the first of cuda, mps and cpu that torch can use. ValueError if it cannot."""
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return next(device for device in there if there[device])
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: there is none that this torch can use ({error})") from error
    return name


# ---- processes -------------------------------------------------------------------------------------------------------

def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words) -> None:
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def count(params: dict[str, nn.Parameter]) -> str:
    """How many numbers each adapter trains, adapters being what names begin with."""
    counts = Counter()
    for name, p in params.items():
        counts[name.partition(".")[0]] += p.numel()
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def draws(seed: int, step: int, k: int = 0) -> torch.Generator:
    """The random numbers of clip k of a step's batch: a pure function of (seed, step, k)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + k)


def pieces(recipe) -> list[range]:
    """This process's clips of the batch 0 .. batch - 1, in as many pieces as are accumulated."""
    n, rest = divmod(recipe.batch, world() * recipe.accumulate)
    if rest or n == 0:
        raise ValueError(f"a batch of {recipe.batch} clips does not divide among {world()} processes x "
                         f"accumulate={recipe.accumulate}")
    return [range(i * n, (i + 1) * n) for i in range(rank() * recipe.accumulate, (rank() + 1) * recipe.accumulate)]


@torch.no_grad()
def reduce(params: dict[str, nn.Parameter], terms: dict[str, Tensor | float]) -> None:
    """Add up, over all processes and in place, the gradients and the terms of the loss: one all_reduce."""
    if world() == 1:
        return
    like = next(iter(params.values()))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()]
    values = torch.stack([torch.as_tensor(v, device=like.device, dtype=torch.float64) for v in terms.values()])
    flat = torch.cat([g.flatten() for g in grads] + [values.to(like.dtype)])
    dist.all_reduce(flat)
    *sums, values = flat.split([p.numel() for p in params.values()] + [len(terms)])
    for p, total in zip(params.values(), sums):
        p.grad = total.view_as(p)
    terms.update(zip(terms, values))


def shard(dit: nn.Module, device: str) -> None:
    """FSDP2: every process keeps its part of the frozen weights and fetches a block's while it runs.

    What is trained stays whole in every process, so `reduce`, checkpoints and files know nothing of sharding.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(torch.device(device).type, (world(),))
    trained = {p for p in dit.parameters() if p.requires_grad}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of in-place changes of its output: none here
    for module in [*next(m for m in dit.children() if isinstance(m, nn.ModuleList)), dit]:
        fully_shard(module, mesh=mesh, ignored_params=trained)


def check_finite(step: int, terms: dict[str, Tensor | float], norm: Tensor, clips: list[str]) -> None:
    """Stop before a step that would spoil the weights, naming what is not finite and this step's clips."""
    values = {name: float(value) for name, value in (terms | {"gradient norm": norm}).items()}
    if not all(map(math.isfinite, values.values())):
        named = [clips]
        if world() > 1:
            named = [None] * world()
            dist.all_gather_object(named, clips)
        raise ValueError(f"step {step}: not finite: " + ", ".join(f"{k} {v:g}" for k, v in values.items())
                         + f"; clips: {', '.join(sum(named, []))}; the last checkpoint is as it was")


def settings(args: argparse.Namespace, recipe, names: list[str]) -> dict:
    """What a run is, and its checkpoint keeps: the recipe, the folders as they were given, and the pairs by name."""
    given = {f"--{key}": str(value) for key in ("out", "base", "vae2d", "mirage", "prompt", "real")
             if (value := getattr(args, key, None))}
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return dataclasses.asdict(recipe) | given | {"--data": f"{len(names)} pairs, {digest[:8]}"}


# ---- the folder ------------------------------------------------------------------------------------------------------

def save(folder: Path, step: int, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer,
         settings: dict) -> None:
    """Write the checkpoint, whole or not at all; the first process does."""
    if rank() == 0:
        tensors = {f"param/{n}": p for n, p in trained.items()}
        tensors |= {f"{key}/{n}": v for n, p in trained.items() for key, v in optimizer.state.get(p, {}).items()}
        about = {"step": str(step), "settings": json.dumps(settings)}
        weights.save_tensors(folder / "checkpoint.safetensors", tensors, about)


@torch.no_grad()
def resume(folder: Path, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer,
           settings: dict) -> int:
    """Load the checkpoint if there is one; returns the step to go on with, 0 in a new run. ValueError: another's."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors, metadata = weights.load_tensors(path)
    then, now = json.loads(metadata["settings"]), settings
    changed = [f"{k}: then {then.get(k)}, now {now.get(k)}" for k in sorted(then.keys() | now.keys())
               if then.get(k) != now.get(k) and k not in RESULT_IS_THE_SAME]
    wanted = {n: list(p.shape) for n, p in trained.items()}
    given = {n.partition("/")[2]: list(t.shape) for n, t in tensors.items() if n.startswith("param/")}
    changed += [f"{n}: wanted {wanted.get(n)}, given {given.get(n)}" for n in sorted(wanted.keys() | given.keys())
                if wanted.get(n) != given.get(n)]
    if changed:
        raise ValueError(f"{path} belongs to another run, {len(changed)} things differ: {'; '.join(changed[:5])} "
                         f"(--run-folder FOLDER starts a new one)")
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "param":
            trained[name].copy_(value)
        else:
            optimizer.state[trained[name]][kind] = value if kind == "step" else value.to(trained[name].device)
    say(f"goes on at step {metadata['step']} of {path}")
    return int(metadata["step"])


def schedule(step: int, warmup: int, steps: int, cosine: bool) -> float:
    """The factor on the learning rate: a linear rise over `warmup` steps, then 1, or half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) if cosine else 1.0


def about(args, recipe, stage_a: dict[str, str] = {}) -> dict[str, str]:
    """What an adapter file says of its making. base and vae2d: the flag's, or else those that stage A names, relative
    to --out where they are folders."""
    names = {}
    for key in ("base", "vae2d"):
        name = getattr(args, key)
        if name is None and key in stage_a:
            name = stage_a[key] if not (args.mirage / stage_a[key]).is_dir() else args.mirage / stage_a[key]
        if name:
            names[key] = os.path.relpath(name, args.out) if Path(name).is_dir() else str(name)
    return names | {"step": str(recipe.steps), "recipe": json.dumps(dataclasses.asdict(recipe))}


if __name__ == "__main__":
    import tempfile

    @dataclasses.dataclass
    class Recipe:
        steps: int = 6
        lr: float = 0.1

    def train(folder: Path, killed_after: int) -> Tensor:
        w = nn.Parameter(torch.zeros(3))
        optimizer, settings = torch.optim.AdamW([w], lr=Recipe.lr), dataclasses.asdict(Recipe())
        for step in range(resume(folder, {"w": w}, optimizer, settings), killed_after):
            optimizer.zero_grad()
            (w - torch.randn(3, generator=draws(0, step))).square().sum().backward()
            optimizer.step()
            save(folder, step + 1, {"w": w}, optimizer, settings)
        return w.detach()

    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        print("six steps:           ", train(Path(a), 6).tolist())
        print("two, and then killed:", train(Path(b), 2).tolist())
        print("the same command:    ", train(Path(b), 6).tolist())
    print("factors on the learning rate:", [round(schedule(s, 2, 6, cosine=True), 2) for s in range(6)])
