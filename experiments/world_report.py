"""The text and pictures of world_study.py, from what it has recorded."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from torch import Tensor

from experiments import common, tables

SCORES = "PSNR_C", "PSNR_C, seen", "LPIPS_C", "LPIPS_C, seen", "way back", "way back, seen"
HEAD = """# The world model's memory, tried in the small

This is the *world model* called Mirage ([world.md](world.md)), not the harmoniser. Made by
`experiments/world_study.py`, whose header says what each part does; every figure, seed by seed, is in
[world_study.json](world_study.json). Toy scenes of {size}, {count}, none of which was trained on; mean ± deviation over
seeds.
"""
READOUT = """## A readout without a generator

`{command}`, {date}.

Cells: the share that a memory of frame 0 shows at frame t of a drive. Error: mean square to the latent of frame t over
its variance, on the cells that both memories show. PSNR: of these cells decoded, in dB.

{table}
"""
COST = """## What it costs

`{command}`, {date}, torch {torch}, {threads} thread(s).

Milliseconds are those of a processor; the small VAE, 96x144, two new latents a chunk. A readout is the control of one
chunk: three readouts of cells, or nine pictures of the cloud and their encoding. An update encodes the chunk and adds
its cells, or adds its pixels; for both a chunk is first decoded ({decode:.0f} ms) and its depth found (here by the
renderer, {depth:.0f} ms).

{table}
"""
LOOP = """## Out and back

`{command}`, {date}.

The first frame is given. PSNR in dB. In pixels that frame 0 shows, the last frame with the latent memory is {gain} dB
above that without one, seed by seed.

{table}

![Film strip](world_study_strip.png)
"""
ABLATIONS = """## One thing changed

`{command}`, {date}.

The rows above the line are those of the loop.

{table}
"""
MOVING = """## Where cars move

`{command}`, {date}.

The way out is true, the way back is generated. PSNR in dB on its frames, of what is at rest. The filter changes what is
read in {cells} of the pixels.

