"""The documents: every link leads to a file that is there, and to a heading that it has."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import scripts

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md")
                   if not {"runs", "data"} & set(path.relative_to(ROOT).parts[:1]))


def anchors(text: str) -> set[str]:
    """The headings of a document, as a link names them: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_of_a_document_leads_somewhere(name):
    path = ROOT / name
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name} links to {target}"
        assert found == ROOT or ROOT in found.parents, f"{name} links to {target}, outside the project"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name} links to {target}"


# ---- the commands ----------------------------------------------------------------------------------------------------

def commands(name: str) -> list[str]:
    """The commands of a document's fenced blocks: lines continued, comments and blanks left out, `&&` taken apart."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [re.sub(r"\s+#\s.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [" ".join(part.split()) for line in lines for part in line.split(" && ") if part.strip()]


def test_a_pair_is_made_harmonised_and_scored_as_the_document_says(tmp_path):
    """On one clip, shorter and smaller."""
    block = [line for line in commands("docs/training.md") if "data/films" in line]
    assert len(block) == 3
    for line in block:
        line = line.replace("data/films", str(tmp_path)).replace("--clips 2", "--clips 1 --frames 5 --size 64x96")
        python, *argv = shlex.split(line)
        done = scripts.run(*argv)
        assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["mean"]["actor-centric crops"]
    for method in ("naive insertion", "ours"):
        assert scores[method]["PSNR"] > 15 and scores[method]["E*warp"] > 0, f"{method}: {scores[method]}"
