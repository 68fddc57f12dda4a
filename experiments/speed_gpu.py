"""The whole of Mirage at CogVideoX1.5-5B's size on a GPU, random weights, bfloat16, against diffusers' parts.

    python -m experiments.speed_gpu      # minutes; needs diffusers and an NVIDIA GPU with 40 GiB or more

Adds to speed.json, for each size of video: frames a second, memory above the weights, the seconds of each stage, and
the frames a second that an H200 would make if every counted operation ran at its peak.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments import common, measuring, published
from experiments.common import GIB, H200_BF16

SIZES = [(9, 512, 768), (49, 480, 832), (49, 720, 1280), (49, 1080, 1920)]  # frames, rows, columns


def run_twice(call: Callable[[], object], frames: int, weights: int) -> dict[str, float] | str:
    """Frames a second and GiB above the weights of the second of two calls: the first chooses kernels."""
    try:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"fps": frames / seconds, "GiB": (torch.cuda.max_memory_allocated() - weights) / GIB}
    except torch.OutOfMemoryError:
        return "out of memory"


@torch.no_grad()
def measure_size(size: tuple[int, int, int], ours, theirs: Callable[[Tensor], Tensor], on_meta) -> dict:
    """All figures of one size of video, frames x rows x columns; on_meta is `ours` again, on the meta device."""
    T, H, W = size
    x = torch.rand(T, 3, H, W).mul(2).sub(1)
    whole = x.movedim(0, 1)[None, ..., : H // 16 * 16, : W // 16 * 16].to(torch.bfloat16)  # what diffusers takes
    with FlopCounterMode(display=False) as count:
        on_meta(whole.to("meta"))
    row = {"flops": count.get_total_flops(), "fps_limit": T * H200_BF16 / count.get_total_flops()}
    weights = torch.cuda.memory_allocated()
    row["ours"] = run_twice(lambda: list(ours.stream(iter(x))), T, weights)
    clip = whole.to("cuda")
    row["diffusers"] = run_twice(lambda: theirs(clip), T, torch.cuda.memory_allocated())
    with measuring.stopwatch(measuring.STAGES, torch.cuda.synchronize) as spent:
        start = time.perf_counter()
        list(ours.stream(iter(x)))
        row["seconds_staged"] = time.perf_counter() - start  # it waits between stages
    return row | {"stages": dict(spent)}


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ValueError("it needs an NVIDIA GPU that this torch can use")
    ours, theirs = published.mirage_5b("cuda"), published.diffusers_5b("cuda")
    on_meta, rows = published.mirage_5b("meta"), {"gpu": torch.cuda.get_device_name()}
    for T, H, W in SIZES:
        rows[f"{T}x{H}x{W}"] = measure_size((T, H, W), ours, theirs, on_meta)
        print(f"{T}x{H}x{W}: {rows[f'{T}x{H}x{W}']}")
    measuring.record(args.out / "speed.json", "gpu", rows)


def flags() -> argparse.ArgumentParser:
    return common.flags(__doc__)


if __name__ == "__main__":
    common.start(main, flags())
