"""A run's checkpoint, and what the run is: so that the same command resumes it and no other one can.

A checkpoint holds the trained tensors, the optimiser's moments and the step. Clip k of step s is drawn by a generator
that is seeded with (seed, s, k) and nothing else (`run.draws`), so the place in the data and the state of every random
number are one integer, the step. Killed at any moment and started again, by any number of processes, a run
continues as if nothing had happened, and on a CPU ends bit-equal.

    checkpoint.safetensors      the newest; it carries a digest of its contents, which `resume` compares
    previous.safetensors        the one before it, which the error names where the newest is damaged

`identify` says what a run is: the recipe, the flags, and digests of the clips and of all weights that are not trained.
Whatever differs is named and refused. Only settings that cannot change the result are exempt: see `may_change`.

    python -m mirage_min.training.checkpoint
"""

import argparse
import dataclasses
import json
import os
import zlib
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..networks import weights
from .processes import like_part, print_once, rank, to_first

NEWEST, PREVIOUS = "checkpoint.safetensors", "previous.safetensors"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's
# Flags that another command may have: where things lie whose contents are compared, what is only watched, and what
# --recipe and --set make of the recipe, which is compared itself.
FREE_FLAGS = {"data", "perceptual", "val", "run", "device", "recipe", "set", "step"}
SAMPLE = 2**20     # bytes of every frozen tensor that its digest covers
BLOCK = 4096       # a file's digest covers its size and 16 blocks of this many bytes, evenly spread


def may_change(default):
    """A field of a recipe that changes how a result is computed and not the result: free when a run resumes."""
    return dataclasses.field(default=default, metadata={"may_change": True})


# ---- what a run is ---------------------------------------------------------------------------------------------------

def identify(args: argparse.Namespace, recipe, files: list[Path], models: nn.Module, trained: dict[str, Tensor],
             **facts) -> dict:
    """What must be the same for a run to resume: {name: value}, of JSON's types.

    files    every file or folder that clips are read from
    models   all networks of a step; `trained` are those of their tensors that a checkpoint holds
    facts    what else decides the result, by name (the timestep of a loaded model, say)
    """
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if not f.metadata.get("may_change")}
    if not getattr(recipe, "cosine", True):
        del fields["steps"]  # under a constant rate a longer run begins with the shorter one
    flags = {f"--{key}": str(value) for key, value in vars(args).items() if value is not None and key not in FREE_FLAGS}
    found = {"clips": digest_of_files(files), "weights": f"digest {digest_of_frozen(models, trained)}"}
    return json.loads(json.dumps(fields | flags | found | facts, default=str))


