"""A training run on disk: what the training scripts share, and no more. The loop itself is in each script.

A run is a folder with `checkpoint.safetensors` (trained parameters, optimiser, step), `log.jsonl` and `settings.json`.
Everything random in a step is drawn from a generator seeded by (seed, step), so the place in the data and the state of
every random number are one integer: the step. Killed at any moment and started again, a run goes on as if nothing had
happened, and on a CPU ends bit-equal.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from . import weights


def draws(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The random numbers of one step of one process: a pure function of (seed, step, rank)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


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
            changes[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f"--set {setting}: {key} must be {kind.__name__}, got {value!r}") from None
    return dataclasses.replace(recipe, **changes)


def save(folder: Path, step: int, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write the checkpoint, whole or not at all."""
    tensors = {f"param/{n}": p.detach() for n, p in params.items()}
    for name, p in params.items():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = value
    weights.save_tensors(folder / "checkpoint.safetensors", tensors, {"step": str(step)})


@torch.no_grad()
def resume(folder: Path, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint if there is one; returns the step to go on with, 0 in a new run."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors, metadata = weights.load_tensors(path)
    wanted, given = set(params), {n.partition("/")[2] for n in tensors if n.startswith("param/")}
    if wanted != given:
        raise ValueError(f"{path} belongs to another run: {len(wanted - given)} parameters missing "
                         f"{sorted(wanted - given)[:5]}, {len(given - wanted)} unexpected {sorted(given - wanted)[:5]}")
    for name, p in params.items():
        if tensors[f"param/{name}"].shape != p.shape:
            raise ValueError(f"{path}: {name} wanted {list(p.shape)}, given {list(tensors[f'param/{name}'].shape)}")
        p.copy_(tensors[f"param/{name}"])
        state = {k.partition("/")[0]: v for k, v in tensors.items() if k.partition("/")[2] == name}
        state.pop("param")
        optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
    return int(metadata["step"])


class Log:
    """log.jsonl: one line {"step": …, "seconds": …, term: value} each time it is called; a resumed run appends."""

    def __init__(self, folder: Path, settings):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.start = folder / "log.jsonl", time.time()
        temporary = folder / "settings.json.part"
        temporary.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
        os.replace(temporary, folder / "settings.json")

    def __call__(self, step: int, terms: dict[str, Tensor | float]) -> dict[str, float]:
        values = {k: float(v) for k, v in terms.items()}
        with open(self.file, "a") as f:
            f.write(json.dumps({"step": step, "seconds": round(time.time() - self.start, 1), **values}) + "\n")
        return values


def schedule(step: int, warmup: int, steps: int, cosine: bool) -> float:
    """The factor on the learning rate: a linear rise over `warmup` steps, then 1, or half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) if cosine else 1.0


def check_finite(step: int, loss: Tensor, terms: dict[str, Tensor | float]) -> None:
    """Stop at a loss that is not finite, with the step and the terms; the last checkpoint stays as it is."""
    if not torch.isfinite(loss):
        raise ValueError(f"step {step}: the loss is not finite: "
                         + ", ".join(f"{name} {float(value):g}" for name, value in terms.items()))


def about(args, recipe) -> dict[str, str]:
    """What an adapter file says of its making."""
    recipe = dataclasses.asdict(recipe)
    base = {key: os.path.relpath(value, args.out) if Path(value).is_dir() else value
            for key in ("base", "vae2d") if (value := getattr(args, key, None))}
    return base | {"step": str(recipe["steps"]), "recipe": json.dumps(recipe)}
