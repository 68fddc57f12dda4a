"""The doors of fuzz.py: each prepares valid inputs in a folder of its own and returns what tries a changed one."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

import build_pairs
import convert
import evaluate
import generate
import infer
import train_base
import train_harmonize
import train_online
import train_r3d2
import train_vae
import train_world
from mirage_min.data import desk, place, results
from mirage_min.data.keep import read_boxes, weight
from mirage_min.data.pixels import to_bytes
from mirage_min.data.scene import read_tracks
from mirage_min.data.scene_cameras import read_cameras
from mirage_min.data.splat import Gaussians, load_ply, save_ply
from mirage_min.data.video import Video, writing
from mirage_min.data.world_scene import Toy, write_toy
from mirage_min.method.camera import Camera
from mirage_min.networks import checked, weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.harmonizer import Harmonizer, Settings
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from mirage_min.systems.r3d2 import R3D2
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings as Tasks
from mirage_min.systems.world import Geometry, World
from mirage_min.training import run
from tests import fuzz_training, small
from tests.fuzz_changes import VALUES, Door, Lost, any_file, change_bytes, change_file, change_json
from tests.media import encode, picture, pictures

T = 12  # frames of every video


# ---- pictures and sound ----------------------------------------------------------------------------------------------

def watched(path: Path, frames: int) -> None:
    """Read a video; Lost if frames are missing and nobody said so."""
    with Video(path) as video:
        count = sum(1 for _ in video)
    if count < frames and not video.notes:
        raise Lost(f"{path.suffix}: frames are missing")


def video(folder: Path) -> Door:
    """Ten containers, as they are read and written again with their sound."""
    kinds = {"a.mp4": ("libx264", "aac"), "b.mov": ("mjpeg", "aac"), "c.mkv": ("libx264", "ac3"),
             "d.webm": ("libvpx-vp9", "libopus"), "e.avi": ("mpeg4", "mp3"), "f.ts": ("libx264", "aac"),
             "g.mp4": ("libx265", None), "h.webm": ("libvpx", None), "i.mp4": ("libx264", "aac"),
             "j.flv": ("libx264", "aac")}
    fragments = {"movflags": "frag_every_frame+empty_moov"}
    files = []
    for name, (codec, sound) in kinds.items():
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        options = {"x265-params": "log-level=none:pools=1:frame-threads=1"} if codec == "libx265" else {"g": "6"}
        container = {"fflags": "bitexact"} | (fragments if name == "i.mp4" else {})  # the same bytes in every run
        files.append(encode(folder / name, pictures(T), codec, pix_fmt, sound=sound, container=container,
                            options=options | {"threads": "1"}))
    for file in files:
        watched(file, T)
    data = {file: file.read_bytes() for file in files}
    # Cut off there, a recording in fragments is a whole one, and shorter.
    ends = [found.start() - 4 for found in re.finditer(b"moof|mfra", data[folder / "i.mp4"])]

    def door(draws: Random) -> None:
        source = draws.choice(files)
        file = folder / f"changed{source.suffix}"
        changed = change_bytes(data[source], draws)
        file.write_bytes(changed)
        shorter = source.name == "i.mp4" and len(changed) in ends and data[source].startswith(changed)
        if draws.random() < 0.8:
            watched(file, 0 if shorter else T)
            return
        with Video(file) as given, writing(folder / "out.mp4", given.format, 30, "ultrafast", file) as out:
            for frame in given:
                out.write(frame, *given.times.popleft())
    return door


def animation(folder: Path) -> Door:
    """GIF, WebP, AVIF and PNG that move."""
    images, files = [Image.fromarray(picture(20 * t)) for t in range(6)], []
    for name in ("a.gif", "b.webp", "c.png", "d.avif"):
        images[0].save(folder / name, save_all=True, append_images=images[1:], duration=100)
        watched(folder / name, 6)
        files.append(folder / name)
    data = {file: file.read_bytes() for file in files}

    def door(draws: Random) -> None:
        source = draws.choice(files)
        file = folder / f"changed{source.suffix}"
        file.write_bytes(change_bytes(data[source], draws))
        watched(file, 6)
    return door


def picture_folder(folder: Path) -> Door:
    """Three pictures, one of them changed."""
    kinds = ("png", "jpg", "webp", "bmp", "tif", "ppm")
    for kind in kinds:
        (folder / kind).mkdir()
        for t in range(3):
            Image.fromarray(picture(20 * t)).save(folder / kind / f"{t}.{kind}")
    data = {kind: (folder / kind / f"1.{kind}").read_bytes() for kind in kinds}

    def door(draws: Random) -> None:
        kind = draws.choice(kinds)
        (folder / kind / f"1.{kind}").write_bytes(change_bytes(data[kind], draws))
        watched(folder / kind, 3)
    return door


# ---- weights ---------------------------------------------------------------------------------------------------------

def networks(folder: Path) -> Door:
    """config.json and safetensors of every kind of network, used once where they are taken."""
    vae, dit, vae2d = small.parts()
    system = small.r3d2()
    made = [(vae, lambda n: n.encode(torch.zeros(1, 3, 1, 16, 16))),
            (vae2d, lambda n: n.encode(torch.zeros(1, 3, 16, 16))),
            (dit, lambda n: n(torch.zeros(1, 4, 1, 4, 4), 9, torch.zeros(1, 2, 8))),
            (WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1)), lambda n: n.encode(torch.zeros(1, 3, 1, 16, 16))),
            (system.unet, lambda n: n(torch.zeros(1, 4, 8, 8), 9, torch.zeros(1, 7, 12))),
            (small.r3d2(kl=False).vae, lambda n: n.encode(torch.zeros(1, 3, 16, 16)))]
    doors = []
    for i, (network, use) in enumerate(made):
        network.save_pretrained(folder / str(i))

        @torch.no_grad()
        def read(path, cls=type(network), use=use):
            return use(cls.from_pretrained(path, dtype=torch.float32))
        doors.append(any_file(folder / str(i), read))
    return lambda draws: draws.choice(doors)(draws)


def use_system(system) -> None:
    """Two frames through a system, as bytes."""
    for frame in system.stream(iter(torch.zeros(2, 3, 16, 16))):
        to_bytes(frame)


def mirage(folder: Path) -> Door:
    """A trained Mirage: stage files, prompt, and the base that they name; used once where it is taken."""
    small.save_cogvideox(folder, None)
    model = Mirage.from_base(folder / "base", folder / "vae_2d", torch.randn(1, 2, 8))
    for name in (RECONSTRUCTION, HARMONISATION, TRANSFORMER):
        model.add_lora(name, 2, 2.0)
    weights.save_tensors(folder / "prompt.safetensors", {"text": model.text})
    model.save_stage(folder / "stage_a.safetensors", [RECONSTRUCTION], {"base": "base", "vae2d": "vae_2d"}, fusion=True)
    model.save_stage(folder / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], {"t": "249", "window": "5"})
    return any_file(folder, lambda path: use_system(Mirage.from_pretrained(path, dtype=torch.float32)))


def harmonizer(folder: Path) -> Door:
    """A DiffusionHarmonizer's folder."""
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=1, attention_head_dim=24, num_layers=1, text_embed_dim=12,
                                    adaln_lora_dim=6, max_size=(16, 64, 64), rope_scale=(1.0, 4.0, 4.0)))
    vae = WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1))
    Harmonizer(vae, dit, Settings("release")).save_pretrained(folder)
    return any_file(folder, lambda path: use_system(Harmonizer.from_pretrained(path, dtype=torch.float32)))


