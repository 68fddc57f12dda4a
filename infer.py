"""Harmonise a video: a naive insertion in, the same scene with shadows and matched light out (Mirage §3.2, Figure 2).

    python infer.py in.mp4 out.mp4
    python infer.py frames/ out.mp4 --set fps=10
    python infer.py in.mp4 out.mp4 --model my_r3d2 --set batch=4 --set keep=boxes.json
    python infer.py in.mp4 out.mp4 --report           # and out.html: input and result under a slider, tone, flicker
    python infer.py small.mp4 large.mp4 --model DOVE --set task=dove --set prompt=empty.safetensors
    python infer.py in.mp4 out.mp4 --model my_inpainting --mask mask.png           # or a video, or a box 40,20,120,80
    python infer.py clips/ out/                       # a folder of videos; torchrun's processes share them

Reads whatever PyAV decodes, a folder of images, or a pair's NAME.safetensors; writes an mp4, NAME.safetensors, or a
folder of PNGs if the output ends in neither. Size, number, order and times of the frames stay, and the sound; a model
that enlarges changes the size alone. The video streams through the model, so a long one takes time but no more memory;
the output appears when it is complete, or never. Which system the model's folder holds, and so what else --set takes,
is read from the folder (systems/load.py).

Of a folder of videos each becomes NAME.mp4 in the output, whole. Existing ones are skipped, so the same command
continues; one that cannot be done is reported, and the others are done. What is no video is passed over and named.

Exit status: 0 done; 1 a video of a folder could not be done; 2 the input, the model or a flag is wrong, and one line
says how; 128 + its number after a signal.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds
    desk.steady_heap()

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import av
import torch
from torch import Tensor
from torch.nn import functional as nnf

from mirage_min.data import desk, place, report
from mirage_min.data.keep import keep, read_boxes
from mirage_min.data.masks import read_mask
from mirage_min.data.pictures import videos_in
from mirage_min.data.video import Video, is_mp4, writing
from mirage_min.networks.card import fields_of_card
from mirage_min.networks.checked import Within
from mirage_min.systems.load import system_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LESS_MEMORY = "--set tiles=2 takes less"


@dataclass
class Settings:
    """What --set key=value changes; the options of the system are added to it."""

    crf: Annotated[int, Within(0, 51)] = 16  # quality of the mp4: 0 is lossless, 51 the worst
    preset: str = "fast"                     # of x264: slower ones make smaller files
    fps: float = 25.0                        # frames a second of a folder of images
    at_height: int = 0                       # harmonise at this height, and add what changed, enlarged; 0: as is
    keep: str = ""                           # a file of boxes (data/keep.py): outside of them nothing changes
    edge: Annotated[float, Within(0)] = 8.0  # pixels over which the change rises inside a box's border


def main(args: argparse.Namespace) -> int:
    args.videos, args.passed_over = videos_in(args.input)
    if not args.videos:
        place.check_output(args.input, args.output, args.overwrite)
    device = desk.choose_device(args.device)
    dtype = DTYPES.get(args.dtype) or choose_dtype(device, args.model)
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and not args.videos:
        raise ValueError(f"{args.input}: processes share a folder of videos; one video takes one process")
    device = f"cuda:{local}" if device == "cuda" and world > 1 else device
    System = system_in(args.model)
    settings, options = choose(System, args)
    if args.mask is not None and not hasattr(System, "masked"):
        raise ValueError(f"{args.model}: holds a {System.__name__}, which takes no mask (--mask)")
    load = cache(partial(System.from_pretrained, args.model, device=device, dtype=dtype, **options))
    if args.videos:
        return harmonise_all(args.videos[rank::world], load, args, settings)
    harmonise(args.input, args.output, load, args, settings)
    return 0


def harmonise_all(videos: list[Path], load: Callable, args: argparse.Namespace, settings: Settings) -> int:
    """Each video -> NAME.mp4 in the folder args.output, unless that exists. Returns the exit status.

    ValueError if args.output is not a folder, or is the input.
    """
    if is_mp4(args.output) or place.is_clip(args.output) or args.output.is_file():
        raise ValueError(f"{args.output}: wanted a folder for the results of a folder of videos")
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output}: is the input: name another folder")
    args.output.mkdir(exist_ok=True)
    targets = {video: args.output / f"{video.stem}.mp4" for video in videos}
    left = [video for video in videos if args.overwrite or not targets[video].exists()]
    failed = 0
    if left:
        load()  # once, and what is wrong with it is not a video's fault
    for number, video in enumerate(left, 1):
        try:
            harmonise(video, targets[video], load, args, settings, f"{number} of {len(left)}")
        except (ValueError, OSError, av.FFmpegError) as error:
            desk.say_error(f"infer.py: {error}")
            failed += 1
        except (MemoryError, RuntimeError) as error:
            if not desk.lacks_memory(error):
                raise
            desk.say_error(f"infer.py: {video}: the memory does not suffice ({LESS_MEMORY})")
            failed += 1
    passed_over = ", ".join(args.passed_over[:8]) + ", ..." * (len(args.passed_over) > 8)
    desk.say(f"{args.output}: {len(left) - failed} videos done, {len(videos) - len(left)} were there, {failed} failed"
             + f"; passed over: {passed_over}" * bool(passed_over))
    return 1 if failed else 0


def harmonise(source: Path, target: Path, load: Callable, args: argparse.Namespace, settings: Settings,
              label: str | None = None) -> None:
    """One video from file to file; load() returns the system, label is put before the progress bar.

    ValueError of one line if video, settings and system do not fit, or the place of the output is taken.
    """
    page = target.with_name(f"{target.stem if is_mp4(target) or place.is_clip(target) else target.name}.html")
    if args.report and page.exists() and not args.overwrite:
        raise ValueError(f"{page}: exists (--overwrite replaces it)")
    comparison = report.Comparison("input", "result")
    with Video(source, settings.fps, args.skip_broken) as video:
        output = video.format
        if min(output.width, output.height) < 16:
            raise ValueError(f"{source}: frames are {output.width}x{output.height}, wanted at least 16x16")
        system = load()
        scale = getattr(system, "scale", 1)
        if scale > 1 and (settings.at_height or settings.keep):
            raise ValueError(f"{args.model}: enlarges {scale} times, which at_height and keep do not follow")
        output = replace(output, width=scale * output.width, height=scale * output.height)
        if args.compare:
            output = replace(output, width=2 * output.width)
        if is_mp4(target) and (output.width % 2 or output.height % 2):
            video.notes.append(f"{output.width}x{output.height} is odd, so the mp4 is yuv444p, which not every player "
                               "shows")
        for note in video.notes:
            desk.say_error(f"note: {note}")
        stream = adjusted(system.stream, video, source, args, settings)

        start, count = time.time(), 0
        with (writing(target, output, settings.crf, settings.preset, source, args.overwrite) as out,
              ThreadPoolExecutor(1) as writer):
            originals = deque()  # frames that the model was given and has not yet given back
            results = stream(remember(video, originals) if args.compare or args.report else video)
            writes = deque()     # they continue while the model works
            for x_dr in desk.bar(results, total=video.count, unit="frame", desc=label):
                original = originals.popleft() if originals else None
                if scale > 1 and original is not None:
                    original = nnf.interpolate(original[None], x_dr.shape[1:], mode="bilinear")[0]
                if args.report:
                    comparison.add(original, x_dr)
                if args.compare:
                    x_dr = torch.cat([original, x_dr], dim=2)                        # [3, H, 2 W]
                writes.append(writer.submit(out.write, x_dr, *video.times.popleft()))
                if len(writes) > 4:
                    writes.popleft().result()
                count += 1
            for write in writes:
                write.result()
            if not args.videos:
                desk.ignore_signals()  # the output is about to appear: a signal now would be reported to leave none
    if args.report:
        report.write(page, f"{source.name}, harmonised", {"": comparison})
    if video.broken:
        desk.say_error(f"note: {len(video.broken)} frames did not decode and repeat the one before: "
                       f"{', '.join(map(str, video.broken[:8]))}{', ...' * (len(video.broken) > 8)}")
    desk.say(f"{target}: {count} frames, {count / (time.time() - start):.2f} frames/s, {desk.peak_memory()}")


def adjusted(stream: Callable, video: Video, source: Path, args: argparse.Namespace, settings: Settings) -> Callable:
    """A system's stream with what was asked for: a mask, another height, and boxes outside of which nothing changes."""
    boxes = read_boxes(settings.keep, source.stem) if settings.keep else None
    if args.mask is not None:
        stream = partial(stream, masks=read_mask(args.mask, video.format.height, video.format.width))
    if settings.at_height:
        stream = partial(at_height, settings.at_height, stream)
    if boxes is not None:
        stream = partial(keep, stream, boxes=boxes, edge=settings.edge)
    return stream


