"""Harmonise a video: a naive insertion in, the same scene with shadows and matched light out (Mirage §3.2, Figure 2).

    python infer.py in.mp4 out.mp4
    python infer.py frames/ out.mp4 --set fps=10

Reads whatever PyAV decodes, or a folder of images; writes an mp4, or a folder of PNGs if the output does not end in
.mp4. Size, number, order and times of the frames stay, and the sound. The video streams through the model, so a long
one takes time but no more memory; the output appears when it is complete, or never.

Exit status: 0 done; 2 the input, the model or a flag is wrong, and one line says how; 128 and its number: a signal.
"""

import argparse
import ctypes
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import av
import torch
from torch import Tensor
from torch.nn import functional as nnf
from tqdm import tqdm

from mirage_min.data.video import Video, is_mp4, writing
from mirage_min.systems.mirage import Mirage
from mirage_min.training import run

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Settings:
    """What is rarely changed, by --set key=value."""

    crf: int = 16                  # quality of the mp4: 0 is lossless, 51 the worst
    preset: str = "fast"           # of x264: slower ones make smaller files
    fps: float = 25.0              # frames a second of a folder of images
    at_height: int = 0             # harmonise at this height, and add what changed, enlarged, to the frames; 0: as is
    tiles: int = 1                 # rows and columns into which large frames are cut for the VAEs
    margin: int = 8                # latent cells around each of them


def main(args: argparse.Namespace, settings: Settings) -> None:
    check_paths(args.input, args.output, args.overwrite)
    device = run.choose_device(args.device)
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if device == "cuda" else torch.float32)
    with Video(args.input, settings.fps, args.skip_broken) as video:
        output = video.format
        if min(output.width, output.height) < 16:
            raise ValueError(f"{args.input}: frames are {output.width}x{output.height}, wanted at least 16x16")
        if args.compare:
            output = replace(output, width=2 * output.width)
        if is_mp4(args.output) and (output.width % 2 or output.height % 2):
            print(f"note: {output.width}x{output.height} is odd, so the mp4 is yuv444p, which not every player shows",
                  file=sys.stderr)
        mirage = Mirage.from_pretrained(args.model, base=args.base, vae2d=args.vae2d, device=device, dtype=dtype)

        start, count = time.time(), 0
        sound = None if args.input.is_dir() else args.input
        harmonise = partial(mirage.stream, window=args.window, tiles=settings.tiles, margin=settings.margin)
        with writing(args.output, output, settings.crf, settings.preset, sound) as out, ThreadPoolExecutor(1) as writer:
            originals = deque()  # frames that the model was given and has not yet given back
            frames = remember(video, originals) if args.compare else video
            stream = at_height(settings.at_height, harmonise, frames) if settings.at_height else harmonise(frames)
            writes = deque()     # they go on while the model works
            for x_dr in tqdm(stream, total=video.count, unit="frame", leave=False, disable=None):  # None: off in a pipe
                if args.compare:
                    x_dr = torch.cat([originals.popleft(), x_dr], dim=2)             # [3, H, 2 W]
                writes.append(writer.submit(out.write, x_dr, *video.times.popleft()))
                if len(writes) > 4:
                    writes.popleft().result()
                count += 1
            for write in writes:
                write.result()
    if video.broken:
        print(f"note: {len(video.broken)} frames did not decode and repeat the one before: "
              f"{', '.join(map(str, video.broken[:8]))}{', ...' * (len(video.broken) > 8)}", file=sys.stderr)
    print(f"{args.output}: {count} frames, {count / (time.time() - start):.2f} frames/s, {peak_memory()}")


def remember(frames: Iterable[Tensor], kept: deque[Tensor]) -> Iterator[Tensor]:
    for frame in frames:
        kept.append(frame)
        yield frame


