"""What all experiments share: their flags, the way they start, and files that are written atomically.

An experiment is run from the repository's root as `python -m experiments.NAME`, and nothing else starts it. What it
makes goes to runs/experiments, in the folders and under the names that docs/ has: `--out docs` is how maintainers renew
the tables and pictures there.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mirage_min.networks.weights import whole_file

GIB = 2**30
H200_BF16 = 989e12  # dense operations a second, as NVIDIA states them


def flags(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the experiment's docstring, with the one flag that all of them have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"),
                        help="folder for the results (default runs/experiments; docs: those of the documentation)")
    return parser


def start(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run; an input that is wrong is one line on stderr and exit status 2."""
    args = parser.parse_args()
    try:
        main(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {' '.join(str(error).split())}\n")


def save_text(path: Path, text: str) -> None:
    """A text file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, content: dict) -> None:
    """A JSON file and the folders above it."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def save_figure(path: Path, figure: Figure, dpi: int = 110, colours: int | None = None) -> None:
    """A PNG and the folders above it; with so many `colours` at most, 256 or fewer, it takes a third of the room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
        if colours is not None:
            with Image.open(temporary) as image:
                few = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
            few.save(temporary, format="png", optimize=True)


def picture(x: Tensor) -> Figure:
    """x [3, H, W] in [-1, 1] as a figure without a frame."""
    H, W = x.shape[1:]
    figure = Figure(figsize=(W / 50, H / 50))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(((x + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="bilinear")
    axis.set_axis_off()
    return figure


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table, all columns but the first to the right; floats are best given as text."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