{table}
"""


def spread(values: list[float]) -> str:
    """Mean ± deviation over seeds."""
    return tables.cell(values, None)


def readout(part: dict) -> str:
    rows = []
    for t, found in part["distances"].items():
        cells, errors, psnr = ([spread(found[key]) for key in keys] for keys in (
            ("cells, latent", "cells, RGB"), ("latent", "RGB", "no warp"), ("PSNR latent", "PSNR RGB", "PSNR true")))
        rows.append([t, *cells, *errors, *psnr])
    header = ["t", "cells, latent", "cells, RGB", "error, latent", "error, RGB", "error, no warp", "PSNR, latent",
              "PSNR, RGB", "PSNR, true latent"]
    return READOUT.format(**part | {"table": common.table(header, rows)})


def cost(part: dict) -> str:
    header = ["frames", "KiB, latent", "KiB, RGB", "times", "ms a readout, latent", "ms a readout, RGB",
              "ms an update, latent", "ms an update, RGB"]
    rows = [[row["frames"], *(f"{row[f'bytes, {name}'] / 1024:.0f}" for name in ("latent", "RGB")),
             f"{row['bytes, RGB'] / row['bytes, latent']:.1f}",
             *(f"{row[f'{call}, {name}']:.1f}" for call in ("read", "update") for name in ("latent", "RGB"))]
            for row in part["rows"]]
    return COST.format(**part | {"table": common.table(header, rows)})


def scores(methods: dict[str, dict]) -> list[list[str]]:
    """A row for each method."""
    return [[name, *(spread(found[key]) for key in SCORES)] for name, found in methods.items()]


def loop(part: dict) -> str:
    latent, none = (part["methods"][name]["PSNR_C, seen"] for name in ("latent memory", "no memory"))
    gain = spread([a - b for a, b in zip(latent, none)])
    return LOOP.format(**part | {"gain": gain, "table": common.table(["memory", *SCORES], scores(part["methods"]))})


def ablations(part: dict, reference: dict | None) -> str:
    rows = scores(reference["methods"]) if reference else []
    rows += [["–"] * (1 + len(SCORES))] * bool(rows) + scores(part["methods"])
    text = ABLATIONS.format(**part | {"table": common.table(["", *SCORES], rows)})
    missing = f"\nNot tried, for want of a model that is trained so: {', '.join(part['left out'])}.\n"
    return text + missing * bool(part["left out"])


def moving(part: dict) -> str:
    places = "what is at rest", "cells that the filter changes"
    rows = [[f"{name} the filter", *(spread(part[f"{place}, {name}"]) for place in places)]
            for name in ("with", "without")]
    cells = f"{mean(part['cells']):.1%}"
    return MOVING.format(**part | {"cells": cells, "table": common.table(["", *places], rows)})


def write(out: Path, record: dict) -> None:
    """world_study.md, and world_study.png where something is recorded that it shows."""
    counted = next((part["command"] for name, part in record.items() if name != "cost"), "")
    scenes, seeds = (counted.partition(f"--{flag} ")[2].split(" ")[0] or "–" for flag in ("scenes", "seeds"))
    texts = [HEAD.format(size="96x144", count=f"{scenes} a seed, {seeds} seeds")]
    for name, write_part in (("readout", readout), ("cost", cost), ("loop", loop)):
        if name in record:
            texts.append(write_part(record[name]))
    if "ablations" in record:
        texts.append(ablations(record["ablations"], record.get("loop")))
    if "moving" in record:
        texts.append(moving(record["moving"]))
    if missing := [name for name in ("readout", "cost", "loop", "ablations", "moving") if name not in record]:
        texts.append(f"Not run yet: {', '.join(missing)}.\n")
    if {"readout", "loop"} & record.keys():
        draw_figures(out / "world_study.png", record)
        texts.insert(1, "![Error by distance and PSNR by frame, as far as they were measured](world_study.png)\n")
    common.save_text(out / "world_study.md", "\n".join(texts))
    print("\n".join(texts))


def draw_figures(path: Path, record: dict) -> None:
    """The error of a readout by distance, and the PSNR along the way, whichever there is."""
    parts = [name for name in ("readout", "loop") if name in record]
    figure = Figure(figsize=(5.5 * len(parts), 3.6), layout="constrained")
    axes = dict(zip(parts, figure.subplots(1, len(parts), squeeze=False)[0]))
    if "readout" in axes:
        distances = record["readout"]["distances"]
        for key, label in (("latent", "latent memory"), ("RGB", "RGB cloud"), ("no warp", "no warp")):
            known = {int(t): mean(found[key]) for t, found in distances.items() if found[key]}
            axes["readout"].plot(known.keys(), known.values(), "o-", label=label)
        axes["readout"].set(xlabel="frame t, read from a memory of frame 0", ylabel="error of the latent, relative")
    if "loop" in axes:
        for name, found in record["loop"]["methods"].items():
            known = {int(key.removeprefix("frame ")): mean(values) for key, values in found.items()
                     if key.startswith("frame ") and values}
            axes["loop"].plot(known.keys(), known.values(), ".-", label=name)
        axes["loop"].set(xlabel="frame, out and back", ylabel="PSNR of what frame 0 shows, dB")
    for axis in axes.values():
        axis.legend()
    common.save_figure(path, figure)


def draw_strip(path: Path, videos: dict[str, Tensor]) -> None:
    """A row for each video [3, T, H, W] in [-1, 1]: its first frame, the farthest, and the last, back again."""
    figure = Figure(figsize=(9, 2.1 * len(videos)), layout="constrained")
    for row, (name, x) in zip(figure.subplots(len(videos), 3, squeeze=False), videos.items()):
        T = x.shape[1]
        for axis, t, where in zip(row, (0, T // 2, T - 1), ("the first frame", "farthest", "back again")):
            tables.draw_frame(axis, ((x[:, t] + 1) / 2).clamp(0, 1), f"{name}: {where}, frame {t}")
    common.save_figure(path, figure, dpi=80)
