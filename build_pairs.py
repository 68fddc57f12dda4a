"""NI–GT pairs from scenes of 3D Gaussians: an actor gives way to its generated asset, aligned twice (Mirage §3.3, §8).

    python build_pairs.py scenes/* --out data/pairs

A scene is a folder in the formats of mirage_min/data/scene.py; `python -m mirage_min.data.toy_world --scene DIR` makes
one up.

    choose   the actor: visible and inside the image in all frames, with the largest mean mask               (§8.2)
    coarse   a similarity takes the asset's Gaussians to the actor's                                         (§3.3)
    fine     one scaling and one displacement in the image, for the whole video, take the rendered asset's
             boxes to the annotated ones                                                                     (§3.3)
    x_NI     the scene without the actor, and over it the asset, hidden where something is nearer            (§8.4)
    x_GT     the video as it was filmed

Written to OUT: SCENE_FIRSTFRAME.safetensors, which mirage_min/data/pairs.py reads, with x_ni and x_gt (uint8
[3, T, H, W]), actor (uint8 [1, T, H, W], the asset's alpha), boxes and boxes_gt ([T, 4] x0, y0, x1, y1 in pixels; the
asset's and the annotated ones) and naive (the middle frame, the asset placed by position alone); SCENE.png, a contact
sheet; and manifest.json with every figure. A run killed and started again keeps the pairs it finds.

Exit status: 0 done; 1 some scene is broken, and one line says how (the others are done); 2 a flag or OUT is wrong.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from mirage_min.data import align, desk
from mirage_min.data.insertion import Insertion, align_asset, composite
from mirage_min.data.pixels import to_bytes
from mirage_min.data.scene import SceneFolder, moved, on, read_scene
from mirage_min.data.splat import load_ply, render
from mirage_min.data.video import Video
from mirage_min.method.metrics import actor_crops, cropped, psnr
from mirage_min.networks import checked, weights

STAGES = "none", "coarse", "full"  # how far the asset is aligned: by position alone, in 3D, and in 2D too
TENSORS = {"x_ni", "x_gt", "actor", "boxes", "boxes_gt", "naive"}


@dataclass
class Clip:
    """A pair's figures, in the manifest and in its file."""

    file: str
    first_frame: int
    box_iou: dict[str, float]
    crop_psnr: dict[str, Any]  # inf where the two are equal


@dataclass
class Entry:
    """What is read again of a scene's entry in the manifest."""

    settings: dict[str, Any]
    clips: list[Clip]


def choose_actor(folder: Path, scene: SceneFolder, frames: range, wanted: int | None) -> int:
    """The id of the tracked object inside the image in all the frames whose mean mask is the largest (§8.2)."""
    if wanted is not None and wanted not in scene.tracks:
        raise ValueError(f"{folder / 'tracks.json'}: objects: no id {wanted} (--actor), there are {list(scene.tracks)}")
    size = torch.tensor([scene.cameras[0].width, scene.cameras[0].height])
    inside = {}
    for i in scene.tracks if wanted is None else [wanted]:
        track = scene.tracks[i]
        within = track.visible & (track.box[:, :2] > 0).all(1) & (track.box[:, 2:] < size).all(1)
        inside[i] = int(within[frames.start : frames.stop].sum())
    if max(inside.values()) < len(frames):
        best = max(inside, key=inside.get)
        raise ValueError(f"{folder / 'tracks.json'}: objects: none is visible and inside the image in all of frames "
                         f"{frames.start} to {frames.stop - 1}; the best, {best}, is in {inside[best]} of them")
    there = [i for i in inside if inside[i] == len(frames) and len(scene.objects[i])]
    if not there:
        raise ValueError(f"{folder / 'scene.ply'}: object_id: no Gaussians of object {max(inside, key=inside.get)}")

    def area(i: int) -> float:  # DEVIATION: of the object's rendered alpha; the paper has masks of Grounding-SAM2
        poses, cameras = scene.tracks[i].pose, scene.cameras
        return sum(float(render(moved(scene.objects[i], poses[t]), cameras[t])[1].mean()) for t in frames)
    return max(there, key=area)


# ---- one scene -------------------------------------------------------------------------------------------------------