def choose(System: type, args: argparse.Namespace) -> tuple[Settings, dict]:
    """All settings, and of them those for System.from_pretrained; --base, --vae2d and --window are settings too."""
    flags = {name: getattr(args, name) for name in ("base", "vae2d", "window")}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    both = make_dataclass("Both", [], bases=(System.Options, Settings))
    settings = desk.override(both(), given + args.set)
    return settings, {field.name: getattr(settings, field.name) for field in fields(System.Options)}


def choose_dtype(device: str, model: Path) -> torch.dtype:
    """bfloat16 on cuda; on a CPU with AMX too, if the model's card says what that moves; else float32."""
    tried = device != "cpu" or "bfloat16" in fields_of_card(model)
    return torch.bfloat16 if tried and desk.bfloat16_is_faster(device) else torch.float32


def remember(frames: Iterable[Tensor], kept: deque[Tensor]) -> Iterator[Tensor]:
    """The same frames [3, H, W]; each is appended to `kept` as it passes."""
    for frame in frames:
        kept.append(frame)
        yield frame


def at_height(height: int, harmonise: Callable, frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """x + enlarge(harmonise(s) - s) with s = shrink(x), for frames x [3, H, W] in [-1, 1]: light and shadow by a model
    that knows small frames, the detail from the frames themselves.

    height: pixels of s; its width keeps the shape of the frame. ValueError if it is above H, or s below 16 x 16.
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    def one_line_each(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=30, width=120)

    parser = argparse.ArgumentParser(description=desk.first_line(__doc__), formatter_class=one_line_each)
    parser.add_argument("input", type=Path, help="a video, a pair's file, a folder of images, or one of videos")
    parser.add_argument("output", type=Path, help="NAME.mp4, NAME.safetensors, or a folder for PNGs or for the results")
    parser.add_argument("--model", type=Path, metavar="DIR", default=Path(__file__).parent / "weights",
                        help="folder or hub id of a trained system (default: the small Mirage in weights/)")
    parser.add_argument("--base", metavar="ID",
                        help="folder or hub id of what a Mirage was trained on (default: as it says)")
    parser.add_argument("--vae2d", metavar="ID", help="folder or hub id of its AutoencoderKL (default: as it says)")
    parser.add_argument("--mask", metavar="MASK",
                        help="for inpainting: what is filled, white in a picture or a video, or a box x0,y0,x1,y1")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", metavar="NAME",
                        help="cuda, mps, cpu or auto (default: auto, the first that this machine has)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", metavar="TYPE",
                        help=f"{', '.join(DTYPES)} or auto (default: auto; bfloat16 where it is faster)")
    parser.add_argument("--window", type=int, metavar="N",
                        help="latents that its transformer sees at once (default: its own)")
    parser.add_argument("--compare", action="store_true", help="write input and result side by side")
    parser.add_argument("--report", action="store_true", help="write NAME.html next to the output: what has changed")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--skip-broken", action="store_true",
                        help="where a frame does not decode, repeat the one before instead of giving up")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="crf=16, preset=fast, fps=25, at_height=0, keep=BOXES.json, edge=8, what the model takes")
    return parser.parse_args(argv)


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    args = parse(argv)
    args.videos = []

    def stopped() -> str:
        return f"; what is in {args.output} is whole, and the same command continues" if args.videos else desk.NOTHING

    return desk.serve("infer.py", lambda: main(args), stopped, memory=LESS_MEMORY)


if __name__ == "__main__":
    sys.exit(cli())
