"""docs/equations.md, "From the papers to the code": whole, its names exist, and their source carries the tags."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT.parent / "shared" / "papers"
NUMBERED = [*(f"Mirage Eq. {n}" for n in range(1, 5)), *(f"ChopGrad Eq. {n}" for n in range(1, 7)),
            *(f"ChopGrad Alg. 1, line {n}" for n in range(1, 15))]


def rows() -> list[tuple[str, str]]:
    """(paper, where) of every row."""
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [(cells[0].strip(), cells[-1].strip()) for cells in lines[2:]]


def tags(text: str) -> set[str]:
    """The numbered equations and lines that a text names: "lines 5 to 7, 9" is 5, 6, 7 and 9."""
    found = {f"{paper} Eq. {n}" for paper, n in re.findall(r"(Mirage|ChopGrad) Eq\. (\d+)", text)}
    for numbers in re.findall(r"ChopGrad Alg\. 1, lines? ((?:\d+(?:, | to )?)+)", text):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers):
            found |= {f"ChopGrad Alg. 1, line {n}" for n in range(int(first), int(last or first) + 1)}
    return found


def sources(where: str) -> dict[str, str]:
    """{file: name -> source} of what stands in backticks; AssertionError where there is no such file or name."""
    out = {}
    for file, names in re.findall(r"`([\w/]+\.py): ([^`]+)`", where):
        path = next((p for p in (ROOT / file, *(ROOT / "mirage_min").glob(f"*/{file}")) if p.is_file()), None)
        assert path, f"there is no file {file}"
        text = path.read_text(encoding="utf-8")
        for name in names.split(", "):
            scope = [ast.parse(text)]
            for part in name.split("."):
                scope = [node for outer in scope for node in outer.body if getattr(node, "name", None) == part]
            assert len(scope) == 1, f"{file} has {len(scope)} things called {name}"
            out[f"{file}: {name}"] = ast.get_source_segment(text, scope[0])
    return out


def test_every_numbered_equation_and_every_line_of_the_algorithm_has_one_row():
    named = [tag for paper, _ in rows() for tag in sorted(tags(paper))]
    assert sorted(named) == sorted(NUMBERED), f"missing or twice: {sorted(set(named) ^ set(NUMBERED)) or sorted(named)}"


@pytest.mark.parametrize("paper, where", rows(), ids=lambda text: text if "`" not in text and len(text) < 40 else "")
def test_a_row_names_code_that_carries_its_tag_or_says_why_there_is_none(paper, where):
    code = sources(where)
    if where.startswith("not code"):
        assert tags(paper) and (len(where) > 20 or "lines 10" in paper), "say why"
        return
    assert code, f"{where} names no function"
    for tag in tags(paper):
        assert any(tag in tags(text) for text in code.values()), f"{tag} stands in none of {list(code)}"
    for name, text in code.items():
        if tags(paper):
            assert tags(paper) & tags(text), f"{name} carries none of {sorted(tags(paper))}"


@pytest.mark.skipif(not PAPERS.is_dir(), reason="needs ../shared/papers")
def test_the_papers_number_no_more_than_the_table_covers():
    mirage, chopgrad = ((PAPERS / f"{name}.txt").read_text(encoding="utf-8") for name in ("mirage", "chopgrad"))
    numbered = {f"Mirage Eq. {n}" for n in re.findall(r"(?:^|[.,] )\((\d+)\)[.]?$", mirage, re.MULTILINE)}
    numbered |= {f"ChopGrad Eq. {n}" for n in re.findall(r"\\quad \((\d+)\)", chopgrad)}
    numbered |= {f"ChopGrad Alg. 1, line {n}" for n in re.findall(r"^- (\d+): ", chopgrad, re.MULTILINE)}
    assert numbered == set(NUMBERED), f"the papers and the table differ by {sorted(numbered ^ set(NUMBERED))}"