def r3d2(folder: Path) -> Door:
    """An R3D2's folder."""
    small.r3d2(kl=False).save_pretrained(folder)
    return any_file(folder, lambda path: use_system(R3D2.from_pretrained(path, dtype=torch.float32)))


def world(folder: Path) -> Door:
    """A world model's folder."""
    small.world().save_pretrained(folder)
    K, pose = torch.tensor([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]).double(), torch.eye(4).double()
    cameras = [Camera.from_pose(K, pose, 16, 16)] * 3

    def observe(frames, cameras):
        return Geometry(torch.full((len(cameras), 16, 16), 4.0, dtype=torch.float64))

    def read(path):
        model, frame = World.from_pretrained(path, dtype=torch.float32), torch.zeros(3, 16, 16)
        for _, x in model.generate(frame, observe(frame, cameras[:1]), cameras, observe, torch.Generator()):
            to_bytes(x)
    return any_file(folder, read)


class Deep(torch.nn.Module):
    """Depth by the row, for a network in a file."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (torch.ones_like(images[:, 0]).cumsum(1) + 1).flip(1)


def generation(folder: Path) -> Door:
    """Scenes for generate.py: a made-up one, one whose depth and masks are in all kinds of files, a geometry.npz."""
    small.world().save_pretrained(folder / "model")
    T, H, W = 5, 16, 32
    for name in ("toy", "plain"):
        write_toy(folder / name, Toy(3, T, H, W, "loop"))
    plain = folder / "plain"
    torch.jit.script(Deep()).save(plain / "depth.pt")
    content = json.loads((plain / "transforms.json").read_text())
    del content["toy_world"]
    depths = [np.load(plain / "depth" / f"{t:06d}.npy") for t in range(T)]
    Image.fromarray((np.where(np.isfinite(depths[0]), depths[0], 0) * 1000).astype(np.uint16)).save(plain / "a.png")
    np.savez(plain / "b.npz", depth=depths[1])
    Image.fromarray(np.eye(H, W, dtype=np.uint8) * 255).save(plain / "mask.png")
    content["frames"][0] |= {"depth_file_path": "a.png", "mask_path": "mask.png"}
    content["frames"][1] |= {"depth_file_path": "b.npz"}
    (plain / "transforms.json").write_text(json.dumps(content))
    poses = np.stack([frame["transform_matrix"] for frame in content["frames"]]) @ np.diag([1.0, -1, -1, 1])
    K = np.array([[content["fl_x"], 0, W / 2 - 0.5], [0, content["fl_y"], H / 2 - 0.5], [0, 0, 1]])
    frames = np.stack([np.asarray(Image.open(plain / "images" / f"{t:06d}.png")) for t in range(T)])
    (folder / "npz").mkdir()
    np.savez(folder / "npz" / "geometry.npz", depths=np.stack(depths), intrinsics=np.stack([K] * T), poses_c2w=poses,
             frames=frames, masks=np.ones((T, H, W), np.uint8))

    def read(path: Path, *flags: str) -> None:
        argv = [path, folder / "out.safetensors", "--overwrite", "--model", folder / "model", "--device", "cpu", *flags]
        with contextlib.redirect_stdout(io.StringIO()):
            generate.main(generate.parse([str(word) for word in argv]))
    network = "--depth", str(plain / "depth.pt")
    doors = [any_file(folder / "toy", read),
             any_file(plain, lambda path: read(path, *network, "--path", "out_and_back", "--frames", "5")),
             any_file(folder / "npz", lambda path: read(path, *network))]
    return lambda draws: draws.choice(doors)(draws)


def restorer(folder: Path) -> Door:
    """A restorer's folder."""
    parts = small.world()
    flow = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    Restorer(parts.vae, parts.dit, torch.ones(1, 2, 8), flow, Tasks("upscale", scale=2)).save_pretrained(folder)
    return any_file(folder, lambda path: use_system(Restorer.from_pretrained(path, dtype=torch.float32)))