def at_height(height: int, harmonise: Callable, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """x + enlarge(harmonise(s) - s) with s = shrink(x): light and shadow by a model that knows small frames, the detail
    from the frames themselves. height: pixels of s; its width keeps the shape of the frame.
    """
    waiting = deque()  # x and s of the frames that the model has not yet given back

    def shrunk() -> Iterator[Tensor]:
        for x in frames:
            H, W = x.shape[-2:]
            if not 16 <= height <= H or round(W * height / H) < 16:
                raise ValueError(f"at_height must be from 16 to the frames' own {H} and leave 16 columns, got {height}")
            s = nnf.interpolate(x[None], (height, round(W * height / H)), mode="bilinear", antialias=True)[0]
            waiting.append((x, s))
            yield s

    for harmonised in harmonise(shrunk()):
        x, s = waiting.popleft()
        change = nnf.interpolate((harmonised - s)[None], x.shape[-2:], mode="bilinear")[0]
        yield (x + change).clamp(-1, 1)


def check_paths(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, what could not be written or would destroy something."""
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if source.exists() and target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the input, which is not overwritten")
    if target.resolve() in source.resolve().parents:
        raise ValueError(f"{target}: holds the input, which would be lost with it")
    if not is_mp4(target) and (target.is_file() or (is_media(target) and not target.is_dir())):
        raise ValueError(f"{target}: the output is NAME.mp4, or a folder for PNGs")
    if target.is_dir() and os.path.ismount(target):
        raise ValueError(f"{target}: is a mount point, which cannot be replaced whole: name a folder inside it")
    names = sorted(os.listdir(target)) if target.is_dir() else [target.name] * target.exists()
    if names and not overwrite:
        raise ValueError(f"{target}: exists (--overwrite replaces it)")
    if target.is_dir() and (others := [name for name in names if not re.fullmatch(r"\d{6}\.png", name)]):
        raise ValueError(f"{target}: not replaced, for it holds more than numbered PNGs: {others[0]}")


def is_media(path: Path) -> bool:
    """Whether libav knows the ending of this name as that of a file that it can write."""
    formats = (av.ContainerFormat(name) for name in av.formats_available)
    return any(path.suffix[1:].lower() in f.extensions for f in formats if f.is_output)


def peak_memory() -> str:
    """The most memory that this process, and on a GPU its tensors, took at any time."""
    peak = "unknown"
    if sys.platform == "linux":  # where getrusage counts in the process that started this one
        kib = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        peak = f"{int(kib) / 2**20:.2f} GiB"
    elif sys.platform == "darwin":
        import resource  # Windows has none

        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30:.2f} GiB"
    gpu = f" + {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU" if torch.cuda.is_initialized() else ""
    return f"peak memory {peak}{gpu}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    def one_line_each(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=30, width=120)

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=one_line_each)
    parser.add_argument("input", type=Path, help="a video that PyAV decodes, or a folder of images")
    parser.add_argument("output", type=Path, help="NAME.mp4, or a folder for PNGs")
    parser.add_argument("--model", type=Path, metavar="DIR", default=Path(__file__).parent / "weights",
                        help="folder with the trained adapters (default: the small model in weights/)")
    parser.add_argument("--base", metavar="ID",
                        help="folder or hub id of what they were trained on (default: as they say)")
    parser.add_argument("--vae2d", metavar="ID", help="folder or hub id of the AutoencoderKL (default: as they say)")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", metavar="NAME",
                        help="cuda, mps, cpu or auto (default: auto, the first of them that is there)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", metavar="TYPE",
                        help=f"{', '.join(DTYPES)} or auto (default: auto, bfloat16 on cuda and float32 elsewhere)")
    parser.add_argument("--window", type=int, metavar="N",
                        help="latents that the transformer sees at once (default: the model's own)")
    parser.add_argument("--compare", action="store_true", help="write input and result side by side")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--skip-broken", action="store_true",
                        help="where a frame does not decode, repeat the one before instead of giving up")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="crf=16 and preset=fast (x264), fps=25 (of images), at_height=0 (off), tiles=1, margin=8")
    return parser.parse_args(argv)


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    try:
        args = parse(argv)
        main(args, run.override(Settings(), args.set))
    except (ValueError, OSError, av.FFmpegError) as error:
        print("infer.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in reason:
            raise
        print("infer.py: the memory does not suffice (--set tiles=2 takes less):", reason, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        print(f"infer.py: stopped by {number.name}; nothing was written", file=sys.stderr)
        return 128 + number
    return 0


def steady_heap() -> None:
    """Memory that does not grow with the video, for less time; to be called before the first large tensor is made.

    glibc hands back every block of 256 KiB or more: kept, they would fragment its heap, which grows for the first 100
    frames. Pages of 2 MiB then make asking for them again cheap (Linux; PyTorch looks for this variable).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD


def interrupt(number: int, _) -> None:
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)  # a second one must not cut off the cleaning up
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    steady_heap()
    for each in STOPPING:
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup
            signal.signal(each, interrupt)
    sys.exit(cli())
