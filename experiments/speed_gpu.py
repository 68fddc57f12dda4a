"""Every system at its official size on a GPU, random weights, bfloat16: one command that fills its part of speed.md.

    python -m experiments.speed_gpu                  # an hour; needs diffusers and an NVIDIA GPU with 80 GiB or more
    python -m experiments.speed_gpu --out docs       # the same, and docs/speed.md has it
    python -m experiments.speed_gpu --only training  # and what an earlier run found of the rest

    peak       what this card makes of large bfloat16 products, its yardstick for all that follows
    systems    each system with a clip: frames a second, memory above the weights, operations, their share of the peak,
               and how diffusers' parts fare where there are any
    training   a clip's training step, forward and backward, as training_cost.py counts it

The first run of a call chooses kernels and counts operations, the best of two others is timed. What fails, for want of
memory or otherwise, is a row that says so. Every row is kept in speed.json as soon as it is measured.
"""

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import common, measuring, published, training_cost
from experiments.common import GIB
from mirage_min.method.camera import Camera
from mirage_min.systems.world import Geometry, World

BEGIN, END = "<!-- speed_gpu: begin -->", "<!-- speed_gpu: end -->"
PARTS = ["peak", "systems", "training"]
Size = tuple[int, int, int]  # frames, rows, columns, as they come in


@dataclass
class Case:
    """A system and the clips that it is given."""

    name: str
    make: Callable[[str], nn.Module]                       # on a device
    sizes: list[Size]
    run: Callable[[nn.Module, Tensor], object]             # the system, frames [T, 3, H, W] in [-1, 1] on the CPU
    stages: dict[str, tuple[type, str]] | None = None      # as measuring.stopwatch takes them
    theirs: Callable[[nn.Module, str], Callable[[Tensor], object]] | None = None  # diffusers' parts, of the same frames


# ---- what is run -----------------------------------------------------------------------------------------------------

def stream(system: nn.Module, frames: Tensor) -> list[Tensor]:
    """All of a system's results."""
    return list(system.stream(iter(frames)))


def generate(world: World, frames: Tensor) -> list[Tensor]:
    """A world model's video of as many frames, from the first: straight ahead, to a wall at 10 m."""
    T, _, H, W = frames.shape
    like = next(world.parameters())
    K = torch.tensor([[W / 2, 0, W / 2], [0, W / 2, H / 2], [0, 0, 1]])
    poses = torch.eye(4).repeat(T, 1, 1)
    poses[:, 2, 3] = torch.arange(T) / 10
    cameras = [Camera.from_pose(K, pose, W, H) for pose in poses]

    def wall(seen: Tensor, from_where: list[Camera]) -> Geometry:
        z = torch.stack([10 - camera.camera_to_world[2, 3] for camera in from_where])
        return Geometry(z[:, None, None].expand(-1, H, W).to(like.device))
    first = frames[0].to(like)
    draws = Generator(like.device).manual_seed(0)
    return [x for _, x in world.generate(first, wall(first, cameras[:1]), cameras, wall, draws)]


