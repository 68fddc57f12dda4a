"""Score harmonised videos against the truth: the metrics of Mirage §4.1, both halves of its Table 1.

    python evaluate.py --pred results --gt truth --perceptual DIR
    python evaluate.py --pred ours=a --pred theirs=b --ni pairs/ni --gt pairs/gt --boxes boxes.json --out scores
    python evaluate.py --pred out --ni data/held_out --gt data/held_out --boxes data/held_out --flow data/held_out

Each folder holds videos of the same names: files that PyAV decodes, folders of images, or NAME.safetensors clips, from
which x_dr, x_ni or x_gt is taken. Sizes and lengths must agree; nothing is resized or cut to fit. How each metric is
computed, mirage_min/method/metrics.py says. A video's figure is the mean over its frames, the table's the mean
over videos. In memory are two frames of each video, and for vFID one clip. E*warp is lower for what is blurred: compare
it with the truth's own, which has a row.

    boxes     the actor's, for crops: a JSON {NAME: [[x0, y0, x1, y1] or null, one for each frame]}, in pixels, or a
              folder of NAME.safetensors with `boxes` [T, 4]; frames without the actor have no crop. For E*warp whole
              frames are warped, and the pixels inside the crop count
    flow      of the truth: OpenCV's DIS, or a folder of NAME.safetensors with exact `flow` and `visible`
    vFID      of clips of 16 frames one after another, the rest of a video being a clip, too (below 10 frames it is
              played forwards and backwards); the network is I3D (auto), or TorchScript: videos [B, 3, T, H, W] in
              [-1, 1] -> features [B, d]. TorchScript is code that runs here: use files that you trust
    frames/s  as infer.py printed them, if a *.log next to the results holds its output

A metric that lacks its weights is left out and the reason given. --out also gets scores.html: each method next to the
truth under a slider, the first PAGE videos. Status 2: one line says what is wrong.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import csv
import io
import json
import math
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mirage_min.data import desk, report, results
from mirage_min.method import metrics, optical_flow
from mirage_min.method.perceptual import Dists, Features, Lpips
from mirage_min.networks import backbones, weights
from mirage_min.networks.i3d import I3D

COLUMNS = {"PSNR": ("↑", 2), "SSIM": ("↑", 3), "LPIPS": ("↓", 3), "DISTS": ("↓", 3),  # what is better, and digits
           "E*warp": ("↓", 3), "vFID": ("↓", 3), "frames/s": ("↑", 2)}
CROPS, FULL = "actor-centric crops", "full frame"
NAIVE, TRUTH = "naive insertion", "ground truth"
CLIP = 16  # frames in a clip of vFID
PAGE, PICTURES = 6, 16  # videos in scores.html, and frames of each at most


# ---- what is compared ------------------------------------------------------------------------------------------------

def frames(path: Path, method: str) -> Iterator[Tensor]:
    """The frames [1, 3, 1, H, W] in [-1, 1] of a method's video, one after another."""
    return results.frames(path, {NAIVE: "x_ni", TRUTH: "x_gt"}.get(method, "x_dr"))


def check(methods: dict[str, dict[str, Path]]) -> dict[str, tuple[int, int, int]]:
    """{name: (T, H, W)}; ValueError naming what is missing or differs in size or length from the truth.

    Every frame is decoded: containers can be wrong about their length, which hours of scoring should not end in.
    """
    truth, shapes = methods[TRUTH], {}
    for method, found in methods.items():
        if differing := sorted(found.keys() ^ truth.keys()):
            raise ValueError(f"{method} and {TRUTH} have videos of different names: {len(differing)} are in one alone, "
                             f"{', '.join(f'{n} ({method if n in found else TRUTH})' for n in differing[:5])}")
    for name in desk.bar(truth, desc="checking", unit="video"):
        for method, found in methods.items():  # of which the truth is the first
            path = found[name]
            T = H = W = 0
            for T, x in enumerate(frames(path, method), 1):
                H, W = x.shape[-2:]
            wanted = shapes.setdefault(name, (T, H, W))
            if (T, H, W) != wanted or min(H, W) < 32:  # LPIPS' networks leave nothing of less
                raise ValueError(f"{path}: {T} frames of {H}x{W} (height x width), wanted {wanted[0]} of {wanted[1]}x"
                                 f"{wanted[2]} as in {truth[name]}, and 32x32 at least")
    return shapes


# ---- scores ----------------------------------------------------------------------------------------------------------

