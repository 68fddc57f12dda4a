"""Seconds and memory: of a call, of a model's stages, of one of the project's own scripts."""

import argparse
import ctypes
import gc
import inspect
import json
import re
import runpy
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from experiments.common import save_json
from mirage_min.data.video import Format, writing
from mirage_min.networks.vae_cogvideox import CogVideoXVAE
from mirage_min.systems.mirage import Mirage

ROOT = Path(__file__).parents[1]
STAGES = {"3D encoder": (CogVideoXVAE, "encode_group"), "transformer": (Mirage, "denoise"),
          "2D encoder": (Mirage, "mids"), "3D decoder": (CogVideoXVAE, "decode_group")}


def process_memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process, in bytes; Linux."""
    return 1024 * int(re.search(field + r":\s*(\d+)", Path("/proc/self/status").read_text())[1])


def timed(call: Callable[[], object]) -> tuple[float, int]:
    """(seconds, bytes that the process took at most above what it had before) of a call; Linux."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before, start = process_memory("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, process_memory("VmHWM") - before


@contextmanager
def stopwatch(methods: dict[str, tuple[type, str]], wait: Callable[[], None] = lambda: None
              ) -> Iterator[dict[str, float]]:
    """Lends {stage: seconds}, to which every call of a stage's method adds while the block runs.

    methods: {stage: (class, name of the method)}; wait is called before and after, to let a GPU finish.
    """
    spent = defaultdict(float)
    originals = {stage: inspect.getattr_static(*method) for stage, method in methods.items()}
    try:
        for stage, (owner, name) in methods.items():
            setattr(owner, name, watched(getattr(owner, name), stage, spent, wait))
        yield spent
    finally:
        for stage, (owner, name) in methods.items():
            setattr(owner, name, originals[stage])


def watched(call: Callable, stage: str, spent: dict[str, float], wait: Callable[[], None]) -> Callable:
    """A method that does what `call` does, and adds its seconds to spent[stage]."""
    def method(*args, **kwargs):
        wait()
        start = time.perf_counter()
        out = call(*args, **kwargs)
        wait()
        spent[stage] += time.perf_counter() - start
        return out
    return method


# ---- infer.py as a user runs it --------------------------------------------------------------------------------------

def noise_clip(path: Path, T: int, H: int, W: int) -> Path:
    """An mp4 of T frames of blocks of random colours: it compresses badly, so its packets are large."""
    draws = torch.Generator().manual_seed(0)
    with writing(path, Format(W, H)) as out:
        for t in range(T):
            blocks = torch.rand(3, -(-H // 4), -(-W // 4), generator=draws)
            frame = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :H, :W]
            out.write(frame * 2 - 1, t, 1)
    return path


def run_script(name: str, *argv) -> None:
    """Run one of the project's scripts in this process, as from the command line; ValueError if it fails."""
    before = sys.argv
    sys.argv = [name, *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise ValueError(f"{name} ended with status {end.code}") from end
    finally:
        sys.argv = before


def peak_of_script(name: str, *argv) -> int:
    """Bytes that a process of one of the project's scripts took at most; Linux. ValueError if it fails."""
    probe = ("import experiments.measuring as m, sys\n"
             "m.run_script(*sys.argv[1:])\nprint()\nprint(m.process_memory('VmHWM'))")
    run = subprocess.run([sys.executable, "-c", probe, name, *map(str, argv)], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE)
    if run.returncode:
        raise ValueError(f"{name} ended with status {run.returncode}")
    return int(run.stdout.split()[-1])


# ---- results ---------------------------------------------------------------------------------------------------------

def record_parts(path: Path, parts: dict[str, Callable], args: argparse.Namespace, prefix: str = "") -> None:
    """Measure those of the parts that args.part names, with args.threads threads, and record each under its name."""
    torch.set_num_threads(args.threads)
    for part in args.part:
        record(path, prefix + part, parts[part](args))


def record(path: Path, part: str, figures: dict) -> None:
    """Put a part's figures into a JSON file, in the place of its last ones, with what they depend on."""
    before = json.loads(path.read_text()) if path.exists() else {}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    save_json(path, before | {part: figures | about})
