"""Make a video from one frame: a world model drives along a path and remembers what it has seen (arXiv 2606.09828).

    python -m mirage_min.data.world_scene --out scene --seed 1000001 --path loop
    python generate.py scene out.mp4 --model my_world                      # along the scene's own cameras
    python generate.py scene out.mp4 --model my_world --path out_and_back --frames 33
    python generate.py scene out.mp4 --model my_world --depth depth.pt     # a depth network: TorchScript or NAME.onnx

This is the world model called Mirage, not Mirage, the harmoniser, whose command is infer.py. SCENE is a folder with a
frame, its depth and cameras, or a geometry.npz (mirage_min/data/world_scene.py). The video is made chunk by chunk
(mirage_min/systems/world.py); the first frame is the given one. The depth of what is generated comes from the network
of --depth; in a made-up scene, whose folder says so, the renderer knows it.

A path may lead out of all that is known: each chunk says how many of its cells the memory showed. The output is an mp4,
NAME.safetensors, or a folder of PNGs if it ends in neither, and appears when it is complete, or never.

Exit status: 0 done; 2 the scene, the model or a flag is wrong, and one line says how; 128 and its number: a signal.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds
    desk.steady_heap()

import argparse
import sys
import time
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Generator

from mirage_min.data import desk, place
from mirage_min.data.toy_paths import PATHS
from mirage_min.data.video import Format, is_mp4, rational, writing
from mirage_min.data.world_scene import Known, WorldScene, read_world_scene, toy_scene, way_through
from mirage_min.method.camera import Camera
from mirage_min.networks.checked import Within
from mirage_min.systems.observe import DepthNetwork, ToyDepth
from mirage_min.systems.world import Geometry, Observe, World

SHIPPED = Path(__file__).parent / "weights" / "world"
MOST = 100_000  # frames of a path: a camera for each is held
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Settings:
    """What is rarely changed, by --set key=value; what the model takes is added to it."""

    seed: Annotated[int, Within(0, 2**40)] = 0  # of the noise
    views: Annotated[int, Within(0)] = 1        # frames with depth that begin the memory; 0: all that the scene has
    way: Annotated[float, Within(0)] = 0.0      # how far --path leads, in the unit of the poses; 0: it is chosen
    crf: Annotated[int, Within(0, 51)] = 16     # quality of the mp4: 0 is lossless, 51 the worst
    preset: str = "fast"                        # of x264: slower ones make smaller files
    fps: float = 10.0


def main(args: argparse.Namespace) -> None:
    place.check_output(args.scene, args.output, args.overwrite)
    if args.model == SHIPPED and not SHIPPED.is_dir():
        raise ValueError(f"{SHIPPED}: no small world model is there: wanted --model DIR, a folder that train_world.py "
                         "has written")
    device = desk.choose_device(args.device)
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if device == "cuda" else torch.float32)
    settings, options = choose(args)
    scene = read_world_scene(args.scene)
    desk.say(f"{args.scene}: {len(scene.cameras)} cameras, {len(scene.known)} frames with depth; depth and poses " +
             ("cannot be compared" if scene.off is None else f"are off each other by {scene.off}"))
    world = World.from_pretrained(args.model, device=device, dtype=dtype, **options)
    cameras = choose_cameras(scene, args, settings, world)
    observe = choose_observer(scene, args, device)

    if settings.views > len(scene.known):
        raise ValueError(f"{args.scene}: depth of {len(scene.known)} frames, wanted views={settings.views}")
    first, *others = scene.known[: settings.views or None]
    H, W = first.frame.shape[1:]
    output = Format(W, H, rational(settings.fps), 1 / rational(settings.fps))
    if is_mp4(args.output) and (W % 2 or H % 2):
        desk.say_error(f"note: {W}x{H} is odd, so the mp4 is yuv444p, which not every player shows")
    draws, began, seen = Generator().manual_seed(settings.seed), time.time(), []
    with writing(args.output, output, settings.crf, settings.preset, overwrite=args.overwrite) as out:
        memory = None
        for known in [*others, first]:
            state = world.start(*placed(known, device, dtype), memory)
            memory = state.memory
        out.write(first.frame, 0, 1)
        done, bar = 1, desk.bar(total=len(cameras), initial=1, unit="frame")
        while done < len(cameras):
            ahead = cameras[done : done + world.room(state)]
            state, x = world.step(state, ahead, observe, draws)        # x [1, 3, n, H, W]
            for frame in x[0].unbind(dim=1):
                out.write(frame, done, 1)
                done += 1
            seen.append(state.seen)
            bar.update(len(ahead))
        bar.close()
        desk.ignore_signals()  # the output is about to appear: a signal now would be reported as if it had not
    desk.say(f"cells of each chunk that the memory showed: {', '.join(f'{share:.0%}' for share in seen)}; "
             f"{len(state.memory):,} points in it now")
    desk.say(f"{args.output}: {len(cameras)} frames, {len(cameras) / (time.time() - began):.2f} frames/s, "
             f"{desk.peak_memory()}")


def placed(known: Known, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, Geometry, Camera]:
    """A known frame as World.start takes it."""
    dynamic = None if known.dynamic is None else known.dynamic[None].to(device)
    return known.frame.to(device, dtype), Geometry(known.depth[None].to(device), dynamic), known.camera


def choose(args: argparse.Namespace) -> tuple[Settings, dict]:
    """All settings, and those of World.from_pretrained that the command gives."""
    options = {field.name: field for field in fields(World.Options)}
    given = {setting.partition("=")[0] for setting in args.set}
    both = make_dataclass("Both", [], bases=(Settings, World.Options))
    settings = desk.override(both(), args.set)
    return settings, {name: getattr(settings, name) for name in options if name in given}


def choose_cameras(scene: WorldScene, args: argparse.Namespace, settings: Settings, world: World) -> list[Camera]:
    """The cameras of the video. ValueError if there are fewer than asked for, or than one chunk has."""
    if args.path == "scene":
        cameras = scene.cameras[: args.frames]
        if len(cameras) < (args.frames or 2):
            raise ValueError(f"{args.scene}: holds {len(scene.cameras)} cameras, wanted {args.frames or 2} at least: "
                             f"--path {' or '.join(PATHS)} makes up others")
    else:
        cameras = way_through(scene, args.path, args.frames or 33, settings.way)
    chunk = 4 * (world.settings.latents - 1) + 1
    if len(cameras) < chunk:
        raise ValueError(f"{args.scene}: a path of {len(cameras)} cameras, wanted {chunk} at least, one chunk of "
                         f"{world.settings.latents} latents")
    return cameras


def choose_observer(scene: WorldScene, args: argparse.Namespace, device: str) -> Observe:
    """What knows the depth of generated frames: the network of --depth, or the renderer of a made-up scene."""
    if args.depth is None:
        if scene.toy is None:
            raise ValueError(f"{args.scene}: is no made-up scene: wanted --depth FILE, a depth network as TorchScript "
                             "or NAME.onnx, for the frames that are generated")
        return ToyDepth(toy_scene(scene.toy))
    first = scene.known[0]
    network = DepthNetwork(args.depth, device)
    network, off = network.matched(first.frame.to(device), first.depth.to(device), first.camera)
    desk.say(f"{args.depth}: times {network.scale:.3g}, its depth is that of the first frame up to {off:.1%} (median)")
    return network


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("scene", type=Path, help="a folder with transforms.json or geometry.npz")
    parser.add_argument("output", type=Path, help="NAME.mp4, NAME.safetensors, or a folder for PNGs")
    parser.add_argument("--model", type=Path, metavar="DIR", default=SHIPPED,
                        help="folder or hub id of a trained world model (default: the small one in weights/world)")
    parser.add_argument("--path", choices=["scene", *PATHS], default="scene",
                        help="scene: the scene's own cameras (default); others begin at its first")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of the video (default: all cameras, or 33)")
    parser.add_argument("--depth", type=Path, metavar="FILE",
                        help="a depth network, TorchScript or NAME.onnx; made-up scenes need none")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", metavar="NAME",
                        help="cuda, mps, cpu or auto (default: auto, the first of them that is there)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", metavar="TYPE",
                        help=f"{', '.join(DTYPES)} or auto (default: auto, bfloat16 on cuda and float32 elsewhere)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="seed=0, views=1, way=0, crf=16, preset=fast, fps=10, what the model takes: steps=20, ...")
    args = parser.parse_args(argv)
    if args.frames is not None and not 2 <= args.frames <= MOST:
        parser.error(f"--frames must be from 2 to {MOST}, got {args.frames}")
    return args


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    args = parse(argv)
    return desk.serve("generate.py", lambda: main(args))


if __name__ == "__main__":
    sys.exit(cli())
