"""A model's card: the README.md of its folder, with the front matter that the hub reads.

    write_card(folder, "Mirage", base="THUDM/CogVideoX1.5-5B", about={"steps": "10000"})

The hub shows a model by these fields: its licence, its library, its task, and what it was trained from. A README.md
that a person has written is kept. One field is ours: `bfloat16`, how far the output moves when the model computes in
it. infer.py chooses bfloat16 by itself only where the card has this field.

    python -m mirage_min.networks.card
"""

import json
import re
from pathlib import Path

from . import hub
from .weights import whole_file

HARMONISES = ("video-harmonization", "one-step-diffusion")
TASKS = {  # {system: (the hub's name for its task, tags)}
    "Mirage": ("video-to-video", HARMONISES),
    "Harmonizer": ("video-to-video", HARMONISES),
    "R3D2": ("image-to-image", HARMONISES),
    "Restorer": ("video-to-video", ("video-restoration", "one-step-diffusion")),
    "World": ("image-to-video", ("world-model",)),
}
UNWRITTEN = "What it does well, and what not, has not been written down yet."
CARD = """---
license: {license}
library_name: mirage_min
pipeline_tag: {task}
{base}tags:
{tags}
---

# {system}

Trained with mirage_min. Its licence is that of what it was trained from, and of the data. {unwritten}
{command}{about}"""
COMMAND = "\n```\npython infer.py in.mp4 out.mp4 --model {folder}\n```\n"


def write_card(folder: str | Path, system: str, base: str | Path | None = None, about: dict | None = None,
               license: str = "other") -> None:
    """Write README.md, unless a person has written one. ValueError for a system that has no task.

    system  the class's name
    base    what it was trained from: a hub id becomes the field base_model, a folder none
    about   how it was trained, as in the metadata of its files
    """
    if system not in TASKS:
        raise ValueError(f"wanted one of the systems {', '.join(TASKS)}, got {system!r}")
    task, tags = TASKS[system]
    path = Path(folder) / "README.md"
    if path.exists() and UNWRITTEN not in path.read_text(encoding="utf-8", errors="replace"):
        return
    rows = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |"
            for key, value in (about or {}).items()]
    base = "" if base is None else str(base)
    named = hub.is_id(base) and not (Path(folder) / base).is_dir()
    command = "" if system == "World" else COMMAND.format(folder=Path(folder).name)  # infer.py takes no world
    text = CARD.format(license=license, task=task, system=system, unwritten=UNWRITTEN,
                       base=f"base_model: {hub.split(base)[0]}\n" if named else "",
                       tags="\n".join(f"- {tag}" for tag in tags), command=command,
                       about="\n".join(["", "| | |", "|---|---|", *rows, ""]) if rows else "")
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # the folder's name may be no text


def fields_of_card(folder: str | Path) -> set[str]:
    """Names of the fields in the front matter of a folder's README.md; none without one."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    _, begins, rest = text.partition("---\n")
    if not begins or not text.startswith("---\n"):
        return set()
    return set(re.findall(r"(?m)^(\w+):", rest.partition("\n---")[0]))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_card(folder, "Mirage", "THUDM/CogVideoX1.5-5B", {"steps": "10000", "recipe": {"lr": 1e-4}})
        print(Path(folder, "README.md").read_text().replace(Path(folder).name, "my_run"))
