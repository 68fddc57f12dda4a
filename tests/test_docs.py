"""The documents: every link leads to a file that is there, and to a heading that it has."""

import re
from pathlib import Path

import pytest

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