def pickles(folder: Path) -> Door:
    """What convert.py reads, in both of torch.save's formats."""
    state = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(4)}
    kinds = [{"state_dict_unet": state, "state_dict_vae": state, "rank_unet": 8}, state,
             {"state_dict": state, "epoch": 1}]
    data = []
    for content in kinds:
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            data.append(file.getvalue())

    def door(draws: Random) -> None:
        file = folder / "a.pkl"
        file.write_bytes(change_bytes(draws.choice(data), draws))
        found = convert.recognise(convert.read(file), convert.parser().parse_args([str(file), str(folder / "out")]))
        shutil.rmtree(folder / "out", ignore_errors=True)
        convert.write(folder / "out", found)
    return door


# ---- scenes, scores --------------------------------------------------------------------------------------------------

def scene(folder: Path) -> Door:
    """transforms.json, tracks.json and build_pairs' manifest."""
    pose = torch.eye(4).tolist()
    cameras = {"fl_x": 50.0, "fl_y": 51.0, "cx": 20, "cy": 15, "w": 40, "h": 30, "k1": 0.0, "camera_model": "OPENCV",
               "frames": [{"file_path": f"images/{t}.png", "transform_matrix": pose} for t in range(3)]}
    sights = [{"frame": t, "pose": pose, "size": [4, 2, 1], "box": [0, 0, 9, 9], "visible": True} for t in range(3)]
    tracks = {"objects": [{"id": 7, "category": "car", "reference": 1, "frames": sights}]}
    manifest = {"s": {"settings": {"align": "full"}, "actor": 1, "clips": [
        {"file": "s_000000.safetensors", "first_frame": 0, "box_iou": {"full": 0.9}, "crop_psnr": {"full": 20.0}}]}}
    images = [folder / "images" / f"{t}.png" for t in range(3)]
    kinds = [(cameras, lambda path: read_cameras(path, 40, 30, images)),
             (cameras, lambda path: read_cameras(path, 40, 30)),
             (tracks, lambda path: read_tracks(path, 3)), (manifest, lambda path: checked.value(
                 dict[str, build_pairs.Entry], weights.read_json(path), path, ""))]

    def door(draws: Random) -> object:
        valid, read = draws.choice(kinds)
        file = folder / "a.json"
        file.write_bytes(change_json(valid, draws))
        return read(file)
    return door