def build(folder: Path, args: argparse.Namespace, settings: dict) -> dict:
    """All pairs of one scene -> its entry in the manifest; ValueError naming the file and the field that is wrong."""
    scene = read_scene(folder, args.device)
    name, N = folder.resolve().name, args.frames
    start, stop = args.range or (0, len(scene.cameras))
    if not 0 <= start <= stop - N <= len(scene.cameras) - N:
        raise ValueError(f"{scene.video}: {len(scene.cameras)} frames, wanted {start}:{stop} in clips of {N}")
    actor = choose_actor(folder, scene, range(start, stop), args.actor)
    boxes_gt = scene.tracks[actor].box.float()
    asset = on(load_ply(folder / "asset.ply"), args.device)
    if not len(asset) or not (asset.means.amax(0) > asset.means.amin(0)).all():
        raise ValueError(f"{folder / 'asset.ply'}: wanted Gaussians that span a space, got {len(asset)} that do not")
    clips, left_out, at = [], [], 0
    with desk.bar(total=2 * (stop - start), desc=name, unit="frame") as bar, \
            Video(scene.video) as video:
        insertions = align_asset(scene, asset, args.asset_axes, actor, range(start, stop), bar=bar)
        filmed = iter(video)
        for first in range(start, stop - N + 1, N):
            rows = slice(first, first + N)
            path = args.out / f"{name}_{first:06d}.safetensors"
            iou = {stage: float(align.iou(insertion.aligned_boxes()[rows], boxes_gt[rows]).mean())
                   for stage, insertion in insertions.items()}
            if iou[args.align] < args.min_iou:
                left_out.append({"first_frame": first, "box_iou": iou})
            elif (made := made_before(path, settings)) is not None:
                clips.append(made)
            else:
                x_gt = torch.stack(list(islice(filmed, first - at, first - at + N)), dim=1)
                at = first + N  # frames that have been read
                tensors, figures = make_pair(scene, insertions, actor, rows, x_gt, stage=args.align, bar=bar)
                clips.append({"file": path.name, "first_frame": first, "box_iou": iou} | figures)
                weights.save_tensors(path, tensors, {"clip": json.dumps(clips[-1]), "settings": json.dumps(settings)})
    return {"settings": settings, "actor": actor, "category": scene.tracks[actor].category,
            "scaling": insertions["full"].scaling, "displacement": insertions["full"].displacement,
            "clips": clips, "left_out": left_out}


def make_pair(scene: SceneFolder, insertions: dict[str, Insertion], actor: int, rows: slice, x_gt: Tensor, stage: str,
              bar: tqdm) -> tuple[dict[str, Tensor], dict]:
    """Frames `rows` of a scene, filmed as x_gt [3, T, H, W] -> the tensors of its file, and figures of every stage."""
    track = scene.tracks[actor]
    shots = {name: [] for name in insertions}
    for t in range(rows.start, rows.stop):
        back = render(scene.at(t, without=actor), scene.cameras[t])
        for name, insertion in insertions.items():
            front = insertion.render(t, scene.cameras[t], track.pose[t])
            shots[name].append([v.cpu() for v in composite(back, front, margin=float(track.size[t].min()))])
        bar.update()
    x_ni = {name: torch.stack([frame for frame, _ in shot], dim=1) * 2 - 1 for name, shot in shots.items()}
    alpha = torch.stack([alpha for _, alpha in shots[stage]], dim=1)
    middle = x_gt.shape[1] // 2
    crops = actor_crops(track.box[rows], *x_gt.shape[2:])
    x_gt_cropped = cropped(x_gt[None], crops)
    figures = {"crop_psnr": {name: float(psnr(cropped(x[None], crops), x_gt_cropped)) for name, x in x_ni.items()}}
    return {"x_ni": to_bytes(x_ni[stage]), "x_gt": to_bytes(x_gt), "actor": (alpha * 255).round().byte(),
            "boxes": insertions[stage].aligned_boxes()[rows], "boxes_gt": track.box[rows].float(),
            "naive": to_bytes(x_ni["none"][:, middle])}, figures


# ---- many scenes, once -----------------------------------------------------------------------------------------------

def settings_of(folder: Path, args: argparse.Namespace) -> dict:
    """What a scene's pairs depend on: flags, and sizes and times of its files. Another value makes them anew."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*"))}
    flags = {key: getattr(args, key) for key in ("align", "frames", "range", "actor", "min_iou")}
    flags["asset_axes"] = args.asset_axes.tolist()
    return json.loads(json.dumps(flags | {"files": files}))            # as it will be read again


def made_before(path: Path, settings: dict) -> dict | None:
    """The manifest's entry of a clip that an earlier run wrote with the same settings."""
    if not path.exists():
        return None
    tensors, about = weights.load_tensors(path)
    if about.get("settings") != json.dumps(settings) or not TENSORS <= tensors.keys():
        return None
    return asdict(checked.record(Clip, checked.parse(about.get("clip", "")), path, "clip"))


def contact_sheet(out: Path, name: str, clips: list[dict]) -> None:
    """The middle frame of every clip: naive unaligned | x_NI | x_GT, with lines along the annotated box.

    A panel shows the crop that is scored (metrics.actor_crops), and what is around it."""
    rows = []
    for clip in clips:
        tensors, _ = weights.load_tensors(out / clip["file"])
        middle = tensors["x_gt"].shape[1] // 2
        x0, y0, x1, y1 = tensors["boxes_gt"][middle].tolist()
        ys, xs = actor_crops(tensors["boxes_gt"], *tensors["x_gt"].shape[2:])[middle]
        scale = min(240 / (xs.stop - xs.start), 160 / (ys.stop - ys.start))
        left, top = (xs.start + xs.stop - 240 / scale) / 2, (ys.start + ys.stop - 160 / scale) / 2
        panels = [Image.fromarray(x.permute(1, 2, 0).numpy()).transform(
            (240, 160), Image.AFFINE, (1 / scale, 0, left, 0, 1 / scale, top), Image.BILINEAR)
            for x in (tensors["naive"], tensors["x_ni"][:, middle], tensors["x_gt"][:, middle])]
        row = Image.new("RGB", (3 * 240 + 8, 162))
        for i, panel in enumerate(panels):
            draw = ImageDraw.Draw(panel)
            draw.rectangle([round((x0 - left) * scale), round((y0 - top) * scale),
                            round((x1 - left) * scale), round((y1 - top) * scale)], outline=(255, 220, 0))
            row.paste(panel, (i * 244, 0))
        rows.append(row)
    sheet = Image.new("RGB", (rows[0].width, 162 * len(rows)))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, 162 * i))
    with weights.whole_file(out / f"{name}.png") as temporary:
        sheet.save(temporary, format="png")


