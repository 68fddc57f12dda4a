"""The walkthrough's cells run as a notebook, and print what the page says."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs pip install nbclient ipykernel")

from experiments import walkthrough_notebook as notebook  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / notebook.PAGE
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]\d+)?")


def said(cell) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def alike(wanted: str, found: str) -> bool:
    """Two lines of the same words, whose numbers agree but for rounding."""
    if NUMBER.sub("#", wanted).split() != NUMBER.sub("#", found).split():
        return False
    pairs = zip(NUMBER.findall(wanted), NUMBER.findall(found), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.02, abs=0.006) for a, b in pairs)


def test_a_page_becomes_text_and_cells_in_order():
    page = "Text.\n\n```\nshell\n```\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\nMore.\n\n```python\n2\n```\n"
    cells = notebook.cells(page)
    assert cells == [("markdown", "Text.\n\n```\nshell\n```", ""), ("code", "print(1)", "1\n"),
                     ("markdown", "More.", ""), ("code", "2", "")]


def test_lines_are_alike_where_only_the_last_digits_differ():
    assert alike("t 199  z0 = 0.859 z_t", "t 199 z0 = 0.860 z_t")
    assert not alike("t 199  z0 = 0.859", "t 199  z0 = 0.959") and not alike("change 1", "difference 1")


def test_every_cell_runs_and_prints_the_lines_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    made = notebook.run(text, PAGE.parent)
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    wanted = [lines for kind, _, lines in notebook.cells(text) if kind == "code"]
    assert len(cells) == len(wanted) > 8 and sum(map(bool, wanted)) > 6
    for cell, lines in zip(cells, wanted, strict=True):
        printed = said(cell).splitlines()
        for line in lines.splitlines():
            assert any(alike(line, found) for found in printed), f"{line!r} is not among what is printed:\n{said(cell)}"