def digest(tensors: dict[str, Tensor], most: int | None = None, start: int = 0) -> str:
    """CRC-32 of the tensors' names, types, shapes and values, in eight hexadecimal digits.

    most   how many bytes of each tensor count, from its first; None: all
    start  the CRC-32 to continue from
    """
    value = start
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        numbers = tensor.detach().flatten()
        numbers = numbers if most is None else numbers[: most // numbers.element_size()]
        value = zlib.crc32(numbers.cpu().contiguous().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def digest_of_frozen(models: nn.Module, trained: dict[str, Tensor]) -> str:
    """The digest of all tensors that the models compute with and that are not trained, and of the models' configs.

    It covers the first MiB of every parameter, buffer and tensor that is a plain attribute (a noise schedule).
    """
    ours = {id(t) for t in trained.values()}
    frozen, configs = {}, ""
    for prefix, module in models.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, Tensor) and id(value) not in ours:
                frozen[f"{prefix}.{name}"] = value
        configs += f"{prefix} {getattr(module, 'config', None)};"
    return digest(frozen, SAMPLE, zlib.crc32(configs.encode()))


def digest_of_run(tensors: dict[str, Tensor], step: str, settings: str) -> str:
    """The digest of all that a checkpoint holds, every byte: eight hexadecimal digits."""
    return digest(tensors, start=zlib.crc32(f"{step} {settings}".encode()))


def digest_of_files(files: list[Path]) -> str:
    """The number of files or folders, and the digest of their names and contents (digest_of_file), in order.

    ValueError naming a file that cannot be read.
    """
    value = 0
    for file in files:
        value = digest_of_file(file, value)
    return f"{len(files)} files, digest {value:08x}"


def digest_of_file(path: Path, start: int = 0) -> int:
    """CRC-32 of a file's name, size and 16 blocks of it, or of all files in a folder; up to 64 KiB are covered whole.

    Another clip of the same name and size differs nearly everywhere, so this notices it without reading the whole file.
    ValueError if the file cannot be read.
    """
    value = zlib.crc32(path.name.encode(errors="surrogateescape"), start)
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            value = digest_of_file(inside, value)
        return value
    with weights.one_line(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        value = zlib.crc32(str(size).encode(), value)
        if size <= 16 * BLOCK:
            return zlib.crc32(file.read(), value)
        for k in range(16):
            file.seek((size - BLOCK) * k // 15)
            value = zlib.crc32(file.read(BLOCK), value)
    return value


# ---- writing and reading ---------------------------------------------------------------------------------------------

def save(folder: Path, step: int, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer,
         identity: dict) -> None:
    """Write the checkpoint after `step` steps of the run of that identity, atomically.

    Every process calls it, the first one writes. trained: {name: a tensor of any shape that is trained, or measured
    once and kept}. The checkpoint before this one stays, as PREVIOUS.
    """
    tensors = {f"param/{name}": to_first(tensor) for name, tensor in trained.items()}
    for name, tensor in trained.items():
        tensors |= {f"{key}/{name}": to_first(value) for key, value in optimizer.state.get(tensor, {}).items()}
    if rank() > 0:
        return
    about = {"step": str(step), "settings": json.dumps(identity)}
    about["digest"] = digest_of_run(tensors, about["step"], about["settings"])
    written = folder / "next.safetensors"
    weights.save_tensors(written, tensors, about)
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / PREVIOUS)
    os.replace(written, folder / NEWEST)


@torch.no_grad()
def resume(folder: Path, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, identity: dict,
           steps: int | None = None) -> int:
    """Load the newest checkpoint, if there is one -> the step to continue with; 0 in a new run.

    ValueError: it is damaged, belongs to a run of another identity, or has more steps than `steps`.
    """
    path = newest(folder)
    if path is None:
        return 0
    try:
        tensors, step, then = read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out(path)}") from error
    changed = [f"{key}: then {then.get(key)}, now {identity.get(key)}" for key in sorted(then.keys() | identity.keys())
               if then.get(key) != identity.get(key)]
    given = {key.removeprefix("param/"): t for key, t in tensors.items() if key.startswith("param/")}
    changed += weights.mismatches(trained, given)
    if changed:
        raise ValueError(f"{path} belongs to another run, {len(changed)} things differ: {'; '.join(changed[:5])} "
                         f"(--run-folder FOLDER starts a new one)")
    if steps is not None and step > steps:
        raise ValueError(f"{path}: {step} steps are done, which is more than the {steps} that are wanted")
    check_moments(path, tensors, trained)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "param":
            trained[name].copy_(like_part(value, trained[name]))
        else:
            optimizer.state[trained[name]][kind] = value if kind == "step" else like_part(value, trained[name])
    print_once(f"resumes at step {step}, from {path}")
    return step


def check_moments(path: Path, tensors: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """ValueError unless every tensor belongs to one that is trained, which has all of AdamW's moments or, if it never
    had a gradient, none of them."""
    kinds = defaultdict(set)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        fits = name in trained and list(value.shape) in ([], list(trained[name].shape)) and value.is_floating_point()
        if not fits or kind not in {"param"} | MOMENTS:
            raise ValueError(f"{path}: no parameter has the tensor {key} ({value.dtype} {list(value.shape)})")
        kinds[name].add(kind)
    for name, found in kinds.items():
        if found not in ({"param"}, {"param"} | MOMENTS):
            raise ValueError(f"{path}: {name}: wanted {', '.join(sorted(MOMENTS))}, got {', '.join(sorted(found))}")
    if {"param"} | MOMENTS not in kinds.values():
        raise ValueError(f"{path}: wanted the moments of what is trained, got none")


def newest(folder: Path) -> Path | None:
    """The checkpoint to resume from: the one before the newest, if a run was killed between two renamings."""
    return next((folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()), None)


def read(path: Path) -> tuple[dict[str, Tensor], int, dict]:
    """A checkpoint -> (its tensors, the steps that it was written after, the identity of its run).

    ValueError of one line if it is damaged, or no checkpoint.
    """
    tensors, about = weights.load_tensors(path)
    if lacks := {"step", "settings", "digest"} - about.keys():
        raise ValueError(f"{path}: wanted a checkpoint of this version, its metadata lack {', '.join(sorted(lacks))}")
    if about["digest"] != digest_of_run(tensors, about["step"], about["settings"]):
        raise ValueError(f"{path}: damaged: its contents are not what was written (their digest differs)")
    try:
        step, settings = int(about["step"]), json.loads(about["settings"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: step or settings cannot be read: {error}") from error
    if not isinstance(settings, dict) or step < 0:
        raise ValueError(f"{path}: wanted settings to be an object and step 0 or more, got {settings} and {step}")
    return tensors, step, settings


def way_out(damaged: Path) -> str:
    """The end of an error: what the user can do about a damaged checkpoint, with the command."""
    before = damaged.with_name(PREVIOUS)
    if damaged != before:
        try:
            _, step, _ = read(before)
            return f"the one before it, of step {step}, is whole: to resume there, mv {before} {damaged}"
        except ValueError:
            pass
    return f"no other is whole: to start again, rm {damaged}"


def way_on(folder: Path) -> str:
    """The last line of an interrupted run: at which step the same command resumes."""
    path = newest(folder)
    if path is None:
        return "there is no checkpoint yet: the same command starts again"
    try:
        with safe_open(path, framework="pt") as file:
            return f"the same command resumes at step {file.metadata()['step']}, from {path}"
    except (OSError, SafetensorError, KeyError, TypeError):
        return f"{path} cannot be read"


if __name__ == "__main__":
    import tempfile

    @dataclasses.dataclass
    class Recipe:
        steps: int = 6
        lr: float = 0.1
        every: int = may_change(1)

    def train(folder: Path, recipe: Recipe, killed_after: int) -> Tensor:
        w = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([w], lr=recipe.lr)
        identity = identify(argparse.Namespace(), recipe, [], nn.Module(), {"w": w})
        for step in range(resume(folder, {"w": w}, optimizer, identity), killed_after):
            optimizer.zero_grad()
            draws = torch.Generator().manual_seed(step)
            (w - torch.randn(3, generator=draws)).square().sum().backward()
            optimizer.step()
            save(folder, step + 1, {"w": w}, optimizer, identity)
        return w.detach()

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        print("six steps:           ", train(Path(one), Recipe(), 6).tolist())
        print("two, and then killed:", train(Path(two), Recipe(), 2).tolist())
        print("the same command:    ", train(Path(two), Recipe(every=2), 6).tolist())
        file = Path(two, NEWEST)
        for spoil, recipe in ((b"", Recipe(lr=0.2)), (b"\0", Recipe())):
            file.write_bytes(file.read_bytes()[: -1 if spoil else None] + spoil)
            try:
                train(Path(two), recipe, 6)
            except ValueError as error:
                print("refused:", str(error).replace(two, "FOLDER"))