def ply(folder: Path) -> Door:
    """Gaussians."""
    torch.manual_seed(0)
    N, file = 20, folder / "a.ply"
    save_ply(file, Gaussians(torch.randn(N, 3), torch.randn(N, 3), torch.randn(N, 4), torch.randn(N),
                             torch.randn(N, 4, 3), torch.arange(N)))
    whole = file.read_bytes()
    at = whole.index(b"end_header\n") + 11

    def door(draws: Random) -> object:
        header, body = whole[:at], whole[at:]
        kind = draws.randrange(4)
        if kind == 0:
            lines = header.split(b"\n")
            i = draws.randrange(len(lines))
            lines[i : i + 1] = draws.choice(([], [lines[i]] * 2, [b"comment x", lines[i]], [b"property double x"],
                                             [b"element vertex 99999999999"], [lines[i].replace(b"float", b"double")],
                                             [lines[i] + b"\r"], [b"property list uchar int y"]))
            header = b"\n".join(lines)
        data = header + body if kind == 0 else change_bytes(header, draws) + body if kind == 1 else \
            header + change_bytes(body, draws) if kind == 2 else change_bytes(whole, draws)
        file.write_bytes(data)
        return load_ply(file)
    return door


def scores(folder: Path) -> Door:
    """What evaluate.py reads next to videos: boxes, flow, logs; and the boxes that infer.py keeps changes inside."""
    boxes = {"a": [[1, 2, 9, 9], None, [2.5, 2, 9, 9]]}
    tensors = {"flow": torch.zeros(2, 2, 8, 8), "visible": torch.ones(1, 2, 8, 8), "boxes": torch.zeros(3, 4)}
    log = b"out/a.mp4: 3 frames, 4.50 frames/s, peak memory 0.50 GiB\n" * 3

    def door(draws: Random) -> object:
        kind = draws.randrange(4)
        if kind == 3:
            (folder / "boxes.json").write_bytes(change_json(boxes, draws))
            return [weight(entry, 16, 16, 4.0) for entry in read_boxes(folder / "boxes.json", "a")]
        if kind == 0:
            (folder / "boxes.json").write_bytes(change_json(boxes, draws))
            return results.read_boxes(folder / "boxes.json", "a", 3)
        if kind == 1:
            change_file(folder / "a.safetensors", save(tensors), draws)
            return results.read_boxes(folder, "a", 3), results.exact_flow(folder / "a.safetensors", 3, 8, 8)
        (folder / "a.log").write_bytes(change_bytes(log, draws))
        return evaluate.logged_speed(folder)
    return door


# ---- what is typed ---------------------------------------------------------------------------------------------------

def settings(folder: Path) -> Door:
    """--set of every script."""
    recipes = [infer.Settings(), *train_vae.RECIPES.values(), *train_harmonize.RECIPES.values(),
               *train_base.RECIPES.values(), *train_r3d2.RECIPES.values(), *train_online.RECIPES.values(),
               *(recipe for parts in train_world.RECIPES.values() for recipe in parts.values())]
    texts = [str(value) for value in VALUES] + ["1_0", "0x10", " 1 ", "1e5", "٣", "true", "NO", "9" * 5000, "\0"]

    def door(draws: Random) -> None:
        recipe = draws.choice(recipes)
        key = draws.choice([*(f.name for f in dataclasses.fields(recipe)), "", "x", "__class__"])
        changed = desk.override(recipe, [draws.choice((f"{key}={draws.choice(texts)}", key, f"{key}=="))])
        if not isinstance(recipe, infer.Settings):
            run.check(changed)
            [run.schedule(step, changed.warmup, changed.steps, changed.cosine) for step in (0, 5)]
    return door


def paths(folder: Path) -> Door:
    """infer.py's input and output, by name."""
    encode(folder / "in.mp4", pictures(2))
    (folder / "dir").mkdir()
    (folder / "pngs").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "pngs" / "000000.png")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/out.mp4")
    names = ["in.mp4", "dir", "pngs", "loop", "dangling", "", ".", "..", "/", "out.mp4", "out", "a" * 255, "a" * 256,
             "é" * 127, "out.avi", "in.mp4/x.mp4", "pngs/000000.png", "\udcff.mp4", "a\nb.mp4", "x\0.mp4", "/dev/null",
             "dir/../out.mp4", "%d.png", "pngs/%06d.png", "file:in.mp4", "pipe:0", "~/x.mp4", "C:\\x.mp4", "-"]

    def door(draws: Random) -> None:
        source, target = (Path(str(folder / name) if name else name) for name in draws.choices(names, k=2))
        place.check_output(source, target, draws.random() < 0.5)
        with Video(source, Fraction(25)) as video:
            next(iter(video))
    return door


DOORS = {door.__name__: door for door in (video, animation, picture_folder, networks, mirage, harmonizer, r3d2, world,
                                          generation, restorer, pickles, scene, ply, scores, settings, paths,
                                          *fuzz_training.DOORS)}