def load_networks(args) -> tuple[dict[str, Callable], Callable | None, dict[str, str]]:
    """({metric: distance of two videos}, the network of vFID or None, {metric that cannot be computed: why}).

    ValueError if --perceptual or --vfid names what is not there, or no such network.
    """
    distances, absent = {"PSNR": metrics.psnr, "SSIM": metrics.ssim}, {}
    if args.perceptual and str(args.perceptual) != backbones.AUTO and not args.perceptual.exists():
        raise ValueError(f"--perceptual {args.perceptual}: is not there")
    for name, measure, Model, net in (("LPIPS", metrics.lpips, Lpips, args.lpips),
                                      ("DISTS", metrics.dists, Dists, "vgg")):
        try:
            if args.perceptual is None:
                raise ValueError("no weights given (--perceptual DIR or auto)")
            distances[name] = partial(measure, model=Model(Features(net, args.perceptual)).to(args.device))
        except (ValueError, ImportError) as error:
            absent[name] = str(error)
    if not args.flow and not find_spec("cv2"):
        absent["E*warp"] = "no exact flow given (--flow DIR), and no OpenCV (pip install opencv-python-headless)"
    if not args.vfid:
        return distances, None, absent | {"vFID": "no feature network given (--vfid FILE or auto)"}
    return distances, load_features(args.vfid, args.device), absent


