"""The documents: every link leads to a file and a heading that are there, and every command is understood."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import commands, scripts

ROOT = Path(__file__).resolve().parents[1]


def anchors(text: str) -> set[str]:
    """The headings of a document, as a link names them: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", commands.documents())
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

@pytest.mark.filterwarnings("ignore:'.*' found in sys.modules:RuntimeWarning")
def test_every_command_that_is_shown_is_understood():
    """Flags, settings of recipes, and the files of the project that they name; what they do is for other tests."""
    shown, refused = list(commands.commands()), []
    for each in {each.command: each for each in shown}.values():
        try:
            commands.understand(each.command, each.in_sentence)
        except commands.Refused as error:
            refused.append(f"{each.where}: {each.command}: {error}")
    assert not refused, "\n".join(refused)
    assert len(shown) > 300 and {"README.md", "docs/use.md", "train_vae.py"} <= {each.where for each in shown}


@pytest.mark.filterwarnings("ignore:'.*' found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command, said", [
    ("python infer.py in.mp4", "arguments are required: output"), ("python infer.py a b --no-flag", "unrecognized"),
    ("python infer.py a b --set crv=3", "unknown key 'crv'"), ("python generate.py a b --set window=x", "unknown key"),
    ("torchrun --nproc-per-node=8 train_vae.py --recipe mirag", "invalid choice: 'mirag'"),
    ("python train_vae.py --set d_trunk=2", "unknown key 'd_trunk'"),
    ("python train_vae.py --set batch=0", "batch must be at least 1"),
    ("python train_vae.py --set lr=fast", "lr must be float"), ("python no_such_script.py", "there is no no_such"),
    ("python -m mirage_min.data.no_such_module", "there is no mirage_min/data/no_such_module.py"),
    ("python -m experiments.mirage_table4", "required: --perceptual"), ("pip install -r no.txt", "there is no no.txt"),
    ("pytest tests/test_nothing.py", "there is no tests/test_nothing.py"),
    ("python -m mirage_min.systems.mirage assets/no.mp4", "there is no assets/no.mp4")])
def test_a_command_that_would_fail_is_refused(command, said):
    with pytest.raises(commands.Refused, match=said):
        commands.understand(command)


def test_commands_are_found_where_documents_and_headers_have_them():
    text = """A sentence of `python -m one.module --flag
3` and more.

```
python first.py a \\
    --long            # why
pip install -r requirements.txt && pytest tests/
some output: python was here
for s in 0 1; do python third.py --seed $s; done
```

Prose, not a command:
python prose.py

```python
python = 3
```

```text
python history.py
```
"""
    found = [command for block in commands.blocks(text) for command in commands.commands_of(block)]
    assert found == ["python first.py a --long", "pip install -r requirements.txt", "pytest tests/",
                     "python third.py --seed $s"]


def test_a_pair_is_made_harmonised_and_scored_as_the_document_says(tmp_path):
    """On one clip, shorter and smaller."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    block = [line for part in commands.blocks(text) for line in commands.commands_of(part) if "data/films" in line]
    assert len(block) == 3
    for line in block:
        line = line.replace("data/films", str(tmp_path)).replace("--clips 2", "--clips 1 --frames 5 --size 64x96")
        python, *argv = shlex.split(line)
        done = scripts.run(*argv)
        assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["mean"]["actor-centric crops"]
    for method in ("naive insertion", "ours"):
        assert scores[method]["PSNR"] > 15 and scores[method]["E*warp"] > 0, f"{method}: {scores[method]}"