def main(args: argparse.Namespace) -> int:
    """Every scene in turn; returns how many were broken."""
    args.device = desk.choose_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path, broken = args.out / "manifest.json", 0
    manifest = weights.read_json(path) if path.exists() else {}
    made = checked.value(dict[str, Entry], manifest, path, "")
    for folder in args.scenes:
        name = folder.resolve().name
        old = made.get(name)
        try:
            settings = settings_of(folder, args)
            if old and old.settings == settings and all((args.out / clip.file).exists() for clip in old.clips):
                desk.say(f"{name}: kept, {len(old.clips)} pairs")
                continue
            manifest[name] = build(folder, args, settings)
        except (ValueError, OSError, av.FFmpegError) as error:
            where = "" if str(folder) in str(error) else f"{folder}: "
            desk.say_error(f"build_pairs.py: {where}{error}")
            broken += 1
            continue
        entry, files = manifest[name], {clip["file"] for clip in manifest[name]["clips"]}
        for file in args.out.glob("*.safetensors"):  # those of other settings must not be trained on
            if re.fullmatch(re.escape(name) + r"_\d{6}", file.stem) and file.name not in files:
                file.unlink()
        if entry["clips"]:
            contact_sheet(args.out, name, entry["clips"])
        with weights.whole_file(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        report(name, entry, args)
    return broken


def report(name: str, entry: dict, args: argparse.Namespace) -> None:
    """One line of figures of a scene, and one of each pair that was left out."""
    def mean(key: str) -> str:
        values = [[clip[key][stage] for clip in entry["clips"]] for stage in STAGES]
        return " -> ".join(f"{sum(v) / len(v):.3g}" for v in values)

    text = f"{name}: actor {entry['actor']}, {len(entry['clips'])} pairs"
    if entry["clips"]:
        text += f"; {' -> '.join(STAGES)}: box IoU {mean('box_iou')}, PSNR in the crop {mean('crop_psnr')}"
    desk.say(text)
    for clip in entry["left_out"]:
        desk.say(f"{name}: frames from {clip['first_frame']} left out: box IoU {clip['box_iou'][args.align]:.3f}, "
                 f"wanted at least {args.min_iou}")


def frame_range(text: str) -> tuple[int, int]:
    """"40:120" -> (40, 120)"""
    start, stop = map(int, text.split(":"))
    return start, stop


def axes(text: str) -> Tensor:
    """"RDF": x right, y down, z forward -> [3, 3] that takes them to x forward, y left, z up"""
    F, L, U = torch.eye(3)
    points = {"F": F, "B": -F, "L": L, "R": -L, "U": U, "D": -U}
    R = torch.stack([points.get(letter, 0 * F) for letter in text.upper() or " "], dim=1)
    if R.shape != (3, 3) or torch.linalg.det(R) != 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted three right-handed axes, as in RDF, FLU or LUF")
    return R


def cli(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("scenes", type=Path, nargs="+", help="scene folders (formats: mirage_min/data/scene.py)")
    parser.add_argument("--out", type=Path, default=Path("data/pairs"), help="where the pairs go (default data/pairs)")
    parser.add_argument("--align", choices=STAGES, default="full",
                        help="by position alone, in 3D, or in 3D and in the image (default full)")
    parser.add_argument("--frames", type=int, default=9, metavar="N", help="frames of a pair (default 9)")
    parser.add_argument("--range", type=frame_range, metavar="A:B", help="only frames A to B - 1 (default all)")
    parser.add_argument("--actor", type=int, metavar="ID", help="the object to replace (default: the largest mask)")
    parser.add_argument("--asset-axes", type=axes, default="RDF", metavar="XYZ",
                        help="where the asset's x, y and z point, of Left Right Up Down Forward Back (default RDF)")
    parser.add_argument("--min-iou", type=float, default=0.8, metavar="X",
                        help="leave out pairs whose boxes overlap less on average (default 0.8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to render (default: cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    names = [folder.resolve().name for folder in args.scenes]
    if args.frames < 1 or len(set(names)) < len(names) or not 0 <= args.min_iou <= 1:  # nor nan, which leaves out none
        parser.error("frames must be at least 1, min-iou from 0 to 1, and the scene folders' names must differ")
    with torch.no_grad():
        return desk.serve("build_pairs.py", lambda: min(main(args), 1), lambda: "; the same command continues")


if __name__ == "__main__":
    sys.exit(cli())