def load_features(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """vFID's network: videos [B, 3, T, H, W] in [-1, 1] -> features [B, d]; ValueError where it is or gives another.

    "auto" is I3D, fetched. Else path is TorchScript.
    DEVIATION from safetensors only: I3D is passed round as TorchScript. That is code, and can write files.
    """
    if str(path) == backbones.AUTO:
        return I3D.from_file(backbones.fetch("i3d")).to(device)
    if not path.is_file():
        raise ValueError(f"{path}: is no file")  # a pipe would be waited for, without end
    try:
        network = torch.jit.load(path, map_location=device).eval()
        known = {argument.name for argument in network.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a TorchScript network: {str(error).splitlines()[0]}") from None
    # StyleGAN-V's i3d_torchscript.pt wants 224 x 224 pixels and gives class scores unless it is told otherwise.
    told = {"rescale": False, "resize": True, "return_features": True}
    told = told if told.keys() <= known else {}

    def features(x: Tensor) -> Tensor:
        try:
            y = network(x, **told)
        except torch.OutOfMemoryError:
            raise
        except (torch.jit.Error, RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise ValueError(f"{path}: cannot compute features of a video {list(x.shape)}: {reason}") from None
        if not isinstance(y, Tensor) or not y.isfinite().all():
            raise ValueError(f"{path}: wanted features of finite numbers, got {y!r:.60}")
        return y

    return features


def dis(y: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Flow [1, 2, 1, H, W] from one frame to the next of y [1, 3, 2, H, W], and where it leads to something visible."""
    w = optical_flow.flow_dis(y)
    return w, optical_flow.visible_by_consistency(w, optical_flow.flow_dis(y.flip(2)))


def exact(path: Path, T: int, H: int, W: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """As `dis`, for frames t and t + 1 of a video, but with the flow that a file holds."""
    w, seen = results.exact_flow(path, T, H, W)
    return lambda y, t: (w[:, :, t : t + 1].to(y.device), seen[:, :, t : t + 1].to(y.device))


@torch.no_grad()
def score(paths: dict[str, Path], views: list[dict], flow, distances: dict, network, device,
          shown: dict[str, report.Comparison]) -> tuple[dict, dict]:
    """One video: {(region, method): {metric: [of each frame]}} and {(region, method): [feature of each clip]}.

    views: {region: (rows, columns)} of each frame; flow: dis, or one that is exact, or None; shown: {method: what
    takes in its frames next to the truth's}.
    """
    values, clips, features = defaultdict(lambda: defaultdict(list)), defaultdict(list), defaultdict(list)
    before = {}
    for t, read in enumerate(zip(*(frames(path, method) for method, path in paths.items()), strict=True)):
        current = {method: x.to(device) for method, x in zip(paths, read)}
        for method, comparison in shown.items():
            comparison.add(current[TRUTH][0, :, 0], current[method][0, :, 0])
        for region, (rows, columns) in views[t].items():
            for method, x in current.items():
                x, y = x[..., rows, columns], current[TRUTH][..., rows, columns]
                if method != TRUTH:
                    for metric, distance in distances.items():
                        values[region, method][metric].append(distance(x, y).item())
                if network:
                    clips[region, method].append(x)
        if before and flow:
            pairs = {method: torch.cat([before[method], current[method]], dim=2) for method in paths}  # [1, 3, 2, H, W]
            w, seen = flow(pairs[TRUTH], t - 1)
            for region, (rows, columns) in views[t - 1].items():
                inside = torch.zeros_like(seen)
                inside[..., rows, columns] = seen[..., rows, columns]
                for method, x in pairs.items():
                    values[region, method]["E*warp"].append(optical_flow.warp_error(x, w, inside).item())
        for key, clip in clips.items():
            if len(clip) == CLIP or (clip and t == len(views) - 1):
                features[key].append(metrics.clip_features(network, torch.cat(clip, dim=2)).cpu())
                clip.clear()
        before = current
    return values, features


def mean(values) -> float:
    """Of those that are numbers: a pair of frames of which nothing is visible has no warp error."""
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def mean_row(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """{metric: value} of several videos -> their means, of every metric in COLUMNS; nan where no video has it."""
    rows = list(rows)
    return {metric: mean(row.get(metric, math.nan) for row in rows) for metric in COLUMNS}


def logged_speed(folder: Path) -> dict[str, float]:
    """{name: frames a second} that infer.py printed, from the *.log files of a folder."""
    text = "\n".join(log.read_text(errors="replace") for log in sorted(folder.glob("[!.]*.log")) if log.is_file())
    return {Path(m[1]).stem: float(m[2]) for m in re.finditer(r"(?m)^(.+): \d+ frames, (\d+\.\d+) frames/s", text)}


# ---- tables ----------------------------------------------------------------------------------------------------------

def markdown(means: dict[str, dict[str, dict[str, float]]]) -> str:
    """{region: {method: {metric: value}}} -> a table for each region, the best of several methods in bold.

    The warp error favours blur: the best is the nearest to the truth's own, if that is known.
    """
    text = ""
    for region, rows in means.items():
        table = [[region, *(f"{m} {arrow}" for m, (arrow, _) in COLUMNS.items())], ["---"] + ["---:"] * len(COLUMNS)]
        for method, row in rows.items():
            table.append([method])
            for metric, (arrow, digits) in COLUMNS.items():
                own = rows[TRUTH][metric] if metric == "E*warp" and TRUTH in rows else math.nan
                values = {m: r[metric] for m, r in rows.items() if m != TRUTH and not math.isnan(r[metric])}
                if not math.isnan(own):
                    miss = {m: abs(value - own) for m, value in values.items()}
                else:
                    miss = {m: -value if arrow == "↑" else value for m, value in values.items()}
                best = len(miss) > 1 and miss.get(method) == min(miss.values())
                number = "–" if math.isnan(row[metric]) else f"{row[metric]:.{digits}f}"
                table[-1].append(f"**{number}**" if best else number)
        widths = [max(map(len, column)) for column in zip(*table)]
        text += "".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths))} |\n" for line in table) + "\n"
    return text


def write(folder: Path, means: dict, scores: dict, remarks: dict[str, str], text: str,
          pages: dict[str, report.Comparison]) -> None:
    """scores.json, scores.csv (one line for each region, method and video, and their mean), scores.md, scores.html."""
    plain = json.loads(json.dumps({"remarks": remarks, "mean": means, "videos": scores}),
                       parse_constant=lambda number: None if number == "NaN" else "inf")  # JSON knows neither
    lines = [["region", "method", "video", *COLUMNS]]
    for region, rows in scores.items():
        for method, videos in rows.items():
            for name, row in ("mean", means[region][method]), *videos.items():
                row = [row.get(metric, math.nan) for metric in COLUMNS]
                lines.append([region, method, name, *("" if math.isnan(value) else value for value in row)])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", json.dumps(plain, indent=2) + "\n"), ("csv", table.getvalue()), ("md", text)):
        with weights.whole_file(folder / f"scores.{suffix}") as file:
            file.write_text(content, encoding="utf-8", errors="replace")  # of names, and arrows
    report.write(folder / "scores.html", "scores", pages, text)


def add_vfid(means: dict, features: dict[tuple[str, str], list[Tensor]]) -> dict[str, str]:
    """Add vFID to the means, {region: {method: {metric: value}}} -> remarks on it, {"vFID, REGION": text}.

    features: of each (region, method) the rows [1, d] of its clips
    """
    remarks = {}
    for region, method in features:
        rows = [*features[region, method], *features[region, TRUTH]]
        if len({row.shape for row in rows}) > 1:
            remarks[f"vFID, {region}"] = "absent: the network's features are not of one size"
            continue
        a, b = (torch.cat(features[region, m]) for m in (method, TRUTH))
        if len(a) < 2:
            remarks[f"vFID, {region}"] = "absent: one clip has no covariance"
        elif method != TRUTH:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                means[region][method]["vFID"] = metrics.vfid(a, b)
            remarks |= {f"vFID, {region}": str(w.message) for w in said}
    return remarks


def main(args) -> None:
    args.device = desk.choose_device(args.device)
    methods, speeds, left = {}, {}, {}
    for label, folder in [(TRUTH, args.gt), *([(NAIVE, args.ni)] if args.ni else []), *args.pred]:
        if label in methods:
            raise ValueError(f"--pred {folder}: the name {label!r} is taken (--pred NAME=DIR)")
        methods[label], left[str(folder)] = results.videos(folder)
        speeds[label] = logged_speed(folder)
    distances, network, absent = load_networks(args)
    shapes, crops, flows = check(methods), {}, {}
    for name, (T, H, W) in shapes.items():
        crops[name] = metrics.actor_crops(results.read_boxes(args.boxes, name, T), H, W) if args.boxes else [None] * T
        flows[name] = exact(args.flow / f"{name}.safetensors", T, H, W) if args.flow and T > 1 else dis

    pages = {}  # {heading: Comparison} of scores.html
    scores, features = {CROPS: defaultdict(dict), FULL: defaultdict(dict)}, defaultdict(list)
    equal = Counter()  # frames of a region and method that are the truth's own
    for name in desk.bar(shapes, desc="scoring", unit="video"):
        views = [({CROPS: crop} if crop else {}) | {FULL: (slice(None), slice(None))} for crop in crops[name]]
        flow = None if "E*warp" in absent else flows[name]
        paths = {method: found[name] for method, found in methods.items()}
        page = {method: report.Comparison(TRUTH, method, PICTURES) for method in paths if method != TRUTH}
        page = page if args.out and len(pages) < PAGE * len(page) else {}
        pages |= {f"{name}: {method}": comparison for method, comparison in page.items()}
        values, clips = score(paths, views, flow, distances, network, args.device, page)
        for (region, method), row in values.items():
            scores[region][method][name] = {metric: mean(v) for metric, v in row.items()}
            equal[region, method] += row["PSNR"].count(math.inf)
            if region == FULL and name in speeds.get(method, {}):
                scores[region][method][name]["frames/s"] = speeds[method][name]
        for key, found in clips.items():
            features[key] += found
    means = {region: {method: mean_row(rows.values()) for method, rows in table.items()}
             for region, table in scores.items() if table}

    frames, shown = sum(map(len, crops.values())), sum(crop is not None for found in crops.values() for crop in found)
    remarks = {"scored": f"{len(shapes)} videos, {frames} frames" + f", {shown} of them with crops" * bool(args.boxes),
               "LPIPS": args.lpips, "E*warp": f"×10³, along the truth's flow: {args.flow or 'OpenCV DIS'}",
               "vFID": str(args.vfid)}
    remarks |= {f"passed over in {folder}": ", ".join(names) for folder, names in left.items() if names}
    remarks |= {metric: f"absent: {why}" for metric, why in absent.items()} | add_vfid(means, features)
    remarks |= {f"PSNR, {region}, {method}": f"inf in {n} frames, which equal the truth"
                for (region, method), n in equal.items() if n}
    text = markdown(means) + "".join(f"* {subject}: {remark}\n" for subject, remark in remarks.items())
    if args.out:
        write(args.out, means, scores, remarks, text, pages)
    if not desk.say(text, end="") and not args.out:
        raise OSError("stdout takes no more (--out DIR writes the scores to files)")


def labelled(text: str) -> tuple[str, Path]:
    """"ours=out/a" -> ("ours", Path("out/a")); a folder alone is called as it is."""
    label, equals, folder = text.partition("=")
    return (label, Path(folder)) if equals and not Path(text).exists() else (Path(text).resolve().name, Path(text))


def cli(argv: list[str] | None = None) -> int:
    """Run; on an error say it in one line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pred", type=labelled, action="append", required=True, metavar="[NAME=]DIR",
                        help="results of a method; repeat it to compare methods")
    parser.add_argument("--gt", type=Path, required=True, metavar="DIR", help="the truth")
    parser.add_argument("--ni", type=Path, metavar="DIR", help="the naive insertions, scored as a method, too")
    parser.add_argument("--boxes", type=Path, metavar="PATH", help="the actor's boxes, for crops (see above)")
    parser.add_argument("--flow", type=Path, metavar="DIR", help="exact flow (default: OpenCV's DIS on the truth)")
    parser.add_argument("--perceptual", type=Path, metavar="DIR", help="backbones of metrics: a folder, or auto")
    parser.add_argument("--lpips", choices=["alex", "vgg", "squeeze"], default="alex", help="(default alex)")
    parser.add_argument("--vfid", type=Path, metavar="FILE", help="vFID's network: TorchScript, or auto (I3D)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scores.json, .csv, .md and .html there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one, else cpu")
    return desk.serve("evaluate.py", lambda: main(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli())
