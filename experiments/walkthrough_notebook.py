"""docs/walkthrough.md as a notebook: its Python blocks become cells, all else text; what they print is what they print.

    python -m experiments.walkthrough_notebook            # a minute: runs the cells too
    python -m experiments.walkthrough_notebook --out docs # renews the notebook of the documentation

A ```text block after a Python block has lines that the cell prints; tests/test_walkthrough.py compares them.
"""

import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from experiments import common

PAGE = Path("docs/walkthrough.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def cells(page: str) -> list[tuple[str, str, str]]:
    """(markdown or code, its text, lines that the page says it prints) of a page, in order."""
    found, end = [], 0
    for block in BLOCK.finditer(page):
        found += [("markdown", page[end : block.start()].strip(), ""), ("code", block[1].strip(), block[2] or "")]
        end = block.end()
    return [cell for cell in [*found, ("markdown", page[end:].strip(), "")] if cell[1]]


def notebook(page: str) -> nbformat.NotebookNode:
    """The page as a notebook without outputs."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = [make[kind](text, id=f"cell-{k}") for k, (kind, text, _) in enumerate(cells(page))]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=made, metadata=about)


def run(page: str, folder: Path) -> nbformat.NotebookNode:
    """The page as a notebook with outputs; its kernel starts in `folder`, as one that is opened there does."""
    made = notebook(page)
    client = NotebookClient(made, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                            record_timing=False)
    client.execute()
    return made


def main(args: argparse.Namespace) -> None:
    made = run(PAGE.read_text(encoding="utf-8"), PAGE.parent)
    made.metadata.pop("language_info", None)  # the version of this machine's Python
    common.save_text(args.out / "walkthrough.ipynb", nbformat.writes(made) + "\n")


def flags() -> argparse.ArgumentParser:
    return common.flags(__doc__)


if __name__ == "__main__":
    common.start(main, flags())
