"""Every file of the package runs as a demonstration of the one thing that it is about."""

from pathlib import Path

import pytest
import torch

from mirage_min.data.video import write_clip
from tests import scripts

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "mirage_min").rglob("*.py")
               if path.stem != "__init__")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, list]:
    """{file: arguments} of what would take long by default: a clip of a third of the demo clip's pixels."""
    clip = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(clip, torch.rand(3, 17, 48, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return {"mirage_min/systems/mirage": [clip]}


@pytest.mark.parametrize("name", FILES)
def test_a_demonstration_runs_prints_and_names_the_pictures_it_leaves(name, tmp_path, arguments):
    about = (ROOT / f"{name}.py").read_text().split('"""')[1]
    module = name.replace("/", ".")
    assert f"python -m {module}" in about, "the file's docstring says how to run it"
    run = scripts.run("-m", module, *arguments.get(name, ()), cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert any(c.isdigit() for c in run.stdout), f"no figures in what it prints: {run.stdout!r}"
    for picture in tmp_path.rglob("*.png"):
        assert picture.name in run.stdout, f"{picture.name} is left without a word"