def diffusers_5b(ours: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """diffusers' parts of a Mirage, for frames [T, 3, H, W]; sides are cut to multiples of 16, which it wants."""
    theirs = published.diffusers_5b(device)

    def run(frames: Tensor) -> Tensor:
        H, W = frames.shape[2:]
        clip = frames[..., : H // 16 * 16, : W // 16 * 16].movedim(0, 1)[None]
        return theirs(clip.to(device, torch.bfloat16))
    return run


def diffusers_r3d2(ours: nn.Module, device: str) -> Callable[[Tensor], list[Tensor]]:
    """diffusers' parts of an R3D2, on its weights, frame by frame as ours."""
    theirs = published.DiffusersR3D2(ours)
    return lambda frames: [theirs(frame[None].to(device, torch.bfloat16)).cpu() for frame in frames]


def r3d2(name: str) -> Callable[[str], nn.Module]:
    """Its maker, in bfloat16."""
    return functools.partial(published.r3d2, name, dtype=torch.bfloat16)


MIRAGE_SIZES = [(9, 512, 768), (49, 480, 832), (49, 720, 1280), (49, 1080, 1920)]
CASES = [
    Case("Mirage, CogVideoX1.5-5B", published.mirage_5b, MIRAGE_SIZES, stream, measuring.STAGES, diffusers_5b),
    Case("Mirage, Wan 2.1 1.3B", functools.partial(published.mirage_wan, "1.3B"), MIRAGE_SIZES[:3], stream),
    Case("Mirage, Wan 2.1 14B", functools.partial(published.mirage_wan, "14B"), MIRAGE_SIZES[:3], stream),
    Case("R3D2", r3d2("R3D2"), [(8, 1080, 1920)], stream, None, diffusers_r3d2),
    Case("R3D2-BIG", r3d2("R3D2-BIG"), [(8, 1080, 1920)], stream, None, diffusers_r3d2),
    Case("DiffusionHarmonizer, 0.6B", published.harmonizer, [(16, 576, 1024)], stream),
    Case("DOVE, CogVideoX1.5-5B, 4 times", published.dove, [(25, 180, 320)], stream),
    Case("artifact removal, Wan 2.1 1.3B", published.artifact_remover, [(49, 480, 832)], stream),
    Case("world model, Wan 2.2 TI2V-5B, 20 steps", published.world, [(33, 704, 1280)], generate),
]


# ---- measuring -------------------------------------------------------------------------------------------------------

def wait(device: str) -> None:
    """Until the GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak(device: str, n: int = 8192, repeat: int = 20) -> float:
    """Operations a second of the product of two n x n matrices in bfloat16, the best of this many."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(repeat + 2):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def timed(call: Callable[[], object], device: str, repeat: int = 2) -> dict[str, float]:
    """Operations, seconds and GiB above what there was, of a call that is made once before it is timed."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with FlopCounterMode(display=False) as count:
        call()
    found = {"operations": count.get_total_flops(), "seconds": float("inf"), "GiB": 0.0}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found["seconds"] = min(found["seconds"], time.perf_counter() - start)
    if device == "cuda":
        found["GiB"] = (torch.cuda.max_memory_allocated() - before) / GIB
    return found


def measured(call: Callable[[], dict]) -> dict:
    """What a measurement gives; if it fails, {"failed": why}, in a few words."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except (RuntimeError, ValueError, ImportError) as error:
        return {"failed": str(error).strip().split("\n")[0][:80]}
    finally:
        free()


@torch.no_grad()
def measure(case: Case, size: Size, device: str) -> dict:
    """All figures of a system and a size of clip."""
    T, H, W = size
    torch.manual_seed(0)
    frames = torch.rand(T, 3, H, W) * 2 - 1
    system = case.make(device)
    row = timed(lambda: case.run(system, frames), device)
    if case.stages:
        with measuring.stopwatch(case.stages, functools.partial(wait, device)) as spent:
            case.run(system, frames)
        row["stages"] = dict(spent)
    if case.theirs:
        row["diffusers"] = measured(lambda: run_theirs(case, system, frames, device))
    return row


def run_theirs(case: Case, system: nn.Module, frames: Tensor, device: str) -> dict:
    """The figures of diffusers' parts; those of ours that they do not share stay in memory, and are not counted."""
    theirs = case.theirs(system, device)
    return timed(lambda: theirs(frames), device)


# ---- the document ----------------------------------------------------------------------------------------------------

def figures_of(row: dict, frames: int, best: float) -> list[str]:
    """A table's cells: frames a second, GiB, TFLOP a frame, share of the peak."""
    if "failed" in row:
        return [row["failed"], "", "", ""]
    speed = row["operations"] / row["seconds"]
    return [f"{frames / row['seconds']:.3g}", f"{row['GiB']:.1f}", f"{row['operations'] / frames / 1e12:.3g}",
            f"{100 * speed / best:.0f} %"]


def report(found: dict) -> str:
    """The part of speed.md that `found`, this experiment's figures, fills."""
    best = found["peak"]
    text = (f"Measured by `python -m experiments.speed_gpu` on one {found['gpu']} (PyTorch {found['torch']}), random "
            f"weights, bfloat16.\nProducts of 8192×8192 matrices reach {best / 1e12:.0f} TFLOP/s there, of which the "
            "shares are. Memory\nis what a call takes above the weights.\n")
    rows = []
    for name, row in found["systems"].items():
        clip, _, size = name.rpartition(" ")
        frames = int(size.split("x")[0])
        theirs = figures_of(row["diffusers"], frames, best)[0] if "diffusers" in row else ""
        rows.append([clip, size.replace("x", "×"), *figures_of(row, frames, best), theirs])
    if rows:
        header = ["", "frames×rows×columns", "frames/s", "GiB", "TFLOP a frame", "of the peak", "diffusers', frames/s"]
        text += f"\n{common.table(header, rows)}\n"
    for name, row in found["systems"].items():
        if stages := row.get("stages"):
            shares = ", ".join(f"{stage} {100 * s / sum(stages.values()):.0f} %" for stage, s in stages.items())
            text += f"\nOf the time of {name}: {shares}.\n"
    rows = [[name, *([row["failed"], "", ""] if "failed" in row else [
        f"{row['seconds']:.3g}", f"{row['GiB']:.1f}", f"{100 * row['operations'] / row['seconds'] / best:.0f} %"])]
        for name, row in found["training"].items()]
    if rows:
        text += f"\n{common.table(['a training step of one clip', 'seconds', 'GiB', 'of the peak'], rows)}\n"
    return text


def fill(document: str, text: str) -> str:
    """A document with `text` between its marks; ValueError if it has not both of them once, in order."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"speed.md: wanted {BEGIN} and {END} in it, once each")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def save(args: argparse.Namespace, found: dict) -> None:
    """speed.json and speed.md with what has been found."""
    measuring.record(args.out / "speed.json", "gpu", found)
    document = (measuring.ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    common.save_text(args.out / "speed.md", fill(document, report(found)))


# ---- the day ---------------------------------------------------------------------------------------------------------

def run_parts(args: argparse.Namespace, cases: list[Case], recipes: list, device: str) -> dict:
    """Measure the parts that args.only names, of these systems and training recipes -> all figures.

    What an earlier run on the same card has found of the others is kept, and files are renewed after every row.
    """
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    path = args.out / "speed.json"
    before = json.loads(path.read_text()).get("gpu", {}) if path.exists() else {}
    found = {"gpu": gpu, "torch": torch.__version__, "peak": before.get("peak"), "systems": {}, "training": {}}
    if before.get("gpu") == gpu:
        found |= {part: before.get(part, {}) for part in ("systems", "training") if part not in args.only}
    if "peak" in args.only or before.get("gpu") != gpu or found["peak"] is None:
        found["peak"] = peak(device)
        print(f"{gpu}: {found['peak'] / 1e12:.1f} TFLOP/s", flush=True)
    jobs = [("systems", f"{case.name} {'x'.join(map(str, size))}", functools.partial(measure, case, size, device))
            for case in cases for size in case.sizes]
    jobs += [("training", f"{recipe.name}, {'×'.join(map(str, recipe.size))}",
              functools.partial(measure_step, recipe, device)) for recipe in recipes]
    for part, name, job in jobs:
        if part in args.only:
            found[part][name] = measured(job)
            print(f"{name}: {found[part][name]}", flush=True)
            save(args, found)
    save(args, found)
    return found


def measure_step(recipe: training_cost.Recipe, device: str) -> dict:
    """The figures of a clip's training step; its memory is above weights and adapters, gradients included."""
    return timed(training_cost.prepared(recipe, device), device)


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ValueError("it needs an NVIDIA GPU that this torch can use")
    run_parts(args, CASES, training_cost.RECIPES, "cuda")


def flags() -> argparse.ArgumentParser:
    parser = common.flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default all)")
    return parser


if __name__ == "__main__":
    common.start(main, flags())
